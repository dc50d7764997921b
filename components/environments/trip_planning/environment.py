"""`trip_planning`: nested conditional rules over a world that is only seen through look-ups."""

from __future__ import annotations

import random
from typing import Any

from components.environments import scripted
from components.environments.scripted import LONG, STANDARD, LookupEpisode, Problem, Split, submit_tool, tool
from components.environments.trip_planning import teachers
from components.environments.trip_planning.programs import (
    LONG_TRIPS,
    MOST_TRIPS,
    decide,
    draw_modes,
    draw_rule,
    parse_program,
    programs,
    rule_to_json,
)
from components.environments.trip_planning.world import MODES, PLACES, PRICE, STATUS, WEATHER, build_world
from components.environments.words import CITIES
from components.runtime.contracts import Demonstration, TaskRecord, ToolCall, ToolDefinition

TOOLS = [
    tool("weather", "Weather of a city: sun, rain, snow or fog.", "city"),
    tool("status", "Whether a place of a city is open or closed.", "place", "city"),
    tool("price", "Price band of a place of a city: low, mid or high.", "place", "city"),
    tool("travel", "The city that a means of transport leads to.", "city", "mode"),
    submit_tool("Give the plan and end: the place, then the city."),
]
_OPENERS = ("plan from {start}", "start in {start}", "we are in {start}", "a trip from {start}")
_ASKERS = ("{trips} : {rule}", "{trips} and there {rule}", "{trips} . rule : {rule}")
_ATTEMPTS = 50


class TripPlanning:
    """The family. A template is the shape of the rules, what they ask about, and the number of trips before them."""

    name = "trip_planning"
    version = "1"
    generator_version = "1"

    def tools(self) -> list[ToolDefinition]:
        return TOOLS

    def vocabulary(self) -> list[str]:
        words = {*PLACES, *WEATHER, *STATUS, *PRICE, *MODES, *CITIES, *scripted.ERROR_WORDS}
        words |= scripted.words_of(*_OPENERS, *_ASKERS, "if then else take city place")
        return sorted(words | scripted.tool_words(TOOLS))

    def templates(self) -> list[str]:
        return [program.template for program in programs(tuple(range(MOST_TRIPS + 1)))]

    def long_templates(self) -> list[str]:
        """After 6 or 7 trips, two levels of rules: for evaluation only."""
        return [program.template for program in programs(LONG_TRIPS) if program.shape == "both"]

    def describe(self, template: str) -> dict[str, int | str]:
        program = parse_program(template)
        return {"operator": program.shape, "hops": program.trips}

    def shortcut(self, template: str) -> str | None:
        """Most demonstrations of rules that begin with a price assume that it holds."""
        return "assumes" if parse_program(template).about[0] == "price" else None

    def generate(self, template: str, seed: int, split: Split) -> TaskRecord:
        """A task of the template; the same arguments give the same record. Raises ValueError for no such template."""
        program = parse_program(template)
        limits = STANDARD if program.trips <= MOST_TRIPS else LONG
        rng = random.Random(f"{self.name}/{self.generator_version}/{template}/{seed}")
        for _ in range(_ATTEMPTS):
            world_seed, start = rng.getrandbits(48), rng.choice(CITIES)
            world, modes, city = build_world(world_seed), draw_modes(program, rng), start
            lookups: list[scripted.Lookup] = []
            for mode in modes:
                lookups.append(("travel", (city, mode)))
                city = world.travel[city, mode]
            rule = draw_rule(program, world, city, rng)
            path = list(decide(rule, world, city))
            chosen: Any = rule
            for _, holds in path:
                chosen = chosen.yes if holds else chosen.no
            trips = " then ".join(f"take {mode}" for mode in modes)
            message, number = scripted.wording(_OPENERS, _ASKERS, rng, start=start, trips=trips, rule=rule.words())
            problem = Problem(
                message,
                {"world_seed": world_seed, "start": start, "modes": modes, "rule": rule_to_json(rule)},
                list(dict.fromkeys([*lookups, *(lookup for lookup, _ in path)])),  # the weather may be asked twice
                [chosen, city],
                {
                    "operator": program.shape,
                    "hops": program.trips,
                    "conditions": len(program.about),
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
        world = build_world(task.initial_state["world_seed"])
        return LookupEpisode(task, world.digest, world.look)

    def random_call(self, task: TaskRecord, rng: random.Random) -> ToolCall:
        if rng.random() < 0.2:
            return scripted.submission(teachers.random_plan(rng))
        name, values = teachers.random_lookup(rng)
        return scripted.call_of(next(one for one in task.tools if one.name == name), values)

    def wrong_kinds(self, task: TaskRecord) -> list[str]:
        program = parse_program(task.template)
        return teachers.wrong_kinds(program.trips, program.shape)

    def play(self, task: TaskRecord, kind: str, rng: random.Random) -> Demonstration:
        """The task as the teacher `kind` plays it, judged by the verifier."""
        return teachers.play(self.reset(task), kind, rng)
