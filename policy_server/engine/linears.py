"""Linear layers whose weights lie in memory once more, in the order in which oneDNN reads them.

On a CPU that makes products of a few rows half as fast again, and those of many a tenth. The copies are made beside a running engine, and take the
place of the old ones in a swap.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# The order is chosen for so many; it is right for any.
_TYPICAL_ROWS = 64


class PackedLinears:
    """The linear layers of a model. Each decodes with a copy of its weight from here on."""

    def __init__(self, module: PreTrainedModel) -> None:
        self._layers: dict[int, list[_PackedLinear]] = {}  # by the id of the weight, which tied layers share
        for layer in module.modules():
            # Subclasses compute something else: low-rank additions, quantised products.
            if isinstance(layer, nn.Linear | Conv1D) and type(layer) in (nn.Linear, Conv1D):
                self._layers.setdefault(id(layer.weight), []).append(_PackedLinear(layer))
        self._weights = {
            name: parameter
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if id(parameter) in self._layers
        }
        self.exchange(self.pack(self._weights))

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Copies of those parameters' tensors that are weights here; changes nothing, and may run on any thread."""
        packed: dict[int, Tensor] = {}
        with torch.inference_mode():
            for name, tensor in tensors.items():
                weight = self._weights.get(name)
                if weight is not None and id(weight) not in packed:
                    packed[id(weight)] = self._layers[id(weight)][0].pack(tensor.to(weight.dtype))
        return packed

    def exchange(self, packed: Mapping[int, Tensor]) -> None:
        """Decode with these copies from now on."""
        for weight, copy in packed.items():
            for layer in self._layers[weight]:
                layer.copy = copy


def can_pack(module: PreTrainedModel) -> bool:
    """Whether copies make this model faster: on a CPU, in full precision."""
    return module.device.type == "cpu" and module.dtype == torch.float32 and _has_onednn()


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


class _PackedLinear:
    """Stands in for the forward of one layer."""

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        self._is_transposed = isinstance(layer, Conv1D)
        self._bias: Tensor | None = layer.bias
        self._plain = layer.forward
        self.copy: Tensor | None = None
        layer.forward = self._forward  # type: ignore[method-assign]

    def pack(self, weight: Tensor) -> Tensor:
        """A copy of `weight` as oneDNN wants it."""
        weight = weight.t() if self._is_transposed else weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)
        return packed

    def _forward(self, inputs: Tensor) -> Tensor:
        if self.copy is None:
            return self._plain(inputs)
        return torch.ops.mkldnn._linear_pointwise(inputs, self.copy, self._bias, "none", [], "")  # type: ignore[no-any-return]
