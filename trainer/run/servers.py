"""The servers of a run: connected, and held to what the run needs and began with when they come, or come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rlhf.channel import call_metadata
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

    `policy` and `publisher` are of the first policy server alone, which is checked in full before the run; `fleet` is
    all of them, for the run.
    """

    def __init__(
        self, settings: TrainerSettings, *, run_id: str, watch: Callable[[str], CallWatch], metrics: TrainerMetrics
    ) -> None:
        """`watch("policy")` and `watch("reward")` learn of the calls that wait."""
        metadata = call_metadata(run_id=run_id)
        self._served_reference = settings.reference is ReferencePlace.SERVER
        self._held_to: tuple[Needs, Pins] | None = None
        first = settings.policy_server[0]
        self.publisher = WeightPublisher(
            first,
            timeout=settings.publish_timeout,
            watch=watch("policy"),
            metadata=metadata,
            shared_folder=settings.weights_folder,
        )
        self.policy = PolicyClient(
            first,
            timeout=settings.policy_timeout,
            watch=watch("policy"),
            metadata=metadata,
        )
        discovery = Discovery(settings.policy_server)
        self.fleet = PolicyFleet(
            discovery,
            # A server that was started again may be another: of another folder, with another reference.
            check=self._check_policy_server,
            watch=watch("policy"),
            metrics=metrics,
            concurrency=settings.rollout_concurrency,
            # Then rollouts, or a replica that joins, may need the last weights while the next are being learned.
            keep_copy=settings.max_staleness > 0 or discovery.several,
            timeout=settings.policy_timeout,
            publish_timeout=settings.publish_timeout,
            metadata=metadata,
            shared_folder=settings.weights_folder,
        )
        self.rewards = RewardClient(
            settings.reward_server, run_id=run_id, timeout=settings.reward_timeout, watch=watch("reward")
        )

    async def hold_to(self, needs: Needs, pins: Pins) -> None:
        """What a policy server must be that takes the weights from here on; waits until one can take them."""
        self._held_to = needs, pins
        await self.fleet.wait_ready()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(self.fleet.close(), self.policy.close(), self.publisher.close(), self.rewards.close())

    async def _check_policy_server(self, policy: PolicyClient) -> None:
        assert self._held_to is not None, "nothing is published before the servers are checked"
        needs, pins = self._held_to
        check_served_model(await policy.get_model(), needs, target=policy.target)
        if self._served_reference:
            served = await policy.get_model(REFERENCE)
            check_pins(
                pins,
                owner=f"policy server {policy.target}",
                reference_digest=served.weights_digest,
                tokenizer_digest=needs.tokenizer_digest,
            )
