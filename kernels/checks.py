"""Argument checks shared by the operations: each raises a ValueError that names the argument, what came and what is
accepted."""

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDICES = (torch.int32, torch.int64)


def check_shape(name: str, tensor: torch.Tensor, *expected: int | None) -> None:
    """`expected` gives the size of each dimension; None accepts any size."""
    given = tuple(tensor.shape)
    fits = len(given) == len(expected) and all(e is None or e == g for g, e in zip(given, expected, strict=True))
    if not fits:
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: shape {list(given)} was given, [{wanted}] is accepted")


def check_dtype(name: str, tensor: torch.Tensor, accepted: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in accepted:
        raise ValueError(f"{name}: dtype {tensor.dtype} was given, accepted: {', '.join(str(d) for d in accepted)}")


def check_same(what: str, **tensors: torch.Tensor) -> None:
    """`what` is 'dtype' or 'device'; all tensors must agree in it."""
    values = {name: getattr(tensor, what) for name, tensor in tensors.items()}
    if len(set(values.values())) > 1:
        given = ", ".join(f"{name}: {value}" for name, value in values.items())
        raise ValueError(f"one {what} is accepted for all of these, given {given}")


def check_inner_contiguous(name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: strides {tensor.stride()} were given, the last dimension must have stride 1")


def check_indices(name: str, indices: torch.Tensor, rows: int) -> None:
    """Range check -1 <= index < rows. It reads the values, so on a GPU it waits for the stream: callers make it
    optional there."""
    if indices.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(indices))
    if low < -1 or high >= rows:
        raise ValueError(f"{name}: values {low}..{high} were given, accepted: -1 (no key) and 0..{rows - 1}")


def check_positive(name: str, value: float) -> None:
    if not (value > 0 and value < float("inf")):
        raise ValueError(f"{name}: {value} was given, a finite number above 0 is accepted")


def check_ranges(key_start_T: torch.Tensor, key_end_T: torch.Tensor, tokens: int, rows: int) -> None:
    """Key ranges [start, end) of the queries lie in 0..rows. It reads the values (on a GPU: waits for the stream)."""
    for name, values in (("key_start_T", key_start_T), ("key_end_T", key_end_T)):
        check_shape(name, values, tokens)
        check_dtype(name, values, INDICES)
    if tokens and (int(key_start_T.min()) < 0 or int(key_end_T.max()) > rows):
        given = f"{int(key_start_T.min())}..{int(key_end_T.max())}"
        raise ValueError(f"key_start_T, key_end_T: rows {given} were given, 0..{rows} is accepted")
