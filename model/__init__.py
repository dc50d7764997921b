"""The network: one forward for training (packed sequences) and decoding (paged cache). Local paths only."""

from model.config import ModelConfig
from model.context import PackedContext, PagedContext
from model.transformer import Transformer

__all__ = ["ModelConfig", "PackedContext", "PagedContext", "Transformer"]
