"""The grammar: what an environment may consist of, and the definition that a number compiles to.

An environment has functional relations (each entity has one object), perhaps a many-valued one, perhaps a code by which
entities are found, and perhaps a gate in front of its facts. How each of them is reached differs from environment to
environment: by a tool of its own or by one that takes the relation's name, with parameters in any order, page by page
or at once, after opening the entity or with a key that another tool gives. A design is one combination; no two designs
have the same tool signature, even when all names are erased.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from components.environments.scripted import submit_tool, tool
from components.runtime.contracts import ToolDefinition

VERBS = ("look", "fetch", "ask", "query", "trace", "show", "scan", "check", "pull", "seek", "view", "probe")
RELATIONS = (
    *(
        "owner",
        "depot",
        "badge",
        "keeper",
        "route",
        "sponsor",
        "branch",
        "vendor",
        "editor",
        "guard",
        "pilot",
        "tenant",
    ),
    *("dealer", "archive", "dock", "hub", "studio", "agent", "broker", "donor", "host", "rival", "scout", "warden"),
)
LISTS = ("crates", "orders", "parts", "visits", "claims", "tickets", "permits", "rentals")
CODES = ("code", "serial", "label", "ticket")
GATES = ("none", "open", "key first", "key last")
FUNCTIONAL_KINDS = ("own", "entity relation", "relation entity")
LIST_KINDS = (
    "none",
    "entity page",
    "page entity",
    "entity relation page",
    "relation page entity",
    "at once",
    "counted",
)
FIND_KINDS = ("none", "value", "relation value", "value relation")
ENVIRONMENTS = 260


@dataclass(frozen=True)
class Signature:
    """One tool without its names: the kinds of its parameters in order, and the shape of its result."""

    parameters: tuple[str, ...]
    result: str


@dataclass(frozen=True)
class Design:
    """A combination of the grammar's choices."""

    functional: str
    relations: int
    listing: str
    find: str
    gate: str

    def signatures(self) -> tuple[Signature, ...]:
        """The tools without names, in canonical order."""
        copies = self.relations if self.functional == "own" else 1
        found = [Signature(parameters_of(self, "functional"), "entity")] * copies
        if self.listing != "none":
            result = {"at once": "entities", "counted": "number"}.get(self.listing, "entities and more")
            found.append(Signature(parameters_of(self, "list"), result))
        if self.find != "none":
            found.append(Signature(parameters_of(self, "find"), "entity"))
        if self.gate != "none":
            found.append(Signature(("entity",), "done" if self.gate == "open" else "key"))
        return tuple(sorted(found, key=lambda one: (one.result, one.parameters)))


def parameters_of(design: Design, role: str) -> tuple[str, ...]:
    """Names of the parameters of the tool with this role, in order."""
    if role == "functional":
        plain = ("entity",) if design.functional == "own" else tuple(design.functional.split())
        return {"key first": ("key", *plain), "key last": (*plain, "key")}.get(design.gate, plain)
    if role == "list":
        return ("entity",) if design.listing in ("at once", "counted") else tuple(design.listing.split())
    return tuple(design.find.split()) if role == "find" else ("entity",)


@dataclass(frozen=True)
class Definition:
    """An environment: its design with names."""

    name: str
    design: Design
    relations: tuple[str, ...]
    listing: str
    code: str
    verbs: dict[str, str]  # role (functional, list, find, gate) -> verb, where the tool is not named by its relation

    def tools(self) -> list[ToolDefinition]:
        """The tools that a player sees, the submission last."""
        design, verbs = self.design, self.verbs
        functional = parameters_of(design, "functional")
        if design.functional == "own":
            found = [tool(name, f"The {name} of an entity.", *functional) for name in self.relations]
        else:
            found = [tool(verbs["functional"], f"The {' or '.join(self.relations)} of an entity.", *functional)]
        if self.listing:
            how = {"at once": "All", "counted": "The number of"}.get(design.listing, "At most 3 a page of the")
            name = verbs["list"] if "relation" in design.listing else self.listing
            found.append(tool(name, f"{how} {self.listing} of an entity.", *parameters_of(design, "list")))
        if self.code:
            found.append(tool(verbs["find"], f"The entity with a {self.code}.", *parameters_of(design, "find")))
        if design.gate != "none":
            what = (
                "Opens an entity, which its facts need." if design.gate == "open" else "The key of an entity's facts."
            )
            found.append(tool(verbs["gate"], what, "entity"))
        return [*found, submit_tool("Give the answer and end: an entity, a number, or all entities of a list.")]

    def role(self, name: str) -> str:
        """What the tool `name` does: functional, list, find or gate."""
        if name in self.relations:
            return "functional"
        if name == self.listing:
            return "list"
        return next(role for role, verb in self.verbs.items() if verb == name)


@lru_cache(maxsize=1)
def designs() -> tuple[Design, ...]:
    """All designs with different tool signatures, in a fixed order."""
    found: dict[tuple[Signature, ...], Design] = {}
    for functional, relations, listing, find, gate in product(
        FUNCTIONAL_KINDS, (2, 3, 4), LIST_KINDS, FIND_KINDS, GATES
    ):
        design = Design(functional, relations, listing, find, gate)
        found.setdefault(design.signatures(), design)
    return tuple(found.values())


@lru_cache(maxsize=4096)
def compile_environment(number: int) -> Definition:
    """The environment of a number from 0. The first `len(designs())` have different tool signatures."""
    order = list(range(len(designs())))
    random.Random("compiled/designs").shuffle(order)
    design = designs()[order[number % len(order)]]
    rng = random.Random(f"compiled/environment/{number}")
    verbs = rng.sample(VERBS, 4)
    relations = tuple(rng.sample(RELATIONS, design.relations))
    return Definition(
        name=f"env{number:03d}",
        design=design,
        relations=relations,
        listing=rng.choice(LISTS) if design.listing != "none" else "",
        code=rng.choice(CODES) if design.find != "none" else "",
        verbs=dict(zip(("functional", "list", "find", "gate"), verbs, strict=True)),
    )
