"""The report as prose: several thousand words on twenty pages, of which a player sees what the tools show.

python -m components.environments.ledger_tieout.report 7
"""

from __future__ import annotations

import random
import sys

from components.environments.ledger_tieout.company import (
    LINES,
    PAGES,
    RELATIONS,
    SECTION_OF,
    SECTIONS,
    Company,
    build_company,
)

_SENTENCES = (
    "At the end of the period {account} stood at {amount} thousand.",
    "The position {account} of the section {section} is carried at {amount} thousand.",
    "Management reports {amount} thousand under {account}.",
    "Note: {account} amounts to {amount} thousand and was reviewed by the committee.",
)
_COMMENT = (
    "The movement of {account} is discussed together with {contra}, against which it is booked, and with {driver}, "
    "which drives it. No change of method took place in the period, and the comparative figures were not restated."
)


def render(company: Company, seed: int) -> dict[str, str]:
    """Page -> text. Every stated amount stands on its page; so do the sections' tables."""
    rng = random.Random(f"ledger_tieout/report/{seed}")
    texts: dict[str, list[str]] = {page: [] for page in PAGES}
    for account, pages in company.stated.items():
        section = SECTION_OF.get(account, account)
        for page, amount in pages.items():
            sentence = rng.choice(_SENTENCES).format(account=account, section=section, amount=amount)
            if account in LINES:
                contra, driver = RELATIONS["contra"][account], RELATIONS["driver"][account]
                sentence += " " + _COMMENT.format(account=account, contra=contra, driver=driver)
            texts[page].append(sentence)
    for index, section in enumerate(SECTIONS):
        lines = ", ".join(f"{line} {company.ledger[line]}" for line in SECTIONS[section])
        texts[PAGES[index]].append(f"Section {section}: {lines}; in all {company.ledger[section]} thousand.")
    return {page: "\n".join(sentences) for page, sentences in texts.items()}


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    for page, text in render(build_company(number), number).items():
        print(f"--- {page}\n{text}\n")
