"""Tensors as bytes on the wire: safetensors' dtype names, little-endian row-major bytes, xxh3_64 of each piece."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

CHUNK_BYTES = 1 << 20
"""1 MiB chunks stream fastest over gRPC in Python; larger ones are slower."""

_NAMES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPES = {dtype: name for name, dtype in _NAMES.items()}

if sys.byteorder != "little":  # pragma: no cover - no such machine runs torch today
    raise ImportError("the tensor codec sends memory as it lies and needs a little-endian machine")


@dataclass(frozen=True)
class Piece:
    """Bytes of a tensor from `offset` on, and their xxh3_64."""

    offset: int
    data: bytes
    xxh3_64: int


def dtype_from_name(name: str) -> torch.dtype:
    """The torch dtype of safetensors' `name`; raises ValueError that lists the known names."""
    try:
        return _NAMES[name]
    except KeyError:
        raise ValueError(f"unknown dtype {name!r}; known are {', '.join(_NAMES)}") from None


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of `dtype`; raises ValueError for one that can't be sent."""
    try:
        return _DTYPES[dtype]
    except KeyError:
        raise ValueError(f"{dtype} has no name in safetensors") from None


def xxh3_64(data: bytes | memoryview) -> int:
    """xxh3 of `data`, 64 bits, seed 0."""
    return xxhash.xxh3_64_intdigest(data)


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable and without a copy. Raises ValueError for any other tensor."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("byte_view needs a contiguous tensor in host memory")
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def allocate(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """An uninitialised CPU tensor in fresh memory, which torch aligns to 64 bytes."""
    return torch.empty(tuple(shape), dtype=dtype)


def nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor of this dtype and shape; 1 element for a scalar's empty shape."""
    return math.prod(shape) * dtype.itemsize


def iter_pieces(tensor: Tensor, piece_bytes: int = CHUNK_BYTES) -> Iterator[Piece]:
    """The whole tensor in pieces of at most `piece_bytes`; one on another device or strided is copied once."""
    view = byte_view(tensor.detach().to("cpu").contiguous())
    for offset in range(0, len(view), piece_bytes):
        data = bytes(view[offset : offset + piece_bytes])
        yield Piece(offset, data, xxh3_64(data))
