"""The chat format against its own jinja template, as stock libraries read it, and against itself read back."""

import random

import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.environments import chat_format
from components.environments.chat_format import ChatFormatError
from components.environments.kg_query import KnowledgeGraphQuery
from components.runtime.contracts import Message, ToolCall

FAMILY = KnowledgeGraphQuery()
TOOLS = FAMILY.tools()


TEMPLATE = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(chat_format.CHAT_TEMPLATE)


def rendered(messages, tools):
    return TEMPLATE.render(messages=openai_messages(messages), tools=[tool.openai() for tool in tools])


def openai_messages(messages):
    found = []
    for message in messages:
        entry = {"role": message.role, "content": message.content}
        if message.tool_calls:
            entry["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        found.append(entry)
    return found


def call(entity="ada", relation="works_in", page=1):
    return ToolCall(name="neighbors", arguments={"entity": entity, "relation": relation, "page": page})


ODD_CONVERSATIONS = [
    [Message(role="user", content="hello")],
    [Message(role="system", content="be brief"), Message(role="user", content="hello")],
    [Message(role="user", content="hello"), Message(role="assistant", content="ada")],
    [Message(role="user", content="hello"), Message(role="assistant")],
    [
        Message(role="user", content="a"),
        Message(role="assistant", content="3", tool_calls=[call(), call("bruno", page=2)]),
        Message(role="tool", content="core"),
        Message(role="tool", content="data more"),
        Message(role="assistant", tool_calls=[ToolCall(name="submit", arguments={"answer": ["core", "data"]})]),
        Message(role="user", content="and now"),
    ],
]


@pytest.mark.parametrize("messages", ODD_CONVERSATIONS, ids=range(len(ODD_CONVERSATIONS)))
@pytest.mark.parametrize("tools", [TOOLS, []], ids=["tools", "no tools"])
def test_template_says_what_the_python_code_says(messages, tools):
    words, _ = chat_format.conversation_words(messages, tools)
    assert rendered(messages, tools) == " ".join(words)


def demonstrations(number=60):
    rng = random.Random(7)
    for seed in range(number):
        task = FAMILY.generate(rng.choice(FAMILY.templates()), seed, "train")
        kind = rng.choice(["careful", *FAMILY.wrong_kinds(task)])
        yield FAMILY.play(task, kind, rng)


def test_template_on_played_tasks():
    for played in demonstrations():
        for stop in range(1, len(played.messages) + 1):
            words, _ = chat_format.conversation_words(played.messages[:stop], played.tools)
            assert rendered(played.messages[:stop], played.tools) == " ".join(words)


def test_turns_read_back_as_they_were_written():
    for played in demonstrations():
        for message in played.messages:
            if message.role == "assistant":
                assert chat_format.parse_assistant(chat_format.assistant_words(message), played.tools) == message


def test_prompt_and_turns_add_up_to_the_conversation():
    """What a rollout puts together turn by turn is what a training example holds, and the mask marks its turns."""
    for played in demonstrations(20):
        words, by_assistant = chat_format.conversation_words(played.messages, played.tools)
        first = next(i for i, message in enumerate(played.messages) if message.role == "assistant")
        grown = chat_format.prompt_words(played.messages[:first], played.tools)
        mask = [False] * len(grown)
        for before, message in zip([None, *played.messages[first:]], played.messages[first:], strict=False):
            if message.role == "tool":
                added = chat_format.reply_words([message])
            else:
                added = chat_format.assistant_words(message)
            grown += added
            mask += [message.role == "assistant"] * len(added)
            assert before is None or before.role != message.role
        assert grown == words
        assert mask == by_assistant


def test_prompt_must_not_end_with_the_assistant():
    with pytest.raises(ValueError, match="ends with"):
        chat_format.prompt_words([Message(role="assistant", content="x")], TOOLS)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("<|call|> <|end|>", "unknown tool"),
        ("<|call|> neighbours ada <|end|>", "unknown tool"),
        ("<|call|> neighbors ada <|arg|> works_in <|end|>", "takes entity, relation, page"),
        ("<|call|> neighbors a <|arg|> b <|arg|> 1 <|arg|> 2 <|end|>", "takes entity, relation, page"),
        ("<|call|> neighbors a <|arg|> b <|arg|> one <|end|>", "one integer"),
        ("<|call|> neighbors a <|arg|> b <|arg|> 1 2 <|end|>", "one integer"),
        ("<|call|> neighbors <|arg|> b <|arg|> 1 <|end|>", "empty"),
    ],
)
def test_wrong_calls_are_refused_by_name(text, complaint):
    with pytest.raises(ChatFormatError, match=complaint):
        chat_format.parse_assistant(text.split(), TOOLS)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*chat_format.SPECIAL_WORDS, "neighbors", "submit", "ada", "works_in", "1", "-"])))
def test_any_words_parse_or_are_refused(words):
    """Whatever a model writes gives a message or a ChatFormatError, never another exception."""
    try:
        message = chat_format.parse_assistant(words, TOOLS)
    except ChatFormatError:
        return
    assert message.role == "assistant"
    for found in message.tool_calls:
        assert FAMILY.reset(TASK).step(found).content is not None


TASK = FAMILY.generate("works_in/name", 0, "train")


@pytest.mark.slow
def test_stock_transformers_applies_the_template_alike(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = [*chat_format.SPECIAL_WORDS, *FAMILY.vocabulary()]
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=chat_format.UNKNOWN)
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, chat_template=chat_format.CHAT_TEMPLATE, unk_token=chat_format.UNKNOWN
    )
    tokenizer.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tools = [tool.openai() for tool in TOOLS]
    for played in demonstrations(10):
        expected, _ = chat_format.conversation_words(played.messages, played.tools)
        given_text = tokenizer.apply_chat_template(openai_messages(played.messages), tools=tools, tokenize=False)
        assert given_text == " ".join(expected)
        ids = tokenizer(given_text, add_special_tokens=False)["input_ids"]
        assert ids == [words.index(word) for word in expected]
