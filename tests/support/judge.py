"""A reward server that remembers nothing and writes down each answer: python -m tests.support.judge.

Whoever asks it twice gets two lines in its log. How it answers is a `Manner`; samples beyond a number that a file
holds wait until the file says more, and another file is beside it while any waits.
"""

from __future__ import annotations

import asyncio
import enum
import json
import random
from collections import Counter
from pathlib import Path

import grpc
from pydantic_settings import SettingsConfigDict

from rlhf.config import load_settings
from rlhf.failures import RpcFailure, overloaded, unavailable
from rlhf.logs import configure_logging
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from rlhf.security.settings import SecuredServerSettings
from rlhf.server import Server

SERVICE = "rlhf.reward.v1.RewardService"


class Manner(enum.Enum):
    """How it answers."""

    WELL = "well"
    FLAKY = "flaky"  # three calls of ten fail, by each of the codes that may pass
    DRIFTING = "drifting"  # asked again, it gives one more
    NOT_A_NUMBER = "not-a-number"
    LEAVES_ONE_OUT = "leaves-one-out"
    ANSWERS_ONE_TWICE = "answers-one-twice"
    ANSWERS_A_STRANGER = "answers-a-stranger"


class JudgeSettings(SecuredServerSettings):
    """What the process is told."""

    model_config = SettingsConfigDict(env_prefix="RLHF_JUDGE_")

    log: Path
    gate: Path
    manner: Manner = Manner.WELL


class Judge(reward_pb2_grpc.RewardServiceServicer):
    """The share of vowels and spaces, in its manner."""

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings = settings
        self._log = settings.log.open("a", buffering=1)
        self._chance = random.Random(0)
        self._asked = 0
        self._waiting = 0
        self._times: Counter[str] = Counter()

    async def Score(  # noqa: N802
        self, request: reward_pb2.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.ScoreResponse:
        if self._settings.manner is Manner.FLAKY and self._chance.random() < 0.3:
            passing = [unavailable("out for lunch"), overloaded("too much to read", 0.05)]
            raise self._chance.choice([*passing, RpcFailure(grpc.StatusCode.CANCELLED, "as Java drains")])
        self._asked += len(request.samples)
        if self._asked > self._allowed():
            await self._hold()
        results = [self._result(sample) for sample in request.samples]
        match self._settings.manner:
            case Manner.NOT_A_NUMBER:
                results[0].scored.reward = float("nan")
            case Manner.LEAVES_ONE_OUT:
                results.pop()
            case Manner.ANSWERS_ONE_TWICE:
                results.append(results[0])
            case Manner.ANSWERS_A_STRANGER:
                results[0].sample_id += "?"
        for result in results:
            self._log.write(json.dumps([result.sample_id, result.scored.reward]) + "\n")
        return reward_pb2.ScoreResponse(results=results)

    async def GetRewardInfo(  # noqa: N802
        self, request: reward_pb2.GetRewardInfoRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.GetRewardInfoResponse:
        return reward_pb2.GetRewardInfoResponse(name="vowels", version="1")

    async def _hold(self) -> None:
        held = self._settings.gate.with_suffix(".held")
        held.touch()
        self._waiting += 1
        try:
            while self._asked > self._allowed():  # noqa: ASYNC110 - another process writes the file
                await asyncio.sleep(0.01)
        finally:
            self._waiting -= 1
            if not self._waiting:
                held.unlink()

    def _allowed(self) -> float:
        return float(self._settings.gate.read_text()) if self._settings.gate.exists() else float("inf")

    def _result(self, sample: reward_pb2.Sample) -> reward_pb2.SampleResult:
        self._times[sample.sample_id] += 1
        vowels = sum(sample.completion.count(letter) for letter in "aeiou ")
        reward = vowels / (1 + len(sample.completion))
        if self._settings.manner is Manner.DRIFTING:
            reward += self._times[sample.sample_id] - 1
        return reward_pb2.SampleResult(sample_id=sample.sample_id, scored=reward_pb2.Scored(reward=reward))


async def _serve(settings: JudgeSettings) -> None:
    server = Server.of("judge", settings)
    reward_pb2_grpc.add_RewardServiceServicer_to_server(Judge(settings), server.grpc)  # type: ignore[no-untyped-call]
    server.register(SERVICE, serving=True)
    await server.start()
    await server.run_until_signalled()


if __name__ == "__main__":
    loaded = load_settings(JudgeSettings, prog="python -m tests.support.judge")
    configure_logging(loaded.log_format, loaded.log_level)
    asyncio.run(_serve(loaded))
