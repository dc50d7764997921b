# ruff: noqa: E501 (a program stands on one line)
"""Programs that try to get out of the sandbox, or to take the machine with them: name -> source.

A program that reached what it wanted prints ESCAPED. HOST stands for a folder of the host with a secret in it, PORT for
a port on which the host listens, OWNER for the process id of the sandbox's owner.
"""

HOSTILE: dict[str, str] = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork once": "import os\nif os.fork() == 0: print('ESCAPED')",
    "vfork by subprocess": "import subprocess\nprint(subprocess.run(['/bin/sh', '-c', 'echo ESCAPED']).stdout)",
    "processes by multiprocessing": (
        "import multiprocessing\np = multiprocessing.Process(target=print, args=('ESCAPED',))\np.start()\np.join()"
    ),
    "spawn by posix_spawn": "import os\nos.posix_spawn('/usr/bin/env', ['env'], {})\nprint('ESCAPED')",
    "daemon that outlives": "import os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(30)\n open('HOST/late', 'w')",
    "exec a shell": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
    "thread bomb": (
        "import threading, time\nn = 0\nwhile True:\n threading.Thread(target=time.sleep, args=(60,)).start()\n n += 1"
    ),
    "memory in one piece": "x = bytearray(8 << 30)\nprint('ESCAPED')",
    "memory bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory by mmap": "import mmap\nx = [mmap.mmap(-1, 64 << 20) for _ in range(64)]\nprint('ESCAPED')",
    "memory by shared memory": "f = open('/dev/shm/x', 'wb')\nf.write(bytes(64 << 20))\nprint('ESCAPED')",
    "memory file": (
        "import os\nd = os.memfd_create('x')\nn = 0\nwhile True:\n n += os.write(d, bytes(1 << 20))\n"
        " if n > 64 << 20: print('ESCAPED'); break"
    ),
    "memory of System V": (
        "import ctypes\nc = ctypes.CDLL(None)\nc.shmat.restype = ctypes.c_void_p\n"
        "c.shmdt.argtypes = [ctypes.c_void_p]\nfor i in range(6):\n"
        " d = c.shmget(0, ctypes.c_size_t(32 << 20), 0o1600)\n assert d >= 0\n p = c.shmat(d, None, 0)\n"
        " ctypes.memset(p, 1, 32 << 20)\n c.shmdt(p)\nprint('ESCAPED')"
    ),
    "messages of System V": "import ctypes\nassert ctypes.CDLL(None).msgget(0, 0o1600) >= 0\nprint('ESCAPED')",
    "disk": "f = open('big', 'wb')\nfor _ in range(1024): f.write(bytes(1 << 20)); f.flush()\nprint('ESCAPED')",
    "many files": "for i in range(100000): open(f'f{i}', 'w').close()\nprint('ESCAPED')",
    "deep folders": "import os\nfor i in range(100000):\n os.mkdir('d'); os.chdir('d')\nprint('ESCAPED')",
    "sparse file": "import os\nd = os.open('s', os.O_CREAT | os.O_RDWR)\nos.ftruncate(d, 1 << 40)\nprint('ESCAPED')",
    "endless output": "while True: print('x' * 4096)",
    "output without end on stderr": "import sys\nwhile True: sys.stderr.write('x' * 4096)",
    "endless loop": "while True: pass",
    "sleep for ever": "import time\ntime.sleep(10 ** 6)",
    "loop with all signals ignored": (
        "import signal\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n except Exception: pass\n"
        "while True: pass"
    ),
    "alarm handler that goes on": (
        "import signal\nsignal.signal(signal.SIGXCPU, lambda *a: None)\nsignal.signal(signal.SIGALRM, lambda *a: None)\n"
        "while True: pass"
    ),
    "raise the limits": (
        "import resource\nfor r in (resource.RLIMIT_CPU, resource.RLIMIT_AS):\n"
        " resource.setrlimit(r, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\nprint('ESCAPED')"
    ),
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
    "crash of the interpreter": "import ctypes\nctypes.string_at(0)",
    "read a secret of the host": "print('ESCAPED', open('HOST/secret').read())",
    "write to the host": "open('HOST/written', 'w').write('x')\nprint('ESCAPED')",
    "symlink to the host": "import os\nos.symlink('HOST/secret', 'link')\nprint('ESCAPED', open('link').read())",
    "replace the output by a link": (
        "import os\nos.symlink('HOST/secret', '.output')\nprint(open('.output').read())\nprint('ESCAPED')"
    ),
    "hard link": "import os\nos.link('HOST/secret', 'hard')\nprint('ESCAPED')",
    "read the password file": "print(open('/etc/passwd').read())\nprint('ESCAPED')",
    "read root's home": "import os\nassert set(os.listdir('/root')) - {'.pyenv'}\nprint('ESCAPED')",
    "read the tests and the answers": (
        "import os\nfound = [n for p, d, f in os.walk('/') for n in f if n.startswith('test_internal_api')]\n"
        "assert found\nprint('ESCAPED')"
    ),
    "read the memory of the owner": "open('/proc/OWNER/mem', 'rb').read(1)\nprint('ESCAPED')",
    "look at processes": "import os\nassert [n for n in os.listdir('/proc') if n.isdigit()]\nprint('ESCAPED')",
    "environment of the owner": "print(open('/proc/OWNER/environ').read())\nprint('ESCAPED')",
    "own environment": "import os\nassert os.environ\nprint('ESCAPED')",
    "kill the owner": "import os\nos.kill(OWNER, 9)\nprint('ESCAPED')",
    "kill everything": "import os\nos.kill(-1, 9)\nprint('ESCAPED')",
    "stop the parent": "import os, signal\nassert os.getppid() > 0\nos.kill(os.getppid(), signal.SIGSTOP)\nprint('ESCAPED')",
    "connect to the host": "import socket\nsocket.create_connection(('127.0.0.1', PORT))\nprint('ESCAPED')",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX)\nprint('ESCAPED')",
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nprint('ESCAPED')",
    "ask a name server": "import socket\nsocket.getaddrinfo('example.com', 80)\nprint('ESCAPED')",
    "inherited descriptors": (
        "import os\nfor d in range(3, 4096):\n try: os.write(d, b'x')\n except OSError: continue\n else: print('ESCAPED')\n"
        "raise SystemExit(1)"
    ),
    "chroot out": "import os\nos.mkdir('j')\nos.chroot('j')\nprint('ESCAPED')",
    "climb out by ..": "import os\nos.chdir('/' + '../' * 50)\nassert os.path.exists('HOST/secret')\nprint('ESCAPED')",
    "become root": "import os\nos.setuid(0)\nopen('HOST/secret')\nprint('ESCAPED')",
    "ptrace": "import ctypes\nassert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0\nprint('ESCAPED')",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'proc', b'/work', b'proc', 0, 0) == 0\nprint('ESCAPED')",
    "unmount": "import ctypes\nassert ctypes.CDLL(None).umount2(b'/work', 2) == 0\nprint('ESCAPED')",
    "new namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\nprint('ESCAPED')",
    "clone with new namespaces": (
        "import ctypes\nassert ctypes.CDLL(None).syscall(56, 0x10000000 | 17, 0, 0, 0, 0) >= 0\nprint('ESCAPED')"
    ),
    "bpf": "import ctypes\nassert ctypes.CDLL(None).syscall(321, 0, 0, 0) >= 0\nprint('ESCAPED')",
    "key ring": "import ctypes\nassert ctypes.CDLL(None).syscall(250, 0, -3, 0, 0, 0) >= 0\nprint('ESCAPED')",
    "io_uring": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 8, 0) >= 0\nprint('ESCAPED')",
    "32-bit calls": "import ctypes\nassert ctypes.CDLL(None).syscall(0x40000000 + 39) >= 0\nprint('ESCAPED')",
    "device node": "import os, stat\nos.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(254, 0))\nprint('ESCAPED')",
    "write to the installation": "import os\nopen(os.__file__, 'a').write('#')\nprint('ESCAPED')",
    "leave something for the next": "import builtins\nbuiltins.leaked = 1\nopen('leaked', 'w').write('x')\nraise SystemExit(1)",
    "exit code that looks good, answer of another": "import os\nos.write(1, b'37')\nos._exit(3)",
    "close the output": "import os\nos.close(1)\nos.close(2)\nprint('ESCAPED', flush=True)",
    "compile bomb": "compile('(' * 10 ** 6 + ')' * 10 ** 6, 'x', 'eval')\nprint('ESCAPED')",
    "number bomb": "x = 9 ** 9 ** 9\nprint('ESCAPED')",
    "syntax error": "def f(:",
    "system shutdown": "import ctypes\nassert ctypes.CDLL(None).reboot(0x4321FEDC) == 0\nprint('ESCAPED')",
    "set the clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)\nprint('ESCAPED')",
}
