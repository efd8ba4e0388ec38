"""The two servers of a run: connected, and held to what the run needs and began with when they come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rlhf.channel import call_metadata
from trainer.clients.policy import REFERENCE, PolicyClient
from trainer.clients.publisher import WeightPublisher
from trainer.clients.rewards import RewardClient
from trainer.clients.waits import CallWatch
from trainer.run.checkpoints import Pins
from trainer.run.pinning import Needs, check_pins, check_served_model
from trainer.settings import ReferencePlace, TrainerSettings


class Servers:
    """The clients of one run; as a context it closes them, ending every call."""

    def __init__(self, settings: TrainerSettings, *, run_id: str, watch: Callable[[str], CallWatch]) -> None:
        """`watch("policy")` and `watch("reward")` learn of the calls that wait."""
        metadata = call_metadata(run_id=run_id)
        self._served_reference = settings.reference is ReferencePlace.SERVER
        self._held_to: tuple[Needs, Pins] | None = None
        self.publisher = WeightPublisher(
            settings.policy_server,
            timeout=settings.publish_timeout,
            # A server that was started again may be another: of another folder, with another reference.
            on_new_server=self._check_policy_server,
            watch=watch("policy"),
            metadata=metadata,
            shared_folder=settings.weights_folder,
            security=settings.policy_security(),
        )
        self.policy = PolicyClient(
            settings.policy_server,
            timeout=settings.policy_timeout,
            recover=self.publisher.ensure,
            watch=watch("policy"),
            metadata=metadata,
            security=settings.policy_security(),
        )
        self.rewards = RewardClient(
            settings.reward_server,
            run_id=run_id,
            timeout=settings.reward_timeout,
            watch=watch("reward"),
            security=settings.reward_security(),
        )

    def hold_to(self, needs: Needs, pins: Pins) -> None:
        """What a policy server must be that takes the weights from here on, whichever process it is."""
        self._held_to = needs, pins

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(self.policy.close(), self.publisher.close(), self.rewards.close())

    async def _check_policy_server(self) -> None:
        assert self._held_to is not None, "nothing is published before the servers are checked"
        needs, pins = self._held_to
        check_served_model(await self.policy.get_model(), needs, target=self.policy.target)
        if self._served_reference:
            served = await self.policy.get_model(REFERENCE)
            check_pins(pins, reference_digest=served.weights_digest, tokenizer_digest=needs.tokenizer_digest)
