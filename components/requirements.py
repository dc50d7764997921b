"""What an image installs. Standard library only: it runs before anything is installed.

python3 components/requirements.py pyproject.toml            # requirements, without KFP, whose pins would win
python components/requirements.py --install pyproject.toml   # makes the sources beside it importable
"""

import re
import sys
import sysconfig
import tomllib
from pathlib import Path

WITHOUT = ("kfp", "kfp-kubernetes")
# What KFP's executor imports, what its client does (a backup asks it for the schedules), and PostgreSQL's driver.
MORE = (
    "docstring-parser", "protobuf", "typing-extensions", "googleapis-common-protos", "kfp-server-api>=2.14,<3",
    "psycopg[binary]>=3.2,<4",
)  # fmt: skip


def requirements(project: Path) -> list[str]:
    """The dependencies of the project for an image."""
    stated = tomllib.loads(project.read_text())["project"]["dependencies"]
    return [one for one in stated if re.split(r"[^\w-]", one, maxsplit=1)[0] not in WITHOUT] + list(MORE)


def install(project: Path) -> None:
    """Put the folder of `project` on the import path of this interpreter, with its name, version and entry points."""
    stated = tomllib.loads(project.read_text())["project"]
    packages = Path(sysconfig.get_path("purelib"))
    (packages / "sparseline.pth").write_text(f"{project.resolve().parent}\n")
    metadata = packages / f"sparseline-{stated['version']}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sparseline\nVersion: {stated['version']}\n")
    groups = []
    for group, entries in stated["entry-points"].items():
        groups.append(f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items()))
    (metadata / "entry_points.txt").write_text("\n".join(groups))


if __name__ == "__main__":
    if sys.argv[1] == "--install":
        install(Path(sys.argv[2]))
    else:
        print("\n".join(requirements(Path(sys.argv[1]))))
