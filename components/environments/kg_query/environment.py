"""`kg_query`: questions over a hidden knowledge graph that is only seen through a paging tool."""

from __future__ import annotations

import random
from typing import Any

from components.environments import documents
from components.environments.chat_format import conversation_words
from components.environments.documents import Split
from components.environments.kg_query import teachers
from components.environments.kg_query.graph import ENTITIES, OBJECT_WEIGHTS, RELATIONS, TYPE_OF, build_graph
from components.environments.kg_query.programs import (
    MOST_STANDARD_HOPS,
    OPERATORS,
    WORDINGS,
    long_programs,
    pages,
    parse_program,
    programs,
    solve,
    wording,
)
from components.environments.kg_query.verifier import answer_words, verify
from components.environments.protocol import Observation, Verdict
from components.runtime.contracts import (
    Demonstration,
    Document,
    Limits,
    Message,
    TaskRecord,
    ToolCall,
    ToolDefinition,
    digest,
)

_REPLY_WORDS = "then more none . ? error unknown entity relation page tool arguments call answer was given"
LIMITS = {"standard": Limits(turns=14, tokens=160), "long": Limits(turns=24, tokens=320)}
_ATTEMPTS = 200

NEIGHBORS = ToolDefinition(
    name="neighbors",
    description="Objects of a relation of an entity, at most 3 a page; a page that ends with `more` has a next one.",
    input_schema={
        "type": "object",
        "properties": {
            "entity": {"type": "string", "description": "the entity to start from"},
            "relation": {"type": "string", "description": "the relation to follow"},
            "page": {"type": "integer", "minimum": 1, "description": "page number, from 1"},
        },
        "required": ["entity", "relation", "page"],
        "additionalProperties": False,
    },
)
SUBMIT = ToolDefinition(
    name="submit",
    description="Give the answer and end: one entity, one number, or all entities of a list in any order.",
    input_schema={
        "type": "object",
        "properties": {"answer": {"type": "array", "items": {"type": "string"}, "description": "words of the answer"}},
        "required": ["answer"],
        "additionalProperties": False,
    },
)


def _error(words: str) -> Observation:
    return Observation(f"error {words}", is_error=True)


class GraphEpisode:
    """One play of a task. The state is the facts, the calls made and the submission."""

    def __init__(self, task: TaskRecord) -> None:
        self.graph = build_graph(task.initial_state["graph_seed"])
        self.verifier = task.verifier
        self.calls: list[ToolCall] = []
        self.read: set[tuple[str, str, int]] = set()
        self.submission: list[str] | None = None

    def step(self, call: ToolCall) -> Observation:
        """Answer a call. What is wrong with a call comes back as an observation `error ...`; nothing is raised."""
        if self.submission is not None:
            return _error("answer was given")
        self.calls.append(call)
        if call.name == "neighbors":
            return self._neighbors(call.arguments)
        if call.name == "submit":
            if set(call.arguments) != {"answer"}:
                return _error("unknown arguments")
            self.submission = answer_words(call.arguments["answer"])
            return Observation("", done=True)
        return _error("unknown tool")

    def _neighbors(self, arguments: dict[str, Any]) -> Observation:
        if set(arguments) != {"entity", "relation", "page"}:
            return _error("unknown arguments")
        entity, relation, page = arguments["entity"], arguments["relation"], arguments["page"]
        if not isinstance(entity, str) or entity not in TYPE_OF:
            return _error("unknown entity")
        if not isinstance(relation, str) or (entity, relation) not in self.graph.facts:
            return _error("unknown relation")
        shown = pages(self.graph.objects(entity, relation))
        # bool is an int in Python; JSON's true is no page
        if not isinstance(page, int) or isinstance(page, bool) or not 1 <= page <= len(shown):
            return _error("unknown page")
        self.read.add((entity, relation, page))
        words = [*shown[page - 1]] or ["none"]
        return Observation(" ".join([*words, "more"] if page < len(shown) else words))

    def state_hash(self) -> str:
        calls = [call.model_dump(mode="json") for call in self.calls]
        return digest({"facts": self.graph.digest, "calls": calls, "submission": self.submission})

    def verdict(self) -> Verdict:
        return verify(self.verifier, self.submission, self.read)


class KnowledgeGraphQuery:
    """The family. Worlds are drawn from seeds, so a task record is small and its world is never stored."""

    name = "kg_query"
    version = "1"
    generator_version = "1"

    def tools(self) -> list[ToolDefinition]:
        return [NEIGHBORS, SUBMIT]

    def vocabulary(self) -> list[str]:
        words = {*TYPE_OF, *RELATIONS, *OPERATORS, *map(str, range(len(OBJECT_WEIGHTS)))}
        for text in WORDINGS:
            words.update(word for word in text.split() if not word.startswith("{"))
        for tool in self.tools():
            words.update([tool.name, *tool.input_schema["properties"]])
        words.update(_REPLY_WORDS.split())
        return sorted(words)

    def templates(self) -> list[str]:
        """All programs of 1 to 3 hops."""
        return [program.template for hops in range(1, MOST_STANDARD_HOPS + 1) for program in programs(hops)]

    def long_templates(self) -> list[str]:
        """Longer programs (11 or 12 hops) whose solution exceeds 160 tokens: for evaluation only."""
        return [program.template for program in long_programs()]

    def describe(self, template: str) -> dict[str, int | str]:
        """Operator and number of hops of a template, by which splits are stratified."""
        program = parse_program(template)
        return {"operator": program.operator, "hops": len(program.relations)}

    def shortcut(self, template: str) -> str | None:
        """Most demonstrations of counting read the first page only."""
        return "first_page_only" if parse_program(template).operator == "count" else None

    def generate(self, template: str, seed: int, split: Split) -> TaskRecord:
        """A task of the template; the same arguments give the same record.

        Raises ValueError for a template that is not well typed, RuntimeError when no world of this template fits the
        limits (the reference solution needs more tokens or turns than a player may use).
        """
        program = parse_program(template)
        length = "standard" if len(program.relations) <= MOST_STANDARD_HOPS else "long"
        limits = LIMITS[length]
        rng = random.Random(f"{self.name}/{self.generator_version}/{template}/{seed}")
        for _ in range(_ATTEMPTS):
            graph_seed, start = rng.getrandbits(48), rng.choice(ENTITIES[program.domain])
            variant = rng.randrange(len(WORDINGS))
            solution = solve(build_graph(graph_seed), program, start)
            if program.operator == "list" and not solution.objects:
                continue  # an empty list cannot be written as a call
            calls = [
                ToolCall(name="neighbors", arguments={"entity": entity, "relation": relation, "page": page})
                for entity, relation, page in solution.lookups
            ]
            calls.append(ToolCall(name="submit", arguments={"answer": list(solution.answer)}))
            task = TaskRecord.make(
                environment=self.name,
                environment_version=self.version,
                generator_version=self.generator_version,
                seed=seed,
                template=template,
                difficulty={
                    "operator": program.operator,
                    "hops": len(program.relations),
                    "objects": len(solution.objects),
                    "pages": len(pages(solution.objects)),
                    "wording": variant,
                    "length": length,
                },
                messages=[Message(role="user", content=wording(program, start, variant))],
                tools=self.tools(),
                initial_state={"graph_seed": graph_seed, "start": start},
                solution=calls,
                verifier={
                    "kind": self.name,
                    "operator": program.operator,
                    "answer": list(solution.answer),
                    "lookups": [list(lookup) for lookup in solution.lookups],
                },
                limits=limits,
                split=split,
                provenance={"generator": "components.environments.kg_query"},
            )
            tokens = self.reference_tokens(task)
            if len(calls) <= limits.turns and tokens <= limits.tokens:
                return task
        raise RuntimeError(f"kg_query: no task of template {template!r} with seed {seed} fits {limits}")

    def reference_tokens(self, task: TaskRecord) -> int:
        """Words of the careful teacher's whole conversation: what the reference needs of `limits.tokens`."""
        played = self.play(task, "careful", random.Random(0))
        words, _ = conversation_words(played.messages, task.tools)
        return len(words)

    def reset(self, task: TaskRecord) -> GraphEpisode:
        """A fresh episode. Raises ValueError for a task of another family or version."""
        if (task.environment, task.environment_version) != (self.name, self.version):
            raise ValueError(
                f"task {task.id[:12]} is of {task.environment} version {task.environment_version}, "
                f"this is {self.name} version {self.version}; generate the task set again with this version"
            )
        return GraphEpisode(task)

    def random_call(self, task: TaskRecord, rng: random.Random) -> ToolCall:
        if rng.random() < 0.2:
            return ToolCall(name="submit", arguments={"answer": teachers.random_answer(task, rng)})
        entity = rng.choice(list(TYPE_OF))
        relation = rng.choice([r.name for r in RELATIONS.values() if r.domain == TYPE_OF[entity]])
        page = rng.choice([1, 1, 1, 2, 3])
        return ToolCall(name="neighbors", arguments={"entity": entity, "relation": relation, "page": page})

    def wrong_kinds(self, task: TaskRecord) -> list[str]:
        """The wrong behaviours that make sense on this task, in a fixed order."""
        return teachers.wrong_kinds(task, self.reset(task).graph)

    def play(self, task: TaskRecord, kind: str, rng: random.Random) -> Demonstration:
        """The task as the teacher `kind` plays it, judged by the verifier."""
        episode = self.reset(task)
        messages = teachers.play(episode, task, kind, rng)
        return Demonstration(
            task=task.id,
            template=task.template,
            kind=kind,
            passed=episode.verdict().passed,
            messages=messages,
            tools=task.tools,
            split="validation" if task.split == "validation" else "train",
        )

    def document(self, seed: int, split: Split, words: int = documents.WORDS) -> Document:
        """A long text of facts with questions at its end (see documents.py); the same for the same arguments."""
        rng = random.Random(f"{self.name}/document/{split}/{seed}")
        graph = build_graph(rng.getrandbits(48))
        facts = [(s, r, o[0]) for (s, r), o in graph.facts.items() if RELATIONS[r].functional]
        return documents.make_document(self.name, facts, rng, split, words)
