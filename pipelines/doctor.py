"""What is missing on this machine, before anything is installed. Standard library only; any Python 3.8+ runs it.

python3 pipelines/doctor.py                 # a line per check; exit code 2 when something is missing
python3 pipelines/doctor.py torch-index     # pip options that fit this machine, for the Makefile
"""

import importlib.util
import os
import platform
import shutil
import socket
import sys
import urllib.request

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
INDEX_SECONDS = 5
CPU_WHEEL, CUDA_WHEEL = "about 0.8 GB of download, 2.5 GB on disk", "about 3.1 GB of download, 6.1 GB on disk"
NEED_MEMORY_GB, NEED_DISK_GB_CPU, NEED_DISK_GB_CUDA = 7.5, 5, 9
UI_PORT = 5000


def has_nvidia_gpu() -> bool:
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


def cpu_index_answers() -> bool:
    try:
        with urllib.request.urlopen(CPU_INDEX + "/torch/", timeout=INDEX_SECONDS) as answer:
            return answer.status == 200
    except OSError:
        return False


def torch_index() -> int:
    """Print pip's options on standard output and what they mean on standard error."""
    if has_nvidia_gpu():
        print(f"NVIDIA GPU found: PyTorch with CUDA, {CUDA_WHEEL} in all", file=sys.stderr)
    elif cpu_index_answers():
        print(f"no NVIDIA GPU: PyTorch for CPUs from its own index, {CPU_WHEEL} in all", file=sys.stderr)
        print(f"--extra-index-url {CPU_INDEX}")
    else:
        print(
            f"no NVIDIA GPU, but PyTorch's CPU index did not answer within {INDEX_SECONDS} s: installing the default "
            f"wheel, which brings CUDA libraries ({CUDA_WHEEL} in all); it works the same",
            file=sys.stderr,
        )
    return 0


def memory_gb() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError):
        return float("nan")


def ports_work() -> bool:
    """Whether a server of ours could listen on a free loopback port."""
    try:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            one.listen()
        return True
    except OSError:
        return False


def port_is_free(port: int) -> bool:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
            return True
        except OSError:
            return False


def checks() -> list:
    """(state, text) of every check; state is ok, note or missing."""
    found = []

    def check(good: bool, text: str, otherwise: str, state: str = "missing") -> None:
        found.append(("ok", text) if good else (state, otherwise))

    version = platform.python_version()
    too_old = f"Python {version} is too old: install Python 3.11 or later and run `make PYTHON=python3.11 ...`"
    check(sys.version_info >= (3, 11), f"Python {version}", too_old)
    venv = importlib.util.find_spec("venv") is not None and importlib.util.find_spec("ensurepip") is not None
    check(venv, "venv module", "the venv module is missing: apt-get install python3-venv")
    system = f"{platform.system()} {platform.machine()}"
    no_wheel = f"{system}: the embedded object store has no wheel here; runs use a directory instead"
    check(system == "Linux x86_64", system, no_wheel, "note")
    memory = memory_gb()
    little = f"memory {memory:.1f} GB: a run needs up to 6 GB and may be killed here"
    check(not memory < NEED_MEMORY_GB, f"memory {memory:.1f} GB", little, "note")
    cores = os.cpu_count() or 1
    check(cores >= 2, f"{cores} cores", "one core: runs take about twice the time that the README says", "note")
    need = NEED_DISK_GB_CUDA if has_nvidia_gpu() or not cpu_index_answers() else NEED_DISK_GB_CPU
    free = shutil.disk_usage(os.getcwd()).free / 1e9
    installed = os.path.exists(os.path.join(".venv", ".installed"))
    check(
        installed or free >= need, f"disk {free:.0f} GB free", f"disk {free:.1f} GB free, {need} GB needed: free some"
    )
    check(ports_work(), "loopback ports", "no program can listen on 127.0.0.1: allow it (firewall, sandbox)")
    check(port_is_free(UI_PORT), f"port {UI_PORT} (make ui)", f"port {UI_PORT} is in use: `make ui PORT=5001`", "note")
    if installed:
        found.append(("ok", "installed in .venv: nothing to download"))
    else:
        wheel = CUDA_WHEEL if need == NEED_DISK_GB_CUDA else CPU_WHEEL
        found.append(("note", f"not installed yet: `make install` takes {wheel}, all from package indexes"))
    return found


def main() -> int:
    if sys.argv[1:] == ["torch-index"]:
        return torch_index()
    found = checks()
    for state, text in found:
        print(f"{state:8} {text}")
    missing = sum(state == "missing" for state, _ in found)
    print(f"{missing} thing(s) missing" if missing else "ready")
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
