"""The engine thread on its own: bounds, cancelling, and what happens when the engine breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch

from components.environments.chat_format import END
from components.serving.generator import EngineFailed, Generator, Overloaded, Token
from components.serving.metrics import Metrics
from model.config import ModelConfig
from model.engine import Engine, SamplingParameters
from model.transformer import Transformer
from tests.components.serving.served import WORDS

PROMPT = [1, 20, 30]


class Broken:
    """A logit mask that fails in the middle of a step, as a bug in the engine would."""

    def allowed(self, token_ids: list[int]) -> torch.Tensor:
        raise ArithmeticError("broken mask")


@pytest.fixture
def generator() -> Iterator[Generator]:
    model = Transformer(ModelConfig.preset("micro", vocab_size=len(WORDS))).initialise(7)
    engine = Engine(model, stop_token_id=WORDS.index(END), max_sequences=2, max_sequence_tokens=256, record=False)
    made = Generator(engine, Metrics("micro"), max_waiting=1)
    yield made
    made.close()


async def collect(generator: Generator, sampling: SamplingParameters) -> list[Token]:
    generation, tokens = generator.submit(PROMPT, sampling), []
    while not tokens or tokens[-1].finish_reason is None:
        token = await generation.tokens.get()
        if isinstance(token, BaseException):
            raise token
        tokens.append(token)
    return tokens


def test_tokens_arrive_one_by_one_with_the_reason_last(generator: Generator) -> None:
    tokens = asyncio.run(collect(generator, SamplingParameters(temperature=0, max_new_tokens=9)))
    assert [token.finish_reason for token in tokens] == [None] * 8 + ["length"]
    assert all(token.logprob <= 0 for token in tokens)


def test_the_bound_counts_every_request_until_it_ends(generator: Generator) -> None:
    async def scenario() -> None:
        greedy = SamplingParameters(temperature=0, max_new_tokens=250)
        open_requests = [generator.submit(PROMPT, greedy) for _ in range(3)]
        with pytest.raises(Overloaded, match="3 requests"):
            generator.submit(PROMPT, greedy)
        for request in open_requests:
            generator.cancel(request)
            generator.cancel(request)  # twice is harmless
        # commands are obeyed in order: an answer to this one means that the three are gone
        while True:
            try:
                await collect(generator, SamplingParameters(temperature=0, max_new_tokens=1))
                break
            except Overloaded:
                await asyncio.sleep(0)
        assert generator.engine.live == 0
        assert len([generator.submit(PROMPT, greedy) for _ in range(3)]) == 3

    asyncio.run(scenario())


def test_a_request_that_does_not_fit_fails_alone(generator: Generator) -> None:
    async def scenario() -> None:
        too_long = generator.submit([len(WORDS) + 5], SamplingParameters(max_new_tokens=4))
        assert isinstance(await too_long.tokens.get(), ValueError)
        assert await collect(generator, SamplingParameters(max_new_tokens=2, temperature=0))

    asyncio.run(scenario())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_engine_answers_everybody_and_takes_no_more(generator: Generator) -> None:
    async def scenario() -> None:
        waiting = asyncio.ensure_future(collect(generator, SamplingParameters(temperature=0, max_new_tokens=200)))
        await asyncio.sleep(0)
        broken = asyncio.ensure_future(collect(generator, SamplingParameters(logit_mask=Broken())))
        results = await asyncio.gather(waiting, broken, return_exceptions=True)
        assert [type(result) for result in results] == [EngineFailed, EngineFailed]
        assert "broken mask" in str(results[0])
        with pytest.raises(EngineFailed, match="broken mask"):
            generator.submit(PROMPT, SamplingParameters())
        assert not generator.running

    asyncio.run(scenario())
