"""The verifier of `kg_query`: compares canonical values, never prose.

An episode passes when the submission has the value of the answer and every page that the answer follows from was read.
The facts are drawn at random and only the tool shows them, so a player that knows the answer has read those pages, and
one that has not was guessing; a guess earns nothing even when it hits.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from components.environments.protocol import Verdict


def answer_words(value: Any) -> list[str]:
    """A submitted answer as words: an array of words, one word, or an integer."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [word for item in items for word in str(item).split()]


def same_value(operator: str, expected: list[str], given: list[str]) -> bool:
    """Whether `given` is the expected answer. `list` compares as sets, a repeated word is refused."""
    if operator == "list":
        return len(given) == len(set(given)) and set(given) == set(expected)
    if len(given) != 1:
        return False
    if operator == "count":
        # isascii: isdecimal alone lets other scripts' digits through
        return given[0].isascii() and given[0].isdecimal() and int(given[0]) == int(expected[0])
    return given[0] == expected[0]


def verify(verifier: dict[str, Any], submission: list[str] | None, read: Collection[tuple[str, str, int]]) -> Verdict:
    """Judge an episode: `submission` in words (None: nothing submitted), `read` the pages that were shown.

    `verifier` is the task record's: {"kind": "kg_query", "operator", "answer": [words], "lookups": [[e, r, page]]}.
    """
    if submission is None:
        return Verdict(0.0, "nothing submitted")
    if not same_value(verifier["operator"], verifier["answer"], submission):
        return Verdict(0.0, "wrong answer")
    if any(tuple(lookup) not in read for lookup in verifier["lookups"]):
        return Verdict(0.0, "guessed")
    return Verdict(1.0, "right")
