"""Records -> tokens: what is trained on, in which order, and what is refused."""

import pytest
import torch

from components.environments.chat_format import SPECIAL_WORDS, UNKNOWN
from components.pretraining.config import PhaseConfig
from components.pretraining.data import Example, Stream, demonstration_example, document_example, pack
from components.pretraining.optimizers import curriculum_share, learning_rate_share
from components.runtime.contracts import Demonstration, Document, Message, Question, ToolCall
from components.runtime.errors import InputError

WORDS = ["ada", "works_in", "core", "?", ".", "go", "look", "at"]
IDS = {word: index for index, word in enumerate([*SPECIAL_WORDS, *WORDS])}


def words_of(example: Example) -> list[str]:
    names = {index: word for word, index in IDS.items()}
    return [names[int(token)] for token in example.token_ids]


def test_only_what_the_assistant_wrote_is_trained_on():
    messages = [
        Message(role="user", content="go"),
        Message(role="assistant", tool_calls=[ToolCall(name="look", arguments={"at": "ada"})]),
        Message(role="tool", content="core"),
        Message(role="assistant", content="core"),
    ]
    record = Demonstration(
        task="t", template="x", kind="careful", passed=True, messages=messages, tools=[], split="train"
    )
    example = demonstration_example(record, IDS)
    trained = [word for word, weight in zip(words_of(example), example.weights, strict=True) if weight == 1]
    assert trained == ["<|call|>", "look", "ada", "<|end|>", "core", "<|end|>"]


def test_answers_weigh_one_and_other_words_of_a_document_less():
    words = ["ada", "works_in", "core", ".", "?", "ada", "works_in", "core", "."]
    document = Document(
        id="d", words=words, questions=[Question(answer_start=7, answer_end=8, evidence=[0, 1, 2])], split="train"
    )
    example = document_example(document, IDS, 0.25)
    assert words_of(example)[8] == "core"
    assert example.weights.tolist() == [0.25] * 8 + [1.0] + [0.25]
    batch = pack([example])
    assert batch.lengths == [9]
    assert int(batch.targets_T[7]) == IDS["core"]
    assert float(batch.weights_T[7]) == 1.0


def test_an_unknown_word_is_refused_by_name():
    document = Document(id="d", words=["zebra"], questions=[], split="train")
    with pytest.raises(InputError, match="zebra"):
        document_example(document, {word: i for word, i in IDS.items() if word != UNKNOWN}, 0.1)


def examples(count: int) -> list[Example]:
    return [Example(torch.full((3 + index % 17,), index), torch.ones(3 + index % 17)) for index in range(count)]


def test_an_epoch_holds_every_example_once_within_the_token_budget():
    stream = Stream(examples(300), 40, torch.Generator().manual_seed(0))
    first = stream.next()
    seen = [first]
    while stream._parts:
        seen.append(stream.next())
    assert sorted(int(example.token_ids[0]) for batch in seen for example in batch) == list(range(300))
    assert max(sum(pack(batch).lengths) for batch in seen) <= 40


def test_the_order_follows_from_the_seed():
    def order(seed):
        stream = Stream(examples(50), 40, torch.Generator().manual_seed(seed))
        return [pack(stream.next()).inputs_T.tolist() for _ in range(20)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_the_curriculum_starts_with_the_shortest():
    stream = Stream(examples(170), 60, torch.Generator().manual_seed(0))
    early = [max(pack(stream.next(0.25)).lengths) for _ in range(10)]
    late = [max(pack(stream.next(1.0)).lengths) for _ in range(30)]
    assert max(early) <= 6
    assert max(late) == 18


def test_schedules():
    phase = PhaseConfig(steps=100, learning_rate=1.0, warmup_steps=10, final_share=0.1, curriculum=0.5)
    shares = [learning_rate_share(step, phase) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == pytest.approx(1.0)
    assert shares[-1] == pytest.approx(0.1, abs=0.01)
    assert curriculum_share(0, phase) == 0.125
    assert [curriculum_share(step, phase) for step in (49, 99)] == [1.0, 1.0]
