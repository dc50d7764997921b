"""What a cached result depends on: a change of code makes exactly the stages run again that can reach it."""

import shutil

import pytest

from pipelines.code_digest import PACKAGES, ROOT, closure, code_digest
from pipelines.stages import STAGES


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def digests(root):
    return {name: code_digest(stage.modules, root) for name, stage in STAGES.items()}


def changed_by(tree, path, text="\n# one more line\n"):
    before = digests(tree)
    original = (tree / path).read_text()
    try:
        (tree / path).write_text(original + text)
        after = digests(tree)
    finally:
        (tree / path).write_text(original)
    assert digests(tree) == before
    return {name for name in STAGES if before[name] != after[name]}


MODEL_STAGES = {"pretraining", "post_training", "evaluation", "champion", "serving"}


def test_the_digest_is_of_the_sources_not_of_their_place(tree):
    assert digests(tree) == digests(ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, stages",
    [
        ("model/transformer.py", MODEL_STAGES),
        ("kernels/topk/reference.py", MODEL_STAGES),
        ("components/synthesis/battery.py", {"synthesis"}),
        ("components/pretraining/run.py", {"pretraining"}),
        ("components/post_training/objective.py", {"post_training"}),
        ("components/evaluation/statistics.py", {"evaluation", "champion"}),
        ("components/evaluation/gate.py", {"gate", "promotion", "rejected"}),
        # Started as a process of its own.
        ("components/serving/server.py", {"serving"}),
        ("components/runtime/artifacts.py", set(STAGES)),
        # A plug-in, named by an entry point and imported by nobody.
        ("components/environments/kg_query/environment.py", {"synthesis", *MODEL_STAGES}),
        ("pipelines/display.py", set()),
        ("pipelines/training.py", set()),
    ],
)
def test_a_changed_line_reaches_the_right_stages(tree, path, stages):
    assert changed_by(tree, path) == stages


def test_a_preset_is_code_too(tree):
    assert changed_by(tree, "model/presets/nano.json", "\n") == MODEL_STAGES


@pytest.mark.slow
def test_a_new_module_counts_once_it_is_imported(tree):
    (tree / "components" / "synthesis" / "extra.py").write_text("x = 1\n")
    try:
        assert changed_by(tree, "components/synthesis/extra.py") == set()
        assert changed_by(
            tree, "components/synthesis/tasks.py", "\ndef f():\n    from components.synthesis import extra\n"
        ) == {"synthesis"}
        found, _ = closure(["components.synthesis.run"], tree)
        assert "components.synthesis.extra" not in found
    finally:
        (tree / "components" / "synthesis" / "extra.py").unlink()


def test_a_stage_that_does_not_exist_is_told(tree):
    with pytest.raises(ValueError, match=r"no source of the module components\.nothing"):
        code_digest(["components.nothing"], tree)
