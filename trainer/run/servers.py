"""The servers of a run: connected, and held to what the run needs and began with when they come, or come back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rlhf.channel import call_metadata
from rlhf.failures import RpcFailure, is_transient
from trainer.clients.discovery import Discovery
from trainer.clients.fleet import PolicyFleet
from trainer.clients.policy import REFERENCE, PolicyClient
from trainer.clients.publisher import WeightPublisher
from trainer.clients.rewards import RewardClient
from trainer.clients.waits import CallWatch
from trainer.metrics import TrainerMetrics
from trainer.run.checkpoints import Pins
from trainer.run.pinning import Needs, check_pins, check_served_model
from trainer.settings import ReferencePlace, TrainerSettings


class Servers:
    """The clients of one run; as a context it closes them, ending every call.

    `policy` and `publisher` are of one policy server, which is checked in full before the run; `fleet` is all of them,
    for the run.
    """

    policy: PolicyClient
    publisher: WeightPublisher

    def __init__(
        self, settings: TrainerSettings, *, run_id: str, watch: Callable[[str], CallWatch], metrics: TrainerMetrics
    ) -> None:
        """`watch("policy")` and `watch("reward")` learn of the calls that wait."""
        self._settings = settings
        self._watch = watch("policy")
        self._metadata = call_metadata(run_id=run_id)
        self._closing = contextlib.AsyncExitStack()
        self._held_to: tuple[Needs, Pins] | None = None
        self._discovery = Discovery(settings.policy_server)
        self.fleet = PolicyFleet(
            self._discovery,
            # A server that was started again may be another: of another folder, with another reference.
            check=self._check_policy_server,
            watch=self._watch,
            metrics=metrics,
            concurrency=settings.rollout_concurrency,
            # Then rollouts, a replica that joins, or one that stragglers found away may need the last weights while the
            # next are being learned.
            keep_copy=settings.max_staleness > 0 or settings.oversample > 0 or self._discovery.several,
            timeout=settings.policy_timeout,
            publish_timeout=settings.publish_timeout,
            metadata=self._metadata,
            shared_folder=settings.weights_folder,
            security=settings.policy_security(),
        )
        self.rewards = RewardClient(
            settings.reward_server,
            run_id=run_id,
            timeout=settings.reward_timeout,
            watch=watch("reward"),
            security=settings.reward_security(),
        )
        metrics.watch_rewards(lambda: self.rewards.pending)

    async def reach(self) -> None:
        """Until a policy server can be asked: `policy` and `publisher` are of that one.

        An only address is taken as it is, so that asking tells what it is if it is no policy server.
        """
        target = self._settings.policy_server[0]
        if self._discovery.several:
            target = (await self.fleet.wait_ready())[0].target
        security = self._settings.policy_security().for_host(self._discovery.host_of(target))
        self.policy = PolicyClient(
            target,
            timeout=self._settings.policy_timeout,
            watch=self._watch,
            metadata=self._metadata,
            security=security,
        )
        self.publisher = WeightPublisher(
            target,
            timeout=self._settings.publish_timeout,
            watch=self._watch,
            metadata=self._metadata,
            shared_folder=self._settings.weights_folder,
            security=security,
        )
        self._closing.push_async_callback(self.policy.close)
        self._closing.push_async_callback(self.publisher.close)

    async def hold_to(self, needs: Needs, pins: Pins, *, grace: float) -> Sequence[str]:
        """What a policy server must be that takes the weights from here on; the targets of those that are it now.

        Those that answer within `grace` seconds of each other are checked at once; raises PinError when one does not
        pass. The others are checked when they come.
        """
        self._held_to = needs, pins
        passed = []
        for policy in await self.fleet.wait_ready(grace=grace):
            try:
                await self._check_policy_server(policy)
            except RpcFailure as failure:
                if not is_transient(failure):
                    raise
            else:
                passed.append(policy.target)
        return passed

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(self.fleet.close(), self.rewards.close(), self._closing.aclose())

    async def _check_policy_server(self, policy: PolicyClient) -> None:
        assert self._held_to is not None, "nothing is published before the servers are checked"
        needs, pins = self._held_to
        check_served_model(await policy.get_model(), needs, target=policy.target)
        if self._settings.reference is ReferencePlace.SERVER:
            served = await policy.get_model(REFERENCE)
            check_pins(
                pins,
                owner=f"policy server {policy.target}",
                reference_digest=served.weights_digest,
                tokenizer_digest=needs.tokenizer_digest,
            )
