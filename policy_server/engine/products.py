"""Products with a weight that lies in memory in an order of oneDNN's."""

from __future__ import annotations

import ctypes
from bisect import bisect_left
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

_TYPICAL_ROWS = 64
_TYPICAL_HEIGHT = 32
_HEIGHTS = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128, 192, 256)
_LARGE = 2**19  # elements of a weight


class Product(Protocol):
    """How linear layers of one shape compute."""

    def pack(self, weight: Tensor) -> Tensor:
        """A copy of weight [out, in], float32, in oneDNN's order."""
        ...

    def __call__(self, inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """Inputs [..., in] by the packed weight, plus the bias [out]: [..., out]."""
        ...


def product_for(out_features: int, in_features: int) -> Product:
    """The fastest that we know for weights [out_features, in_features] on this CPU."""
    # Measured on AVX2 alone, where the convolution's kernel uses the registers better: by 15 to 30 % from 8 rows on.
    # With small weights it loses that to the call.
    if torch.backends.cpu.get_cpu_capability() == "AVX2" and out_features * in_features >= _LARGE:
        return _convolution(out_features, in_features, torch.get_num_threads())
    return InnerProduct()


class InnerProduct:
    """oneDNN's own for linear layers. Its order is right for any number of rows."""

    def pack(self, weight: Tensor) -> Tensor:
        """See Product."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)
        return packed

    def __call__(self, inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """See Product."""
        return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")  # type: ignore[no-any-return]


class Convolution:
    """A convolution by 1 × 1 over images one pixel wide, whose pixels are the rows.

    The order depends on the height of the images, and on the number of threads. Given another, oneDNN would reorder
    the weight in every call, so rows are cut, or filled up with zeros, to heights whose order is that of the copy.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        self.shape = (out_features, in_features)
        weight = torch.rand(self.shape)  # equal bytes are equal orders
        order = _bytes(self._packed(weight, _TYPICAL_HEIGHT))
        self._heights = [
            height for height in _HEIGHTS if height == _TYPICAL_HEIGHT or _bytes(self._packed(weight, height)) == order
        ]

    def pack(self, weight: Tensor) -> Tensor:
        """See Product."""
        return self._packed(weight, _TYPICAL_HEIGHT)

    def __call__(self, inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """See Product."""
        out_features, width = self.shape
        rows = inputs.reshape(-1, width).contiguous()
        count = rows.shape[0]
        images = -(-count // self._heights[-1])
        height = self._heights[bisect_left(self._heights, count / images)]
        if images * height > count:
            rows = F.pad(rows, (0, 0, 0, images * height - count))
        pixels = rows.as_strided((images, width, height, 1), (height * width, 1, width, width))
        outputs = torch.ops.mkldnn._convolution_pointwise(
            pixels, packed, bias, (0, 0), (1, 1), (1, 1), 1, "none", [], ""
        )
        result: Tensor = outputs.as_strided((count, out_features), (out_features, 1))
        return result.view(*inputs.shape[:-1], out_features)

    def _packed(self, weight: Tensor, height: int) -> Tensor:
        out_features, in_features = self.shape
        image = [1, in_features, height, 1]  # which the stub does not know of
        plain = weight.reshape(out_features, in_features, 1, 1).to_mkldnn()
        return torch._C._nn.mkldnn_reorder_conv2d_weight(plain, [0, 0], [1, 1], [1, 1], 1, image)  # type: ignore[call-arg]


@cache
def _convolution(out_features: int, in_features: int, _threads: int) -> Convolution:
    return Convolution(out_features, in_features)


def _bytes(packed: Tensor) -> bytes:
    return ctypes.string_at(int(torch.ops.mkldnn.data_ptr(packed)), int(torch.ops.mkldnn._nbytes(packed)))
