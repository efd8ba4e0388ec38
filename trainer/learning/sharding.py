"""Parameters that lie on several ranks in parts (FSDP2), and models that arrive from rank 0 without a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer


def take_from_rank_0(model: nn.Module, device: torch.device, *, sharded: bool) -> None:
    """Give every rank, on `device`, the weights that `model` has on rank 0; elsewhere it may be on the meta device.

    sharded: each rank keeps its part of every parameter alone: block by block, so that none ever holds more than the
    largest block and the embeddings whole. Parameters that are tied stay so. Collective.

    Raises ValueError for a model without layers that can be sharded one by one.
    """
    if not sharded:
        _receive(model, device)
        return
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(f"sharding=fsdp: {type(model).__name__} has no layers that transformers marks as such")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        _receive(block, device)
        fully_shard(block, mesh=mesh)
    _receive(model, device)
    # The root's parameters stay whole from the forward to the backward pass: the head's gradient reads its weight.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def part_again(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass left whole."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A parameter, a gradient or an optimizer's moment with all its parts. Collective if it has several."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_cpu(values: Any, *, keep: bool) -> Any:
    """`values` (dicts and lists of anything) with whole tensors in CPU memory, or nothing at all unless `keep`.

    One tensor after the other, in one order on all ranks. Collective if there are parts.
    """
    if isinstance(values, DTensor):
        gathered = whole(values)
        return gathered.cpu() if keep else None
    if isinstance(values, dict):
        return {name: whole_on_cpu(value, keep=keep) for name, value in values.items()}
    if isinstance(values, list):
        return [whole_on_cpu(value, keep=keep) for value in values]
    return values


def spread_optimizer_state(optimizer: torch.optim.Optimizer, state: Any) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes on each rank, from the whole `state` that rank 0 has. Collective.

    Tensors of a parameter's shape are parted as it is; the others go to everyone.
    """
    described = [_described(state) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(described, src=0)
    plain: dict[str, Any] = described[0]  # type: ignore[assignment]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, moments in plain["state"].items():
        like = parameters[index]
        for name, value in moments.items():
            if isinstance(value, torch.Size):
                content = torch.empty(value, dtype=like.dtype, device=like.device)
                if dist.get_rank() == 0:
                    content.copy_(state["state"][index][name])
                if isinstance(like, DTensor):
                    moments[name] = distribute_tensor(content, like.device_mesh, like.placements)
                else:
                    dist.broadcast(content, src=0)
                    moments[name] = content
    return plain


class Gatherable:
    """Stands in for a parameter that is in several places, ranks or parts of a sum: what asks for it has it gathered.

    It has of a tensor what publishing and digests use; nothing is kept.
    """

    def __init__(self, parameter: Tensor, gather: Callable[[], Tensor | None]) -> None:
        """`gather()` gives the whole, of the shape and type of `parameter`."""
        self.shape = parameter.shape
        self.dtype = parameter.dtype
        self.nbytes = parameter.numel() * parameter.element_size()
        self._gather = gather

    def detach(self) -> Gatherable:
        """Itself: it has no gradient."""
        return self

    def to(self, device: Any = None, **kwargs: Any) -> Tensor:
        """The whole tensor; arguments as in `Tensor.to`."""
        gathered = self._gather()
        assert gathered is not None, "who reads it is rank 0"
        return gathered.to(device, **kwargs) if device is not None else gathered.to(**kwargs)


def _described(state: Any) -> dict[str, Any]:
    """An optimizer's state with shapes in place of the tensors that have one; steps and the like stay."""
    moments = {
        index: {
            name: value.shape if isinstance(value, Tensor) and value.dim() > 0 else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {"state": moments, "param_groups": state["param_groups"]}


def _receive(module: nn.Module, device: torch.device) -> None:
    """Rank 0's weights on `device`, for whatever in `module` has not been sharded yet."""
    moved: dict[int, Tensor] = {}
    for place, name, tensor in _tensors(module):
        if id(tensor) not in moved:
            content = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
            dist.broadcast(content, src=0)
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(content, tensor.requires_grad) if is_parameter else content
        place[name] = moved[id(tensor)]


def _tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Every parameter and buffer that is not sharded: where it is kept, its name there, and itself."""
    for part in module.modules():
        for place in (part._parameters, part._buffers):
            for name, tensor in list(place.items()):
                if tensor is not None and not isinstance(tensor, DTensor):
                    yield place, name, tensor
