"""PolicyFleet against servers that hold calls back, lose weights, fail, or are not of this run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import grpc
import pytest
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from rlhf.channel import RetryPolicy, Waiting
from rlhf.failures import RpcFailure, overloaded, unavailable
from rlhf.policy.v1 import policy_pb2
from tests.trainer.servers import SOON, MemoryWeights, ScriptedPolicy, completed, reached, serving
from trainer.clients import fleet as fleet_module
from trainer.clients.discovery import Discovery
from trainer.clients.fleet import PolicyFleet
from trainer.clients.policy import Generation, PolicyClient
from trainer.clients.publisher import PublishError
from trainer.metrics import TrainerMetrics
from trainer.versions import WeightsVersion

FAST = RetryPolicy(initial=0.001, maximum=0.01)
TENSORS = [("weight", torch.arange(4.0))]


class HeldPolicy(ScriptedPolicy):
    """Keeps its answers to Generate until `gate` is open."""

    def __init__(self, *scripts: Callable[..., policy_pb2.GenerateResponse] | RpcFailure) -> None:
        super().__init__(*(scripts or (completed,)))
        self.gate = asyncio.Event()
        self.gate.set()

    async def Generate(  # noqa: N802
        self, request: policy_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> policy_pb2.GenerateResponse:
        answer = await super().Generate(request, context)
        await self.gate.wait()
        return answer


@dataclass
class Server:
    """One replica: generation, weights, and a health that always says SERVING."""

    policy: HeldPolicy = field(default_factory=HeldPolicy)
    weights: MemoryWeights = field(default_factory=MemoryWeights)

    def add_to(self, server: grpc.aio.Server) -> None:
        self.policy.add_to(server)
        self.weights.add_to(server)
        told = health.aio.HealthServicer()
        for name in ("rlhf.policy.v1.PolicyService", "rlhf.weights.v1.WeightsService"):
            asyncio.get_running_loop().create_task(told.set(name, health_pb2.HealthCheckResponse.SERVING))
        health_pb2_grpc.add_HealthServicer_to_server(told, server)


class Watch:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.seen: list[Waiting] = []

    def waiting(self, call: object, waiting: Waiting) -> None:
        self.seen.append(waiting)

    def over(self, call: object) -> None:
        pass


class Fleet:
    """A fleet under test with its addresses, and what it told."""

    def __init__(self, fleet: PolicyFleet, addresses: Sequence[str], registry: CollectorRegistry, watch: Watch) -> None:
        self.fleet = fleet
        self.addresses = addresses
        self.watch = watch
        self._registry = registry

    async def publish(self, number: int) -> WeightsVersion:
        version = WeightsVersion("run", 1, number)
        await self.fleet.publish(TENSORS, version)
        return version

    async def generate(self, version: WeightsVersion, *, or_later: bool = False, seed: int = 0) -> Generation:
        (generation,) = await self.fleet.generate([7], seed=seed, max_new_tokens=4, weights=version, or_later=or_later)
        return generation

    def replicas(self, state: str) -> float | None:
        return self._registry.get_sample_value("rlhf_trainer_policy_replicas", {"state": state})

    async def everyone_holds(self, version: WeightsVersion) -> None:
        await reached(lambda: all(replica.holds == version for replica in self.fleet._replicas.values()))

    async def until(self, state: str, count: int) -> None:
        await reached(lambda: self.replicas(state) == count)


async def passes(client: PolicyClient) -> None:
    pass


@contextlib.asynccontextmanager
async def fleet_of(
    *servers: Server,
    check: Callable[[PolicyClient], Awaitable[None]] = passes,
    concurrency: int = 4,
    discovery: Callable[[Sequence[str]], Discovery] = Discovery,
) -> AsyncIterator[Fleet]:
    async with contextlib.AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(serving(server.add_to)) for server in servers]
        registry, watch = CollectorRegistry(), Watch()
        fleet = PolicyFleet(
            discovery(addresses),
            check=check,
            watch=watch,
            metrics=TrainerMetrics(registry),
            concurrency=concurrency,
            keep_copy=True,
            retry=FAST,
        )
        stack.push_async_callback(fleet.close)
        await fleet.wait_ready()
        watch.seen.clear()
        yield Fleet(fleet, addresses, registry, watch)


async def test_calls_are_spread_and_whoever_answers_first_gets_the_next() -> None:
    slow, quick = Server(), Server()
    slow.policy.gate.clear()
    async with fleet_of(slow, quick) as run:
        version = await run.publish(1)
        await run.everyone_holds(version)
        calls = [asyncio.create_task(run.generate(version, seed=seed)) for seed in range(20)]
        await reached(lambda: sum(call.done() for call in calls) == 18)

        assert len(slow.policy.calls) == 2, "half of four calls in flight"
        assert len(quick.policy.calls) == 18
        slow.policy.gate.set()
        await asyncio.gather(*calls)


async def test_a_server_with_three_times_the_room_gets_three_times_the_calls() -> None:
    large, small = Server(), Server()
    large.policy.model.max_running_completions, small.policy.model.max_running_completions = 48, 16
    large.policy.gate.clear()
    small.policy.gate.clear()
    async with fleet_of(small, large, concurrency=8) as run:
        version = await run.publish(1)
        await run.everyone_holds(version)
        calls = [asyncio.create_task(run.generate(version, seed=seed)) for seed in range(20)]
        await reached(lambda: len(large.policy.calls) + len(small.policy.calls) == 8)

        assert (len(large.policy.calls), len(small.policy.calls)) == (6, 2)
        large.policy.gate.set()
        small.policy.gate.set()
        await asyncio.gather(*calls)


async def test_a_call_that_fails_for_a_passing_reason_goes_to_another_replica_as_it_is() -> None:
    broken, well = Server(HeldPolicy(unavailable("draining"))), Server()
    async with fleet_of(broken, well) as run:
        version = await run.publish(1)
        await run.everyone_holds(version)
        await run.generate(version, seed=5)

        assert broken.policy.calls[:1] == well.policy.calls
        assert run.watch.seen == []


async def test_a_replica_without_the_weights_gets_no_call_and_holds_nobody_up() -> None:
    behind, well = Server(), Server()
    async with fleet_of(behind, well) as run:
        first = await run.publish(1)
        await run.everyone_holds(first)
        behind.weights.fail_after_begin = [grpc.StatusCode.UNAVAILABLE] * 1000
        second = await run.publish(2)
        await asyncio.gather(*(run.generate(second, seed=seed) for seed in range(8)))
        assert behind.policy.calls == []
        assert len(well.policy.calls) == 8
        await run.until("away", 1)

        behind.weights.fail_after_begin = []
        await run.until("usable", 2)
        await asyncio.gather(*(run.generate(second, seed=seed) for seed in range(8)))
        assert {call.weights.exact.version for call in behind.policy.calls} == {2}


async def test_a_replica_with_older_weights_is_used_where_older_ones_will_do() -> None:
    server = Server()
    async with fleet_of(server) as run:
        await run.publish(3)
        await run.generate(WeightsVersion("run", 1, 2), or_later=True)

    (call,) = server.policy.calls
    assert call.weights.min.version == 2


async def test_an_overloaded_replica_is_left_alone_and_the_wait_names_it() -> None:
    server = Server(HeldPolicy(overloaded("full", 0.5), completed))
    async with fleet_of(server) as run:
        await run.generate(await run.publish(1))

        assert len(server.policy.calls) == 2
        (waiting,) = run.watch.seen
        assert (waiting.target, waiting.reason) == (run.addresses[0], "RESOURCE_EXHAUSTED: full")
        assert len(server.weights.updates) == 1, "it was never lost"


async def test_without_any_replica_the_wait_names_each_with_its_reason() -> None:
    first, second = Server(HeldPolicy(unavailable("one"), completed)), Server(HeldPolicy(unavailable("two"), completed))
    async with fleet_of(first, second) as run:
        version = await run.publish(1)
        await run.everyone_holds(version)
        for server, why in ((first, "one"), (second, "two")):
            server.weights.instance, server.weights.live = "restarted", policy_pb2.WeightsVersion()
            server.weights.fail_after_begin = [unavailable(why)] * 20
        await run.generate(version)

    assert run.watch.seen[0].target == ", ".join(run.addresses)
    assert run.watch.seen[0].reason == "; ".join(
        f"{address}: UNAVAILABLE: {why}" for address, why in zip(run.addresses, ("one", "two"), strict=True)
    )


async def test_a_replica_that_comes_back_gets_the_bytes_as_they_were_published() -> None:
    server, other = Server(HeldPolicy(unavailable("killed"), completed)), Server()
    tensor = torch.zeros(3)
    async with fleet_of(server, other) as run:
        version = WeightsVersion("run", 1, 1)
        await run.fleet.publish([("weight", tensor)], version)
        await run.everyone_holds(version)
        tensor += 1  # the learner goes on
        server.weights.instance, server.weights.live, server.weights.tensors = "new", policy_pb2.WeightsVersion(), {}
        await run.generate(version)
        await run.until("usable", 2)

    assert server.weights.tensors == {"weight": torch.zeros(3).numpy().tobytes()}


class NotOursError(Exception):
    """What the check of a test raises."""


async def test_a_replica_that_fails_the_check_is_left_out_until_no_other_is_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stranger, well = Server(), Server()

    async def check(client: PolicyClient) -> None:
        if client.target in refused:
            raise NotOursError(f"{client.target} has another tokenizer")

    async with fleet_of(stranger, well, check=check) as run:
        refused = run.addresses[:1]
        version = await run.publish(1)
        await run.until("refused", 1)
        await asyncio.gather(*(run.generate(version) for _ in range(4)))
        assert stranger.policy.calls == []
        assert stranger.weights.updates == []
        assert "another tokenizer" in caplog.text

        refused = run.addresses
        well.weights.instance = "new"
        well.policy._scripts = [unavailable("restarting"), completed]
        with pytest.raises(NotOursError, match=run.addresses[1]):
            await run.generate(version)


async def test_a_replica_that_cannot_take_the_weights_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    blind, well = Server(), Server()
    blind.weights.fail_after_begin = [grpc.StatusCode.PERMISSION_DENIED] * 100
    async with fleet_of(blind, well) as run:
        await run.generate(await run.publish(1))
        await run.until("refused", 1)
        await run.generate(await run.publish(2))

    assert f"policy server {run.addresses[0]} does not find what this trainer writes" in caplog.text
    assert blind.policy.calls == []


async def test_a_replica_that_another_trainer_took_over_ends_the_run() -> None:
    taken, well = Server(HeldPolicy(unavailable("busy"))), Server()
    async with fleet_of(taken, well) as run:
        version = await run.publish(1)
        await run.everyone_holds(version)
        taken.weights.live = policy_pb2.WeightsVersion(run_id="other", incarnation=1)
        with contextlib.suppress(PublishError):
            await run.publish(2)
        with pytest.raises(PublishError, match="another trainer took it over"):
            await run.generate(WeightsVersion("run", 1, 3))


async def test_reference_numbers_of_a_server_that_was_restarted_meanwhile_are_asked_for_again() -> None:
    checked: list[str] = []

    async def check(client: PolicyClient) -> None:
        checked.append(server.weights.instance)

    class Restarting(HeldPolicy):
        async def LogProbs(  # noqa: N802
            self, request: policy_pb2.LogProbsRequest, context: grpc.aio.ServicerContext
        ) -> policy_pb2.LogProbsResponse:
            answer = await super().LogProbs(request, context)
            server.weights.instance, server.weights.live = "second", policy_pb2.WeightsVersion()
            self.logprob = -2.0
            return answer

    server = Server(Restarting())
    async with fleet_of(server, check=check) as run:
        await run.publish(1)
        rows = await run.fleet.log_probs("reference", [([1], [2, 3])])

    assert rows == [[-2.0, -2.0]]
    assert checked == ["first", "second"]


async def test_addresses_of_a_name_join_and_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_RESOLVE_SECONDS", 0.01)
    first, second = Server(), Server()
    there: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        if not there:
            raise OSError("no address")
        return there

    def discovery(addresses: Sequence[str]) -> Discovery:
        there[:] = addresses[:1]
        return Discovery(["dns:///policy:1"], resolve=resolve)

    async with fleet_of(first, second, discovery=discovery) as run:
        version = await run.publish(1)
        there[:] = run.addresses
        await run.until("usable", 2)
        await run.everyone_holds(version)
        second.policy.gate.clear()
        calls = [asyncio.create_task(run.generate(version)) for _ in range(4)]
        await reached(lambda: len(second.policy.calls) == 2)

        there[:] = run.addresses[:1]
        await run.until("usable", 1)
        second.policy.gate.set()
        await asyncio.gather(*calls)  # those under way end where they began
        asked = len(second.policy.calls)
        await run.generate(version)
        assert len(second.policy.calls) == asked

        there.clear()
        await run.generate(version)
        assert run.replicas("usable") == 1, "a name that stops resolving takes nobody away"


async def test_a_name_is_looked_up_again_while_nobody_behind_it_has_answered_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet_module, "_RESOLVE_SECONDS", 0.01)
    looked_up = 0

    def discovery(addresses: Sequence[str]) -> Discovery:
        async def resolve(host: str, port: int) -> Sequence[str]:
            nonlocal looked_up
            looked_up += 1
            return addresses if looked_up > 3 else ["127.0.0.1:1"]

        return Discovery(["dns:///policy:1"], resolve=resolve)

    async with asyncio.timeout(SOON), fleet_of(Server(), discovery=discovery) as run:
        assert list(run.fleet.known) == run.addresses


async def test_a_call_that_is_cancelled_while_it_waits_or_runs_gives_its_place_back() -> None:
    server = Server()
    server.policy.gate.clear()
    async with fleet_of(server, concurrency=1) as run:
        version = await run.publish(1)
        running, waiting = (asyncio.create_task(run.generate(version)) for _ in range(2))
        await reached(lambda: len(server.policy.calls) == 1)
        for call in (waiting, running):
            call.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        server.policy.gate.set()

        await asyncio.wait_for(run.generate(version), SOON)
