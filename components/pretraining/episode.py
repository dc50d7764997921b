"""An episode that the model plays between two training steps, for a person to look at. Nothing is learnt from it."""

from __future__ import annotations

from tokenizers import Tokenizer

from components.environments.chat_format import END
from components.environments.protocol import environment
from components.rollouts import EnginePolicy, EpisodeRequest, run_episodes
from components.rollouts.loop import transcript
from components.runtime.contracts import TaskRecord
from components.runtime.errors import InputError
from model import Transformer
from model.engine import Engine, SamplingParameters

TURN_TOKENS = 40


def play_one(model: Transformer, tokenizer: Tokenizer, task: TaskRecord, seed: int) -> str:
    """The model's play of `task`, sampled at temperature 1, as text. Leaves the model as it was.

    Raises InputError when the tokenizer lacks the chat format's end.
    """
    stop = tokenizer.token_to_id(END)
    if stop is None:
        raise InputError(f"the tokenizer has no {END}; it was not made for this chat format")
    training = model.training
    engine = Engine(
        model.eval(),
        stop_token_id=stop,
        max_sequences=1,
        max_sequence_tokens=task.limits.tokens,
    )
    policy = EnginePolicy(engine, tokenizer, SamplingParameters(max_new_tokens=TURN_TOKENS))
    (result,) = run_episodes(policy, [EpisodeRequest(environment(task.environment), task, seed)])
    model.train(training)
    return transcript(result)
