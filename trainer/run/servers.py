"""The servers of a run: connected, held to what the run began with, and checked again when they come back."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

import torch

from rlhf.channel import RetryPolicy, call_metadata, call_with_retry
from rlhf.fingerprints import weights_digest
from rlhf.logs import get_logger
from trainer.clients.discovery import Discovery
from trainer.clients.fleet import PolicyFleet
from trainer.clients.policy import REFERENCE, PolicyClient
from trainer.clients.rewards import RewardClient
from trainer.clients.waits import watched
from trainer.metrics import TrainerMetrics
from trainer.run.checkpoints import Pins
from trainer.run.loading import Loaded, SettingsError
from trainer.run.pinning import check_pins, check_policy_server
from trainer.run.runfolder import RunIdentity
from trainer.run.waiting import WaitBoard
from trainer.settings import TrainerSettings

_log = get_logger(__name__)


class Servers:
    """The clients of one run; as a context it closes them, ending every call."""

    def __init__(
        self,
        settings: TrainerSettings,
        identity: RunIdentity,
        loaded: Loaded,
        waits: WaitBoard,
        metrics: TrainerMetrics,
    ) -> None:
        metadata = call_metadata(run_id=identity.run_id)
        self._loaded = loaded
        self._context_tokens = loaded.max_prompt_tokens + settings.max_new_tokens
        self._pins: Pins | None = None
        self._watch = waits.watch("policy")
        discovery = Discovery(settings.policy_server)
        self.policy = PolicyFleet(
            discovery,
            # A server that was started again may be another: of another folder, with another reference.
            check=self._check_policy_server,
            watch=self._watch,
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
            settings.reward_server,
            run_id=identity.run_id,
            timeout=settings.reward_timeout,
            watch=waits.watch("reward"),
        )

    async def hold_to(self, pins: Pins | None) -> Pins:
        """Wait for the servers and hold them to `pins`, or, for a new run, to what they are now.

        Of several policy servers one is enough; those that are there are held to the same now, others when they come.

        Raises PinError, RewardChangedError, and SettingsError when the reward needs a column that the data lacks.
        """
        with watched(self._watch) as on_wait:
            return await call_with_retry(
                lambda: self._hold_to(pins),
                policy=RetryPolicy(),
                what="policy server",
                target=self.policy.target,
                on_wait=on_wait,
            )

    async def _hold_to(self, pins: Pins | None) -> Pins:
        self._pins = pins
        first, *others = await self.policy.wait_ready()
        await self._check_policy_server(first)
        info = await self.rewards.pin(pins.reward_version if pins is not None else None)
        columns = {key for record in self._loaded.training for key in record.metadata}
        if missing := sorted(set(info.required_metadata) - columns):
            raise SettingsError(
                f"reward {info.name!r} needs the column(s) {', '.join(missing)}; the data has "
                f"{', '.join(sorted(columns)) or 'none beside the prompt'}"
            )
        if pins is None:
            self._pins = Pins(await self._reference_digest(first), self._loaded.tokenizer_digest, info.version)
            await self._warn_of_another_reference(first)
        for other in others:
            await self._check_policy_server(other)
        assert self._pins is not None
        return self._pins

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(self.policy.close(), self.rewards.close())

    async def _check_policy_server(self, policy: PolicyClient) -> None:
        await check_policy_server(
            policy,
            tokenizer_digest=self._loaded.tokenizer_digest,
            vocab_size=self._loaded.logit_columns,
            context_tokens=self._context_tokens,
        )
        if self._pins is not None:
            check_pins(
                self._pins,
                owner=f"policy server {policy.target}" if self._loaded.reference is None else "this trainer",
                reference_digest=await self._reference_digest(policy),
                tokenizer_digest=self._loaded.tokenizer_digest,
            )

    async def _reference_digest(self, policy: PolicyClient) -> str:
        """Of the reference that the run uses, the trainer's own or the served one."""
        if self._loaded.reference is not None:
            return weights_digest(self._loaded.reference.named_parameters(), torch.float32)
        return (await policy.get_model(REFERENCE)).weights_digest

    async def _warn_of_another_reference(self, policy: PolicyClient) -> None:
        if self._loaded.reference is not None:
            return
        served = await policy.get_model(REFERENCE)
        dtype = getattr(torch, served.serving_dtype, None)
        if isinstance(dtype, torch.dtype):
            ours = weights_digest(self._loaded.model.pretrained_model.named_parameters(), dtype)
            if ours != served.weights_digest:
                _log.warning("the served reference is not the model that this run starts from", target=policy.target)
