"""Programs: which account is meant, by a path of relations, and what is asked about it.

`contra/section/locate`: from the named account to its contra account, to the section of that; which page misstates it?
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from components.environments.ledger_tieout.company import ACCOUNTS, LINES, SECTIONS, Company, words
from components.environments.scripted import Lookup

OPERATORS = ("locate", "agree", "booked", "first", "last", "pages")
MOST_HOPS = 2
LONG_HOPS = 7


@dataclass(frozen=True)
class Program:
    path: tuple[str, ...]
    operator: str

    @property
    def template(self) -> str:
        return "/".join([*self.path, self.operator])

    @property
    def starts(self) -> tuple[str, ...]:
        """Accounts from which the path can be walked."""
        return tuple(SECTIONS) if self.path[:1] == ("largest",) else LINES if self.path else ACCOUNTS


def _paths(hops: int) -> list[tuple[str, ...]]:
    """Paths that can be walked: lines have a section, a contra account and a driver, sections a largest line."""
    paths: list[tuple[str, ...]] = [()]
    for _ in range(hops):
        paths = [
            (*path, relation)
            for path in paths
            for relation in ("section", "contra", "driver", "largest")
            if not path or (relation == "largest") == (path[-1] == "section")
        ]
    return paths


def programs(hops: Sequence[int]) -> list[Program]:
    """All programs whose paths have these numbers of hops, in a fixed order."""
    return [Program(path, operator) for number in hops for path in _paths(number) for operator in OPERATORS]


def long_programs(number: int = 24) -> list[Program]:
    """A fixed sample of programs with long paths: for evaluation only."""
    rng = random.Random("ledger_tieout long programs")
    paths = sorted(rng.sample(_paths(LONG_HOPS), number))
    return [Program(path, rng.choice(("locate", "agree"))) for path in paths]


def parse_program(template: str) -> Program:
    """The program that `template` names. Raises ValueError when its path cannot be walked."""
    *path, operator = template.split("/")
    if operator not in OPERATORS or tuple(path) not in _walkable(len(path)):
        raise ValueError(f"ledger_tieout template {template!r}: expected relation/.../operator")
    return Program(tuple(path), operator)


@lru_cache(maxsize=16)
def _walkable(hops: int) -> set[tuple[str, ...]]:
    return set(_paths(hops))


def solve(program: Program, company: Company, start: str) -> tuple[list[Lookup], list[str]]:
    """The look-ups that any player needs, in order, and the answer in words."""
    lookups: list[Lookup] = []
    account = start
    for relation in program.path:
        lookups.append(("related", (account, relation)))
        related = company.related(account, relation)
        assert related is not None
        account = related
    pages = company.pages(account)
    if program.operator == "booked":
        return [*lookups, ("ledger", (account,))], list(words(company.ledger[account]))
    lookups.append(("find", (account,)))
    if program.operator == "pages":
        return lookups, [str(len(pages))]
    if program.operator in ("first", "last"):
        page = pages[0 if program.operator == "first" else -1]
        return [*lookups, ("read", (page, account))], list(words(company.stated[account][page]))
    lookups.append(("ledger", (account,)))
    wrong = [page for page in pages if company.stated[account][page] != company.ledger[account]]
    if program.operator == "agree":
        read, answer = pages, [str(len(pages) - len(wrong))]
    else:  # reading ends at the page that is wrong
        read, answer = pages[: pages.index(wrong[0]) + 1] if wrong else pages, wrong or ["none"]
    return [*lookups, *(("read", (page, account)) for page in read)], answer
