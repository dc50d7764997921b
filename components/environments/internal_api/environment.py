"""`internal_api`: search a library, read its documentation, run a program in the sandbox, submit what it prints."""

from __future__ import annotations

import random
from collections.abc import Callable

from components.environments import scripted
from components.environments.internal_api import teachers
from components.environments.internal_api.library import NAMES, TYPES, Library, build_library, chain
from components.environments.internal_api.programs import MOST_HOPS, code_words, parse_program, programs
from components.environments.internal_api.runner import called, run_program, run_trusted
from components.environments.protocol import Verdict
from components.environments.scripted import LONG, STANDARD, LookupEpisode, Problem, Split, submit_tool, tool
from components.environments.words import NUMBERS
from components.runtime.contracts import Demonstration, TaskRecord, ToolCall, ToolDefinition

TOOLS = [
    tool("search", "Names of the functions that take a type.", "type"),
    tool("doc", "Documentation of a function: what it takes and gives, or what to use instead.", "function"),
    tool("run", "Run a Python program with the library, and see what it prints.", "program"),
    submit_tool("Give the number that the right program prints, and end."),
]
_OPENERS = (
    "with {release} from {first} {value}",
    "{release} : {first} {value}",
    "we have {first} {value} in {release}",
)
_ASKERS = ("to {path}", "make {path}", "get {path} of it", "and want {path}")
_REPLIES = "takes gives deprecated use error program output time function type by way of x = ( ) ; print"
_ATTEMPTS = 50


class ApiEpisode(LookupEpisode):
    """Remembers what was run: the answer has to come out of a program of documented, not deprecated calls."""

    def __init__(self, task: TaskRecord, library: Library, run: Callable[[str, str], str] = run_program) -> None:
        super().__init__(task, library.digest, self._answer)
        self.library, self.run = library, run
        self.printed: list[tuple[list[str], str]] = []

    def _answer(self, name: str, values: tuple[str, ...]) -> str:
        if name == "search":
            return " ".join(self.library.shelf.get(values[0], ())) or "error unknown type"
        if name == "doc":
            function = self.library.functions.get(values[0])
            return function.documentation if function else "error unknown function"
        reply = self.run(self.library.source, values[0])
        self.printed.append((called(values[0]), reply))
        return reply

    def verdict(self) -> Verdict:
        found = super().verdict()
        if found.passed and (self.task.verifier["calls"], self.submission) not in [
            (names, [reply]) for names, reply in self.printed
        ]:
            return Verdict(0.0, "guessed: no program of the right calls was run")
        return found


class InternalApi:
    """The family. A template is a path through types, and the steps at which a deprecated function lies in the way."""

    name = "internal_api"
    version = "1"
    generator_version = "1"

    def tools(self) -> list[ToolDefinition]:
        return TOOLS

    def vocabulary(self) -> list[str]:
        words = {*TYPES, *NAMES, *NUMBERS, *scripted.ERROR_WORDS, *_REPLIES.split(), "v1", "v2"}
        return sorted(words | scripted.words_of(*_OPENERS, *_ASKERS) | scripted.tool_words(TOOLS))

    def templates(self) -> list[str]:
        return [program.template for hops in range(1, MOST_HOPS + 1) for program in programs(hops)]

    def long_templates(self) -> list[str]:
        """Four steps: for evaluation only."""
        return [program.template for program in programs(4)[::4]]

    def describe(self, template: str) -> dict[str, int | str]:
        program = parse_program(template)
        return {"operator": f"traps {program.traps}", "hops": len(program.traps)}

    def shortcut(self, template: str) -> str | None:
        """Most demonstrations of the second release call what a search lists first, without reading about it."""
        return "undocumented" if parse_program(template).release == "v2" else None

    def generate(self, template: str, seed: int, split: Split) -> TaskRecord:
        """A task of the template; the same arguments give the same record. Raises ValueError for no such template."""
        program = parse_program(template)
        limits = STANDARD if len(program.traps) <= MOST_HOPS else LONG
        rng = random.Random(f"{self.name}/{self.generator_version}/{template}/{seed}")
        for _ in range(_ATTEMPTS):
            world_seed, value = rng.getrandbits(48), rng.randrange(100)
            library = build_library(world_seed, program.path, program.traps)
            functions = chain(library, program.path)
            names, result = [one.name for one in functions], value
            for one in functions:
                result = one(result)
            message, number = scripted.wording(
                _OPENERS,
                _ASKERS,
                rng,
                release=program.release,
                first=program.path[0],
                value=str(value),
                path=" by way of ".join([program.path[-1], *program.path[1:-1]]),
            )
            lookups: list[scripted.Lookup] = [("doc", (name,)) for name in names]
            problem = Problem(
                message,
                {"world_seed": world_seed, "value": value},
                [*lookups, ("run", (code_words(names, value),))],
                [str(result)],
                {
                    "operator": f"traps {program.traps}",
                    "hops": len(names),
                    "wording": number,
                    "length": "standard" if limits is STANDARD else "long",
                },
            )
            task = scripted.make_record(self, template, seed, split, problem, TOOLS, limits)
            verifier = {**task.verifier, "kind": self.name, "lookups": task.verifier["lookups"][:-1], "calls": names}
            task = task.model_copy(update={"verifier": verifier})
            task = task.model_copy(update={"id": task.identity()})
            # how long the careful teacher's conversation is does not depend on the number that is printed
            episode = ApiEpisode(task, library, run=lambda *_, printed=str(result): printed)
            if scripted.fits(teachers.play(episode, teachers.CAREFUL, rng), limits):
                return task
        raise RuntimeError(f"{self.name}: no task of template {template!r} with seed {seed} fits {limits}")

    def reset(self, task: TaskRecord) -> ApiEpisode:
        """A fresh episode. Raises ValueError for a task of another family or version."""
        return self._episode(task, run_program)

    def _episode(self, task: TaskRecord, run: Callable[[str, str], str]) -> ApiEpisode:
        scripted.check_version(self, task)
        program = parse_program(task.template)
        return ApiEpisode(task, build_library(task.initial_state["world_seed"], program.path, program.traps), run)

    def random_call(self, task: TaskRecord, rng: random.Random) -> ToolCall:
        if rng.random() < 0.2:
            return scripted.submission([rng.choice(NUMBERS)])
        name, values = teachers.random_lookup(rng, [one.name for one in task.tools])
        return scripted.call_of(next(one for one in task.tools if one.name == name), values)

    def wrong_kinds(self, task: TaskRecord) -> list[str]:
        return teachers.wrong_kinds(parse_program(task.template))

    def play(self, task: TaskRecord, kind: str, rng: random.Random) -> Demonstration:
        """The task as the teacher `kind` plays it, judged by the verifier."""
        return teachers.play(self._episode(task, run_trusted), kind, rng)  # the program is the teacher's own
