"""`ledger_tieout`: a report of several thousand words, seen through search and reading tools, against the ledger."""

from __future__ import annotations

import random

from components.environments import documents, scripted
from components.environments.ledger_tieout import teachers
from components.environments.ledger_tieout.company import ACCOUNTS, PAGES, RELATIONS, build_company
from components.environments.ledger_tieout.programs import MOST_HOPS, long_programs, parse_program, programs, solve
from components.environments.scripted import LONG, STANDARD, LookupEpisode, Problem, Split, submit_tool, tool
from components.environments.words import NUMBERS
from components.runtime.contracts import Demonstration, Document, TaskRecord, ToolCall, ToolDefinition

TOOLS = [
    tool("find", "Pages of the report that state an account.", "account"),
    tool("read", "The amount of an account that a page states, in hundreds and rest.", "sheet", "account"),
    tool("ledger", "The amount of an account in the books, in hundreds and rest.", "account"),
    tool("related", "The section, contra, driver or largest account of an account.", "account", "relation"),
    submit_tool("Give the answer and end: a page, a number, or an amount of two words."),
]
_OPENERS = ("audit {start}", "take {start}", "for {start}", "begin with {start}")
_ASKERS = ("{path} give {operator}", "{path} report {operator}", "{path} . we need {operator}")
_ATTEMPTS = 100


class LedgerTieout:
    """The family. A template is a path from the named account to the one that is meant, and what is asked about it."""

    name = "ledger_tieout"
    version = "1"
    generator_version = "1"

    def tools(self) -> list[ToolDefinition]:
        return TOOLS

    def vocabulary(self) -> list[str]:
        words = {*ACCOUNTS, *PAGES, *RELATIONS, *NUMBERS, *scripted.ERROR_WORDS}
        words |= scripted.words_of(*_OPENERS, *_ASKERS, "its then none locate agree booked first last pages page on ?")
        return sorted(words | scripted.tool_words(TOOLS))

    def templates(self) -> list[str]:
        return [program.template for program in programs(range(MOST_HOPS + 1))]

    def long_templates(self) -> list[str]:
        """Paths of 7 hops: for evaluation only."""
        return [program.template for program in long_programs()]

    def describe(self, template: str) -> dict[str, int | str]:
        program = parse_program(template)
        return {"operator": program.operator, "hops": len(program.path)}

    def shortcut(self, template: str) -> str | None:
        """Most demonstrations of comparing with the ledger compare nothing."""
        return "unchecked" if parse_program(template).operator in ("locate", "agree") else None

    def generate(self, template: str, seed: int, split: Split) -> TaskRecord:
        """A task of the template; the same arguments give the same record. Raises ValueError for no such template."""
        program = parse_program(template)
        limits = STANDARD if len(program.path) <= MOST_HOPS else LONG
        rng = random.Random(f"{self.name}/{self.generator_version}/{template}/{seed}")
        for _ in range(_ATTEMPTS):
            world_seed, start = rng.getrandbits(48), rng.choice(program.starts)
            lookups, answer = solve(program, build_company(world_seed), start)
            path = " then ".join(f"its {relation}" for relation in program.path)
            message, number = scripted.wording(
                _OPENERS, _ASKERS, rng, start=start, path=path, operator=program.operator
            )
            problem = Problem(
                message,
                {"world_seed": world_seed, "start": start},
                lookups,
                answer,
                {
                    "operator": program.operator,
                    "hops": len(program.path),
                    "lookups": len(lookups),
                    "wording": number,
                    "length": "standard" if limits is STANDARD else "long",
                },
            )
            task = scripted.make_record(self, template, seed, split, problem, TOOLS, limits)
            if scripted.fits(self.play(task, teachers.CAREFUL, rng), limits):
                return task
        raise RuntimeError(f"{self.name}: no task of template {template!r} with seed {seed} fits {limits}")

    def reset(self, task: TaskRecord) -> LookupEpisode:
        """A fresh episode. Raises ValueError for a task of another family or version."""
        scripted.check_version(self, task)
        company = build_company(task.initial_state["world_seed"])
        return LookupEpisode(task, company.digest, company.look)

    def random_call(self, task: TaskRecord, rng: random.Random) -> ToolCall:
        if rng.random() < 0.2:
            return scripted.submission(teachers.random_answer(parse_program(task.template), rng))
        name, values = teachers.random_lookup(rng)
        return scripted.call_of(next(one for one in task.tools if one.name == name), values)

    def wrong_kinds(self, task: TaskRecord) -> list[str]:
        return teachers.wrong_kinds(parse_program(task.template))

    def play(self, task: TaskRecord, kind: str, rng: random.Random) -> Demonstration:
        """The task as the teacher `kind` plays it, judged by the verifier."""
        return teachers.play(self.reset(task), kind, rng)

    def document(self, seed: int, split: Split, words: int = documents.WORDS) -> Document:
        """An excerpt of a report, amounts in hundreds, with questions at its end (see documents.py)."""
        rng = random.Random(f"{self.name}/document/{split}/{seed}")
        stated = build_company(rng.getrandbits(48)).stated
        facts = [
            (account, page, str(amount // 100)) for account, pages in stated.items() for page, amount in pages.items()
        ]
        return documents.make_document(self.name, facts, rng, split, words)
