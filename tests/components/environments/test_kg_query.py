"""kg_query against oracles of its own: networkx on the facts, the prompt read as text, conversations replayed."""

import hashlib
import random
import re
import subprocess
import sys

import networkx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.environments.chat_format import assistant_words, conversation_words, parse_assistant
from components.environments.kg_query import KnowledgeGraphQuery
from components.environments.kg_query.graph import ENTITIES, RELATIONS, TYPE_OF, build_graph
from components.environments.kg_query.programs import parse_program
from components.environments.kg_query.teachers import WRONG_KINDS
from components.environments.kg_query.verifier import verify
from components.environments.protocol import environment
from components.runtime.contracts import Message, ToolCall

FAMILY = KnowledgeGraphQuery()
TEMPLATES = FAMILY.templates()
SETTINGS = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
tasks = st.builds(
    lambda template, seed: FAMILY.generate(template, seed, "train"),
    st.sampled_from(TEMPLATES),
    st.integers(0, 2**40),
)


def network(task):
    """The facts as networkx sees them; edges keep the order in which the tool lists objects."""
    graph = networkx.MultiDiGraph()
    for (subject, relation), objects in build_graph(task.initial_state["graph_seed"]).facts.items():
        for target in objects:
            graph.add_edge(subject, target, relation=relation)
    return graph


def read_prompt(task):
    """Start, relations and operator from the user's words alone."""
    (message,) = task.messages
    words = message.content.split()
    start = next(word for word in words if word in TYPE_OF)
    relations = [word for word in words if word in RELATIONS]
    (operator,) = [word for word in words if word in ("name", "count", "list")]
    return start, relations, operator


def oracle_answer(task):
    graph = network(task)
    start, relations, operator = read_prompt(task)
    reached = {start}
    for relation in relations:
        reached = {
            target
            for node in reached
            if node in graph
            for _, target, data in graph.out_edges(node, data=True)
            if data["relation"] == relation
        }
    return str(len(reached)) if operator == "count" else reached


def test_installed_as_a_plug_in():
    assert isinstance(environment("kg_query"), KnowledgeGraphQuery)
    with pytest.raises(ValueError, match="kg_query"):
        environment("no_such_family")


@SETTINGS
@given(tasks)
def test_answer_is_what_networkx_finds(task):
    expected = oracle_answer(task)
    if isinstance(expected, str):
        assert task.verifier["answer"] == [expected]
    else:
        assert set(task.verifier["answer"]) == expected
        assert len(task.verifier["answer"]) == len(expected) >= 1


@SETTINGS
@given(tasks)
def test_reference_passes_and_is_minimal(task):
    episode = FAMILY.reset(task)
    for call in task.solution:
        assert not episode.step(call).is_error
    assert episode.verdict().passed
    for left_out in range(len(task.solution)):
        episode = FAMILY.reset(task)
        for i, call in enumerate(task.solution):
            if i != left_out:
                episode.step(call)
        assert not episode.verdict().passed


@SETTINGS
@given(tasks, st.sampled_from(["careful", *WRONG_KINDS]), st.integers(0, 2**32))
def test_demonstrations_are_labelled_by_what_they_do(task, kind, seed):
    """Read back from its words and played again, a demonstration gets the same replies and the verdict it claims."""
    if kind != "careful" and kind not in FAMILY.wrong_kinds(task):
        return
    played = FAMILY.play(task, kind, random.Random(seed))
    assert played.messages[: len(task.messages)] == task.messages
    episode = FAMILY.reset(task)
    for before, message in zip(played.messages, played.messages[1:], strict=False):
        if message.role == "tool":
            (call,) = parse_assistant(assistant_words(before), played.tools).tool_calls
            assert episode.step(call).content == message.content
    (call,) = played.messages[-1].tool_calls
    assert episode.step(call).done
    submitted = call.arguments["answer"]
    assert episode.verdict().passed == played.passed
    expected = oracle_answer(task)
    value_right = (
        submitted == [expected]
        if isinstance(expected, str)
        else len(submitted) == len(expected) and set(submitted) == expected
    )
    assert value_right or not played.passed
    if kind != "guesses":  # a guesser that looked once may have seen the answer of a program of one hop
        assert played.passed == (kind == "careful")
    words, _ = conversation_words(played.messages, played.tools)
    assert len(words) <= task.limits.tokens == 160
    assert {word for word in words if not word.startswith("<|")} <= set(FAMILY.vocabulary())


def test_teachers_do_what_their_names_say():
    """Look-ups of each teacher on one task of 3 hops with 2 pages and more."""
    task = next(
        task
        for seed in range(200)
        if (task := FAMILY.generate(["lives_in", "twinned_with/powered_by/offices/count"][1], seed, "train"))
        and task.difficulty["pages"] > 1
    )

    def looked(kind):
        messages = FAMILY.play(task, kind, random.Random(3)).messages
        calls = [call for message in messages for call in message.tool_calls]
        return [(c.arguments["relation"], c.arguments["page"]) for c in calls if c.name == "neighbors"]

    path = [("twinned_with", 1), ("powered_by", 1)]
    pages = [("offices", page) for page in range(1, task.difficulty["pages"] + 1)]
    assert looked("careful") == path + pages
    assert looked("first_page_only") == [*path, ("offices", 1)]
    assert looked("stops_early") == path
    assert ("twinned_with", 1) not in looked("skips_hop")
    assert [relation for relation, page in looked("wrong_relation") if page == 1] != [r for r, _ in [*path, pages[0]]]
    assert len(looked("guesses")) <= 1


def test_careful_counts_aloud():
    """The running total stands before each further call: 3, 6, then the answer."""
    for seed in range(60):
        task = FAMILY.generate("works_in/advisers/count", seed, "train")
        messages = FAMILY.play(task, "careful", random.Random(0)).messages
        contents = [message.content for message in messages if message.role == "assistant"]
        count = int(oracle_answer(task))
        totals = [str(min(3 * page, count)) for page in range(1, task.difficulty["pages"] + 1)]
        assert contents == ["", "", *totals]


def test_each_wrong_kind_applies_to_a_good_share_of_tasks():
    rng = random.Random(0)
    found = [
        kind for i in range(300) for kind in FAMILY.wrong_kinds(FAMILY.generate(rng.choice(TEMPLATES), i, "train"))
    ]
    assert {kind: found.count(kind) >= 60 for kind in WRONG_KINDS} == dict.fromkeys(WRONG_KINDS, True)


def test_programs_are_well_typed_and_many():
    assert len(TEMPLATES) == len(set(TEMPLATES)) >= 300
    for template in [*TEMPLATES, *FAMILY.long_templates()]:
        *relations, operator = template.split("/")
        domain = RELATIONS[relations[0]].domain
        for relation in relations:
            assert RELATIONS[relation].domain == domain
            domain = RELATIONS[relation].range
        assert all(RELATIONS[relation].functional for relation in relations[:-1])
        assert RELATIONS[relations[-1]].functional == (operator == "name")
        assert parse_program(template).template == template
    kinds = {(template.count("/"), template.rsplit("/", 1)[1]) for template in TEMPLATES}
    assert kinds == {(hops, operator) for hops in (1, 2, 3) for operator in ("name", "count", "list")}


def test_all_programs_of_two_hops_are_there():
    expected = {
        f"{first.name}/{second.name}/{operator}"
        for first in RELATIONS.values()
        for second in RELATIONS.values()
        for operator in ("name", "count", "list")
        if first.functional
        and first.range == second.domain
        and first is not second
        and second.functional == (operator == "name")
    }
    assert {template for template in TEMPLATES if template.count("/") == 2} == expected


@pytest.mark.parametrize(
    "template",
    [
        "",
        "name",
        "works_in",
        "works_at/name",
        "works_in/count",
        "offices/name",
        "works_in/offices/count",
        "uses/buyers/list",
    ],
)
def test_wrong_templates_are_refused(template):
    with pytest.raises(ValueError, match="kg_query template"):
        FAMILY.generate(template, 0, "train")


def test_worlds_are_typed_and_differ():
    first, second = build_graph(1), build_graph(2)
    assert first.facts.keys() == {(s, r.name) for r in RELATIONS.values() for s in ENTITIES[r.domain]}
    counts = []
    for graph in (first, second):
        for (subject, name), objects in graph.facts.items():
            relation = RELATIONS[name]
            assert TYPE_OF[subject] == relation.domain
            assert {TYPE_OF[target] for target in objects} <= {relation.range}
            assert subject not in objects
            assert len(set(objects)) == len(objects)
            if relation.functional:
                assert len(objects) == 1
            else:
                counts.append(len(objects))
    assert min(counts) == 0
    assert max(counts) == 8
    assert sum(1 <= count <= 6 for count in counts) > 0.7 * len(counts)
    functional = [key for key in first.facts if RELATIONS[key[1]].functional]
    same = sum(first.facts[key] == second.facts[key] for key in functional)
    assert same < 0.2 * len(functional)
    assert first.digest != second.digest
    assert len(TYPE_OF) == sum(len(names) for names in ENTITIES.values()) == 64


def look(entity, relation, page):
    return ToolCall(name="neighbors", arguments={"entity": entity, "relation": relation, "page": page})


def submit(*answer):
    return ToolCall(name="submit", arguments={"answer": list(answer)})


def test_paging_shows_every_object_once_in_a_fixed_order():
    task = FAMILY.generate("offices/list", 0, "train")
    facts = build_graph(task.initial_state["graph_seed"]).facts
    for (subject, relation), objects in facts.items():
        episode, shown, page, more = FAMILY.reset(task), [], 1, True
        while more:
            words = episode.step(look(subject, relation, page)).content.split()
            more = words[-1] == "more"
            words = words[:-1] if more else words
            assert len(words) <= 3
            shown += [] if words == ["none"] else words
            page += 1
        assert tuple(shown) == objects
        assert page - 1 == max(1, -(-len(objects) // 3))
        assert episode.step(look(subject, relation, page)).content == "error unknown page"


@pytest.mark.parametrize(
    "call, reply",
    [
        (look("nobody", "works_in", 1), "error unknown entity"),
        (look("ada bruno", "works_in", 1), "error unknown entity"),
        (look(["ada"], "works_in", 1), "error unknown entity"),
        (look("ada", "offices", 1), "error unknown relation"),
        (look("ada", "", 1), "error unknown relation"),
        (look("ada", None, 1), "error unknown relation"),
        (look("ada", "works_in", 2), "error unknown page"),
        (look("ada", "works_in", 0), "error unknown page"),
        (look("ada", "works_in", -1), "error unknown page"),
        (look("ada", "works_in", True), "error unknown page"),
        (look("ada", "works_in", "1"), "error unknown page"),
        (ToolCall(name="neighbors", arguments={"entity": "ada"}), "error unknown arguments"),
        (ToolCall(name="submit", arguments={}), "error unknown arguments"),
        (ToolCall(name="delete", arguments={}), "error unknown tool"),
    ],
)
def test_wrong_calls_come_back_as_data(call, reply):
    task = FAMILY.generate("works_in/name", 0, "train")
    episode = FAMILY.reset(task)
    observation = episode.step(call)
    assert (observation.content, observation.is_error, observation.done) == (reply, True, False)
    assert set(reply.split()) <= set(FAMILY.vocabulary())
    for right in task.solution:  # the episode goes on
        observation = episode.step(right)
    assert observation.done
    assert episode.verdict().passed
    assert episode.step(submit("ada")).is_error
    assert episode.verdict().passed


VERIFIER = {"kind": "kg_query", "answer": ["a", "b", "c"], "lookups": [["x", "r", 1], ["x", "r", 2]]}
READ = {("x", "r", 1), ("x", "r", 2), ("y", "r", 1)}


@pytest.mark.parametrize(
    "operator, answer, submission, right",
    [
        ("list", ["a", "b", "c"], ["c", "a", "b"], True),
        ("list", ["a", "b", "c"], ["a", "b"], False),
        ("list", ["a", "b", "c"], ["a", "b", "c", "d"], False),
        ("list", ["a", "b", "c"], ["a", "b", "c", "c"], False),
        ("list", ["a"], [], False),
        ("name", ["a"], ["a"], True),
        ("name", ["a"], ["a", "a"], False),
        ("name", ["a"], ["b"], False),
        ("name", ["a"], [], False),
        ("count", ["7"], ["7"], True),
        ("count", ["7"], ["07"], True),
        ("count", ["7"], ["٧"], False),
        ("count", ["7"], ["7.0"], False),
        ("count", ["7"], ["-7"], False),
        ("count", ["7"], ["8"], False),
        ("count", ["7"], ["seven"], False),
        ("count", ["0"], ["none"], False),
        ("count", ["7"], ["7", "7"], False),
    ],
)
def test_verifier_compares_values(operator, answer, submission, right):
    verifier = {**VERIFIER, "operator": operator, "answer": answer}
    assert verify(verifier, submission, READ).passed == right
    assert not verify(verifier, submission, READ - {("x", "r", 2)}).passed  # a page unread: guessed
    assert not verify(verifier, None, READ).passed


@pytest.mark.parametrize("given_answer", [["7"], [7], 7, "7"])
def test_submitted_numbers_may_be_numbers(given_answer):
    task = next(
        t for seed in range(500) if (t := FAMILY.generate("offices/count", seed, "train")).verifier["answer"] == ["7"]
    )
    episode = FAMILY.reset(task)
    for call in task.solution[:-1]:
        episode.step(call)
    episode.step(ToolCall(name="submit", arguments={"answer": given_answer}))
    assert episode.verdict().passed


def test_state_is_a_value():
    task, other = FAMILY.generate("works_in/name", 0, "train"), FAMILY.generate("works_in/name", 1, "train")
    first, second = FAMILY.reset(task), FAMILY.reset(task)
    seen = [first.state_hash()]
    assert second.state_hash() == seen[0] != FAMILY.reset(other).state_hash()
    for call in [look("ada", "works_in", 1), look("ada", "works_in", 1), look("bruno", "works_in", 1), submit("core")]:
        first.step(call)
        second.step(call)
        assert first.state_hash() == second.state_hash()
        seen.append(first.state_hash())
    assert len(set(seen)) == len(seen)
    third = FAMILY.reset(task)
    third.step(look("ada", "works_in", 2))
    assert third.state_hash() != seen[1]  # another call, as many calls


def test_same_seed_same_records_in_another_process():
    """Neither the hash seed of the interpreter nor what ran before changes a record."""
    program = """
import hashlib, random
from components.environments.kg_query import KnowledgeGraphQuery
family, text = KnowledgeGraphQuery(), ""
for seed, template in enumerate(family.templates()[::40]):
    task = family.generate(template, seed, "test")
    text += task.id + "".join(
        family.play(task, kind, random.Random(seed)).model_dump_json() for kind in family.wrong_kinds(task)
    ) + family.document(seed, "train").model_dump_json()
print(hashlib.sha256(text.encode()).hexdigest(), task.id == task.identity())
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().endswith("True\n")


def test_another_version_is_refused():
    task = FAMILY.generate("works_in/name", 0, "train")
    with pytest.raises(ValueError, match="version 0"):
        FAMILY.reset(task.model_copy(update={"environment_version": "0"}))


def test_long_tasks_exceed_the_training_length():
    for template in FAMILY.long_templates():
        task = FAMILY.generate(template, 5, "test")
        assert task.difficulty["length"] == "long"
        assert 160 < FAMILY.reference_tokens(task) <= task.limits.tokens
        assert len(task.solution) <= task.limits.turns
        expected = oracle_answer(task)
        assert task.verifier["answer"] == [expected] or set(task.verifier["answer"]) == expected


def test_random_calls_are_known_tools_and_words():
    task, rng = FAMILY.generate("advisers/list", 0, "train"), random.Random(0)
    replies = [FAMILY.reset(task).step(FAMILY.random_call(task, rng)) for _ in range(300)]
    assert any(reply.done for reply in replies)
    assert any(not reply.done and not reply.is_error for reply in replies)
    assert all(set(reply.content.split()) <= set(FAMILY.vocabulary()) for reply in replies)


@pytest.mark.parametrize("words", [172, 272, 701])
def test_documents_answer_their_questions(words):
    """Read as text: the sentence at the evidence says what the question asks, and nothing else answers it."""
    far = []
    for seed in range(30):
        document = FAMILY.document(seed, "train", words)
        assert words - 3 <= len(document.words) <= words
        text = " ".join(document.words)
        told = re.findall(r"(?:^|(?<=\. ))(\w+) (\w+) (\w+) \.", text.split(" ? ")[0])
        facts = {(subject, relation): target for subject, relation, target in told}
        assert len(facts) == len(told)
        assert 8 <= len(document.questions) <= 12
        assert text.count("?") == len(document.questions)
        for question in document.questions:
            at = question.answer_start
            subject, relation = document.words[at - 2 : at]
            assert document.words[at - 3] == "?"
            assert [document.words[i] for i in question.evidence] == [subject, relation, facts[subject, relation]]
            assert document.words[at : question.answer_end] == [facts[subject, relation]]
            assert max(question.evidence) < text.split(" ? ")[0].count(" ") + 1
            far.append(at - question.evidence[0] >= 64)
        assert document == FAMILY.document(seed, "train", words)
        assert document.id == hashlib.sha256(repr_json(document.words)).hexdigest()
    assert sum(far) / len(far) > 0.8


def repr_json(words):
    return ("[" + ",".join(f'"{word}"' for word in words) + "]").encode()


@pytest.mark.parametrize("words", [0, 17, 109, 150, 5000])
def test_impossible_document_lengths_are_refused(words):
    with pytest.raises(ValueError, match="18 to 108 or 172 to 768 words"):
        FAMILY.document(0, "train", words)


@pytest.mark.parametrize("words", [18, 54, 108])
def test_a_short_document_asks_for_every_fact_and_no_single_word_finds_an_answer(words):
    document = FAMILY.document(3, "train", words)
    facts = [tuple(document.words[q.evidence[0] : q.evidence[0] + 3]) for q in document.questions]
    assert words - 8 <= len(document.words) <= words
    assert len(set(facts)) == len(facts) == words // 9
    for question, (subject, relation, answer) in zip(document.questions, facts, strict=True):
        start = question.answer_start
        assert document.words[start - 2 : question.answer_end] == [subject, relation, answer]
    if words > 18:
        assert len({subject for subject, _, _ in facts}) < len(facts)


def test_messages_do_not_hint_at_the_teacher():
    """All teachers get the same prompt, so that only reward tells them apart."""
    task = FAMILY.generate("works_in/part_of/offices/count", 3, "train")
    openings = {
        tuple(message.model_dump_json() for message in FAMILY.play(task, kind, random.Random(0)).messages[:1])
        for kind in ["careful", *FAMILY.wrong_kinds(task)]
    }
    assert len(openings) == 1
    assert [Message.model_validate_json(text) for text in openings.pop()] == task.messages
