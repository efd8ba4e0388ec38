"""Settings of a process: one typed object, from flags, environment and a YAML file under the same names.

Flags win over the environment (`RLHF_<PROCESS>_<NAME>`), that over the file given with --config, that over defaults.
A name that no setting has is an error wherever it stands, with the nearest name that exists.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_origin

import yaml
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from rlhf import __version__

EX_CONFIG = 78
"""Exit status of a configuration error (sysexits.h): restarting can't mend it."""


class ConfigurationError(Exception):
    """What is wrong with the settings, one line per mistake, ready to be shown."""


class ProcessSettings(BaseSettings):
    """What every process can be told."""

    model_config = SettingsConfigDict(
        extra="forbid", validate_default=True, env_ignore_empty=False, str_strip_whitespace=True
    )

    log_format: Literal["auto", "text", "json"] = Field(
        default="auto", description="Log lines for people or for machines; auto = text on a terminal, else JSON"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level logged")
    metrics_port: int | Literal["auto"] = Field(
        default=0,
        description="Port of the Prometheus endpoint; 0 = off, auto = the OS picks",
        json_schema_extra={"unit": "port"},
    )
    metrics_host: str = Field(default="127.0.0.1", description="Address that the Prometheus endpoint binds")
    endpoint_file: Path | None = Field(
        default=None, description="Write pid, address and metrics URL to this file, as JSON, once they are bound"
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
        """Flags (given to the constructor), environment, YAML file; nothing else is read."""
        file = cls.model_config.get("yaml_file")
        sources = (init_settings, env_settings)
        return (*sources, YamlConfigSettingsSource(settings_cls)) if file is not None else sources


class ServerSettings(ProcessSettings):
    """What every gRPC server can be told."""

    listen: str = Field(
        default="127.0.0.1:0",
        pattern=r"^.*:\d+$",
        description="Address to listen on; port 0 = the OS picks",
        json_schema_extra={"unit": "host:port"},
    )
    max_message_bytes: int = Field(
        default=64 << 20,
        ge=4 << 20,
        le=(2 << 30) - 1,
        description="Largest message, either way",
        json_schema_extra={"unit": "bytes"},
    )
    drain_seconds: float = Field(
        default=0.5,
        ge=0,
        description="After SIGTERM, how long health says NOT_SERVING before calls are refused",
        json_schema_extra={"unit": "seconds"},
    )
    grace_seconds: float = Field(
        default=30.0,
        ge=0,
        description="After that, how long running calls may take to finish",
        json_schema_extra={"unit": "seconds"},
    )


S = TypeVar("S", bound=ProcessSettings)


def load_settings(settings_class: type[S], argv: Sequence[str] | None = None, *, prog: str) -> S:
    """Read the settings; a mistake is explained on stderr and ends the process with status 78.

    --help, --version and --print-config print and end it with status 0.
    """
    parser = _parser(settings_class, prog)
    try:
        flags = _parse(parser, settings_class, argv)
        print_config = flags.pop("print_config", False)
        settings = read_settings(settings_class, flags, config_file=flags.pop("config", None))
    except ConfigurationError as error:
        sys.stderr.write(f"{prog}: configuration error\n{error}\n{prog} --help lists every setting\n")
        raise SystemExit(EX_CONFIG) from None
    if print_config:
        sys.stdout.write(to_yaml(settings))
        raise SystemExit(0)
    return settings


def read_settings(settings_class: type[S], values: dict[str, Any], *, config_file: Path | str | None = None) -> S:
    """Merge `values` (as from flags), the environment and the YAML file. Raises ConfigurationError."""
    prefix = settings_class.model_config.get("env_prefix", "")
    config_file = config_file or os.environ.get(f"{prefix}CONFIG") or None
    _refuse_unknown_environment(settings_class, prefix)
    source = settings_class
    if config_file is not None:
        _check_file(Path(config_file))
        source = type(
            settings_class.__name__,
            (settings_class,),
            {"__module__": settings_class.__module__, "model_config": {"yaml_file": config_file}},
        )
    try:
        return source(**values)
    except ValidationError as error:
        raise ConfigurationError("\n".join(_explain(settings_class, error, prefix))) from error
    except (SettingsError, yaml.YAMLError) as error:
        raise ConfigurationError(f"  {error}") from error


def to_yaml(settings: ProcessSettings) -> str:
    """The settings as the YAML file that would give them again."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean x?", or nothing when no known name is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"  {message}")


def _parser(settings_class: type[ProcessSettings], prog: str) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=(settings_class.__doc__ or "").strip(),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, under the names below with _ for -")
    parser.add_argument("--print-config", action="store_true", help="print the settings that result, as YAML, and exit")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    fields = settings_class.model_fields
    remaining = dict(fields)
    # The class that declares a field is its group; the process's own come first.
    groups: list[tuple[str, list[str]]] = []
    for declaring in reversed(settings_class.__mro__):
        own = [name for name in getattr(declaring, "__annotations__", {}) if name in remaining]
        if own:
            groups.insert(0, ((declaring.__doc__ or declaring.__name__).strip().splitlines()[0], own))
            for name in own:
                del remaining[name]
    for title, names in groups:
        group = parser.add_argument_group(title)
        for name in names:
            _add_flag(group, name, fields[name])
    return parser


def _add_flag(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    if field.is_required():
        default = "required"
    else:
        value = field.get_default(call_default_factory=not field.default_factory_takes_validated_data)
        default = f"default: {_shown(value)}"
    notes = [*([str(extra["unit"])] if "unit" in extra else []), default]
    text = f"{(field.description or '').rstrip('.')} [{', '.join(notes)}]".replace("%", "%%")
    if field.annotation is bool:
        group.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=text)
    elif get_origin(field.annotation) in (list, tuple, set):
        group.add_argument(_flag(name), action="append", metavar="VALUE", help=text + "; may be repeated")
    else:
        group.add_argument(_flag(name), metavar=name.rpartition("_")[2].upper(), help=text)


def _shown(value: object) -> str:
    if value is None or value is PydanticUndefined:
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(getattr(value, "value", value)) or '""'


def _parse(parser: _Parser, settings_class: type[ProcessSettings], argv: Sequence[str] | None) -> dict[str, Any]:
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        first = unknown[0].partition("=")[0]
        flags = [_flag(name) for name in settings_class.model_fields]
        hint = nearest(first, flags) if first.startswith("-") else "; every setting is given as --name value"
        raise ConfigurationError(f"  {first}: no such flag{hint}" if first.startswith("-") else f"  {first!r}{hint}")
    return vars(namespace)


def _refuse_unknown_environment(settings_class: type[ProcessSettings], prefix: str) -> None:
    if not prefix:
        return
    known = {f"{prefix}{name}".upper() for name in (*settings_class.model_fields, "config")}
    for name in sorted(os.environ):
        if name.upper().startswith(prefix.upper()) and name.upper() not in known:
            raise ConfigurationError(f"  environment variable {name}: no such setting{nearest(name.upper(), known)}")


def _check_file(path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"  --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"  --config {path}: not YAML: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigurationError(f"  --config {path}: must hold `name: value` lines")


def _explain(settings_class: type[ProcessSettings], error: ValidationError, prefix: str) -> Iterable[str]:
    fields = settings_class.model_fields
    for mistake in error.errors(include_url=False):
        name = str(mistake["loc"][0]) if mistake["loc"] else ""
        if mistake["type"] == "extra_forbidden":
            yield f"  {name}: no such setting{nearest(name, fields)}"
        elif mistake["type"] == "missing":
            yield f"  {name}: required; give {_flag(name)}, {prefix}{name.upper()} or `{name}:` in the file"
        elif name:
            message = str(mistake["msg"]).removeprefix("Value error, ")
            yield f"  {name}: {message[:1].lower()}{message[1:]}, got {mistake['input']!r} ({_flag(name)})"
        else:
            yield f"  {str(mistake['msg']).removeprefix('Value error, ')}"
