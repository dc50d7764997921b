"""The real server, over HTTP, through the official client."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from components.environments.chat_format import END, SPECIAL_WORDS, prompt_words
from components.environments.kg_query import KnowledgeGraphQuery
from components.runtime.contracts import Message
from components.runtime.errors import InputError
from components.serving.__main__ import listen, serve

TOOLS = KnowledgeGraphQuery().tools()
QUESTION = "from ada follow works_in give name"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
OPENAI_TOOLS: Any = [tool.openai() for tool in TOOLS]
WORDS_INDEX = {word: i for i, word in enumerate([*SPECIAL_WORDS, *KnowledgeGraphQuery().vocabulary()])}
PROMPT = prompt_words([Message(role="user", content=QUESTION)], TOOLS)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    request: dict[str, Any] = {"model": "micro", "messages": MESSAGES, "tools": OPENAI_TOOLS, "max_tokens": 12}
    return client.chat.completions.create(**{**request, "seed": 1, **options})


def gauges(url: str) -> dict[str, float]:
    text = urllib.request.urlopen(url.replace("/v1", "/metrics")).read().decode()
    return {
        sample.name + str(sample.labels.get("finished_reason", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["micro"]
    assert client.models.retrieve("micro").id == "micro"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("other/model")


def test_greedy_answer_and_its_logprobs_are_the_models(
    client: openai.OpenAI, next_token_oracle: Callable[[list[str]], torch.Tensor]
) -> None:
    answer = ask(client, temperature=0, logprobs=True)
    words = list(PROMPT)
    for token in answer.choices[0].logprobs.content:
        logprobs = next_token_oracle(words).log_softmax(dim=-1)
        assert token.logprob == pytest.approx(float(logprobs.max()), abs=1e-4)
        words.append(token.token)
        best = next_token_oracle(words[:-1]).argmax()
        assert int(best) == WORDS_INDEX[token.token]
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == len(words) - len(PROMPT)
    assert answer.usage.total_tokens == len(words)
    assert answer.choices[0].finish_reason == ("stop" if words[-1] == END else "length")


def test_streaming_gives_the_same_answer_and_usage(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert content == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_seed_decides(client: openai.OpenAI) -> None:
    first, again, other = (ask(client, seed=seed).choices[0].message.content for seed in (5, 5, 6))
    assert first == again != other


def test_requests_in_one_batch_get_what_they_get_alone(server_url: str, client: openai.OpenAI) -> None:
    alone = [ask(client, seed=seed).choices[0].message.content for seed in range(6)]

    async def together() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server_url, api_key="none", max_retries=0) as many:
            return await asyncio.gather(*(ask(many, seed=seed) for seed in range(6)))  # type: ignore[arg-type]

    assert [answer.choices[0].message.content for answer in asyncio.run(together())] == alone


def test_a_full_server_refuses_and_clients_that_leave_make_room(server_url: str, client: openai.OpenAI) -> None:
    async def wait_for(**expected: float) -> None:
        deadline = time.monotonic() + 20
        while True:
            found = await asyncio.to_thread(gauges, server_url)
            if all(found[f"sparseline_num_requests_{name}"] == value for name, value in expected.items()):
                return
            assert time.monotonic() < deadline, (expected, found)
            await asyncio.sleep(0.02)  # between two looks; the condition above decides

    async def crowd() -> None:
        # greedily this model goes round in circles and never ends its turn: these run until they are cancelled
        long: dict[str, Any] = {"max_tokens": 4000, "temperature": 0}
        async with openai.AsyncOpenAI(base_url=server_url, api_key="none", max_retries=0) as many:
            requests = [
                asyncio.ensure_future(ask(many, seed=seed, **long))  # type: ignore[arg-type]
                for seed in range(6)
            ]
            await wait_for(running=4, waiting=2)
            with pytest.raises(openai.InternalServerError, match="running and waiting") as refused:
                await asyncio.to_thread(ask, client)
            assert refused.value.status_code == 503
            assert refused.value.response.headers["retry-after"] == "1"
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
        await wait_for(running=0, waiting=0)

    aborted = gauges(server_url).get("sparseline_request_totalabort", 0.0)
    asyncio.run(crowd())
    assert gauges(server_url)["sparseline_request_totalabort"] == aborted + 6
    assert ask(client).choices


def test_a_stream_that_is_closed_frees_its_sequence(server_url: str, client: openai.OpenAI) -> None:
    with ask(client, stream=True, max_tokens=4000, temperature=0) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 20
    while gauges(server_url)["sparseline_num_requests_running"]:
        assert time.monotonic() < deadline, "the sequence of a closed stream still runs"


def test_stop_and_length(client: openai.OpenAI) -> None:
    full = ask(client)
    words = full.choices[0].message.content.split()
    assert full.choices[0].finish_reason == "length"
    assert len(words) == 12
    for stream in (False, True):
        answer = ask(client, stop=[words[3]], stream=stream)
        if stream:
            chunks = list(answer)
            content = "".join(c.choices[0].delta.content or "" for c in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            content, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (content, reason) == (" ".join(words[:3]) + " ", "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_tool_choice_makes_a_call_that_fits_the_schema(client: openai.OpenAI, stream: bool) -> None:
    choice = {"type": "function", "function": {"name": "neighbors"}}
    answer = ask(client, tool_choice=choice, parallel_tool_calls=False, max_tokens=200, stream=stream)
    if stream:
        name = arguments = reason = ""
        for chunk in answer:
            for call in chunk.choices[0].delta.tool_calls or []:
                assert call.index == 0
                name, arguments = name + (call.function.name or ""), arguments + (call.function.arguments or "")
            reason = chunk.choices[0].finish_reason or reason
    else:
        (call,) = answer.choices[0].message.tool_calls
        name, arguments, reason = call.function.name, call.function.arguments, answer.choices[0].finish_reason
    assert (name, reason) == ("neighbors", "tool_calls")
    found = json.loads(arguments)
    assert [type(value) for value in found.values()] == [str, str, int]


def test_tool_choice_none_makes_no_call(client: openai.OpenAI) -> None:
    answer = ask(client, tool_choice="none", max_tokens=100)
    assert not answer.choices[0].message.tool_calls
    assert "<|" not in answer.choices[0].message.content


BAD = [
    ({"model": "gpt-4"}, 404, "model"),
    ({"n": 2}, 400, "n"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "user", "content": f"x {END}"}]}, 400, "messages[0]"),
    ({"messages": [{"role": "user", "content": "ada " * 4100}]}, 400, "messages"),
    ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, 400, "tool_choice"),
    ({"tools": openai.NOT_GIVEN, "tool_choice": "required"}, 400, "tool_choice"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format.type"),
    ({"extra_body": {"temprature": 0.1}}, 400, "temprature"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
]


@pytest.mark.parametrize("change, status, param", BAD)
def test_what_cannot_be_honoured_is_refused_with_its_name(
    client: openai.OpenAI, change: dict[str, Any], status: int, param: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, **change)
    assert caught.value.status_code == status
    assert caught.value.param == param
    assert caught.value.message


def test_broken_json_unknown_paths_and_health(server_url: str) -> None:
    request = urllib.request.Request(
        f"{server_url}/chat/completions", data=b"{", headers={"content-type": "application/json"}
    )
    for wrong, status in ((request, 400), (f"{server_url}/nope", 404)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(wrong)
        assert caught.value.code == status
        assert set(json.loads(caught.value.read())["error"]) == {"message", "type", "param", "code"}
    health = json.loads(urllib.request.urlopen(server_url.replace("/v1", "/health")).read())
    assert health["status"] == "ok"


def test_metrics_count_tokens(server_url: str, client: openai.OpenAI) -> None:
    before = gauges(server_url)
    usage = ask(client).usage
    after = gauges(server_url)
    for name, expected in (("prompt", usage.prompt_tokens), ("generation", usage.completion_tokens)):
        assert after[f"sparseline_{name}_tokens_total"] - before[f"sparseline_{name}_tokens_total"] == expected
    assert after["sparseline_request_totallength"] - before["sparseline_request_totallength"] == 1


def test_a_port_in_use_a_missing_and_a_damaged_checkpoint_are_bad_input(tmp_path: Path, checkpoint: Path) -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(InputError, match=r"in use; choose another with --port"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="no directory; give a checkpoint's folder"):
        serve(["--model", str(tmp_path / "nowhere"), "--port", "0"])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    with pytest.raises(InputError, match="cannot be served"):
        serve(["--model", str(damaged), "--port", "0"])
