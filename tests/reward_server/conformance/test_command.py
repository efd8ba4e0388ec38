"""`python -m reward_server.conformance` as people and CI systems use it."""

from __future__ import annotations

import json
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
import xmlschema

from reward_server.conformance.__main__ import main
from reward_server.conformance.runner import CASES
from rlhf.reward.v1 import reward_pb2
from tests.reward_server.conformance.broken.info import NoReflection
from tests.reward_server.conformance.broken.metadata import TakesNanForJson
from tests.reward_server.conformance.broken.outcomes import NotANumber
from tests.reward_server.conformance.broken.requests import AnswersErrorsInBand
from tests.reward_server.conformance.broken.scores import SwapsRewards
from tests.reward_server.conformance.conftest import Kit
from tests.reward_server.conformance.right_server import RightServer, Sample, serving
from tests.support.processes import StartProcess

SCHEMA = Path(__file__).parent / "junit.xsd"
BROKEN_CASE = "request/no-group-id"


class Recording(RightServer):
    """Keeps the samples that it has judged."""

    def __init__(self) -> None:
        super().__init__()
        self.judged: list[Sample] = []
        self.json_keys: set[str] = set()

    def failure_of(self, sample: Sample, json_keys: Sequence[str]) -> str | None:
        self.judged.append(sample)
        self.json_keys |= set(json_keys)
        return super().failure_of(sample, json_keys)


def usage_error(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_list_shows_every_case_once_with_level_and_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0::3] == list(CASES)
    assert lines[1::3] == [f"    {case.level.value}: {case.summary}" for case in CASES.values()]
    assert lines[2::3] == [f"    “{case.sentence}”" for case in CASES.values()]


def test_list_obeys_run_and_skip(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list", "--run", "info/*", "--run", "health/alive", "--skip", "*/unknown-*"])
    ids = capsys.readouterr().out.splitlines()[0::3]
    assert "health/alive" in ids
    assert "info/version" in ids
    assert "info/unknown-reward" not in ids
    assert not [case_id for case_id in ids if case_id.startswith("score/")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "HOST:PORT is missing"),
        (["localhost"], "HOST:PORT is missing"),
        (["localhost:1", "--run", "scores/*"], "no case matches 'scores/*'"),
        (["localhost:1", "--metadata", "topic"], "not KEY=VALUE"),
        (["localhost:1", "--timeout", "0"], "seconds above 0"),
        (["localhost:1", "--patience", "long"], "'long' is not a number of seconds"),
        (["localhost:1", "--json", "/"], "/ is a folder"),
        (["localhost:1", "--tls-cert", "a.pem"], "go together"),
        (["localhost:1", "--tls-ca", "nowhere.pem"], "nowhere.pem"),
        (["localhost:1", "--samples", "nowhere.jsonl"], "nowhere.jsonl"),
        (["localhost:1", "--junit", "nowhere/report.xml"], "no folder"),
        (["localhost:1", "--token", "a", "--token-file", "b"], "not allowed with"),
    ],
)
def test_a_mistake_in_the_command_is_explained(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert usage_error(*arguments) == 64
    assert says in capsys.readouterr().err


def test_a_server_that_is_not_there_is_unreachable_within_the_timeout(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    assert main([address, "--timeout", "0.3"]) == 69
    assert f"{address}: no answer within 0.3 s" in capsys.readouterr().err


def test_a_server_that_never_speaks_is_unreachable_too(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert main([f"127.0.0.1:{silent.getsockname()[1]}", "--timeout", "0.3"]) == 69
    assert "no answer within 0.3 s" in capsys.readouterr().err


async def test_a_reward_that_the_server_does_not_have_is_unreachable(kit: Kit) -> None:
    async with serving(RightServer()) as address:
        ended = await kit(address, "--reward", "shorter")
    assert ended.code == 69
    assert "has no reward 'shorter'" in ended.err


async def test_our_own_server_passes(start_process: StartProcess, kit: Kit) -> None:
    # The largest request is sent, too: 4 MiB do as well as 64.
    size = ("--max-message-bytes", str(4 << 20))
    server = start_process("reward_server", "--reward", "length", "--reward-options", '{"target": 5}', *size)
    server.wait_serving("rlhf.reward.v1.RewardService")
    ended = await kit(server.address)
    assert ended.code == 0, ended.out
    assert "0 failed" in ended.out


async def test_a_failure_says_what_was_sent_what_came_back_the_sentence_and_how_to_see_it_again(kit: Kit) -> None:
    async with serving(AnswersErrorsInBand()) as address:
        ended = await kit(address, "--run", BROKEN_CASE)
    assert ended.code == 1
    lines = ended.out.splitlines()
    first = lines.index(f"FAILED  {BROKEN_CASE} (MUST): expected INVALID_ARGUMENT for an empty group_id")
    sent, came_back, contract, again = (line.split(maxsplit=1) for line in lines[first + 1 : first + 5])
    assert sent[0] == "sent"
    assert sent[1].startswith("Score { run_id:")
    assert came_back[1].startswith("back  OK { results { sample_id:")
    assert CASES[BROKEN_CASE].sentence in contract[1]
    words = shlex.split(again[1])
    assert words[:2] == ["grpcurl", "-plaintext"]
    assert words[-2:] == [address, "rlhf.reward.v1.RewardService/Score"]
    assert json.loads(words[words.index("-d") + 1])["samples"][0]["metadata"] == {"topic": "1"}


async def test_what_one_request_does_not_show_is_shown_again_by_the_kit(kit: Kit) -> None:
    async with serving(SwapsRewards()) as address:
        failed = await kit(address, "--seed", "3", "--metadata", "topic=a b", "--run", "score/*")
        (line,) = [line for line in failed.out.splitlines() if line.split()[:1] == ["again"]]
        module, name, *arguments = shlex.split(line)[2:]
        again = await kit(*arguments)
    assert (module, name) == ("-m", "reward_server.conformance")
    assert "--seed 3 --metadata 'topic=a b' --run score/split-merge-reorder" in line
    assert again.code == failed.code == 1


async def test_what_was_seen_in_the_request_of_another_case_is_shown_again_by_both(kit: Kit) -> None:
    async with serving(NotANumberForLongOnes()) as address:
        failed = await kit(address, "--run", "outcomes/reward-finite", "--run", "content/*")
        (line,) = [line for line in failed.out.splitlines() if line.split()[:1] == ["again"]]
        again = await kit(*shlex.split(line)[4:])
    assert "--run outcomes/reward-finite --run content/long-completion" in line
    assert again.code == failed.code == 1


class NotANumberForLongOnes(RightServer):
    def reward_of(self, sample: Sample, company: Sequence[Sample]) -> float:
        return float("nan") if len(sample.completion) > 10_000 else super().reward_of(sample, company)


async def test_a_failure_that_no_case_of_the_run_explains_counts(kit: Kit) -> None:
    async with serving(NotANumber()) as address:
        alone = await kit(address, "--run", "score/log-metadata")
        explained = await kit(address, "--run", "score/log-metadata", "--run", "outcomes/reward-finite")
    assert "FAILED  score/log-metadata (MUST): the reward of" in alone.out
    assert "could not be judged: outcomes/reward-finite failed" in explained.out


async def test_should_failures_alone_have_an_exit_code_of_their_own(kit: Kit) -> None:
    async with serving(NoReflection()) as address:
        ended = await kit(address, "--run", "reflection/*")
    assert ended.code == 2
    assert "could not be judged: reflection/lists failed" in ended.out


async def test_a_known_failure_is_no_failure(kit: Kit, tmp_path: Path) -> None:
    known = tmp_path / "known.txt"
    known.write_text(f"# ours\n\n{BROKEN_CASE}  # mended in the next release\n")
    async with serving(AnswersErrorsInBand()) as address:
        ended = await kit(address, "--run", "request/*", "--known-failures", str(known))
    assert ended.code == 0
    assert f"known   {BROKEN_CASE}: mended in the next release" in ended.out


async def test_a_known_failure_that_passes_or_does_not_exist_is_stale(kit: Kit, tmp_path: Path) -> None:
    known = tmp_path / "known.txt"
    known.write_text("info/version # was empty\nscore/no-such-case\ngroups/part # does not apply\nhealth/alive\n")
    async with serving(RightServer()) as address:
        ended = await kit(address, "--run", "info/*", "--run", "groups/*", "--known-failures", str(known))
    assert ended.code == 1
    stale = [line for line in ended.out.splitlines() if line.startswith("stale")]
    assert stale == [
        "stale known failure: info/version passes",
        "stale known failure: there is no case score/no-such-case",
    ]


def test_a_known_failure_may_stand_once_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = tmp_path / "known.txt"
    known.write_text("info/version\ninfo/version # again\n")
    assert usage_error("localhost:1", "--known-failures", str(known)) == 64
    assert "line 2: info/version stands there twice" in capsys.readouterr().err


async def test_the_reports_for_programs_agree_with_the_one_for_people(kit: Kit, tmp_path: Path) -> None:
    known = tmp_path / "known.txt"
    known.write_text("info/version\nmetadata/not-json # NaN, of all things\n")
    junit, report = tmp_path / "report.xml", tmp_path / "report.json"
    files = ["--junit", str(junit), "--json", str(report), "--known-failures", str(known)]
    async with serving(TakesNanForJsonInBand()) as address:
        ended = await kit(address, "--run", "*/n*", "--run", "info/*", "--run", "metadata/*", *files)
    assert ended.code == 1

    xmlschema.validate(str(junit), str(SCHEMA))
    (suite,) = ElementTree.parse(junit).getroot()
    failed = {f"{each.get('classname')}/{each.get('name')}" for each in suite if each.find("failure") is not None}
    prefix = "reward-conformance"
    assert failed == {f"{prefix}.{BROKEN_CASE}", f"{prefix}.known-failures/info/version passes"}
    assert suite.get("failures") == "2"
    assert suite.get("tests") == str(len(suite))
    (failure,) = suite.findall(".//failure[@type='MUST']")
    assert "contract: “Required; empty = INVALID_ARGUMENT" in (failure.text or "")

    document = json.loads(report.read_text())
    verdicts = {each["id"]: each for each in document["cases"]}
    assert document["exit_code"] == 1
    assert document["stale_known_failures"] == ["info/version passes"]
    assert verdicts[BROKEN_CASE]["verdict"] == "failed"
    assert verdicts[BROKEN_CASE]["again"].startswith("grpcurl ")
    assert verdicts["metadata/not-json"]["verdict"] == "known failure"
    assert verdicts["metadata/missing"]["verdict"] == "passed"
    assert document["counts"]["passed"] == sum(each["verdict"] == "passed" for each in document["cases"])


class TakesNanForJsonInBand(TakesNanForJson, AnswersErrorsInBand):
    """Two faults, one of them known."""


async def test_a_report_holds_what_xml_cannot(kit: Kit, tmp_path: Path) -> None:
    junit = tmp_path / "report.xml"
    async with serving(RefusesNul()) as address:
        ended = await kit(address, "--run", "content/non-ascii", "--junit", str(junit))
    assert ended.code == 1
    assert "no answer to a NUL character" in ended.out
    xmlschema.validate(str(junit), str(SCHEMA))


class RefusesNul(RightServer):
    """Says the wrong thing with the character that it can't take."""

    def check_ids(self, request: reward_pb2.ScoreRequest) -> None:
        super().check_ids(request)
        if "\0" in request.samples[0].completion:
            raise KeyError("\0")


async def test_the_authors_own_samples_and_columns_are_sent(kit: Kit, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    lines = [
        {"prompt": "2 + 2", "completion": f"It is {n}.", "metadata": {"answer": n, "unit": "m"}} for n in range(20)
    ]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    server = Recording()
    async with serving(server) as address:
        ended = await kit(
            *(address, "--run", "score/ordinary-batch", "--samples", str(samples)),
            *("--metadata", "topic=sums", "--metadata", "unit=cm"),
        )
    assert ended.code == 0, ended.out
    assert {sample.metadata["topic"] for sample in server.judged} == {"sums"}
    assert {sample.metadata["unit"] for sample in server.judged} == {"m"}
    assert all(sample.completion == f"It is {sample.metadata['answer']}." for sample in server.judged)
    assert server.json_keys == {"answer"}


def test_a_line_that_is_no_sample_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = tmp_path / "samples.jsonl"
    for line in ('{"prompt": "no completion"}', "[]", '{"completion": 5}', '{"completion": "", "score": 1}', "{"):
        samples.write_text('{"completion": "fine"}\n\n' + line + "\n")
        assert usage_error("localhost:1", "--samples", str(samples)) == 64
        assert "line 3" in capsys.readouterr().err


async def test_a_case_sends_the_same_whichever_cases_run_before_it(kit: Kit) -> None:
    sent = []
    for pattern in ("content/parts-joined", "content/*"):
        server = Recording()
        async with serving(server) as address:
            await kit(address, "--run", pattern)
        sent.append(
            [sample.completion for sample in server.judged if [len(each.parts) for each in sample.messages] == [3]]
        )
    assert sent[0]
    assert sent[0] == sent[1]


async def test_the_seed_decides_what_is_sent_and_the_run_is_always_another(kit: Kit) -> None:
    sent = []
    for seed in ("1", "1", "2"):
        server = Recording()
        async with serving(server) as address:
            await kit(address, "--run", "score/ordinary-batch", "--seed", seed)
        sent.append([sample.completion for sample in server.judged])
    assert sent[0] == sent[1]
    assert sent[0] != sent[2]
