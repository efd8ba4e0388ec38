"""Each example server, as built, over the wire: the same reward, the contract, and a clean end."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from tests.reward_server.examples.make_golden import VECTORS
from tests.reward_server.examples.servers import EXAMPLES, STOPS_WITHIN, ExampleServer
from tests.support.processes import ROOT, health_of, wait_for

pytestmark = pytest.mark.examples

SERVICE = "rlhf.reward.v1.RewardService"
REMEMBERED = 65_536
MOST = 256

Start = Callable[..., ExampleServer]


@pytest.fixture(params=EXAMPLES)
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """`start()`: a server of the language that listens, killed at the end of the test."""
    example = EXAMPLES[request.param]
    started: list[ExampleServer] = []

    def one(listen: str = "127.0.0.1:0", *, binds: bool = True) -> ExampleServer:
        server = ExampleServer(example, tmp_path / str(len(started)), listen)
        started.append(server)
        if binds:
            server.wait_bound()
        return server

    yield one
    for server in started:
        server.kill()


def sample(sample_id: str, completion: str = "42.", answer: str = "42") -> reward_pb2.Sample:
    return reward_pb2.Sample(sample_id=sample_id, group_id="g", completion=completion, metadata={"answer": answer})


def score(channel: grpc.Channel, *samples: reward_pb2.Sample, **fields: Any) -> dict[str, reward_pb2.SampleResult]:
    request = reward_pb2.ScoreRequest(run_id="run", samples=samples, **fields)
    response = reward_pb2_grpc.RewardServiceStub(channel).Score(request, timeout=60)
    results = {result.sample_id: result for result in response.results}
    assert len(response.results) == len(results) == len(samples)
    return results


def watch(channel: grpc.Channel) -> Any:
    """The health of the service as it changes; SERVING now."""
    statuses = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=60)
    assert next(statuses).status == health_pb2.HealthCheckResponse.SERVING
    return statuses


def test_every_golden_vector_comes_out_the_same(start: Start) -> None:
    by_keys: defaultdict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for vector in json.loads(VECTORS.read_text()):
        by_keys[tuple(vector["json_metadata_keys"])].append(vector)
    with grpc.insecure_channel(start().address) as channel:
        for json_keys, vectors in by_keys.items():
            samples = [
                reward_pb2.Sample(
                    sample_id=vector["id"], group_id="g", completion=vector["completion"], metadata=vector["metadata"]
                )
                for vector in vectors
            ]
            results = score(channel, *samples, json_metadata_keys=json_keys)
            for vector in vectors:
                result = results[vector["id"]]
                assert result.WhichOneof("outcome") == vector["outcome"], vector
                if vector["outcome"] == "failed":
                    assert result.failed.code == vector["code"], vector
                else:
                    # == is equal to the last bit, but for the sign of a zero, which not every language sends.
                    assert result.scored.HasField("reward"), vector
                    assert result.scored.reward == vector["reward"], vector
                    assert result.scored.components == vector["components"], vector


def test_a_missing_column_is_named(start: Start) -> None:
    with grpc.insecure_channel(start().address) as channel:
        result = score(channel, reward_pb2.Sample(sample_id="a", group_id="g", completion="42"))["a"]
    assert result.failed.code == "MISSING_METADATA"
    assert "answer" in result.failed.message


def test_it_describes_itself_as_all_six_do(start: Start) -> None:
    with grpc.insecure_channel(start().address) as channel:
        info = reward_pb2_grpc.RewardServiceStub(channel).GetRewardInfo(reward_pb2.GetRewardInfoRequest(), timeout=60)
    assert info.version
    info.version = ""
    assert info == reward_pb2.GetRewardInfoResponse(
        name="answer",
        max_samples=MOST,
        max_request_bytes=4 << 20,
        max_concurrent_calls=64,
        scope=reward_pb2.SCOPE_SAMPLE,
        required_metadata=["answer"],
    )


def test_the_conformance_kit_finds_nothing(start: Start) -> None:
    judged = subprocess.run(
        [sys.executable, "-m", "reward_server.conformance", start().address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    # 0 says that no SHOULD failed either.
    assert judged.returncode == 0, judged.stdout + judged.stderr


def test_the_last_65536_samples_are_remembered_and_no_more(start: Start) -> None:
    numbers = itertools.count()

    def others(channel: grpc.Channel, count: int) -> None:
        while count > 0:
            size = min(count, MOST)
            score(channel, *(sample(f"other-{next(numbers)}") for _ in range(size)))
            count -= size

    with grpc.insecure_channel(start().address) as channel:
        first = score(channel, sample("old"), sample("gone"), sample("kept"))
        others(channel, REMEMBERED // 2)
        assert score(channel, sample("kept"))["kept"] == first["kept"]
        others(channel, REMEMBERED // 2)
        # Of these only the one that was asked for again lies among the last ones.
        results = score(channel, sample("old"), sample("gone", "other"), sample("kept", "other"))
        assert results["old"] == first["old"]
        assert results["gone"].HasField("scored")
        assert results["kept"].failed.code == "SAMPLE_ID_CLASH"
        assert score(channel, sample("kept"))["kept"] == first["kept"]


def test_a_stop_says_not_serving_at_once_and_finishes_the_call_in_flight(start: Start) -> None:
    server = start()
    address = server.address
    # Ids as long as they may be: the answer is larger than what this client lets the server send before it reads.
    samples = [sample(f"{number:0256}") for number in range(MOST)]
    small_window = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(address) as health, grpc.insecure_channel(address, options=small_window) as channel:
        statuses = watch(health)
        # Declared as a stream, so that the answer is not read before it is asked for.
        in_flight = channel.unary_stream(
            f"/{SERVICE}/Score",
            request_serializer=reward_pb2.ScoreRequest.SerializeToString,
            response_deserializer=reward_pb2.ScoreResponse.FromString,
        )(reward_pb2.ScoreRequest(run_id="run", samples=samples), timeout=60)
        in_flight.initial_metadata()  # the server has begun to answer
        server.signal()
        assert next(statuses).status == health_pb2.HealthCheckResponse.NOT_SERVING
        statuses.cancel()
        wait_for(lambda: not health_of(address, SERVICE), within=STOPS_WITHIN, what="end of the listening")
        assert server.poll() is None
        (response,) = in_flight
        assert {result.sample_id for result in response.results} == {each.sample_id for each in samples}
        assert in_flight.code() is grpc.StatusCode.OK
        assert server.wait_exit() == 0


def test_an_open_watch_holds_a_stop_up_no_longer_than_the_grace(start: Start) -> None:
    server = start()
    with grpc.insecure_channel(server.address) as channel:
        statuses = watch(channel)
        server.signal()
        assert next(statuses).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert server.wait_exit() == 0


def test_a_port_that_is_taken_is_an_error(start: Start) -> None:
    taken = start().address
    second = start(taken, binds=False)
    assert second.wait_exit() != 0
    assert not second.address
