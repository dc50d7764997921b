"""What holds for every family of look-up tools, and each family's answers against a solver that reads the question.

The solvers here know the words of the prompt and the raw facts of the world, and nothing of the family's programs.
"""

import random
import re

import pytest

from components.environments.chat_format import conversation_words
from components.environments.grammar import CompiledEnvironments
from components.environments.grammar.definitions import ENVIRONMENTS, compile_environment, designs
from components.environments.grammar.world import build_world as build_compiled
from components.environments.internal_api import InternalApi
from components.environments.internal_api.library import build_library
from components.environments.internal_api.programs import parse_program as parse_api_program
from components.environments.ledger_tieout import LedgerTieout
from components.environments.ledger_tieout.company import SECTIONS, build_company
from components.environments.ledger_tieout.report import render
from components.environments.trip_planning import TripPlanning
from components.environments.trip_planning.world import build_world as build_trips
from components.runtime.contracts import ToolCall
from components.synthesis.battery import Battery, constant_submissions
from tests.components.environments.marks import runs_code

FAMILIES = {family.name: family for family in (TripPlanning(), LedgerTieout(), CompiledEnvironments(), InternalApi())}


def tasks_of(family, number, seed=0):
    rng = random.Random(seed)
    templates = family.templates()
    return [family.generate(rng.choice(templates), rng.getrandbits(32), "train") for _ in range(number)]


class Tasks(dict):
    """Tasks of a family, made when they are first asked for."""

    def __missing__(self, name):
        self[name] = tasks_of(FAMILIES[name], 60 if name == "internal_api" else 150)
        return self[name]


@pytest.fixture(scope="module")
def tasks():
    return Tasks()


every_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=runs_code) if name == "internal_api" else name for name in sorted(FAMILIES)]
)


@every_family
def test_the_careful_teacher_is_right_within_the_limits_and_the_others_are_wrong(name, tasks):
    family = FAMILIES[name]
    words = set(family.vocabulary())
    long = [family.generate(template, 3, "test") for template in family.long_templates()[:6]]
    lucky = played = 0
    for task in [*tasks[name], *long]:
        careful = family.play(task, "careful", random.Random(0))
        assert careful.passed
        text, _ = conversation_words(careful.messages, careful.tools)
        assert len(text) <= task.limits.tokens
        assert sum(message.role == "assistant" for message in careful.messages) <= task.limits.turns
        for kind in family.wrong_kinds(task):
            wrong = family.play(task, kind, random.Random(1))
            assert wrong.kind == kind
            played, lucky = played + 1, lucky + wrong.passed
            text += conversation_words(wrong.messages, wrong.tools)[0]
            assert kind != "guesses" or not wrong.passed
        assert {word for word in text if not word.startswith("<|")} <= words
    assert lucky < 0.1 * played  # drawn again by synthesis


@every_family
def test_a_third_of_the_templates_has_a_shortcut_that_fails_where_it_applies(name, tasks):
    family = FAMILIES[name]
    kinds = {}
    for template in family.templates():
        about = family.describe(template)
        kinds.setdefault((about["operator"], about["hops"]), []).append(family.shortcut(template) is not None)
    share = sum(sum(found) / len(found) for found in kinds.values()) / len(kinds)  # synthesis draws kinds alike
    assert 0.3 < share < 0.42
    with_shortcut = [task for task in tasks[name] if family.shortcut(task.template)]
    applies = [task for task in with_shortcut if family.shortcut(task.template) in family.wrong_kinds(task)]
    assert len(applies) > 0.5 * len(with_shortcut) > 0
    passed = [family.play(task, family.shortcut(task.template), random.Random(2)).passed for task in applies]
    assert sum(passed) <= 0.1 * len(passed)


@every_family
def test_generation_is_a_function_of_its_arguments_and_templates_are_many(name):
    family = FAMILIES[name]
    templates = family.templates()
    assert len(set(templates)) == len(templates) >= 80
    assert family.generate(templates[3], 5, "train") == family.generate(templates[3], 5, "train")
    assert family.generate(templates[3], 5, "train").id != family.generate(templates[3], 6, "train").id
    for unknown in ("nothing", "", templates[0] + "/more"):
        with pytest.raises(ValueError, match="template"):
            family.generate(unknown, 0, "train")


@every_family
def test_the_battery_keeps_nearly_all(name, tasks):
    family = FAMILIES[name]
    battery = Battery(family, constant_submissions(tasks[name]), 12, 3)
    kept = sum(battery.keeps(task) for task in tasks[name])
    assert kept >= 0.95 * len(tasks[name]), battery.removed
    assert battery.report()["mutants_failed_share"] > 0.98


@every_family
def test_what_is_wrong_with_a_call_is_an_observation(name, tasks):
    family, task = FAMILIES[name], tasks[name][0]
    episode = family.reset(task)
    first = task.solution[0]
    wrong = [
        ToolCall(name="fly", arguments={}),
        ToolCall(name=first.name, arguments={}),
        ToolCall(name=first.name, arguments={**first.arguments, "more": 1}),
        ToolCall(name=first.name, arguments=dict.fromkeys(first.arguments, True)),
        ToolCall(name=first.name, arguments=dict.fromkeys(first.arguments, "nobody")),
    ]
    before = episode.state_hash()
    for call in wrong:
        observation = episode.step(call)
        assert observation.is_error
        assert observation.content.startswith("error ")
        assert not observation.done
    assert episode.state_hash() != before
    assert episode.step(task.solution[-1]).done
    assert episode.step(first).content == "error answer was given"
    assert episode.verdict().reward == 0.0  # the answer is right, and guessed
    with pytest.raises(ValueError, match="generate the task set again"):
        family.reset(task.model_copy(update={"environment_version": "0"}))


def prompt(task):
    return task.messages[0].content.split()


def evaluate_rule(words, world, city):
    """The place that a rule in words leads to; consumes the words."""
    word = words.pop(0)
    if word != "if":
        return word
    value = words.pop(0)
    if value in ("sun", "rain", "snow", "fog"):
        holds = world.weather[city] == value
    else:
        asked = words.pop(0)
        table = world.status if asked in ("open", "closed") else world.price
        holds = table[city, value] == asked
    assert words.pop(0) == "then"
    yes = evaluate_rule(words, world, city)
    assert words.pop(0) == "else"
    no = evaluate_rule(words, world, city)
    return yes if holds else no


def test_trip_planning_answers_what_its_words_say(tasks):
    for task in tasks["trip_planning"]:
        world, words = build_trips(task.initial_state["world_seed"]), prompt(task)
        city = next(word for word in words if (word, "train") in world.travel)
        for mode in re.findall(r"take (\w+)", task.messages[0].content):
            city = world.travel[city, mode]
        assert [evaluate_rule(words[words.index("if") :], world, city), city] == task.solution[-1].arguments["answer"]


def test_ledgers_balance_and_reports_state_what_is_told():
    faults = 0
    for seed in range(40):
        company = build_company(seed)
        total = {name: sum(company.ledger[line] for line in lines) for name, lines in SECTIONS.items()}
        assert total["liquid"] + total["fixed"] == total["due"] + total["loans"] + total["equity"]
        assert company.ledger["profit"] == total["income"] - total["expenses"]
        assert all(company.ledger[name] == amount for name, amount in total.items())
        assert all(0 < amount < 10_000 for pages in company.stated.values() for amount in pages.values())
        wrong = {
            (account, page)
            for account, pages in company.stated.items()
            for page, amount in pages.items()
            if amount != company.ledger[account]
        }
        assert wrong == {(fault.account, fault.page) for fault in company.faults}
        faults += len(wrong)
    assert faults > 40 * 20
    company, pages = build_company(7), render(build_company(7), 7)
    assert sum(len(text.split()) for text in pages.values()) > 3000
    for account, stated in company.stated.items():
        for page, amount in stated.items():
            assert re.search(rf"\b{account}\b.*\b{amount}\b|\b{amount}\b.*\b{account}\b", pages[page])


def test_ledger_tieout_answers_what_its_words_say(tasks):
    for task in tasks["ledger_tieout"]:
        company, words = build_company(task.initial_state["world_seed"]), prompt(task)
        account = next(word for word in words if word in company.ledger)
        for relation in re.findall(r"\bits (\w+)", task.messages[0].content):
            if relation == "largest":
                account = sorted(SECTIONS[account], key=lambda line: company.ledger[line])[-1]
            elif relation == "section":
                (account,) = (name for name, lines in SECTIONS.items() if account in lines)
            else:
                account = company.look("related", (account, relation))
        answer = ledger_answer(words[-1], company.stated[account], company.ledger[account])
        assert [str(word) for word in answer] == task.solution[-1].arguments["answer"]


def ledger_answer(asked, stated, true):
    amounts = list(stated.values())
    if asked == "pages":
        return [len(amounts)]
    if asked in ("booked", "first", "last"):
        return divmod({"booked": true, "first": amounts[0], "last": amounts[-1]}[asked], 100)
    if asked == "agree":
        return [amounts.count(true)]
    assert asked == "locate"
    return [page for page, amount in stated.items() if amount != true] or ["none"]


def test_compiled_environments_answer_what_their_words_say(tasks):
    for task in tasks["compiled"]:
        number = int(task.template[3:6])
        world, words = build_compiled(number, task.initial_state["world_seed"]), prompt(task)
        definition = compile_environment(number)
        if definition.code in words and definition.code:
            entity = world.by_code[words[words.index(definition.code) + 1]]
        else:
            entity = next(word for word in words if word in world.lists)
        listed = None
        for word in words:
            if word in definition.relations:
                entity = world.facts[entity, word]
            listed = world.lists[entity] if word == definition.listing else listed
        answer = task.solution[-1].arguments["answer"]
        if listed is None:
            assert answer == [entity]
        else:
            assert answer == [str(len(listed))] or sorted(answer) == sorted(listed)
            assert (answer == [str(len(listed))]) == (task.difficulty["operator"] == "count")


def test_no_two_environments_have_the_same_tools_even_without_names():
    assert ENVIRONMENTS >= 240
    assert len({design.signatures() for design in designs()}) == len(designs()) >= ENVIRONMENTS
    seen = set()
    for number in range(ENVIRONMENTS):
        kinds = []
        for tool in compile_environment(number).tools():
            kinds.append((tuple(tool.input_schema["properties"]), tool.description.split()[0] in ("All", "At")))
        seen.add((tuple(sorted(kinds)), compile_environment(number).design.signatures()))
    assert len(seen) == ENVIRONMENTS
    assert len(compile_environment(5000).tools()) >= 2  # beyond the list, any number compiles


@runs_code
def test_internal_api_answers_what_its_library_computes(tasks):
    for task in tasks["internal_api"]:
        program = parse_api_program(task.template)
        library = build_library(task.initial_state["world_seed"], program.path, program.traps)
        module: dict = {}
        exec(library.source, module)
        values = {(program.path[0],): int(re.search(r" (\d+) ", task.messages[0].content).group(1))}
        for takes, gives in zip(program.path, program.path[1:], strict=False):
            (right,) = (
                name
                for name, function in library.functions.items()
                if (function.takes, function.gives) == (takes, gives) and "deprecated" not in module[name].__doc__
            )
            (value,) = values.values()
            values = {(gives,): module[right](value)}
        assert [repr(next(iter(values.values())))] == task.solution[-1].arguments["answer"]
        assert set(task.messages[0].content.split()) >= set(program.path)


@runs_code
def test_the_right_number_without_the_right_program_earns_nothing(tasks):
    family, task = FAMILIES["internal_api"], tasks["internal_api"][0]
    answer = task.solution[-1].arguments["answer"][0]
    docs = [call for call in task.solution if call.name == "doc"]
    cheat = ToolCall(name="run", arguments={"program": ["print", "(", answer, ")"]})
    episode = family.reset(task)
    for call in [*docs, cheat, task.solution[-1]]:
        observation = episode.step(call)
    assert observation.done
    assert episode.verdict().reason == "guessed: no program of the right calls was run"


@pytest.mark.parametrize("words", [54, 108, 180, 272])
def test_audit_documents_ask_for_facts_that_they_state(words):
    family = FAMILIES["ledger_tieout"]
    vocabulary = set(family.vocabulary())
    for seed in range(20):
        document = family.document(seed, "train", words)
        assert document == family.document(seed, "train", words)
        assert words - 8 <= len(document.words) <= words
        assert set(document.words) <= vocabulary | {"."}
        for question in document.questions:
            asked = document.words[question.answer_start - 2 : question.answer_end]
            assert [document.words[place] for place in question.evidence] == asked
