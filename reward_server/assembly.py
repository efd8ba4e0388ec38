"""From what a user typed (`vader`, `file.py:function`, `model`, `mix.yaml`) to the reward that it means."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from reward_server.composite import Child, CompositeOptions, CompositeReward
from reward_server.kinds import Limits, RewardKind, RewardLoadError
from reward_server.kinds.function import FunctionReward
from reward_server.kinds.loading import load_function, refused_options

_COMPOSITE = "composite"


@dataclass(frozen=True)
class _Kind:
    """Where a kind's class `…Reward` and its `…Options` are, imported when asked for: some bring torch with them."""

    module: str
    prefix: str
    extra: str


_KINDS = {
    "model": _Kind("reward_server.kinds.model", "Model", "model"),
    "human": _Kind("reward_server.human.kind", "Human", "human"),
    "remote": _Kind("reward_server.kinds.remote", "Remote", "reward"),
    "http": _Kind("reward_server.kinds.http", "Http", "judge"),
    "judge": _Kind("reward_server.kinds.judge", "Judge", "judge"),
}

KINDS = (*_KINDS, _COMPOSITE)
"""Names of the kinds other than functions, which go by their own names."""


def make_reward(reward: str, options: Mapping[str, Any], limits: Limits) -> RewardKind:
    """The reward, not started yet. Raises RewardLoadError for what can be known before."""
    if reward.endswith((".yaml", ".yml")):
        if options:
            raise RewardLoadError(f"{reward} holds the options of the composite; give none beside it")
        return _composite(_read(Path(reward)), limits, reward)
    if reward == _COMPOSITE:
        return _composite(options, limits, reward)
    if reward in _KINDS:
        return _of_kind(reward, options, limits)
    return FunctionReward(load_function(reward, options, other_names=KINDS), limits)


def _of_kind(name: str, options: Mapping[str, Any], limits: Limits) -> RewardKind:
    kind = _KINDS[name]
    try:
        module = importlib.import_module(kind.module)
        parsed = _parsed(getattr(module, f"{kind.prefix}Options"), options, name)
        made: RewardKind = getattr(module, f"{kind.prefix}Reward")(parsed, limits)
    except ModuleNotFoundError as error:
        raise RewardLoadError(
            f"the reward {name} needs the package {error.name}: pip install 'rlhf-services[{kind.extra}]'"
        ) from error
    return made


def _composite(options: Mapping[str, Any], limits: Limits, where: str) -> RewardKind:
    parsed: CompositeOptions = _parsed(CompositeOptions, options, where)
    children = []
    for index, part in enumerate(parsed.components):
        try:
            children.append(Child(part, make_reward(part.reward, part.options, limits)))
        except RewardLoadError as error:
            raise RewardLoadError(f"{where}, components[{index}] ({part.name}): {error}") from error
    return CompositeReward(parsed, children, limits)


def _parsed(options_class: Any, options: Mapping[str, Any], where: str) -> Any:
    try:
        return options_class(**options)
    except ValidationError as error:
        known = list(options_class.model_fields)
        raise RewardLoadError(f"options of the reward {where}: {refused_options(error, known)}") from error


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RewardLoadError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RewardLoadError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise RewardLoadError(f"{path} must hold the options of a composite, `components` among them")
    return content
