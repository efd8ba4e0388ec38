from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.tensors import PIECE_BYTES, allocate, byte_view, dtype_from_name, dtype_name, iter_pieces, xxh3_64

NAMES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL"]
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def _random(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return (100 * torch.randn(shape, generator=generator)).to(dtype)


@given(name=st.sampled_from(NAMES), shape=SHAPES, seed=st.integers(0, 2**32), piece=st.integers(1, 40))
def test_a_tensor_put_together_from_its_pieces_is_the_same(
    name: str, shape: tuple[int, ...], seed: int, piece: int
) -> None:
    sent = _random(dtype_from_name(name), shape, seed)
    received = allocate(dtype_from_name(name), shape)
    view = byte_view(received)

    for each in reversed(list(iter_pieces(sent, piece))):
        assert xxh3_64(each.data) == each.xxh3_64
        view[each.offset : each.offset + len(each.data)] = each.data

    assert received.shape == sent.shape
    assert bytes(byte_view(received)) == bytes(byte_view(sent))


@given(name=st.sampled_from(NAMES), shape=SHAPES, piece=st.integers(1, 40))
def test_pieces_tile_the_tensor(name: str, shape: tuple[int, ...], piece: int) -> None:
    tensor = _random(dtype_from_name(name), shape, 0)
    pieces = list(iter_pieces(tensor, piece))

    reached = 0
    for each in pieces:
        assert each.offset == reached
        assert 1 <= len(each.data) <= piece
        reached += len(each.data)
    assert reached == math.prod(shape) * tensor.dtype.itemsize


def test_bytes_are_little_endian_and_row_major() -> None:
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)

    assert bytes(byte_view(tensor)) == b"\x01\x00\x02\x00\x03\x00\x04\x00"
    assert next(iter_pieces(tensor.T)).data == b"\x01\x00\x03\x00\x02\x00\x04\x00"
    assert bytes(byte_view(torch.tensor(1.0, dtype=torch.bfloat16))) == b"\x80\x3f"


def test_a_parameter_is_sent_like_a_tensor_in_pieces_of_a_mebibyte() -> None:
    parameter = torch.nn.Parameter(torch.arange(600_000, dtype=torch.float32))

    sizes = [len(piece.data) for piece in iter_pieces(parameter)]

    assert sizes == [PIECE_BYTES, PIECE_BYTES, 2_400_000 - 2 * PIECE_BYTES]


@given(data=st.binary(min_size=1, max_size=200), at=st.integers(0, 199), bit=st.integers(0, 7))
def test_one_flipped_bit_changes_the_hash(data: bytes, at: int, bit: int) -> None:
    corrupt = bytearray(data)
    corrupt[at % len(data)] ^= 1 << bit

    assert xxh3_64(bytes(corrupt)) != xxh3_64(data)


def test_the_hash_is_the_one_other_languages_compute() -> None:
    # The empty input's value in xxHash's own test vectors.
    assert xxh3_64(b"") == 0x2D06800538D394C2


def test_the_view_is_the_memory_itself() -> None:
    tensor = torch.zeros(3)

    byte_view(tensor)[:4] = b"\x00\x00\x80\x3f"

    assert tensor.tolist() == [1.0, 0.0, 0.0]


def test_only_contiguous_memory_of_the_host_has_a_view() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        byte_view(torch.zeros(2, 3).T)
    with pytest.raises(ValueError, match="CPU"):
        byte_view(torch.zeros(2, device="meta"))


@given(name=st.sampled_from(NAMES), shape=SHAPES)
def test_new_memory_is_aligned(name: str, shape: tuple[int, ...]) -> None:
    assert allocate(dtype_from_name(name), shape).data_ptr() % 64 == 0


def test_names_and_dtypes_that_cannot_be_sent_are_refused_with_those_that_can() -> None:
    assert [dtype_name(dtype_from_name(name)) for name in NAMES] == NAMES
    with pytest.raises(ValueError, match=r"'float32'.*F32"):
        dtype_from_name("float32")
    with pytest.raises(ValueError, match=r"complex64.*F32"):
        dtype_name(torch.complex64)
