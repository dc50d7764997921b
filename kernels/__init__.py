"""The operations of DeepSeek Sparse Attention, one folder each: `reference.py` in plain PyTorch, `triton.py` for
NVIDIA GPUs, and one public function in `__init__.py` that picks by device. README.md says which runs where; start with
`kernels.indexer_topk`, `kernels.sparse_attention` and `kernels.sparse_decode`."""
