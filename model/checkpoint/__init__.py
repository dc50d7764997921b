"""Checkpoints in the Hugging Face layout, read and written without `transformers`."""

from model.checkpoint.hugging_face import CheckpointError, load_model, save_model
from model.checkpoint.tokenizer import copy_tokenizer, load_tokenizer, save_tokenizer, word_tokenizer

__all__ = [
    "CheckpointError",
    "copy_tokenizer",
    "load_model",
    "load_tokenizer",
    "save_model",
    "save_tokenizer",
    "word_tokenizer",
]
