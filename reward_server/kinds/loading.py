"""From what a user typed (`vader`, `package.module:function`, `folder/file.py:function`) to something to call."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from reward_server.builtins import BUILTINS
from reward_server.kinds import RewardLoadError
from rlhf import __version__

# Given to every reward function by position or by these names; a column cannot take their place.
RESERVED_PARAMETERS = ("prompts", "completions", "completion_ids", "messages", "group_ids")


@dataclass(frozen=True)
class LoadedFunction:
    """A reward function with its options bound.

    parameters: names of the keyword arguments it takes that are not options. takes_any: has **kwargs.
    required_columns: parameters without a default that the server does not give itself. version: changes with the
    source file, the options and our release.
    """

    call: Callable[..., Any]
    is_async: bool
    name: str
    version: str
    parameters: frozenset[str]
    takes_any: bool
    required_columns: tuple[str, ...]

    @property
    def takes_token_ids(self) -> bool:
        """Whether it names `completion_ids`; **kwargs alone does not ask for them."""
        return "completion_ids" in self.parameters

    @property
    def compares(self) -> bool:
        """Whether it names `group_ids`, and so wants whole groups."""
        return "group_ids" in self.parameters

    def accepts(self, name: str) -> bool:
        """Whether it may be called with the keyword argument `name`."""
        return self.takes_any or name in self.parameters


def load_function(spec: str, options: Mapping[str, Any], *, other_names: Sequence[str] = ()) -> LoadedFunction:
    """Resolve `spec` and bind `options`: a class is constructed with them once, a function gets them at every call.

    other_names: what else a reward may be called, for the hint when `spec` is nothing. Raises RewardLoadError, naming
    what is wrong, for anything that can be known before the first call.
    """
    if spec in BUILTINS:
        target: Any = BUILTINS[spec]
        name = spec
        source = Path(inspect.getfile(target))
        revision = _installed_version("vaderSentiment") if spec == "vader" else ""
    else:
        module_name, _, attribute = spec.rpartition(":")
        if not module_name or not attribute:
            raise RewardLoadError(_unknown(spec, [*BUILTINS, *other_names]))
        module = _import_file(module_name) if module_name.endswith(".py") else _import_module(module_name)
        target = _attribute(module, attribute, spec)
        name = attribute
        source = Path(module.__file__) if module.__file__ else Path()
        revision = ""
    call = _construct(target, options, spec) if inspect.isclass(target) else _bind(target, options, spec)
    return _described(call, name=name, spec=spec, version=f"{name}@{_digest(source, name, options, revision)}")


def refused_options(error: ValidationError, known: Sequence[str]) -> str:
    """What is wrong with a reward's options, for the person who gave them; known: the names that exist."""
    mistakes = []
    for item in error.errors(include_url=False):
        name = ".".join(map(str, item["loc"]))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, known, n=1)
            message = f"no such option; {f'did you mean {near[0]!r}?' if near else 'it has ' + ', '.join(known)}"
        mistakes.append(f"{name}: {message}" if name else message)
    return "; ".join(mistakes)


def _unknown(spec: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(spec, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"{spec!r} is not a reward: give module:function, path/to/file.py:function, or one of {', '.join(names)}.{hint}"
    )


def _import_file(path_text: str) -> ModuleType:
    path = Path(path_text).resolve()
    if not path.is_file():
        raise RewardLoadError(f"there is no file {path_text}")
    # Helpers that lie beside the file are importable from it, as when Python runs it.
    sys.path.insert(0, str(path.parent))
    name = f"reward_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewardLoadError(f"{path_text} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RewardLoadError(f"{path_text} fails when imported: {type(error).__name__}: {error}") from error
    return module


def _import_module(name: str) -> ModuleType:
    # `python -m` puts the working directory on the path; an installed entry point does not.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise RewardLoadError(f"module {name} cannot be imported: {type(error).__name__}: {error}") from error


def _attribute(module: ModuleType, attribute: str, spec: str) -> Any:
    try:
        target = getattr(module, attribute)
    except AttributeError:
        candidates = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        near = difflib.get_close_matches(attribute, candidates, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RewardLoadError(f"{spec}: the module has no {attribute!r}{hint}") from None
    if not callable(target):
        raise RewardLoadError(f"{spec}: {attribute} is a {type(target).__name__}, not a function")
    return target


def _construct(target: type, options: Mapping[str, Any], spec: str) -> Callable[..., Any]:
    _refuse_unknown(target, options, spec, reserved=())
    try:
        instance = target(**options)
    except ValidationError as error:
        raise RewardLoadError(f"options of the reward {spec}: {refused_options(error, list(options))}") from error
    except Exception as error:
        raise RewardLoadError(f"the reward {spec} cannot be made: {error}") from error
    if not callable(instance):
        raise RewardLoadError(f"{spec}: objects of this class cannot be called")
    return instance  # type: ignore[no-any-return]


def _bind(target: Callable[..., Any], options: Mapping[str, Any], spec: str) -> Callable[..., Any]:
    _refuse_unknown(target, options, spec, reserved=RESERVED_PARAMETERS)
    return partial(target, **options) if options else target


def _refuse_unknown(
    target: Callable[..., Any], options: Mapping[str, Any], spec: str, *, reserved: tuple[str, ...]
) -> None:
    parameters = _signature(target, spec).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    allowed = [name for name, p in parameters.items() if p.kind in _BY_NAME and name not in reserved]
    for option in options:
        if option in reserved or (option not in allowed and not takes_any):
            near = difflib.get_close_matches(option, allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(allowed) or 'none'}"
            raise RewardLoadError(f"the reward {spec} has no option {option!r}; {hint}")


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _signature(target: Callable[..., Any], spec: str) -> inspect.Signature:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError) as error:
        raise RewardLoadError(f"{spec}: its parameters cannot be read: {error}") from error


def _described(call: Callable[..., Any], *, name: str, spec: str, version: str) -> LoadedFunction:
    parameters = _signature(call, spec).parameters
    named = {n: p for n, p in parameters.items() if p.kind in _BY_NAME}
    positional_only = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if positional_only:
        raise RewardLoadError(f"{spec}: {positional_only[0]} is positional-only; rewards are called with keywords")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "completions" not in named and not takes_any:
        raise RewardLoadError(f"{spec}: a reward function takes a parameter named `completions`; this one has none")
    bound = call.keywords if isinstance(call, partial) else {}
    required = tuple(
        n for n, p in named.items() if p.default is p.empty and n not in RESERVED_PARAMETERS and n not in bound
    )
    inner = call.func if isinstance(call, partial) else call
    return LoadedFunction(
        call=call,
        is_async=inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__),
        name=name,
        version=version,
        parameters=frozenset(named) - frozenset(bound),
        takes_any=takes_any,
        required_columns=required,
    )


def _digest(source: Path, name: str, options: Mapping[str, Any], revision: str) -> str:
    digest = hashlib.sha256()
    for part in (__version__, name, revision, json.dumps(dict(options), sort_keys=True, default=str)):
        digest.update(part.encode())
        digest.update(b"\0")
    if source.is_file():
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _installed_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
