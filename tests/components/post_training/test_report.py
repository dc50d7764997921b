"""The page of post-training against the records it is drawn from."""

from components.post_training.report import write_report
from components.post_training.validation import Validation

SUMMARY = {
    **{"best_step": 20, "trained_rollouts": 96, "rollouts": 240, "logprob_gap": 4e-7, "stopped_by": ""},
    "ledger": {"issued": 20, "trained": 8, "dropped_zero_variance": 12, "hash": "f" * 64},
}


def episode(family, passed, text):
    return {"family": family, "passed": passed, "text": text}


def test_what_changed_is_shown_first_and_text_is_escaped(tmp_path):
    first = [episode("a", True, "kept <b>"), episode("a", True, "second"), episode("a", False, "was wrong")]
    best = [episode("a", True, "kept still"), episode("a", True, "second too"), episode("a", True, "is right")]
    curves = {"rl/reward": [(1, 0.2), (2, 0.4)], "rl/reward/a": [(1, 0.2), (2, 0.4)], "rl/entropy": [(1, 0.3)]}
    page = write_report(
        tmp_path, SUMMARY, curves, Validation(0.5, {"a": 0.5}, 0, first), Validation(0.75, {"a": 0.75}, 0, best)
    )
    text = page.read_text()
    assert text.index("was wrong") < text.index("kept &lt;b&gt;")
    assert "second" not in text.replace("Seconds", "").replace("seconds", "")  # two pairs of a family are shown
    assert "<b>kept" not in text
    assert "0.50 → 0.75" in text
    assert "96 of 240" in text
    assert "dropped zero variance" in text
    assert "Reward of rollouts. all: from 0.2 at 1 to 0.4 at 2" in text
