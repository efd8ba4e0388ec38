from __future__ import annotations

import asyncio
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from rlhf.logs import bound_context, configure_logging, get_logger


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def _json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_json_lines_hold_time_level_logger_event_context_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")
    with bound_context(run_id="r", step=3), bound_context(request_id="q"):
        get_logger("a.b").info("what happened", count=2, where="hier ü")

    (line,) = _json_lines(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "a.b",
        "run_id": "r",
        "step": 3,
        "request_id": "q",
        "event": "what happened",
        "count": 2,
        "where": "hier ü",
    }


def test_what_json_cannot_hold_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")
    get_logger("a").info("numbers", nan=float("nan"), inf=float("inf"), other=object)

    (line,) = _json_lines(capsys)
    assert (line["nan"], line["inf"], line["other"]) == ("nan", "inf", "<class 'object'>")


def test_lines_of_libraries_look_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")
    with bound_context(run_id="r"):
        logging.getLogger("library").warning("100%% of %s", "it")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("careful", UserWarning, stacklevel=1)

    line, warning = _json_lines(capsys)
    assert (line["logger"], line["event"], line["run_id"]) == ("library", "100% of it", "r")
    assert "careful" in warning["event"]


def test_an_exception_comes_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")
    try:
        raise ZeroDivisionError("why")
    except ZeroDivisionError:
        get_logger("a").exception("it failed", n=1)

    (line,) = _json_lines(capsys)
    assert (line["event"], line["level"], line["n"]) == ("it failed", "error", 1)
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ZeroDivisionError: why")


def test_text_is_one_readable_line_without_colours_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("text", "info")
    with bound_context(step=3):
        get_logger("a.b").info("what happened", count=2)

    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in line
    for part in ("info", "what happened", "a.b", "count=2", "step=3"):
        assert part in line


@pytest.mark.parametrize(("terminal", "is_json"), [(True, False), (False, True)])
def test_auto_is_text_on_a_terminal_and_json_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool, is_json: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    configure_logging("auto", "info")
    get_logger("a").info("hello")

    assert capsys.readouterr().err.startswith("{") == is_json


def test_lines_below_the_level_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "warning")
    get_logger("a").info("quiet")
    get_logger("a").warning("loud")

    assert [line["event"] for line in _json_lines(capsys)] == ["loud"]


def test_configuring_twice_writes_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")
    configure_logging("json", "info")
    get_logger("a").info("once")

    assert len(_json_lines(capsys)) == 1


def test_other_handlers_get_readable_lines_too(caplog: pytest.LogCaptureFixture) -> None:
    get_logger("a").warning("100%% of %s", "it", n=1, text="x y")

    assert caplog.messages == ["100% of it n=1 text='x y'"]


async def test_tasks_do_not_see_each_others_context(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")

    async def work(step: int) -> None:
        with bound_context(step=step):
            await asyncio.sleep(0)
            get_logger("a").info("working", of=step)

    with bound_context(run_id="r"):
        await asyncio.gather(*(work(step) for step in range(5)))
    get_logger("a").info("after")

    *lines, after = _json_lines(capsys)
    assert all(line["step"] == line["of"] and line["run_id"] == "r" for line in lines)
    assert "step" not in after
