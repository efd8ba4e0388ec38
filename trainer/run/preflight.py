"""Before a run: what costs seconds to check and may save hours, at every start, and by itself with --check."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import grpc
import torch

from rlhf.failures import RpcFailure
from rlhf.fingerprints import weights_digest
from rlhf.logs import get_logger
from rlhf.security.config import CredentialsError
from trainer.adapters import ADAPTER_OFF, base_parameters
from trainer.clients.fleet import PolicyFleet
from trainer.clients.policy import POLICY_SERVICE, REFERENCE, BrokenServerError, ModelInfo, PolicyClient
from trainer.clients.publisher import WEIGHTS_SERVICE, PublishError, WeightsInfo
from trainer.clients.rewards import REWARD_SERVICE, RewardChangedError, RewardInfo
from trainer.clients.weight_files import empty_folder
from trainer.learning.learner import PPOLearner
from trainer.learning.ranks import ALONE, Ranks
from trainer.run.agreement import PROBE_PROMPTS, Agreement, DisagreementError, Probe, gap_limit
from trainer.run.checkpoints import CheckpointError, Pins
from trainer.run.findings import Finding, NotCheckedError, Outcome
from trainer.run.following import leading_learner
from trainer.run.loading import (
    LoadedData,
    LoadedModel,
    SettingsError,
    load_data,
    load_model,
    usable_prompts,
)
from trainer.run.pinning import (
    Needs,
    PinError,
    check_context,
    check_logit_columns,
    check_logprobs,
    check_pins,
    check_tokenizer,
    same_weights,
)
from trainer.run.prompts import Cursor, Prompt, PromptDataError, PromptSource
from trainer.run.runfolder import RunFolderError
from trainer.run.servers import Servers
from trainer.run.space import free_at, in_units
from trainer.run.start import Start, checkpoint_store
from trainer.run.waiting import Patience
from trainer.settings import LoraExport, TrainerSettings
from trainer.versions import WeightsVersion

_log = get_logger(__name__)

T = TypeVar("T")

REFUSALS = (
    SettingsError,
    CredentialsError,
    RunFolderError,
    PromptDataError,
    CheckpointError,
    PinError,
    RewardChangedError,
    PublishError,
    DisagreementError,
    ImportError,
)
"""Settings, data, folder or servers that don't fit the run: starting again does not help."""

_SERVING_SECONDS = 2.0
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class _Server:
    """Where a server is, and what it should be."""

    on: str
    target: str
    setting: str


class Preflight:
    """The checks of one start. Each may use what those before it, which it names, have found.

    Nothing is written, published or stored. The attributes are set by the checks.
    """

    model: LoadedModel
    learner: PPOLearner
    data: LoadedData
    held_out: Sequence[Prompt]
    prompts: PromptSource
    probe: Probe
    served: ModelInfo
    weights: WeightsInfo
    reward: RewardInfo
    reference_digest: str
    reference: ModelInfo | None = None
    """The served one, if the run uses it and it may be compared with the model that this start loads."""

    def __init__(
        self,
        settings: TrainerSettings,
        start: Start,
        servers: Servers,
        *,
        ranks: Ranks = ALONE,
        patience: Patience | None = None,
    ) -> None:
        """`ranks`: who trains, led by this process. `patience`: of the servers' clients; None = they wait for ever."""
        self._ranks = ranks
        self._settings = settings
        self._start = start
        self._servers = servers
        self._patience = patience
        self._policy_server = _Server("policy", servers.fleet.target, "--policy-server")
        self._reward_server = _Server("reward", settings.reward_server, "--reward-server")
        self._digests: dict[torch.dtype, str] = {}

    async def require(self) -> None:
        """Every check; raises what the first that fails raises."""
        for _, check, _ in self._CHECKS:
            await check(self)
        _log.info("every check before the run passed", checks=len(self._CHECKS))

    async def report(self) -> list[Finding]:
        """Every check that can be made, and the log-probabilities of what the policy server serves now."""
        findings: list[Finding] = []
        for name, check, needs in (*self._CHECKS, self._LOG_PROBABILITIES):
            passed = {finding.check for finding in findings if finding.outcome is Outcome.OK}
            if missing := [need for need in needs if need not in passed]:
                findings.append(Finding(name, Outcome.NOT_CHECKED, f"until this is mended: {', '.join(missing)}"))
                continue
            try:
                findings.append(Finding(name, Outcome.OK, await check(self)))
            except NotCheckedError as reason:
                findings.append(Finding(name, Outcome.NOT_CHECKED, str(reason)))
            except (*REFUSALS, BrokenServerError, RpcFailure) as error:
                findings.append(Finding(name, Outcome.FAILED, str(error)))
        return findings

    @cached_property
    def needs(self) -> Needs:
        """What the policy server must be."""
        return Needs(
            tokenizer_digest=self.model.tokenizer_digest,
            logit_columns=self.model.logit_columns,
            context_tokens=self.model.max_prompt_tokens + self._settings.max_new_tokens,
        )

    @property
    def pins(self) -> Pins:
        """What must not change from here on: the run's, or for a new run what there is now."""
        if self._start.stored is not None:
            return self._start.stored.pins
        return Pins(self.reference_digest, self.model.tokenizer_digest, self.reward.version, self.model.base_digest)

    @property
    def agreement(self) -> Agreement:
        """Compares what the policy server holds after the first publish."""
        models = [self.served, *([self.reference] if self.reference is not None else [])]
        return self._agreement(self._servers.fleet, models)

    def _agreement(self, policy: PolicyClient | PolicyFleet, models: Sequence[ModelInfo]) -> Agreement:
        return Agreement(
            policy,
            self.probe,
            temperature=self._settings.temperature,
            limit=gap_limit(self._settings.max_logprob_gap, [self.served.serving_dtype, self.learner.computes_in]),
            models=models,
        )

    async def _check_model(self) -> str:
        stored = self._start.stored
        self.model = await asyncio.to_thread(load_model, self._settings, self._start.checkpoint)
        if stored is not None and stored.pins.base_digest != self.model.base_digest:
            raise PinError(
                f"--model {self._settings.model} ({self.model.base_digest}) is not what this run's adapter is of "
                f"({stored.pins.base_digest}): put its files back, or begin a new run"
            )
        self.learner = await asyncio.to_thread(leading_learner, self._settings, self.model, self._ranks)
        model = self.model.model.pretrained_model
        source = self._start.checkpoint or self._settings.model
        parameters = sum(parameter.numel() for _, parameter in base_parameters(model))
        adapter = sum(parameter.numel() for parameter in model.parameters()) - parameters
        said = f"{type(model).__name__}, {_millions(parameters)} parameters, from {source}"
        return f"{said}; {_millions(adapter)} of an adapter are trained" if adapter else said

    async def _check_data(self) -> str:
        self.data = await asyncio.to_thread(load_data, self._settings)
        return f"{len(self.data.training)} prompts to train on, {len(self.data.held_out)} held out"

    async def _check_prompts(self) -> str:
        self.held_out = await asyncio.to_thread(usable_prompts, self.data.held_out, self.model)
        most = self.model.max_prompt_tokens
        self.prompts = PromptSource(
            self.data.training, self.model.tokenizer, seed=self._settings.seed, max_prompt_tokens=most
        )
        draws, _ = await asyncio.to_thread(self.prompts.draw, Cursor(), PROBE_PROMPTS)
        usable = [draw.prompt for draw in draws if draw.dropped is None]
        highest = max(max(prompt.token_ids) for prompt in usable)
        if highest >= self.model.logit_columns:
            raise SettingsError(
                f"the tokenizer gives the token id {highest}, the model has {self.model.logit_columns} logit columns: "
                "give --model a folder whose tokenizer and weights belong together"
            )
        self.probe = Probe.of(usable)
        return f"{len(usable)} of the first {len(draws)} have 1 to {most} tokens"

    async def _check_disk(self) -> str:
        trained = [parameter for parameter in self.model.model.parameters() if parameter.requires_grad]
        adapter_alone = self.model.model.is_peft_model and self._settings.lora_export is LoraExport.ADAPTER
        exported = trained if adapter_alone else [each for _, each in self.learner.policy_parameters()]
        return checkpoint_store(self._settings).require_room(
            trained,
            model_bytes=sum(parameter.nbytes for parameter in exported),
            with_best=self._settings.eval_prompts > 0,
        )

    async def _check_policy_server(self) -> str:
        await self._ask(self._policy_server, self._servers.reach(), "grpc.health.v1.Health/Check")
        policy, publisher = self._servers.policy, self._servers.publisher
        self.served = await self._ask(self._policy_server, policy.get_model(), f"{POLICY_SERVICE}/GetModel")
        self.weights = await self._ask(self._policy_server, publisher.get_weights(), f"{WEIGHTS_SERVICE}/GetWeights")
        await self._ask(self._policy_server, publisher.wait_ready(), "grpc.health.v1.Health/Check")
        check_logprobs(self.served, target=policy.target)
        return f"{policy.target} serves {self.weights.live} in {self.served.serving_dtype}"

    async def _check_tokenizer(self) -> str:
        check_tokenizer(self.served, self.needs, target=self._servers.policy.target)
        return "the policy server's is the trainer's"

    async def _check_logit_columns(self) -> str:
        check_logit_columns(self.served, self.needs, target=self._servers.policy.target)
        return f"{self.needs.logit_columns} on both sides"

    async def _check_context(self) -> str:
        check_context(self.served, self.needs, target=self._servers.policy.target)
        return f"{self.needs.context_tokens} of the policy server's {self.served.max_context_tokens} tokens"

    async def _check_transfer(self) -> str:
        sizes = {name: parameter.nbytes for name, parameter in self.learner.policy_parameters()}
        size, told = sum(sizes.values()), _told(sizes, self.learner.frozen_parameters)
        most = self.weights.max_staging_bytes
        if most and size > most:
            raise PinError(
                f"policy server {self._servers.policy.target} takes updates of at most {in_units(most)}, this model's "
                f"weights are {in_units(size)}: start it with the same --model, or raise its --max-staging-bytes"
            )
        folder = self._settings.weights_folder
        if folder is None:
            return f"{told} in the stream"
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise SettingsError(
                f"--weights-folder {folder} is not a folder that this user may write to: make it, or leave it out and "
                "weights go in the stream"
            )
        if (free := free_at(folder)) < size:
            raise SettingsError(
                f"--weights-folder {folder} has {in_units(free)} free, the weights are {in_units(size)}: make room, or "
                "leave it out and weights go in the stream"
            )
        if not self.weights.reads_folders:
            return f"{told} in the stream: the policy server was started without --weights-root"
        # A server that stages in place would be left without weights by any update that it refuses.
        if not most or self.weights.in_place:
            return f"{told} through {folder}; whether the policy server sees it, the first publish tells"
        async with empty_folder(folder) as name:
            seen = await self._ask(
                self._policy_server, self._servers.publisher.finds(name), f"{WEIGHTS_SERVICE}/UpdateWeights"
            )
        if seen is False:
            raise PinError(
                f"policy server {self._servers.policy.target} does not see what is written to --weights-folder "
                f"{folder}: give the server's --weights-root as this process sees it, or leave it out and weights go "
                "in the stream"
            )
        return f"{told} through {folder}"

    async def _check_reward_server(self) -> str:
        stored = self._start.stored
        version = stored.pins.reward_version if stored is not None else None
        rewards = self._servers.rewards
        self.reward = await self._ask(self._reward_server, rewards.pin(version), f"{REWARD_SERVICE}/GetRewardInfo")
        return f"{rewards.target} gives {self.reward.name or 'a reward'}, version {self.reward.version}"

    async def _check_columns(self) -> str:
        needed = sorted(self.reward.required_metadata)
        sources = [("--data", self.data.training)]
        if self._settings.eval_data is not None:
            sources.append(("--eval-data", self.data.held_out))
        found = "the reward needs none"
        for setting, records in sources:
            rows = [record.metadata.keys() for record in records]
            columns = {key for row in rows for key in row}
            if missing := [name for name in needed if name not in columns]:
                raise SettingsError(
                    f"reward {self.reward.name!r} needs the column(s) {', '.join(missing)}; the data has "
                    f"{', '.join(sorted(columns)) or 'none beside the prompt'}: add them to {setting}"
                )
            lacking = sum(not set(needed) <= row for row in rows)
            if needed and setting == "--data":
                found = ", ".join(needed)
                found += f"; {lacking} of {len(rows)} rows lack one and will be dropped" if lacking else ""
        return found

    async def _check_reference(self) -> str:
        stored = self._start.stored
        if self.model.reference is not None:
            said = "the trainer's own" + (", the policy without its adapter" * (self.model.reference is ADAPTER_OFF))
            self.reference_digest = self.model.reference_digest
        else:
            served = await self._served_reference()
            self.reference_digest = served.weights_digest
            said = "the policy server's"
        if stored is not None:
            check_pins(
                stored.pins,
                owner=f"policy server {self._servers.policy.target}"
                if self.model.reference is None
                else "this trainer",
                reference_digest=self.reference_digest,
                tokenizer_digest=self.model.tokenizer_digest,
            )
            return f"{said}, the one that the run began with"
        if self.model.reference is not None:
            return said
        same, meant = same_weights(served, self._digest), self._settings.other_reference
        if same:
            self.reference = served
            return f"{said}, the model that the run starts from"
        if meant:
            return f"{said}, another model than the run starts from, as --other-reference says"
        if same is False:
            raise PinError(
                f"the reference of policy server {self._servers.policy.target} is not the model that this run starts "
                f"from ({self._settings.model}), so the KL would not begin at 0: start the server with that as its "
                "--reference, or say --other-reference if it is meant to be another"
            )
        self.reference = served
        return f"{said}; only its log-probabilities tell whether it is the model that the run starts from"

    async def _check_replicas(self) -> str:
        grace = _GRACE_SECONDS if self._patience is None else self._patience.seconds / 2
        held = self._servers.hold_to(self.needs, self.pins, grace=grace)
        passed = await self._ask(self._policy_server, held, f"{POLICY_SERVICE}/GetModel")
        away = sorted(set(self._servers.fleet.known) - set(passed))
        said = f"{len(passed)} of {len(passed) + len(away)} can take the weights"
        return f"{said}; when they come, the same is asked of {', '.join(away)}" if away else said

    async def _served_reference(self) -> ModelInfo:
        policy = self._servers.policy
        try:
            return await self._ask(self._policy_server, policy.get_model(REFERENCE), f"{POLICY_SERVICE}/GetModel")
        except RpcFailure as failure:
            if failure.code is not grpc.StatusCode.NOT_FOUND:
                raise
            raise PinError(
                f"policy server {policy.target} has no model {REFERENCE!r}: start one that has, or set "
                "--reference trainer"
            ) from failure

    async def _check_log_probabilities(self) -> str:
        stored = self._start.stored
        live = self.weights.live
        models = [] if self.reference is None else [self.reference]
        ours = None if stored is None else WeightsVersion(stored.run_id, stored.incarnation, stored.version)
        if live == ours or (not live.run_id and same_weights(self.served, self._digest)):
            models.append(self.served)
        if not models:
            raise NotCheckedError(
                f"not compared, because the policy server holds other weights ({live}) than this start; they are "
                "compared after the first publish"
            )
        try:
            await self._servers.policy.wait_ready(within=_SERVING_SECONDS)
        except TimeoutError as error:
            raise NotCheckedError(
                f"not compared, because {error} (a --managed server before a trainer has published); they are compared "
                "after the first publish"
            ) from None
        agreement = self._agreement(self._servers.policy, models)
        logprobs = await asyncio.to_thread(agreement.probe.logprobs_by, self.learner)
        weights = live if live == ours else None
        return await self._ask(self._policy_server, agreement.require(logprobs, weights), f"{POLICY_SERVICE}/LogProbs")

    def _digest(self, dtype: torch.dtype) -> str:
        """Of the model that this start loads, in a server's type."""
        if dtype not in self._digests:
            self._digests[dtype] = weights_digest(self.learner.policy_parameters(), dtype)
        return self._digests[dtype]

    async def _ask(self, server: _Server, question: Awaitable[T], method: str) -> T:
        """The answer; raises PinError for a server of another contract, or that lets the patience run out."""
        try:
            async with asyncio.timeout(None if self._patience is None else self._patience.seconds):
                return await question
        except TimeoutError:
            assert self._patience is not None
            reason = self._patience.reasons.get(server.on, "no answer")
            raise PinError(
                f"{server.on} server {server.target} did not answer {method} within {self._patience.seconds:g} seconds "
                f"({reason}): start it, or correct {server.setting}"
            ) from None
        except RpcFailure as failure:
            if failure.code is grpc.StatusCode.UNIMPLEMENTED:
                raise PinError(
                    f"{server.target} is no {server.on} server of this contract: it does not know {method} "
                    f"({failure.message}). Correct {server.setting}: is it another server's address?"
                ) from failure
            raise

    _Check = tuple[str, Callable[["Preflight"], Coroutine[Any, Any, str]], tuple[str, ...]]
    _CHECKS: ClassVar[tuple[_Check, ...]] = (
        ("model", _check_model, ()),
        ("data", _check_data, ()),
        ("prompts", _check_prompts, ("model", "data")),
        ("disk space", _check_disk, ("model",)),
        ("policy server", _check_policy_server, ()),
        ("tokenizer", _check_tokenizer, ("model", "policy server")),
        ("logit columns", _check_logit_columns, ("model", "policy server")),
        ("context", _check_context, ("model", "policy server")),
        ("weights", _check_transfer, ("model", "policy server")),
        ("reference", _check_reference, ("model", "policy server")),
        ("reward server", _check_reward_server, ()),
        ("reward columns", _check_columns, ("data", "reward server")),
        ("replicas", _check_replicas, ("tokenizer", "logit columns", "context", "reference", "reward server")),
    )
    """Name, check, and the checks that it builds on. What needs no server comes first."""
    _LOG_PROBABILITIES: ClassVar[_Check] = (
        "log-probabilities",
        _check_log_probabilities,
        ("model", "prompts", "policy server", "tokenizer", "logit columns", "context", "reference"),
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g} million"


def _told(sizes: Mapping[str, int], frozen: Collection[str]) -> str:
    """How much is published: at first, and where something is frozen, in every step."""
    said = in_units(sum(sizes.values()))
    if not frozen:
        return said
    return f"{said} at first, then {in_units(sum(size for name, size in sizes.items() if name not in frozen))} a step"
