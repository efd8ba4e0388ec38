"""The parameters of a live model: their names, and how new values get into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from policy_server.engine.protocol import ParameterSpec

ALIGNMENT = 64  # bytes; vectorised kernels take other paths, with other last bits, on other alignments


class ParameterTable:
    """Every parameter by every name it has; tied names share one entry's memory."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = dict(module.named_parameters(remove_duplicate=False))
        first_names: dict[int, str] = {}
        specs = []
        for name, parameter in self._parameters.items():
            first = first_names.setdefault(id(parameter), name)
            specs.append(ParameterSpec(name, tuple(parameter.shape), tied_to=None if first == name else first))
        self.specs: Sequence[ParameterSpec] = tuple(specs)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors, whose names and shapes are as in `specs`, into the parameters, cast to their dtype.

        Those not named keep their values.
        """
        # A copy that casts within one memory, or crosses without casting, allocates nothing: it can't fail half-way.
        ready = {
            name: tensor if tensor.device == self._parameters[name].device else tensor.to(self._parameters[name].dtype)
            for name, tensor in tensors.items()
        }
        for name, tensor in ready.items():
            self._parameters[name].data.copy_(tensor)


def rehouse(module: nn.Module) -> None:
    """Move every parameter and buffer to fresh memory on its device, tied ones together, and freeze them.

    Loaders map files into memory at any alignment, and kernels round differently on different alignments; fresh memory
    is always aligned, so results are a function of the values.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        if parameter.data_ptr() % ALIGNMENT:
            raise RuntimeError(f"the allocator gave memory that is not aligned to {ALIGNMENT} bytes")
    for buffer in module.buffers():
        buffer.data = buffer.data.clone()
