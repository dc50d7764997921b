"""The documented example: installed as a package of its own, synthesised from, and played."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).with_name("own_environment.py")
PROGRAM = """
import random
from components.environments.protocol import environment, environments
from components.runtime.object_store import open_store
from components.runtime.progress import Progress
from components.runtime.stage import StageContext
from components.runtime.task_set import read_demonstrations, read_tasks
from components.runtime.tracking import Tracker
from components.synthesis.config import SynthesisConfig
from components.synthesis.run import run
from pathlib import Path

assert {"warehouse", "kg_query"} <= set(environments())
Path("work").mkdir()
config = SynthesisConfig(
    environments=["warehouse"], train_tasks=40, validation_tasks=8, test_tasks=12, test_templates=3,
    validation_templates=2, demonstrations=60, validation_demonstrations=8, workers=1,
)
context = StageContext("synthesis", "own", 0, Path("work"), open_store("store"), Tracker(), Progress())
result = run(config, context, {})
folder = context.fetch(result.outputs["tasks"])
tasks = read_tasks(folder, "test")
family = environment("warehouse")
for task in tasks:
    episode = family.reset(task)
    assert [episode.step(call).done for call in task.solution][-1]
    assert episode.verdict().passed
kinds = {one.kind for one in read_demonstrations(folder, "train")}
print(len(tasks), sorted(kinds), result.summary["wrong_share"])
"""


@pytest.mark.slow
def test_the_example_is_installed_synthesised_and_played(tmp_path):
    package = tmp_path / "package"
    (package / "my_package").mkdir(parents=True)
    (package / "my_package" / "__init__.py").write_text("")
    (package / "my_package" / "warehouse.py").write_text(EXAMPLE.read_text())
    metadata = package / "my_package-1.0.dist-info"  # what pip writes
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[sparseline.environments]\nwarehouse = my_package.warehouse:Warehouse\n"
    )
    paths = os.pathsep.join([str(package), str(EXAMPLE.parents[3])])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    number, rest = done.stdout.split(" ", 1)
    assert number == "12"
    assert "['careful', 'guesses', 'skips_hop']" in rest
