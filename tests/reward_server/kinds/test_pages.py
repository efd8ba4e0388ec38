"""The pages about the kinds of reward say what the code does."""

from __future__ import annotations

import asyncio
import re
import shlex
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from reward_server.assembly import make_reward
from reward_server.composite import Component, CompositeOptions
from reward_server.human.options import HumanOptions
from reward_server.kinds import Limits, Sample
from reward_server.kinds.http import HttpOptions, HttpReward
from reward_server.kinds.judge import JudgeOptions
from reward_server.kinds.model import ModelOptions
from reward_server.kinds.remote import RemoteOptions
from reward_server.kinds.rubric import Rubric
from reward_server.results import FailureCode, Scored
from reward_server.train_model.__main__ import main as train
from tests.support.processes import ROOT

OPTIONS: dict[str, type[BaseModel]] = {
    "model": ModelOptions,
    "human": HumanOptions,
    "remote": RemoteOptions,
    "http": HttpOptions,
    "judge": JudgeOptions,
}
PAGES = {name: (ROOT / "docs" / "rewards" / f"{name}.md").read_text() for name in OPTIONS}
COMPOSITE = (ROOT / "docs" / "rewards" / "composite.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| ([^|]*) \|", re.MULTILINE)
COMMAND = re.compile(r"^python -m reward_server (?:.*\\\n)*.*$", re.MULTILINE)
# Told in words.
IN_WORDS = {("judge", "system"), ("human", "scale")}


def shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def section(page: str, heading: str) -> str:
    return page.partition(f"## {heading}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("name", "page", "options"),
    [
        *((name, PAGES[name], options) for name, options in OPTIONS.items()),
        ("composite", section(COMPOSITE, "Of the whole"), CompositeOptions),
        ("component", section(COMPOSITE, "Of each component"), Component),
    ],
)
def test_every_option_is_on_its_page_with_its_default(name: str, page: str, options: type[BaseModel]) -> None:
    fields = options.model_fields
    rows = {option: default for option, default in ROW.findall(page) if option in fields}
    assert rows.keys() == fields.keys()
    for option, default in rows.items():
        value = fields[option].get_default(call_default_factory=True, validated_data={})
        if fields[option].is_required():
            assert default == "required", option
        elif value in ("", None, {}, ()):
            assert default in ("empty", "unset", "none", "this or the next"), option
        elif (name, option) not in IN_WORDS:
            assert default == shown(value), option


def test_every_flag_of_the_training_is_on_the_page_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train(["--help"])
    _, _, told = " ".join(capsys.readouterr().out.split()).partition("show this help message and exit ")
    flags = dict(flag.split(" ", 1) for flag in re.split(r" (?=--)", told))
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| ([^|]*) \|", PAGES["model"], re.MULTILINE))
    assert rows.keys() == flags.keys()
    for flag, text in flags.items():
        default = re.search(r"default: (.*)\]", text)
        assert rows[flag] == (default[1] if default else "required")


def examples(name: str) -> list[BaseModel]:
    """The options that the page's commands and files give."""
    page = PAGES[name]
    commands = [shlex.split(command.replace("\\\n", " ")) for command in COMMAND.findall(page)]
    given = [
        yaml.safe_load(command[command.index("--reward-options") + 1])
        for command in commands
        if "--reward-options" in command
    ]
    given += [yaml.safe_load(block)["reward_options"] for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    return [OPTIONS[name](**options) for options in given]


@pytest.mark.parametrize("name", OPTIONS)
def test_its_examples_are_accepted(name: str) -> None:
    assert examples(name)


def test_the_mixture_on_the_page_can_be_made() -> None:
    (mixture,) = re.findall(r"```yaml\n(.*?)```", COMPOSITE, re.DOTALL)
    assert make_reward("composite", yaml.safe_load(mixture), Limits()).kind == "composite"


def test_the_rubric_on_the_page_is_one() -> None:
    (options,) = examples("judge")
    assert isinstance(options, JudgeOptions)
    assert Rubric(options.rubric).columns == ()


def test_the_codes_of_these_kinds_are_on_their_pages() -> None:
    model = (FailureCode.EMPTY_TEXT, FailureCode.TEXT_TOO_LONG, FailureCode.CHAT_TEMPLATE, FailureCode.NOT_FINITE)
    assert all(f"`{code}`" in PAGES["model"] for code in model)
    assert all(f"`{code}`" in PAGES["human"] for code in (FailureCode.EXPIRED, FailureCode.SAMPLE_ID_CLASH))
    assert f"`{FailureCode.NOT_FINITE}`" in COMPOSITE
    assert f"`{FailureCode.SAMPLE_TOO_LARGE}`" in PAGES["remote"]
    assert f"`{FailureCode.REMOTE_REFUSED}`" in PAGES["http"]
    assert all(f"`{code}`" in PAGES["judge"] for code in (FailureCode.JUDGE_REFUSED, FailureCode.JUDGE_UNREADABLE))


async def test_the_model_on_the_page_can_be_asked() -> None:
    source = re.search(r"# my_model.py\n(.*?)\n\nThreadingHTTPServer", PAGES["http"], re.DOTALL)
    assert source is not None
    namespace: dict[str, Any] = {}
    exec(source.group(1), namespace)
    handler: type[BaseHTTPRequestHandler] = namespace["GetReward"]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    reward = HttpReward(HttpOptions(url=f"http://127.0.0.1:{server.server_port}/get_reward"), Limits())
    try:
        await reward.start()
        assert await reward.score([Sample("a" * 20, "b" * 30)], None) == [Scored(-0.5)]
    finally:
        await reward.close()
        await asyncio.to_thread(server.shutdown)
        server.server_close()
