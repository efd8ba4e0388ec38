from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from rlhf import __version__
from rlhf.config import EX_CONFIG, ServerSettings, load_settings, to_yaml


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Settings(ServerSettings):
    """A process of this test."""

    model_config = SettingsConfigDict(env_prefix="RLHF_TEST_", extra="forbid")

    model: str = Field(description="Which model, 100% of it")
    rows: int = Field(default=8, ge=1, le=64, description="Rows.", json_schema_extra={"unit": "rows"})
    rate: float = Field(default=1e-5, gt=0, description="Rate")
    strict: bool = Field(default=False, description="Be strict")
    colour: Colour = Field(default=Colour.RED, description="Colour")
    folder: Path | None = Field(default=None, description="Folder")
    tags: list[str] = Field(default_factory=list, description="Tags")
    options: dict[str, Any] = Field(default_factory=dict, description="Options")

    @model_validator(mode="before")
    @classmethod
    def _know_top_k(cls, values: Any) -> Any:
        if "top_k" in values:
            raise ValueError("top_k is refused, and here is why")
        return values


def load(*argv: str) -> Settings:
    return load_settings(Settings, argv, prog="prog")


def mistakes(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What stderr says about settings that are wrong."""
    with pytest.raises(SystemExit) as caught:
        load(*argv)
    assert caught.value.code == EX_CONFIG == 78
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("prog: ")
    assert err.endswith("prog --help lists every setting\n")
    return err


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        load(*argv)
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text("model: from file\nrows: 1\nrate: 1e-3\n")
    return path


def test_flags_win_over_the_environment_over_the_file_over_defaults(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_TEST_ROWS", "2")
    monkeypatch.setenv("RLHF_TEST_RATE", "0.5")

    settings = load("--config", str(file), "--rows", "3")

    assert (settings.rows, settings.rate, settings.model, settings.strict) == (3, 0.5, "from file", False)


def test_the_file_may_be_named_by_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_TEST_CONFIG", str(file))

    assert load().model == "from file"


def test_an_empty_file_and_an_empty_variable_set_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    monkeypatch.setenv("RLHF_TEST_ROWS", "")

    assert load("--model", "m", "--config", str(tmp_path / "empty.yaml")).rows == 8


def test_flags_are_kebab_case_and_switches_go_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_TEST_STRICT", "true")

    assert load("--model", "m", "--max-message-bytes=5000000").max_message_bytes == 5_000_000
    assert load("--model", "m").strict is True
    assert load("--model", "m", "--no-strict").strict is False


@pytest.mark.parametrize("flags", [("--tags", "a,b"), ("--tags", "[a, b]"), ("--tags", "a", "--tags", "b")])
def test_lists_are_written_in_three_ways(flags: tuple[str, ...]) -> None:
    assert load("--model", "m", *flags).tags == ["a", "b"]


def test_lists_and_mappings_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_TEST_TAGS", "a,b")
    monkeypatch.setenv("RLHF_TEST_OPTIONS", '{"a": [1, 2]}')

    settings = load("--model", "m")

    assert (settings.tags, settings.options) == (["a", "b"], {"a": [1, 2]})


def test_null_unsets_what_may_be_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_TEST_FOLDER", "/somewhere")

    assert load("--model", "m").folder == Path("/somewhere")
    assert load("--model", "null", "--folder", "null").folder is None


def test_constructing_settings_reads_nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_TEST_ROWS", "2")

    assert Settings(model="m").rows == 8


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--rows", "0"), "--rows: '0': must be greater than or equal to 1"),
        (("--rows", "65"), "--rows: '65': must be less than or equal to 64"),
        (("--rows", "many"), "--rows: 'many': must be a valid integer"),
        (("--colour", "green"), "--colour: 'green': must be 'red' or 'blue'"),
        (("--rate", "nan"), "--rate: 'nan': must be a finite number"),
        (("--metrics-port", "-1"), "--metrics-port: '-1': must be greater than or equal to 0 or must be 'auto'"),
        (("--listen", "50051"), "--listen: '50051': "),
        (("--rowz", "3"), "--rowz: no such setting; did you mean --rows?"),
        (("--rowz=3",), "--rowz: no such setting; did you mean --rows?"),
        (("--row", "3"), "--row: no such setting; did you mean --rows?"),
        (("--no-strikt",), "--no-strikt: no such setting; did you mean --no-strict?"),
        (("--zzz",), "--zzz: no such setting\n"),
        (("stray",), "'stray': every setting is given as --name value"),
        (("--strict", "yes"), "'yes': every setting is given as --name value"),
        (("--rows",), "argument --rows: expected one argument"),
        (("--top-k", "5"), "top_k is refused, and here is why"),
        (("--config", "/no/such/file"), "--config /no/such/file: No such file or directory"),
    ],
)
def test_a_wrong_flag_is_named_with_its_value_and_the_limit(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert said in mistakes(capsys, "--model", "m", *flags)


def test_a_missing_setting_is_named_with_all_ways_to_set_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "model: is missing; --model, RLHF_TEST_MODEL or model in the file" in mistakes(capsys)


def test_every_mistake_is_listed_where_it_stands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("model: m\nrate: -1\nlistn: x\n")
    monkeypatch.setenv("RLHF_TEST_COLOUR", "green")
    monkeypatch.setenv("RLHF_TEST_ROWZ", "1")

    said = mistakes(capsys, "--config", str(file), "--rows", "0")

    assert f"rate in {file}: -1: must be greater than 0" in said
    assert f"listn in {file}: no such setting; did you mean listen?" in said
    assert "RLHF_TEST_COLOUR: 'green': must be 'red' or 'blue'" in said
    assert "RLHF_TEST_ROWZ: no such setting; did you mean RLHF_TEST_ROWS?" in said
    assert "--rows: '0': " in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [", "not YAML"),
        ("- a\n- b\n", "must hold lines of the form"),
        ("_env_file: x\n", "'_env_file' in "),
        ("1: x\n", "1 in "),
        ("model: {a: 1}\n", "must be a valid string"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, said: str
) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(content)

    assert said in mistakes(capsys, "--config", str(file))


@pytest.mark.parametrize("service", ["", "SERVER_", "METRICS_"])
def test_variables_that_kubernetes_adds_for_a_service_of_our_name_are_no_settings(
    monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT_GRPC", "PORT", "PORT_50051_TCP", "PORT_50051_TCP_ADDR"):
        monkeypatch.setenv(f"RLHF_TEST_{service}{name}", "tcp://10.0.0.1:50051")

    settings = load("--model", "m")
    assert settings.model == "m"
    assert settings.metrics_port == Settings.model_fields["metrics_port"].default


def test_a_mistyped_variable_that_ends_like_one_of_kubernetes_is_a_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_TEST_METRIC_PORT", "9090")

    assert "RLHF_TEST_METRICS_PORT" in mistakes(capsys, "--model", "m")


def test_help_lists_every_setting_with_type_unit_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    text = printed(capsys, "--help")

    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip().startswith("--")}
    assert "TEXT" in lines["--model"]
    assert "100% of it [required]" in lines["--model"]
    assert "INTEGER" in lines["--rows"]
    assert "[rows; default: 8]" in lines["--rows"]
    assert "red|blue" in lines["--colour"]
    assert "[default: red]" in lines["--colour"]
    assert "[default: off]" in lines["--strict,"]
    assert "INTEGER|auto" in lines["--metrics-port"]
    assert "[default: unset]" in lines["--folder"]
    assert "[seconds; default: 30.0]" in lines["--grace-seconds"]
    assert "gRPC server:" in text
    assert "RLHF_TEST_" in text


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version") == f"prog {__version__}\n"


def test_the_printed_configuration_is_a_file_that_gives_it_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = (
        "--model",
        "m",
        "--rows",
        "3",
        "--tags",
        "a,b",
        "--folder",
        "/x",
        "--colour",
        "blue",
        "--metrics-port=auto",
    )

    file = tmp_path / "f.yaml"
    file.write_text(printed(capsys, *flags, "--print-config"))

    assert yaml.safe_load(file.read_text()).keys() == Settings.model_fields.keys()
    assert load("--config", str(file)) == load(*flags)
    assert to_yaml(load(*flags)) == file.read_text()


def test_mistakes_are_told_before_the_configuration_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--rows" in mistakes(capsys, "--model", "m", "--rows", "0", "--print-config")
