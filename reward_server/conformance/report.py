"""A run for people, and for programs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf import json_format

from reward_server.conformance.exchange import Exchange
from reward_server.conformance.runner import Outcome, Result, Verdict
from reward_server.conformance.session import Session
from reward_server.conformance.target import Target
from reward_server.conformance.wire import SERVICE
from rlhf.reward.v1 import reward_pb2

_COLOURS = {Verdict.PASSED: 32, Verdict.FAILED: 31, Verdict.NOT_APPLICABLE: 2, Verdict.KNOWN_FAILURE: 33}
_WORDS = {
    Verdict.PASSED: "passed",
    Verdict.FAILED: "FAILED",
    Verdict.NOT_APPLICABLE: "n/a",
    Verdict.KNOWN_FAILURE: "known",
}


@dataclass(frozen=True)
class Report:
    """What a run has to say; flags: those that make the kit do the same again."""

    session: Session
    target: Target
    flags: Sequence[str]
    seed: int
    outcome: Outcome

    def text(self, colour: bool) -> str:
        """Lines for people."""
        lines = [self._head(), ""]
        for each in self.outcome.results:
            lines += self._lines(each, colour)
        lines += [f"stale known failure: {each}" for each in self.outcome.stale]
        return "\n".join([*lines, "", self.summary()])

    def summary(self) -> str:
        """The verdicts in one line."""
        counts = ", ".join(f"{self.outcome.count(verdict)} {verdict.value}" for verdict in Verdict)
        return f"{len(self.outcome.results)} cases: {counts}; exit code {int(self.outcome.exit_code)}"

    def json(self) -> str:
        """The same for programs."""
        document = {
            "address": self.target.address,
            "run_id": self.session.run_id,
            "seed": self.seed,
            "info": json_format.MessageToDict(self.session.info, preserving_proto_field_name=True),
            "exit_code": int(self.outcome.exit_code),
            "counts": {verdict.value: self.outcome.count(verdict) for verdict in Verdict},
            "stale_known_failures": list(self.outcome.stale),
            "cases": [self._as_dict(each) for each in self.outcome.results],
        }
        return json.dumps(document, ensure_ascii=False, indent=2) + "\n"

    def details(self, result: Result) -> list[tuple[str, str]]:
        """What was sent, what came back, which sentence that breaks, and how to see it again."""
        shown = (
            []
            if result.exchange is None
            else [
                ("sent", result.exchange.sent()),
                ("came back", result.exchange.came_back()),
            ]
        )
        return [*shown, ("contract", f"“{result.case.sentence}”"), ("again", self.again(result))]

    def again(self, result: Result) -> str:
        """One command that shows the failure again: grpcurl where one small request does, else the kit itself."""
        if result.exchange is not None and result.alone:
            data = result.exchange.as_json()
            if data is not None:
                return self._grpcurl(result.exchange, data)
        command = ["python", "-m", "reward_server.conformance", self.target.address, *self.flags]
        # A watching case may have seen it in what another one sent.
        ids = dict.fromkeys([result.case.id, *([result.exchange.case_id] if result.exchange else [])])
        return shlex.join([*command, *(word for each in ids for word in ("--run", each))]) + self._token_flag()

    def _grpcurl(self, exchange: Exchange, data: str) -> str:
        words = [
            "grpcurl",
            *self.target.grpcurl_flags(),
            "-import-path",
            "protos",
            "-proto",
            "rlhf/reward/v1/reward.proto",
        ]
        for key, value in exchange.headers:
            words += ["-H", f"{key}: {value}"]
        token = ' -H "authorization: Bearer $TOKEN"' if self.target.token else ""
        rest = shlex.join(["-d", data, self.target.address, f"{SERVICE}/{exchange.method}"])
        return f"{shlex.join(words)}{token} {rest}"

    def _token_flag(self) -> str:
        return ' --token "$TOKEN"' if self.target.token else ""

    def _head(self) -> str:
        info = self.session.info
        scope = reward_pb2.Scope.Name(info.scope) if info.scope in reward_pb2.Scope.values() else str(info.scope)
        return (
            f"{self.target.address}: reward {info.name!r}, version {info.version!r}, {scope}; "
            f"run {self.session.run_id}, seed {self.seed}"
        )

    def _lines(self, result: Result, colour: bool) -> list[str]:
        word = f"{_WORDS[result.verdict]:<6}"
        if colour:
            word = f"\x1b[{_COLOURS[result.verdict]}m{word}\x1b[0m"
        level = f" ({result.case.level.value})" if result.verdict is Verdict.FAILED else ""
        why = f": {result.why}" if result.why else ""
        lines = [f"{word}  {result.case.id}{level}{why}"]
        if result.verdict is Verdict.FAILED:
            lines += [f"        {name:<9}  {text}" for name, text in self.details(result)]
        return lines

    def _as_dict(self, result: Result) -> dict[str, object]:
        entry: dict[str, object] = {
            "id": result.case.id,
            "level": result.case.level.value,
            "verdict": result.verdict.value,
            "summary": result.case.summary,
            "sentence": result.case.sentence,
            "seconds": round(result.seconds, 3),
            "why": result.why,
        }
        if result.verdict in (Verdict.FAILED, Verdict.KNOWN_FAILURE):
            entry |= {name.replace(" ", "_"): text for name, text in self.details(result) if name != "contract"}
        return entry
