"""LoRA (Hu et al. 2021) by peft, within a language model of transformers: added, loaded, saved, merged, switched off.

peft's layers take the place of linear ones, so the model stays what it is to everybody who calls it. Its base is
frozen; with the adapter off it computes what it did before, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME, find_adapter_config_file

if TYPE_CHECKING:
    from peft import LoraConfig

_NAME = "default"
# What peft's own files have in front of a parameter's name.
_PREFIX = "base_model.model."
_BASE = ".base_layer."
_LOW_RANK = (".lora_A.", ".lora_B.")

# What of LoraConfig may be set: an adapter stays two matrices per linear layer, which merge into its weight.
_UNDERSTOOD = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("inference_mode", "init_lora_weights", "runtime_config"),
    }
)


class AdapterOff(enum.Enum):
    """In the place of a reference model: the policy with its adapter off, which is no second model in memory."""

    ADAPTER_OFF = "adapter off"


ADAPTER_OFF = AdapterOff.ADAPTER_OFF


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to the weight of one linear layer."""

    down: str
    """Name of the parameter [rank, inputs]."""
    up: str
    """Name of the parameter [outputs, rank]."""
    scale: float
    transposed: bool
    """Whether the layer's weight is [inputs, outputs]."""

    def merged(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """A weight with what is added; all on one device."""
        if not up.any():
            # Before the first step; adding 0 would turn -0.0 into another bit pattern.
            return weight
        added = (up @ down) * self.scale
        return weight + (added.t() if self.transposed else added).to(weight.dtype)


def lora_config(rank: int, alpha: float, targets: Sequence[str] | None) -> LoraConfig:
    """Of an adapter for the linear layers of these names; None = all but the head."""
    with _needing_peft():
        from peft import LoraConfig
    target_modules = "all-linear" if targets is None else list(targets)
    # peft's type is int, its formula is of any number.
    return LoraConfig(r=rank, lora_alpha=cast(int, alpha), target_modules=target_modules, task_type="CAUSAL_LM")


def adapter_of(model: nn.Module) -> LoraConfig | None:
    """The configuration of the model's adapter, if it has one."""
    adapters: dict[str, LoraConfig] = getattr(model, "peft_config", {})
    return adapters.get(_NAME)


def add_adapter(model: PreTrainedModel, config: LoraConfig) -> None:
    """Put a fresh LoRA adapter into `model`, which draws from torch's generator, and freeze all else.

    `config` itself is not changed. Raises ValueError for what is not plain LoRA on linear layers, and for targets that
    no layer has.
    """
    with _needing_peft():
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Linear, LoraLayer
    if not isinstance(config, LoraConfig):
        raise ValueError(f"peft_config is a LoraConfig, not {type(config).__name__}")
    if adapter_of(model) is not None:
        raise ValueError(f"{type(model).__name__} has an adapter already: leave peft_config out")
    _refuse_more_than_lora(config, LoraConfig())
    if isinstance(config.target_modules, list | set):
        adapted_layers(model, config.target_modules)
    config = copy.deepcopy(config)
    # GPT-2's layers keep their weights the other way round.
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    inject_adapter_in_model(config, model, adapter_name=_NAME)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (type(module) is not Linear or module in ends):
            raise ValueError(
                f"target_modules: {name} can't be adapted, only linear layers below the head can: "
                f"{', '.join(_short_names(model))}"
            )


def adapted_layers(model: PreTrainedModel, targets: Collection[str] | None) -> set[str]:
    """The linear layers whose name is a target, or ends with one after a dot, as peft finds them; None = all.

    Raises ValueError for a target that no linear layer below the head has.
    """
    layers = _linear_layers(model)
    if targets is None:
        return set(layers)
    found = {target: {name for name in layers if f".{name}".endswith(f".{target}")} for target in targets}
    if missing := sorted(target for target, names in found.items() if not names):
        raise ValueError(
            f"target_modules: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} no linear layer of "
            f"{type(model).__name__}, which has {', '.join(_short_names(model))}"
        )
    return set().union(*found.values())


def layers_of_adapter(model: nn.Module) -> set[str]:
    """The layers that the model's adapter is in."""
    return {name.removesuffix(f"{_BASE}weight") for name in low_rank_updates(model)}


def names_adapter(source: str, location: Mapping[str, Any]) -> str | None:
    """The base model that the adapter in `source` (folder or hub name) names; None if there is no adapter there."""
    if (Path(source) / "config.json").exists():
        return None
    file = find_adapter_config_file(source, **location)
    if file is None:
        return None
    base: str | None = json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return base


def load_adapter(model: PreTrainedModel, source: str, location: Mapping[str, Any]) -> None:
    """Put the adapter that lies in `source` into its base model, to be trained on. Raises ValueError."""
    with _needing_peft():
        from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
    config = PeftConfig.from_pretrained(source, **location)
    config.inference_mode = False
    add_adapter(model, config)
    stored = load_peft_weights(source, device="cpu", **location)
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    result: Any = set_peft_model_state_dict(model, weights, adapter_name=_NAME)
    missing = [name for name in result.missing_keys if is_low_rank(name)]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"the adapter in {source} is not one of {type(model).__name__}: missing {missing[:3]}, unexpected "
            f"{result.unexpected_keys[:3]}"
        )


def save_adapter(model: PreTrainedModel, folder: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write the files that peft loads; `tensors` are the model's state dict, or what it has of the adapter."""
    with _needing_peft():
        from peft import get_peft_model_state_dict
    config = adapter_of(model)
    assert config is not None, "there is an adapter"
    own = {name: tensor for name, tensor in tensors.items() if is_low_rank(name)}
    stored = get_peft_model_state_dict(model, own, adapter_name=_NAME, save_embedding_layers=False)
    contents = {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in stored.items()}
    save_file(contents, Path(folder) / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    config = copy.copy(config)
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or model.name_or_path
    config.save_pretrained(os.fspath(folder))


def low_rank_updates(model: nn.Module) -> dict[str, LowRank]:
    """What the adapter adds, by the name that the weight has in the model; empty without an adapter."""
    if adapter_of(model) is None:
        return {}
    from peft.tuners.lora import LoraLayer

    return {
        f"{name}{_BASE}weight": LowRank(
            f"{name}.lora_A.{_NAME}.weight",
            f"{name}.lora_B.{_NAME}.weight",
            module.scaling[_NAME],
            isinstance(module.get_base_layer(), Conv1D),
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def merged_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `model` as the model would have it without an adapter, whose changes are in the weights."""
    updates = low_rank_updates(model)
    return {
        plain_name(name): updates[name].merged(tensor, tensors[updates[name].down], tensors[updates[name].up])
        if name in updates
        else tensor
        for name, tensor in tensors.items()
        if not is_low_rank(name)
    }


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the model as it was before it had an adapter, under the names of then."""
    return ((plain_name(name), tensor) for name, tensor in model.named_parameters() if not is_low_rank(name))


def plain_name(name: str) -> str:
    """A parameter's name in the model without an adapter."""
    return name.replace(_BASE, ".")


def is_low_rank(name: str) -> bool:
    """Whether a parameter of this name is the adapter's."""
    return any(part in name for part in _LOW_RANK)


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as its base does; only for passes without a gradient."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        # peft's enable_adapters would freeze the parameters meanwhile, which FSDP takes for good.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextlib.contextmanager
def _needing_peft() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError("LoRA needs peft: pip install 'rlhf-services[lora]'") from error


def _refuse_more_than_lora(config: LoraConfig, plain: LoraConfig) -> None:
    more = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in _UNDERSTOOD and getattr(config, field.name) != getattr(plain, field.name, None)
    ]
    if config.init_lora_weights not in (True, "gaussian"):
        more.append("init_lora_weights")
    if more:
        raise ValueError(
            f"peft_config: {', '.join(more)}: only plain LoRA is trained, which begins at the base model and merges "
            "into it; leave that at peft's default"
        )


def _linear_layers(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return [
        name.removesuffix(_BASE[:-1])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not is_low_rank(f".{name}.")
    ]


def _short_names(model: PreTrainedModel) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in _linear_layers(model)})
