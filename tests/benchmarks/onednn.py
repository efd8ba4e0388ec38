"""oneDNN's two kernels for a product of rows by a weight [out, in] in float32, and the orders they want it in."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_OPS: Any = torch.ops.mkldnn
_TYPICAL_ROWS = 64


def packed_for_linear(weight: Tensor) -> Tensor:
    """A copy of weight for `linear`; its order does for any number of rows."""
    packed: Tensor = _OPS._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)
    return packed


def linear(inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Inputs [rows, in] by the weight: [rows, out]."""
    outputs: Tensor = _OPS._linear_pointwise(inputs, packed, bias, "none", [], "")
    return outputs


def packed_for_convolution(weight: Tensor, rows: int) -> Tensor:
    """A copy of weight for `convolution` of so many rows; with another number its order may be another."""
    plain = weight.reshape(*weight.shape, 1, 1).to_mkldnn()
    image: Any = [1, weight.shape[1], rows, 1]  # the sixth argument, which the stub does not know
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    packed: Tensor = reorder(plain, [0, 0], [1, 1], [1, 1], 1, image)
    return packed


def convolution(inputs: Tensor, packed: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """The same product as a convolution by 1 × 1 over an image of one column, filled up with zeros to `rows` pixels."""
    count, width = inputs.shape
    if rows > count:
        inputs = F.pad(inputs, (0, 0, 0, rows - count))
    image = inputs.as_strided((1, width, rows, 1), (rows * width, 1, width, width))
    outputs: Tensor = _OPS._convolution_pointwise(image, packed, bias, (0, 0), (1, 1), (1, 1), 1, "none", [], "")
    return outputs.as_strided((count, outputs.shape[1]), (outputs.shape[1], 1))


def content(packed: Tensor) -> bytes:
    """The bytes of a packed weight: equal for equal orders."""
    return ctypes.string_at(int(_OPS.data_ptr(packed)), int(_OPS._nbytes(packed)))
