"""A simulated company: a ledger whose statements balance by construction, and a report about it with faults.

Amounts are whole thousands from 1 to 9999 and are written as two words, hundreds and rest: `41 07` is 4107.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property, lru_cache

from components.runtime.contracts import digest

# section -> its lines; the amount of a section is the sum of its lines
SECTIONS: dict[str, tuple[str, ...]] = {
    "liquid": ("cash", "deposits", "receivables", "inventory"),
    "fixed": ("plant", "vehicles", "software", "buildings"),
    "due": ("payables", "wages", "taxes", "leases"),
    "loans": ("bonds", "mortgage", "overdraft"),
    "equity": ("capital", "reserves", "profit"),
    "income": ("sales", "services", "licences", "interest"),
    "expenses": ("materials", "salaries", "rent", "energy", "freight"),
}
SECTION_OF: dict[str, str] = {line: section for section, lines in SECTIONS.items() for line in lines}
LINES = tuple(SECTION_OF)
ACCOUNTS = (*SECTIONS, *LINES)
# From an account to another: how an auditor walks through the books.
RELATIONS: dict[str, dict[str, str]] = {
    "section": SECTION_OF,
    "contra": {line: LINES[(index + 7) % len(LINES)] for index, line in enumerate(LINES)},
    "driver": {line: LINES[(index * 5 + 3) % len(LINES)] for index, line in enumerate(LINES)},
    "largest": {},  # of a section; depends on the amounts
}
PAGES = tuple(f"p{number}" for number in range(1, 21))
FAULTS = ("transposed", "stale", "dropped")


def words(amount: int) -> tuple[str, str]:
    """An amount in two words."""
    return str(amount // 100), str(amount % 100)


@dataclass(frozen=True)
class Fault:
    account: str
    page: str
    kind: str


@dataclass(frozen=True)
class Company:
    """ledger[account]: the true amount. stated[account]: page -> amount there. faults: where the two differ."""

    ledger: dict[str, int]
    stated: dict[str, dict[str, int]]
    faults: tuple[Fault, ...]

    def related(self, account: str, relation: str) -> str | None:
        """The account that the relation leads to; None where it does not apply."""
        if relation == "largest":
            return max(SECTIONS[account], key=lambda line: self.ledger[line]) if account in SECTIONS else None
        return RELATIONS.get(relation, {}).get(account)

    def pages(self, account: str) -> list[str]:
        """Pages that state the account, in order."""
        return list(self.stated[account])

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of ledger and report."""
        return digest([self.ledger, self.stated])

    def look(self, tool: str, values: tuple[str, ...]) -> str:
        """The answer of a tool in words."""
        if tool == "read":
            page, account = values
            if page not in self.stated.get(account, {}):
                return "error unknown page"
            return " ".join(words(self.stated[account][page]))
        account = values[0]
        if account not in self.ledger:
            return "error unknown account"
        if tool == "find":
            return " ".join(self.pages(account))
        if tool == "ledger":
            return " ".join(words(self.ledger[account]))
        return self.related(account, values[1]) or "error unknown relation"


def balanced_ledger(rng: random.Random) -> dict[str, int]:
    """Amounts of all accounts. Assets are liabilities and equity; profit is income minus expenses."""
    while True:
        ledger = {line: rng.randint(20, 900) for line in LINES}
        income = sum(ledger[line] for line in SECTIONS["income"])
        ledger["profit"] = income - sum(ledger[line] for line in SECTIONS["expenses"])
        assets = sum(ledger[line] for section in ("liquid", "fixed") for line in SECTIONS[section])
        claims = sum(ledger[line] for section in ("due", "loans") for line in SECTIONS[section])
        ledger["capital"] = assets - claims - ledger["reserves"] - ledger["profit"]
        if ledger["profit"] > 0 and ledger["capital"] > 0:
            ledger.update({section: sum(ledger[line] for line in lines) for section, lines in SECTIONS.items()})
            return ledger


def misstate(amount: int, kind: str, rng: random.Random) -> int:
    """A wrong amount as such mistakes are made. Always another than `amount`, never 0."""
    digits = list(str(amount))
    if kind == "transposed" and len(set(digits)) > 1:
        at = next(index for index in range(len(digits) - 1) if digits[index] != digits[index + 1])
        digits[at], digits[at + 1] = digits[at + 1], digits[at]
        wrong = int("".join(digits))
    elif kind == "dropped" and len(digits) > 1:
        del digits[rng.randrange(len(digits))]
        wrong = int("".join(digits))
    else:
        wrong = round(amount * rng.choice((0.8, 0.9, 1.1, 1.2)))  # last year's figure
    return wrong if wrong not in (0, amount) else amount + 1


@lru_cache(maxsize=512)
def build_company(seed: int) -> Company:
    """The company and its report of `seed`. Each account stands on 2 to 4 pages; in 3 of 4 one of them is wrong."""
    rng = random.Random(f"ledger_tieout/{seed}")
    ledger = balanced_ledger(rng)
    stated, faults = {}, []
    for account in ACCOUNTS:
        pages = sorted(rng.sample(PAGES, rng.randint(2, 4)), key=PAGES.index)
        stated[account] = dict.fromkeys(pages, ledger[account])
        if rng.random() < 0.75:
            fault = Fault(account, rng.choice(pages), rng.choice(FAULTS))
            stated[account][fault.page] = misstate(ledger[account], fault.kind, rng)
            faults.append(fault)
    return Company(ledger, stated, tuple(faults))
