"""Tensors as the bytes that cross the wire: little-endian, row-major, in pieces with their own hash.

Assumes a little-endian machine, as every one that PyTorch publishes packages for is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

# Streams fastest in Python (measured); larger pieces are slower.
PIECE_BYTES = 1 << 20

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Piece:
    """Some bytes of a tensor, `offset` bytes from its start, and their xxh3_64."""

    offset: int
    data: bytes
    xxh3_64: int


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a dtype. Raises ValueError for one that has no name there."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise ValueError(f"{dtype} can't be sent; {', '.join(_DTYPES)} can") from None


def dtype_from_name(name: str) -> torch.dtype:
    """The dtype of safetensors' name. Raises ValueError for a name that is none of them."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise ValueError(f"no dtype is named {name[:20]!r}; {', '.join(_DTYPES)} are") from None


def allocate(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A new, uninitialized tensor in CPU memory that starts at a multiple of 64 bytes.

    Kernels choose their path by alignment, so weights at another one could give other last bits.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype)
    assert tensor.data_ptr() % 64 == 0, "PyTorch's CPU allocator aligns to 64 bytes"
    return tensor


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, to read and to write, without a copy."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("only a contiguous tensor in CPU memory has its bytes in wire order")
    # By way of uint8, because numpy has no bfloat16.
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def iter_pieces(tensor: Tensor, piece_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
    """Every byte of a tensor, in order and exactly once; nothing for a tensor without elements.

    A tensor on another device, or not contiguous, is copied once as a whole; a piece copies its own bytes only.
    """
    view = byte_view(tensor.detach().to("cpu").contiguous())
    for offset in range(0, len(view), piece_bytes):
        data = bytes(view[offset : offset + piece_bytes])
        yield Piece(offset, data, xxh3_64(data))


def xxh3_64(data: bytes | memoryview) -> int:
    """The hash that chunks and manifests carry, seed 0."""
    return xxhash.xxh3_64_intdigest(data)
