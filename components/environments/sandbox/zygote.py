"""The process that sandboxed programs are forked from. Started by `box.py` as `python -I zygote.py SOCKET PARENT`.

It locks itself into namespaces of its own (user, mount, pid, network, ipc, host name) with a read-only view of the
Python installation, and then forks, for every program, a process that is the first of a fresh pid namespace, with a
fresh writable tmpfs, no capabilities and a system call filter. When that process ends, the kernel kills what is left
of the namespace, and the tmpfs is gone. Standard library only.
"""

import contextlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import kernel
import syscalls

ROOT = "/tmp"  # becomes the root of the new file system; any directory that exists does
WORK = "/work"
NOBODY = 65534
TRIAL = {
    "program": "", "library": {}, "wall_seconds": 8.0, "cpu_seconds": 5, "memory_bytes": 1 << 30, "disk_bytes": 1 << 20,
    "files": 16, "output_bytes": 1 << 10,
}  # fmt: skip
_UNWRITABLE = kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV


def enter_namespaces() -> None:
    """Enter namespaces of our own in which nothing but the Python installation is visible.

    Root becomes another user before that, so that not even a hole in the box would lead to root's files; it prepares
    the file system first, because the way to the installation may lead through folders that only root may enter.
    """
    proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
    is_root = os.getuid() == 0
    if is_root:
        kernel.unshare(kernel.CLONE_NEWNS)
        build_root()
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root, and the maps cannot be written
    uid, gid = os.getuid(), os.getgid()
    kernel.unshare(
        kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET
        | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    )  # fmt: skip
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        descriptor = os.open(name, os.O_WRONLY, dir_fd=proc)
        os.write(descriptor, text.encode())
        os.close(descriptor)
    os.close(proc)
    if not is_root:
        build_root()


def visible_paths() -> list[str]:
    """What a program may read: the Python installation and the libraries that it links to."""
    wanted = [sys.base_prefix, "/usr/lib", "/usr/lib64", "/lib", "/lib64"]
    found: list[str] = []
    for path in map(os.path.realpath, wanted):
        if os.path.isdir(path) and path != "/" and not any(path == one or path.startswith(one + "/") for one in found):
            found.append(path)
    return found


def build_root() -> None:
    """A root file system with nothing but the Python installation, read-only, and an empty place for the work."""
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    paths = visible_paths()
    links = {path: os.readlink(path) for path in ("/lib", "/lib64") if os.path.islink(path)}
    kernel.mount("tmpfs", ROOT, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=64k,mode=755")
    for path in paths:
        target = ROOT + path
        os.makedirs(target, exist_ok=True)
        kernel.mount(path, target, None, kernel.MS_BIND | kernel.MS_REC)
        kernel.mount("none", target, None, _UNWRITABLE)
    for path, target in links.items():
        os.symlink(target, ROOT + path)
    os.mkdir(ROOT + WORK)
    os.mkdir(ROOT + "/old")
    os.chdir(ROOT)
    kernel.pivot_root(".", "old")
    os.chdir("/")
    kernel.unmount("/old")
    os.rmdir("/old")
    kernel.mount("none", "/", None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID)


def serve(connection: socket.socket) -> None:
    """Run one program after the other, as the requests come. Ends when the owner closes the connection.

    Requests and answers pass through the keeper alone: what this process read, every later program could find in its
    memory. A first, empty program shows that the box works, before the owner hears that it is ready.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    if attempt(lambda: answer_with(connection, {"ready": True}, keep(TRIAL))):
        connection.sendall(b'{"ready": false, "error": "an empty program does not run"}\n')
        return
    connection.sendall(b"\n")
    while connection.recv(1, socket.MSG_PEEK):
        if attempt(lambda: answer_with(connection, keep(json.loads(connection.makefile("rb").readline())))):
            connection.sendall(b'{"ended": "fault", "status": 0, "output": "the keeper died"}\n')
            return  # how much of the request was read is not known: the owner starts another
        connection.sendall(b"\n")  # only now, when nothing of the program is left, is the answer complete


def attempt(work: Callable[[], None]) -> int:
    """Do `work` in a process of its own; its wait status, 0 when all went well."""
    keeper = os.fork()
    if keeper == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(keeper, 0)[1]


def answer_with(connection: socket.socket, answer: dict, trial: dict | None = None) -> None:
    """Send an answer, but its end of line; after a trial only when that went well, else RuntimeError."""
    if trial is not None and trial["ended"] != "ok":
        raise RuntimeError(trial["output"])
    connection.sendall(json.dumps(answer).encode())


def keep(request: dict) -> dict:
    """Make a fresh place, have the program run in it, and say how it ended."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC)
    options = f"size={request['disk_bytes']},nr_inodes={request['files']},mode=700"
    kernel.mount("tmpfs", WORK, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    for name, text in request["library"].items():
        Path(WORK, name).write_text(text)
    output = os.open(f"{WORK}/.output", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(f"{WORK}/.output")  # only its descriptor is left: no program can put another file in its place
    started = time.monotonic()
    program = os.fork()
    if program == 0:
        execute(request, output)
    ended = None
    deadline = started + request["wall_seconds"]
    while True:
        done, status = os.waitpid(program, os.WNOHANG)
        if done:
            break
        left = deadline - time.monotonic()
        if left <= 0:
            os.kill(program, signal.SIGKILL)  # the first process of its namespace: all others die with it
            _, status = os.waitpid(program, 0)
            ended = "time"
            break
        signal.sigtimedwait({signal.SIGCHLD}, left)
    code = os.waitstatus_to_exitcode(status)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    # the kernel compares the limit with time in ticks, which may be ahead of the time that it reports
    if ended is None and code == -signal.SIGKILL and used.ru_utime + used.ru_stime >= 0.9 * request["cpu_seconds"]:
        ended = "cpu"
    size = os.fstat(output).st_size
    text = os.pread(output, request["output_bytes"], 0).decode(errors="replace")
    if ended is None:
        ended = "ok" if code == 0 else "error" if code > 0 else "killed"
    if ended == "ok" and size > request["output_bytes"]:
        ended = "output"
    return {"ended": ended, "status": code, "output": text}


def execute(request: dict, output: int) -> None:
    """Become the program: first process of its pid namespace, another user, no capabilities, filtered, limited."""
    try:
        null = os.open(f"{WORK}/.null", os.O_RDONLY | os.O_CREAT, 0o400)
        for target, source in ((0, null), (1, output), (2, output)):
            os.dup2(source, target)
        os.closerange(3, 65536)
        os.chdir(WORK)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        limits = {
            # the soft limit's signal does not reach the first process of a namespace; the hard one's does
            resource.RLIMIT_CPU: request["cpu_seconds"],
            resource.RLIMIT_AS: request["memory_bytes"],
            resource.RLIMIT_FSIZE: request["disk_bytes"],
            resource.RLIMIT_NOFILE: 32,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NPROC: 32,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
        }
        for limit, value in limits.items():
            resource.setrlimit(limit, (value, value))
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        kernel.install_filter(syscalls.filter_program())
        os.environ.clear()
        sys.path[:] = [WORK, *[path for path in sys.path if path.startswith(sys.base_prefix)]]
        sys.argv = ["program"]
        code = compile(request["program"], "program", "exec")
    except BaseException as error:
        _leave(error)
    try:
        exec(code, {"__name__": "__main__", "__builtins__": __builtins__})
        sys.stdout.flush()
    except BaseException as error:
        _leave(error)
    os._exit(0)


def _leave(error: BaseException) -> None:
    """End as Python would, with one line of the error. Memory may be short here, and every descriptor closed."""
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    with contextlib.suppress(BaseException):
        if not (isinstance(error, SystemExit) and error.code in (0, None)):
            os.write(2, f"{type(error).__name__}: {error}\n".encode()[:500])
    code = error.code if isinstance(error, SystemExit) else 1
    os._exit(code & 0xFF if isinstance(code, int) else 0 if code is None else 1)


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    owner = int(sys.argv[2])
    # not PR_SET_PDEATHSIG: it follows the owner's thread that started this process, and that may end first
    owner_ends = os.pidfd_open(owner)
    if os.getppid() != owner:
        os._exit(1)
    try:
        enter_namespaces()
    except OSError as error:
        connection.sendall((json.dumps({"ready": False, "error": str(error)}) + "\n").encode())
        return
    first = os.fork()  # the first process of the pid namespace: when it dies, all others do
    if first:
        connection.close()
        waiting = select.poll()
        for descriptor in (owner_ends, os.pidfd_open(first)):
            waiting.register(descriptor, select.POLLIN)
        waiting.poll()
        return
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    serve(connection)


if __name__ == "__main__":
    main()
