"""Scripted players of `ledger_tieout`: one that is right, and five that are wrong, each in its own way."""

from __future__ import annotations

import random
from collections.abc import Sequence

from components.environments.ledger_tieout.company import ACCOUNTS, PAGES, SECTIONS, words
from components.environments.ledger_tieout.programs import Program, parse_program
from components.environments.scripted import Conversation, LookupEpisode
from components.runtime.contracts import Demonstration

CAREFUL = "careful"
WRONG_KINDS = ("unchecked", "skips_hop", "first_page_only", "books_only", "guesses")


def wrong_kinds(program: Program) -> list[str]:
    """The kinds of `WRONG_KINDS` for which a program gives occasion."""
    compares = program.operator in ("locate", "agree")
    applies = {
        "unchecked": compares,
        "skips_hop": bool(_shortened(program.path)),
        "first_page_only": compares or program.operator == "last",
        "books_only": program.operator in ("first", "last"),
    }
    return [kind for kind in WRONG_KINDS if applies.get(kind, True)]


def _shortened(path: Sequence[str]) -> list[str]:
    """The path without its last hop, where there is one."""
    return list(path[:-1]) if path else []


def random_answer(program: Program, rng: random.Random) -> list[str]:
    """An answer of the right kind by a player that knows nothing."""
    if program.operator == "locate":
        return [rng.choice((*PAGES, "none"))]
    if program.operator in ("agree", "pages"):
        return [str(rng.randint(1, 4))]
    return list(words(rng.randint(20, 4000)))


def play(episode: LookupEpisode, kind: str, rng: random.Random) -> Demonstration:
    """The whole conversation as the teacher `kind` plays it. Raises ValueError for an unknown kind."""
    if kind not in (CAREFUL, *WRONG_KINDS):
        raise ValueError(f"unknown teacher {kind!r}; known: {', '.join((CAREFUL, *WRONG_KINDS))}")
    program = parse_program(episode.task.template)
    talk = Conversation(episode)
    if kind == "guesses":
        talk.submit(random_answer(program, rng))
        return talk.demonstration(kind)
    account: str = episode.task.initial_state["start"]
    for relation in _shortened(program.path) if kind == "skips_hop" else program.path:
        (account,) = talk.look("related", account, relation)
    if program.operator == "booked" or kind == "books_only":
        talk.submit(talk.look("ledger", account))
        return talk.demonstration(kind)
    pages = talk.look("find", account)
    if program.operator == "pages":
        talk.submit([str(len(pages))])
    elif program.operator in ("first", "last"):
        page = pages[-1 if program.operator == "last" and kind != "first_page_only" else 0]
        talk.submit(talk.look("read", page, account))
    else:
        _compare(talk, account, pages, program.operator, kind)
    return talk.demonstration(kind)


def _compare(talk: Conversation, account: str, pages: Sequence[str], operator: str, kind: str) -> None:
    """Compare the pages with the ledger; the number that agree is written down before each further call."""
    booked = talk.look("ledger", account)
    if kind == "unchecked":  # nothing was compared: all will be right, or the last page is to blame
        talk.submit([str(len(pages))] if operator == "agree" else [pages[-1]])
        return
    agree, tally, wrong = 0, "", "none"
    for page in pages[:1] if kind == "first_page_only" else pages:
        right = talk.look("read", page, account, content=tally) == booked
        agree += right
        tally = str(agree) if operator == "agree" else ""
        if operator == "locate" and not right:
            wrong = page
            break
    talk.submit([tally] if operator == "agree" else [wrong], content=tally)


def random_lookup(rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """A look-up by a player without knowledge."""
    account = rng.choice(ACCOUNTS)
    name = rng.choice(["find", "ledger", "read", "related"])
    if name == "read":
        return name, (rng.choice(PAGES), account)
    if name == "related":
        return name, (account, "largest" if account in SECTIONS else rng.choice(["section", "contra", "driver"]))
    return name, (account,)
