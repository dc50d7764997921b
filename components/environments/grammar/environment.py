"""`compiled`: all environments of the grammar as one family, whose environments are held out as wholes."""

from __future__ import annotations

import random
from typing import Any

from components.environments import scripted
from components.environments.grammar import teachers
from components.environments.grammar.definitions import (
    CODES,
    ENVIRONMENTS,
    LISTS,
    RELATIONS,
    VERBS,
    compile_environment,
)
from components.environments.grammar.programs import is_paged, parse_program, programs, solve
from components.environments.grammar.world import ENTITIES, Desk, World, build_world
from components.environments.scripted import STANDARD, LookupEpisode, Problem, Split
from components.environments.words import NUMBERS
from components.runtime.contracts import Demonstration, TaskRecord, ToolCall, ToolDefinition

_OPENERS = ("from {start}", "start at {start}", "take {start}", "begin with {start}")
_ASKERS = ("follow {path} give {operator}", "and follow {path} to give {operator}", ". give {operator} of {path}")
_REPLIES = "then more none done error closed unknown entity relation page key value"
_ATTEMPTS = 100


class CompiledEnvironments:
    """The family. Templates of one environment share a group; splits hold out groups."""

    name = "compiled"
    version = "1"
    generator_version = "1"

    def tools(self) -> list[ToolDefinition]:
        """The tools of the first environment; those of a task are its own."""
        return compile_environment(0).tools()

    def vocabulary(self) -> list[str]:
        words = {*VERBS, *RELATIONS, *LISTS, *CODES, *ENTITIES, *NUMBERS, *scripted.ERROR_WORDS, *_REPLIES.split()}
        words |= scripted.words_of(*_OPENERS, *_ASKERS, "name count list submit")
        return sorted(words)

    def templates(self) -> list[str]:
        return [program.template for number in range(ENVIRONMENTS) for program in programs(number)]

    def long_templates(self) -> list[str]:
        return []

    def describe(self, template: str) -> dict[str, int | str]:
        program = parse_program(template)
        return {"operator": program.operator, "hops": program.hops, "group": template.split("/")[0]}

    def shortcut(self, template: str) -> str | None:
        """See `teachers.shortcut`."""
        program = parse_program(template)
        return teachers.shortcut(program, is_paged(compile_environment(program.environment)))

    def generate(self, template: str, seed: int, split: Split) -> TaskRecord:
        """A task of the template; the same arguments give the same record. Raises ValueError for no such template."""
        program = parse_program(template)
        definition = compile_environment(program.environment)
        tools = definition.tools()
        rng = random.Random(f"{self.name}/{self.generator_version}/{template}/{seed}")
        for _ in range(_ATTEMPTS):
            world_seed, start = rng.getrandbits(48), rng.choice(ENTITIES)
            world = build_world(program.environment, world_seed)
            path = rng.sample(definition.relations, program.hops)
            lookups, answer = solve(program, world, start, path)
            if not answer:
                continue  # an empty list cannot be written as a call
            named = f"{definition.code} {world.codes[start]}" if program.start == "find" else start
            steps = path if program.operator == "name" else [*path, definition.listing]
            message, number = scripted.wording(
                _OPENERS, _ASKERS, rng, start=named, path=" then ".join(steps), operator=program.operator
            )
            difficulty: dict[str, int | float | str] = {
                "operator": program.operator,
                "hops": program.hops,
                "tools": len(tools),
                "gate": definition.design.gate,
                "wording": number,
                "length": "standard",
            }
            state = {"world_seed": world_seed, "start": start, "path": path}
            problem = Problem(message, state, lookups, answer, difficulty, unordered=program.operator == "list")
            task = scripted.make_record(self, template, seed, split, problem, tools)
            if scripted.fits(self.play(task, teachers.CAREFUL, rng), STANDARD):
                return task
        raise RuntimeError(f"{self.name}: no task of template {template!r} with seed {seed} fits {STANDARD}")

    def _world(self, task: TaskRecord) -> World:
        return build_world(parse_program(task.template).environment, task.initial_state["world_seed"])

    def reset(self, task: TaskRecord) -> LookupEpisode:
        """A fresh episode. Raises ValueError for a task of another family or version."""
        scripted.check_version(self, task)
        world = self._world(task)
        return LookupEpisode(task, world.digest, Desk(world).look)

    def random_call(self, task: TaskRecord, rng: random.Random) -> ToolCall:
        definition = rng.choice(task.tools)
        if definition.name == "submit":
            return scripted.submission(teachers.random_answer(parse_program(task.template), rng))
        pools: dict[str, Any] = {"entity": ENTITIES, "page": ("1", "2", "3"), "key": NUMBERS, "value": NUMBERS}
        compiled = compile_environment(parse_program(task.template).environment)
        pools["relation"] = [*compiled.relations, *filter(None, [compiled.listing, compiled.code])]
        return scripted.call_of(definition, [rng.choice(pools[name]) for name in definition.input_schema["properties"]])

    def wrong_kinds(self, task: TaskRecord) -> list[str]:
        world, entity = self._world(task), task.initial_state["start"]
        for relation in task.initial_state["path"]:
            entity = world.facts[entity, relation]
        return teachers.wrong_kinds(parse_program(task.template), world, entity)

    def play(self, task: TaskRecord, kind: str, rng: random.Random) -> Demonstration:
        """The task as the teacher `kind` plays it, judged by the verifier."""
        return teachers.play(self.reset(task), self._world(task), kind, rng)
