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

from reward_server.human.options import HumanOptions
from reward_server.kinds import Limits, Sample
from reward_server.kinds.http import HttpOptions, HttpReward
from reward_server.kinds.judge import JudgeOptions
from reward_server.kinds.model import ModelOptions
from reward_server.kinds.remote import RemoteOptions
from reward_server.kinds.rubric import Rubric
from reward_server.results import FailureCode, Scored
from tests.support.processes import ROOT

OPTIONS: dict[str, type[BaseModel]] = {
    "model": ModelOptions,
    "human": HumanOptions,
    "remote": RemoteOptions,
    "http": HttpOptions,
    "judge": JudgeOptions,
}
PAGES = {name: (ROOT / "docs" / "rewards" / f"{name}.md").read_text() for name in OPTIONS}
ROW = re.compile(r"^\| `(\w+)` \| ([^|]*) \|", re.MULTILINE)
COMMAND = re.compile(r"^python -m reward_server (?:.*\\\n)*.*$", re.MULTILINE)
# Told in words.
IN_WORDS = {("judge", "system"), ("human", "scale")}


def shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_on_its_page_with_its_default(name: str) -> None:
    fields = OPTIONS[name].model_fields
    rows = {option: default for option, default in ROW.findall(PAGES[name]) if option in fields}
    assert rows.keys() == fields.keys()
    for option, default in rows.items():
        value = fields[option].get_default(call_default_factory=True, validated_data={})
        if fields[option].is_required():
            assert default == "required", option
        elif value in ("", None, {}, ()):
            assert default in ("empty", "unset", "none", "this or the next"), option
        elif (name, option) not in IN_WORDS:
            assert default == shown(value), option


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


def test_the_rubric_on_the_page_is_one() -> None:
    (options,) = examples("judge")
    assert isinstance(options, JudgeOptions)
    assert Rubric(options.rubric).columns == ()


def test_the_codes_of_these_kinds_are_on_their_pages() -> None:
    model = (FailureCode.EMPTY_TEXT, FailureCode.TEXT_TOO_LONG, FailureCode.CHAT_TEMPLATE, FailureCode.NOT_FINITE)
    assert all(f"`{code}`" in PAGES["model"] for code in model)
    assert f"`{FailureCode.EXPIRED}`" in PAGES["human"]
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
