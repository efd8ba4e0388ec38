"""Settings of a process: one typed object, made from flags, environment and a YAML file under the same names.

Flags win over the environment (`RLHF_<PROCESS>_<NAME>`), that over the file of --config, that over defaults. A name
that no setting has is an error wherever it stands, with the nearest name that exists.
"""

from __future__ import annotations

import argparse
import difflib
import enum
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from rlhf import __version__
from rlhf.logs import LogFormat, LogLevel

EX_CONFIG = 78  # sysexits.h: a configuration error, which starting again can't mend


class ConfigurationError(Exception):
    """What is wrong with the settings, one line per mistake, ready to be shown."""


class ProcessSettings(BaseSettings):
    """Logs, metrics and ports"""

    model_config = SettingsConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    log_format: LogFormat = Field(
        default="auto", description="Lines for people or for machines; auto = text on a terminal, else JSON"
    )
    log_level: LogLevel = Field(default="info", description="Least level that is logged")
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | Literal["auto"] = Field(
        default=0,
        description="Port of the Prometheus metrics; 0 = off, auto = the OS picks",
        json_schema_extra={"unit": "port"},
    )
    metrics_host: str = Field(default="127.0.0.1", min_length=1, description="Address that the metrics listen on")
    endpoint_file: Path | None = Field(
        default=None, description="Write pid, address and metrics URL there, as JSON, once they are known"
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s/]+:\d{1,5}$",
        description="Send traces to this OTLP receiver over gRPC; https = with TLS; unset = no traces",
        json_schema_extra={"unit": "http(s)://host:port"},
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments only: `load_settings` reads the rest, and remembers where each value came from."""
        return (init_settings,)


class ServerSettings(ProcessSettings):
    """gRPC server"""

    listen: str = Field(
        default="127.0.0.1:0",
        pattern=r"^(.+:\d{1,5}|unix:.+)$",
        description="Address to listen on; port 0 = the OS picks",
        json_schema_extra={"unit": "host:port"},
    )
    max_message_bytes: int = Field(
        default=64 << 20,
        ge=4 << 20,
        lt=2 << 30,
        description="Largest message either way",
        json_schema_extra={"unit": "bytes"},
    )
    drain_seconds: float = Field(
        default=0.5,
        ge=0,
        description="After SIGTERM, how long health says NOT_SERVING before new calls are refused",
        json_schema_extra={"unit": "seconds"},
    )
    grace_seconds: float = Field(
        default=30.0,
        ge=0,
        description="After that, how long calls in flight may take to finish",
        json_schema_extra={"unit": "seconds"},
    )


S = TypeVar("S", bound=ProcessSettings)


def load_settings(settings_class: type[S], argv: Sequence[str] | None = None, *, prog: str) -> S:
    """The settings that `argv` (None = the command line's), the environment and the file give.

    A mistake is explained on stderr and ends the process with status 78; --help, --version and --print-config print
    and end it with status 0.
    """
    try:
        flags = _parse_flags(settings_class, argv, prog)
        print_config = flags.pop("print_config", False)
        settings = read_settings(settings_class, flags, os.environ)
    except ConfigurationError as error:
        sys.stderr.write(f"{prog}: the settings are wrong\n{error}\n{prog} --help lists every setting\n")
        raise SystemExit(EX_CONFIG) from None
    if print_config:
        sys.stdout.write(to_yaml(settings))
        raise SystemExit(0)
    return settings


def to_yaml(settings: ProcessSettings) -> str:
    """The settings as a file for --config that gives them again."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class _Given:
    """A value and where it came from: `place` as a person would name it, `known` the names that exist there."""

    value: Any
    place: str
    known: Sequence[str]


def read_settings(settings_class: type[S], flags: Mapping[str, Any], environment: Mapping[str, str]) -> S:
    """Merge flags (by field name, values as text; "config" = the file) with the environment and the file.

    Raises ConfigurationError.
    """
    fields, prefix = settings_class.model_fields, settings_class.model_config.get("env_prefix", "")
    variables = _environment(prefix, environment, list(fields))
    file = flags.get("config") or variables.pop("config", _Given(None, "", ())).value
    flag_names = [flag for name, field in fields.items() for flag in _flags(name, field)]
    given = {
        **(_file(Path(file), list(fields)) if file else {}),
        **variables,
        **{name: _Given(value, _flag(name), flag_names) for name, value in flags.items() if name != "config"},
    }
    values = {
        name: _decoded(each.value, fields[name]) if name in fields else each.value for name, each in given.items()
    }
    try:
        return settings_class(**values)
    except ValidationError as error:
        raise ConfigurationError("\n".join(_explain(error, given, prefix))) from error


def _file(path: Path, known: Sequence[str]) -> dict[str, _Given]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"  --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"  --config {path}: not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(f"  --config {path}: must hold lines of the form `name: value`")
    for name in content:
        # BaseSettings takes names with an underscore in front for orders to itself.
        if not isinstance(name, str) or name.startswith("_"):
            raise ConfigurationError(f"  {name!r} in {path}: no such setting")
    return {name: _Given(value, f"{name} in {path}", known) for name, value in content.items()}


# What Kubernetes puts into every pod for a Service whose name is our prefix ("rlhf-policy") or begins with it
# ("rlhf-policy-server"). The address tells the port of a Service "rlhf-policy-metrics" from our setting metrics_port.
_SERVICE_LINK = re.compile(
    r"(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT(?==\w+://)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)=.+"
)


def _environment(prefix: str, environment: Mapping[str, str], names: Sequence[str]) -> dict[str, _Given]:
    """Variables that begin with the prefix, by field name; empty ones count as unset."""
    known = [f"{prefix}{name.upper()}" for name in names]
    given = {}
    for variable, value in sorted(environment.items()):
        name = variable.removeprefix(prefix)
        if prefix and variable != name and name and value and not _SERVICE_LINK.fullmatch(f"{name}={value}"):
            given[name.lower()] = _Given(value, variable, known)
    return given


def _decoded(value: Any, field: FieldInfo) -> Any:
    """Text of a flag or variable as what its field takes; pydantic turns text into numbers and the like by itself.

    Lists are given as "a,b", as YAML "[a, b]", or by a repeated flag; mappings as YAML, and so as JSON; null = unset.
    """
    kinds = list(_alternatives(field.annotation))
    if isinstance(value, str) and value == "null" and type(None) in kinds:
        return None
    origins = {get_origin(kind) or kind for kind in kinds}
    if origins & {list, tuple, set, frozenset}:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return [item for text in texts for item in _items(text)]
    elif dict in origins and isinstance(value, str):
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            return value
        return parsed if isinstance(parsed, dict) else value
    return value


def _items(text: str) -> list[Any]:
    if text.startswith("["):
        try:
            parsed = yaml.safe_load(text)
        except yaml.YAMLError:
            return [text]
        return parsed if isinstance(parsed, list) else [text]
    return [item.strip() for item in text.split(",") if item.strip()]


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, without Annotated; of anything else, itself."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _alternatives(member)
    else:
        yield annotation


def _explain(error: ValidationError, given: Mapping[str, _Given], prefix: str) -> Iterator[str]:
    """One line for each setting that is wrong."""
    messages: dict[str, list[str]] = {}
    for mistake in error.errors(include_url=False):
        name = str(mistake["loc"][0]) if mistake["loc"] else ""
        each = given.get(name)
        message = mistake["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
        if mistake["type"] == "missing":
            message = f"is missing; {_flag(name)}, {prefix}{name.upper()} or {name} in the file of --config sets it"
        elif mistake["type"] == "extra_forbidden":
            message = "no such setting" + (_nearest(each.place.partition(" ")[0], each.known) if each else "")
        elif name:
            message = f"{mistake['input']!r}: {message}" if not isinstance(mistake["input"], dict) else message
        messages.setdefault(name, []).append(message)
    for name, several in messages.items():
        place = given[name].place if name in given else name
        first = several[0].partition(": ")[0]
        text = " or ".join([several[0], *(each.removeprefix(f"{first}: ") for each in several[1:])])
        yield f"  {place}: {text}" if place else f"  {text}"


def _nearest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"  {message}")


def _parse_flags(settings_class: type[ProcessSettings], argv: Sequence[str] | None, prog: str) -> dict[str, Any]:
    """What the flags say, by field name; flags that are none of ours too, for `read_settings` to refuse."""
    known, unknown = _parser(settings_class, prog).parse_known_args(argv)
    given: dict[str, Any] = vars(known)
    rest = iter(unknown)
    last = None
    for text in rest:
        if text.startswith("--"):
            flag, _, value = text.partition("=")
            last = flag.removeprefix("--").replace("-", "_")
            given[last] = value
        elif last is not None and not given[last]:
            given[last] = text
        else:
            raise ConfigurationError(f"  {text!r}: every setting is given as --name value")
    return given


def _parser(settings_class: type[ProcessSettings], prog: str) -> _Parser:
    prefix = settings_class.model_config.get("env_prefix", "")
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--setting value ...]",
        description=settings_class.__doc__,
        epilog=f"Each setting may also come from the environment, as {prefix}LOG_LEVEL for --log-level, or from "
        "the file of --config, as log_level. Flags win over the environment, that over the file. Lists are given as "
        "a,b or by repeating the flag, mappings as YAML or JSON; null unsets.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument("--print-config", action="store_true", help="print the settings that result, as YAML, and exit")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    for declaring in settings_class.__mro__:
        if issubclass(declaring, BaseModel) and (names := _own_fields(declaring)):
            title = (declaring.__doc__ or "").strip().splitlines()[0].rstrip(".")
            group = parser.add_argument_group("settings of this process" if declaring is settings_class else title)
            for name in names:
                _add_flag(group, name, settings_class.model_fields[name])
    return parser


def _own_fields(model: type[BaseModel]) -> list[str]:
    inherited = {name for base in model.__bases__ if issubclass(base, BaseModel) for name in base.model_fields}
    return [name for name in model.model_fields if name not in inherited]


def _add_flag(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    extra = field.json_schema_extra
    unit = [str(extra["unit"])] if isinstance(extra, dict) and "unit" in extra else []
    text = f"{(field.description or '').rstrip('.')} [{'; '.join([*unit, _default(field)])}]".replace("%", "%%")
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not type(None)]
    if kinds == [bool]:
        group.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=text)
    elif (get_origin(kinds[0]) or kinds[0]) in (list, tuple, set, frozenset):
        item = "|".join(_kind(each) for each in _alternatives(get_args(kinds[0])[0]))
        group.add_argument(_flag(name), action="append", metavar=f"{item},...", help=text)
    else:
        group.add_argument(_flag(name), metavar="|".join(_kind(kind) for kind in kinds), help=text)


def _kind(annotation: Any) -> str:
    """What a person has to write, for --help."""
    if get_origin(annotation) is Literal:
        return "|".join(str(value) for value in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "|".join(str(member.value) for member in annotation)
    names = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH", dict: "MAPPING"}
    return names.get(get_origin(annotation) or annotation, "VALUE")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value == "" or value == [] or value == {}:
        return "default: unset"
    if isinstance(value, bool):
        return f"default: {'on' if value else 'off'}"
    return f"default: {value.value if isinstance(value, enum.Enum) else value}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flags(name: str, field: FieldInfo) -> list[str]:
    return [_flag(name), f"--no-{_flag(name)[2:]}"] if field.annotation is bool else [_flag(name)]
