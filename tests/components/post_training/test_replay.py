"""A recorded step is executed again bitwise; where engine and learner part, the token, layer and cause are found."""

import json
import random

import pytest
import torch

from components.post_training import run as post_training
from components.post_training.config import PostTrainingConfig
from components.post_training.divergence import GAP, diverge, gaps
from components.post_training.measurements import Material
from components.post_training.records import ABOUT, DIGESTS, STATE
from components.post_training.replay import read_record, replay
from components.runtime.artifacts import fetch
from components.runtime.errors import InputError
from components.runtime.object_store import open_store
from model import ModelConfig, Transformer
from model.context import PagedContext
from model.engine import Engine, SamplingParameters

STOP = 1


@pytest.fixture
def recorded(train, inputs, lot, tmp_path, monkeypatch):
    """Trains, and gives what replays its step: the folder of its record, its tasks and checkpoint, all digests."""

    def run(step, **values):
        result, folder = train(**{"steps": 4, "record_every": 2, **values})
        store = open_store(str(folder / "store"))
        place = fetch(store, result.outputs[f"step_{step}"], tmp_path / "fetched")
        monkeypatch.setattr(post_training, "environment", lambda family: lot(family))
        config = PostTrainingConfig(**json.loads((place / ABOUT).read_text())["config"])
        material = Material(inputs.folder / "tasks", inputs.folder / "checkpoint", config)
        digests = [json.loads(line) for line in (folder / "records/artifacts" / DIGESTS).read_text().splitlines()]
        return result, place, material, digests

    return run


def holding(findings):
    return {finding.name: finding.holds for finding in findings}


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_recorded_step_again(recorded, step):
    result, place, material, _ = recorded(step)
    assert sorted(name for name in result.outputs if name.startswith("step_")) == ["step_1", "step_2", "step_4"]
    found = holding(replay(read_record(place, material), material, step))
    assert found == {"engine against learner": True, "rollouts": True, f"weights after step {step}": True}


@pytest.mark.slow
def test_steps_without_a_record_are_reached_from_the_one_before(recorded):
    _, place, material, digests = recorded(2)
    found = holding(replay(read_record(place, material), material, 3, digests))
    assert len(digests) == 4
    assert found["rollouts of step 3"] is True
    assert found["weights after step 3"] is True


@pytest.mark.slow
def test_with_two_processes(recorded):
    # every process plays an even number of validation tasks, after which the lot is where it was
    _, place, material, digests = recorded(1, processes=2, validation_tasks=4)
    assert all(holding(replay(read_record(place, material), material, 2, digests)).values())


@pytest.mark.slow
def test_with_another_schedule_the_update_is_executed(recorded, head):
    _, place, material, digests = recorded(2, schedule="one_step_off", rollout_workers=1)
    record = read_record(place, material)
    found = holding(replay(record, material, 2))
    assert found["rollouts of step 2"] is None
    assert found["weights after step 2"] is True
    with pytest.raises(InputError, match=r"only recorded steps.*the last one before step 3 is step 2"):
        list(replay(record, material, 3, digests))


def changed(place, change):
    """The record's state, changed and written back."""
    state = torch.load(place / STATE, weights_only=True)
    change(state)
    torch.save(state, place / STATE)


@pytest.mark.slow
def test_another_token_is_told(recorded):
    def change(state):
        state["played"][1]["episodes"][2]["trajectory"]["token_ids"][-1] += 1

    _, place, material, _ = recorded(1)
    changed(place, change)
    record = read_record(place, material)
    found = {finding.name: finding for finding in replay(record, material, 1)}
    assert found["rollouts"].holds is False
    length = len(record.played[1].episodes[2].trajectory)
    assert f"group 1, episode 2, token {length - 1}: token_ids" in found["rollouts"].detail


@pytest.mark.slow
def test_other_weights_are_told(recorded):
    def change(state):
        state["before"]["learner"]["model"]["model.norm.weight"][0] += 1e-3

    _, place, material, _ = recorded(1)
    changed(place, change)
    found = holding(replay(read_record(place, material), material, 1))
    assert found["weights after step 1"] is False


@pytest.mark.slow
def test_a_record_of_another_layout_and_of_other_tasks(recorded):
    _, place, material, _ = recorded(1)
    material.tasks = material.tasks[:1]
    with pytest.raises(InputError, match="give the one it was trained on"):
        read_record(place, material)
    about = json.loads((place / ABOUT).read_text())
    (place / ABOUT).write_text(json.dumps({**about, "layout": 0}))
    with pytest.raises(InputError, match="has the layout 0"):
        read_record(place, material)


# -- faults put into a place that is known ---------------------------------------------------------------------


def model_with_ties(seed):
    """A micro model whose lightning indexer gives every key the same score: all are tied."""
    model = Transformer(ModelConfig.preset("micro", vocab_size=64)).initialise(seed).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.indexer.weights_proj.weight.zero_()
    return model


def rollout(model, seed, top_p=1.0, reply=True):
    """A trajectory of two turns with a reply between them, longer than the indexer's top-k."""
    engine = Engine(model, stop_token_id=STOP, max_sequences=1, max_sequence_tokens=160)
    generator = random.Random(seed)
    sampling = SamplingParameters(top_p=top_p, max_new_tokens=20, seed=seed)
    handle = engine.add([generator.randrange(2, 64) for _ in range(60)], sampling)
    while engine.live:
        engine.step()
    if reply and engine.extend(handle, [generator.randrange(2, 64) for _ in range(8)]):
        while engine.live:
            engine.step()
    return engine.release(handle)


def ties_to_the_highest(monkeypatch, layer, token):
    """The engine's selection gives ties to the highest position, in one layer, from one token on."""
    right = PagedContext.select

    def select(self, index, q_THD, k_SD, weight_TH, k):
        rows_TK = right(self, index, q_THD, k_SD, weight_TH, k)
        for row, position in enumerate(self.position_T.tolist()):
            if index == layer and position >= token:
                last = torch.arange(position + 1 - rows_TK.shape[1], position + 1)
                positions_TK = last.clamp(min=-1).expand(len(rows_TK), -1)
                rows_TK[row] = self.rows_of(positions_TK)[row]
        return rows_TK

    monkeypatch.setattr(PagedContext, "select", select)


def rounds_to_bfloat16(model, layer, token):
    """The engine computes one layer in bfloat16, from one token on."""

    def rounded(module, arguments, output):
        out_TC, *rest = output
        late_T = arguments[3].position_T >= token
        return (torch.where(late_T[:, None], out_TC.bfloat16().float(), out_TC), *rest)

    model.model.layers[layer].register_forward_hook(rounded)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["selection", "routing", "dtype"])
def test_an_injected_fault_is_found(kind, seed, monkeypatch):
    """Ten faults of each kind, at a layer and token drawn by the seed."""
    rng = random.Random(f"{kind}/{seed}")
    model, config = model_with_ties(seed), PostTrainingConfig()
    engine_model = model_with_ties(seed)
    layers, top_k = len(model.model.layers), model.config.index_topk
    moe_layers = [index for index, layer in enumerate(model.model.layers) if layer.is_moe]
    layer, token = rng.randrange(layers), rng.randrange(top_k + 5, 75)
    if kind == "selection":
        ties_to_the_highest(monkeypatch, layer, token)
    if kind == "dtype":
        rounds_to_bfloat16(engine_model, layer, token)
    trajectory = rollout(engine_model, seed)
    if kind == "routing":
        which = rng.randrange(len(moe_layers))
        layer = moe_layers[which]
        used = set(trajectory.routing[which, token].tolist())
        other = next(expert for expert in range(model.config.n_routed_experts) if expert not in used)
        trajectory.routing[which, token, 0] = other  # what the learner is told to keep
    found = diverge(engine_model, model, trajectory, STOP, config)
    assert found is not None
    assert (found.cause, found.layer, found.token) == (kind, layer, token)


def test_nothing_is_found_where_nothing_is(monkeypatch):
    model, config = model_with_ties(3), PostTrainingConfig()
    trajectory = rollout(model, 3)
    assert float(gaps(model, trajectory, config)[1].max()) <= GAP
    assert diverge(model, model, trajectory, STOP, config) is None


def test_a_sampling_mask_that_was_lost_and_a_record_that_is_wrong():
    model, config = model_with_ties(4), PostTrainingConfig(top_p=0.8)
    trajectory = rollout(model, 4, top_p=0.8)
    assert diverge(model, model, trajectory, STOP, config) is None
    row = 5
    token = int(trajectory.sampled.nonzero().flatten()[row])
    masks = list(trajectory.sampling_masks)
    trajectory.sampling_masks[row] = torch.arange(64, dtype=torch.int32)
    found = diverge(model, model, trajectory, STOP, config)
    assert (found.cause, found.layer, found.token) == ("sampling mask", None, token)
    trajectory.sampling_masks[row] = masks[row]
    trajectory.logprobs[token] -= 0.5
    found = diverge(model, model, trajectory, STOP, config)
    assert (found.cause, found.layer, found.token) == ("record", None, token)
