"""Nothing of size L x L is stored: live bytes of a training step grow linearly with the sequence."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import ModelConfig, PackedContext, Transformer


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that were made while it is on and are still alive; `peak` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._seen and storage._cdata not in known:
                    self._add(storage)
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak_of_training_step(length: int, mode: str, loss_kind: str, checkpoint_layers: bool) -> int:
    model = Transformer(ModelConfig.preset("micro", vocab_size=64, num_hidden_layers=2)).initialise(0)
    model.attention_mode = mode
    for parameter in model.parameters():  # the gradients' bytes are the weights', not the sequence's
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(64, (length,), generator=torch.Generator().manual_seed(0))
    with LiveBytes() as bytes_:
        context = PackedContext.from_lengths([length])
        context.indexer_loss = loss_kind
        context.checkpoint_layers = checkpoint_layers
        hidden = model.hidden(ids, context)
        loss = F.cross_entropy(model.lm_head(hidden[:-1]), ids[1:]) + torch.stack(context.losses).sum()
        loss.backward()
    assert bytes_.peak > 0
    return bytes_.peak


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_sparse_training_step_is_linear_in_the_length(checkpoint_layers):
    small, large = (peak_of_training_step(n, "sparse", "sparse", checkpoint_layers) for n in (4096, 16384))
    assert large <= 4.5 * small, (small, large)


@pytest.mark.slow
def test_dense_warm_up_step_is_linear_in_the_length():
    small, large = (peak_of_training_step(n, "dense", "dense", False) for n in (1024, 4096))
    assert large <= 4.5 * small, (small, large)


def test_the_counter_sees_a_quadratic_step():
    """The instrument itself: a naive L x L product must fail the bar."""

    def peak(length):
        with LiveBytes() as bytes_:
            x = torch.randn(length, 8, requires_grad=True)
            (x @ x.T).softmax(-1).sum().backward()
        return bytes_.peak

    assert peak(2048) > 4.5 * peak(512)
