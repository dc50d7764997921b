"""README's figures are those of the committed result files."""

import json
from pathlib import Path

from pipelines.results import markdown

ROOT = Path(__file__).parents[1]


def test_the_table_is_the_result_file():
    document = json.loads((ROOT / "pipelines/results/nano.json").read_text())
    assert len(document["runs"]) == 3
    assert markdown(document) in (ROOT / "README.md").read_text()
