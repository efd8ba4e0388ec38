"""One PPO step on one batch of rollouts: the only place where the policy's weights change."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from trainer.adapters import (
    ADAPTER_OFF,
    AdapterOff,
    is_low_rank,
    low_rank_updates,
    plain_name,
)
from trainer.learning.assessment import Assessment, assess, pad_rows
from trainer.learning.batch import RolloutBatch
from trainer.learning.experience import Experience, gather_experience
from trainer.learning.forward import run_without_dropout
from trainer.learning.ranks import ALONE, Ranks, Share
from trainer.learning.sharding import (
    Gatherable,
    part_again,
    spread_optimizer_state,
    take_from_rank_0,
    whole,
    whole_on_cpu,
)
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.ppo.config import PPOConfig
from trainer.ppo.controllers import adapted_kl_coefficient
from trainer.ppo.importance import truncated_importance_weights
from trainer.ppo.kl import KlPenalty, estimated_kl
from trainer.ppo.losses import policy_loss, value_loss
from trainer.ppo.minibatches import split_into_updates
from trainer.ppo.moments import RunningMoments, clip_scores, scale_scores
from trainer.ppo.rewards import token_rewards
from trainer.ppo.statistics import (
    Statistics,
    combined_over_minibatches,
    gap_statistics,
    importance_statistics,
    length_statistics,
    mean,
    minibatch_statistics,
    objective_statistics,
    staleness_statistics,
)
from trainer.responses.activations import fuse_activations
from trainer.responses.packing import enable_packing
from trainer.responses.rows import ResponseRows, collate
from trainer.responses.scoring import (
    PackedPolicyWithoutAdapter,
    PackedReference,
    PolicyWithoutAdapter,
    scores_and_values,
)

_POLICY_PREFIX = "pretrained_model."


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient is NaN or infinite. That update was not made; earlier updates of the same step were.

    `statistics` are those of the offending mini-batch, by the names of `step`'s.
    """

    def __init__(self, message: str, statistics: dict[str, float]) -> None:
        super().__init__(message)
        self.statistics = statistics


@dataclass(frozen=True)
class _MiniBatch:
    """What one mini-batch reports."""

    numbers: dict[str, float]
    advantages: Tensor
    """[tokens trained on], CPU."""
    ratio: Tensor
    """[tokens trained on], CPU."""
    skipped: bool
    """Whether the mean ratio exceeded the threshold."""


class PPOLearner:
    """Updates a policy and its value head from batches of rollouts, as TRL 0.11.4's `PPOTrainer.step` does.

    `docs/ppo.md` says what is computed and where it differs from TRL.

    model: trained in place, or its adapter alone; moved to the accelerator's device if there is one. `reference`: a
    frozen causal LM (value head or not) on the model's device, or the model itself with its adapter off, needed for
    `kl_penalty="full"` and for batches without reference log-probabilities. temperature: what the rollout was sampled
    at; all log-probabilities are of logits / temperature. old_logprobs: where the probability ratio starts from,
    recomputed here or as the rollout gave them. importance_cap: weigh each token's policy loss by min(exp(old −
    rollout), cap), for batches that older weights sampled; None = do not. optimizer: Adam if None. lr_scheduler: of
    that optimizer, or what makes one of the learner's; stepped once per `step`.

    ranks: the processes that train together; every one makes a learner, with the same arguments but for the weights,
    which are rank 0's, and calls the same methods in the same order. By DDP each holds the model; `sharded`, by FSDP2,
    a part of it. All numbers are of the whole batch, which every rank is given.

    Raises ValueError for settings that cannot work together.
    """

    def __init__(
        self,
        model: AutoModelForCausalLMWithValueHead,
        config: PPOConfig,
        *,
        reference: nn.Module | AdapterOff | None,
        tokenizer_pad_id: int,
        temperature: float = 1.0,
        old_logprobs: Literal["trainer", "rollout"] = "trainer",
        importance_cap: float | None = None,
        accelerator: Any | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: LRScheduler | Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
        ranks: Ranks = ALONE,
        sharded: bool = False,
    ) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature is {temperature}: it must be finite and above 0")
        if reference is model:
            raise ValueError("reference is the trained model itself: the KL would always be 0; pass a frozen copy")
        if reference is ADAPTER_OFF and not model.is_peft_model:
            raise ValueError("reference: the model has no adapter that could be off")
        full = config.kl_penalty is KlPenalty.FULL
        if full and reference is None:
            raise ValueError("kl_penalty=full needs whole distributions: the trainer must hold its own reference model")
        if full and old_logprobs == "rollout":
            raise ValueError("kl_penalty=full needs whole distributions of the old policy: use old_logprobs=trainer")
        if importance_cap is not None and not (math.isfinite(importance_cap) and importance_cap > 0):
            raise ValueError(f"importance_cap is {importance_cap}: it must be finite and above 0")
        if accelerator is not None:
            _refuse_unsupported(accelerator, ranks)
        if ranks.count > 1 and (accelerator is None or optimizer is not None):
            raise ValueError("several ranks need an accelerator, and make their optimizer themselves")
        self.config = config
        self.temperature = temperature
        self.completed_steps = 0
        self.kl_coefficient = config.init_kl_coef
        self._old_logprobs = old_logprobs
        self._importance_cap = importance_cap
        self._pad_id = tokenizer_pad_id
        self._moments = RunningMoments()
        self._shuffler = np.random.RandomState(config.seed)
        self.model = model
        self._accelerator = accelerator
        self._ranks = ranks
        self._sharded = sharded
        self._wrapped: nn.Module = model
        self._packed = _prepare_forwards(model.pretrained_model)
        other = None if reference is ADAPTER_OFF else reference
        self._reference = other if full else _packed_where_possible(other)
        if config.gradient_checkpointing:
            _enable_checkpointing(model.pretrained_model)
        if accelerator is not None and ranks.count > 1:
            for each in (model, self._reference):
                if each is not None:
                    take_from_rank_0(each, accelerator.device, sharded=sharded)
        # A forward pass puts whole tensors in the place of sharded ones for a while.
        self._parameters = dict(model.named_parameters())
        self._updates = {_POLICY_PREFIX + name: each for name, each in low_rank_updates(model.pretrained_model).items()}
        self._optimizer: torch.optim.Optimizer = optimizer or torch.optim.Adam(
            [parameter for parameter in self._parameters.values() if parameter.requires_grad],
            lr=config.learning_rate,
            fused=True,
        )
        self._lr_scheduler = lr_scheduler(self._optimizer) if callable(lr_scheduler) else lr_scheduler
        if accelerator is not None:
            # What is sharded by FSDP must not be wrapped by DDP, which "evaluation" means here.
            self._wrapped = accelerator.prepare_model(model, evaluation_mode=sharded)
            self._optimizer = accelerator.prepare_optimizer(self._optimizer)
            if self._reference is not None:
                self._reference = accelerator.prepare_model(self._reference, evaluation_mode=True)
        if self._reference is not None:
            self._reference.requires_grad_(False).eval()
        if reference is ADAPTER_OFF:
            packed = self._packed and not full
            self._reference = (PackedPolicyWithoutAdapter if packed else PolicyWithoutAdapter)(self._wrapped)
        self._trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._device = next(model.parameters()).device

    @property
    def computes_in(self) -> str:
        """The coarsest type of a forward pass, by torch's name."""
        mixed = self._accelerator is not None and self._accelerator.mixed_precision == "bf16"
        return "bfloat16" if mixed else str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def step(self, batch: RolloutBatch) -> Statistics:
        """Train on `batch`, of at most or exactly `batch_size` samples, and return the statistics.

        Raises ValueError for a batch that does not fit the settings, before anything changes, and NonFiniteLossError
        in place of the update that would have spoiled the weights.
        """
        with self._ranks.together("step", batch):
            return self._step(batch)

    def _step(self, batch: RolloutBatch) -> Statistics:
        self._check_batch(batch)
        started = time.perf_counter()
        run_without_dropout(self._wrapped, checkpoint_activations=self.config.gradient_checkpointing)
        queries = [query.cpu() for query in batch.queries]
        responses = [response.cpu() for response in batch.responses]
        config = self.config
        scores = self._shaped_scores(batch.scores.detach().to("cpu", torch.float32))
        given = self._padded_inputs(batch)
        mask = given["response_masks"]

        full = config.kl_penalty is KlPenalty.FULL
        reference = self._reference if full or batch.reference_logprobs is None else None
        assessment = self._assess(self._wrapped, reference, queries, responses, with_full_kl=full)
        old_logprobs = given["rollout_logprobs"] if self._old_logprobs == "rollout" else assessment.logprobs
        reference_logprobs = assessment.reference_logprobs
        if reference_logprobs is None:
            reference_logprobs = given["reference_logprobs"]
        forward_done = time.perf_counter()

        kl = assessment.full_kl
        if kl is None:
            kl = estimated_kl(old_logprobs, reference_logprobs, config.kl_penalty)
        rewards, kl_rewards = token_rewards(
            scores.to(self._device), kl, mask, kl_coef=self.kl_coefficient, extra=given.get("token_rewards")
        )
        rewards_done = time.perf_counter()
        experience = gather_experience(
            rewards,
            assessment.values,
            old_logprobs,
            mask,
            gamma=config.gamma,
            lam=config.lam,
            whiten_rewards=config.whiten_rewards,
        )
        if self._importance_cap is not None:
            weights = truncated_importance_weights(old_logprobs, given["rollout_logprobs"], cap=self._importance_cap)
            experience = replace(experience, importance_weights=weights)
        advantages_done = time.perf_counter()

        trained = self._train(queries, responses, experience)
        optimize_done = time.perf_counter()

        statistics = objective_statistics(
            kl=kl,
            kl_rewards=kl_rewards,
            logprobs=old_logprobs,
            mask=mask,
            scores=scores,
            kl_coef=self.kl_coefficient,
        )
        statistics["objective/logprobs"] = _ragged(old_logprobs, responses)
        statistics["objective/ref_logprobs"] = _ragged(reference_logprobs, responses)
        statistics |= length_statistics(queries, responses)
        if "rollout_logprobs" in given:
            statistics |= gap_statistics(assessment.logprobs, given["rollout_logprobs"], mask)
        if batch.staleness is not None:
            statistics |= staleness_statistics(batch.staleness)
        if self._importance_cap is not None and experience.importance_weights is not None:
            statistics |= importance_statistics(experience.importance_weights, mask, cap=self._importance_cap)
        statistics |= trained
        statistics["ppo/learning_rate"] = float(self._optimizer.param_groups[0]["lr"])
        if self.config.adap_kl_ctrl:
            self.kl_coefficient = adapted_kl_coefficient(
                self.kl_coefficient,
                kl=(kl * mask).sum(1).mean().item(),
                samples=len(batch),
                target=self.config.target,
                horizon=self.config.horizon,
            )
        if self._lr_scheduler is not None:
            self._lr_scheduler.step()
        self.completed_steps += 1
        finished = time.perf_counter()
        return statistics | {
            "time/ppo/forward_pass": forward_done - started,
            "time/ppo/compute_rewards": rewards_done - forward_done,
            "time/ppo/compute_advantages": advantages_done - rewards_done,
            "time/ppo/optimize_step": optimize_done - advantages_done,
            "time/ppo/calc_stats": finished - optimize_done,
            "time/ppo/total": finished - started,
        }

    def logprobs(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> list[Tensor]:
        """The policy's log-probabilities of the response tokens, as `step` computes them: [t_i] per row, on the CPU.

        queries, responses: token ids, int64, [q_i] and [t_i], each of at least one token.
        """
        with self._ranks.together("logprobs", queries, responses):
            run_without_dropout(self._wrapped, checkpoint_activations=False)
            return _ragged(self._assess(self._wrapped, None, queries, responses).logprobs, responses)

    def reference_logprobs(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> list[Tensor]:
        """The same of the learner's reference, of which it must have one."""
        with self._ranks.together("reference_logprobs", queries, responses):
            run_without_dropout(self._wrapped, checkpoint_activations=False)
            assessed = self._assess(None, self._reference, queries, responses).reference_logprobs
            assert assessed is not None, "there is a reference"
            return _ragged(assessed, responses)

    def policy_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The causal LM's parameters under transformers' names, without the value head, tied ones once.

        What is merged from an adapter, or lies on several ranks, is made each time that somebody reads it, one by one.
        """
        for name, parameter in self._base_parameters():
            plain = plain_name(name.removeprefix(_POLICY_PREFIX))
            yield plain, self._merged(name, parameter) if name in self._updates else self._readable(name, parameter)

    @property
    def frozen_parameters(self) -> frozenset[str]:
        """The names of those that no step changes: with an adapter, all that it adds nothing to."""
        if not self._updates:
            return frozenset()
        names = (name for name, _ in self._base_parameters() if name not in self._updates)
        return frozenset(plain_name(name.removeprefix(_POLICY_PREFIX)) for name in names)

    def _base_parameters(self) -> Iterator[tuple[str, Tensor]]:
        policy = ((name, each) for name, each in self._parameters.items() if name.startswith(_POLICY_PREFIX))
        return ((name, each) for name, each in policy if not is_low_rank(name))

    def whole_parameter(self, name: str) -> Tensor | None:
        """One parameter as a whole in CPU memory; on ranks other than 0 nothing is kept of it."""
        with self._ranks.together("whole_parameter", name):
            parameter: Tensor | None = whole_on_cpu(self._parameters[name].detach(), keep=self._ranks.index == 0)
            return parameter

    def save_pretrained(self, folder: str | os.PathLike[str], *, merge_adapter: bool = False) -> None:
        """`save_pretrained` of the model, on rank 0 alone, which has all that is written in CPU memory meanwhile."""
        state = None
        if self._sharded:
            adapter_alone = self.model.is_peft_model and not merge_adapter
            state = {name: each for name, each in self.model.state_dict().items() if not isinstance(each, DTensor)}
            # A name that is missing is tied to one that is there.
            state |= {
                name: self._readable(name, each).to("cpu")
                for name, each in self._parameters.items()
                if each.requires_grad or not adapter_alone
            }
        self.model.save_pretrained(folder, merge_adapter=merge_adapter, state_dict=state)

    def _readable(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter, or what has of a tensor what a reader needs."""
        if not self._sharded:
            return parameter
        return cast(Tensor, Gatherable(parameter, lambda: self.whole_parameter(name)))

    def _merged(self, name: str, parameter: Tensor) -> Tensor:
        """What stands for a weight with what an adapter adds to it."""
        update = self._updates[name]

        def whole(each: str) -> Tensor:
            device = "cpu" if self._sharded else self._device
            return self._readable(each, self._parameters[each]).detach().to(device)

        def merge() -> Tensor:
            return update.merged(whole(name), whole(_POLICY_PREFIX + update.down), whole(_POLICY_PREFIX + update.up))

        return cast(Tensor, Gatherable(parameter, merge))

    def state_dict(self) -> dict[str, Any]:
        """All that is needed, beside the model's weights, to continue bit for bit: tensors and plain values only.

        It is the same for any number of ranks, sharded or not, and whole on rank 0 alone.
        """
        with self._ranks.together("state_dict"):
            return self._state_dict()

    def _state_dict(self) -> dict[str, Any]:
        _, key, position, has_gauss, cached = self._shuffler.get_state(legacy=True)
        return {
            "optimizer": whole_on_cpu(self._optimizer.state_dict(), keep=self._ranks.index == 0),
            "lr_scheduler": self._lr_scheduler.state_dict() if self._lr_scheduler is not None else None,
            "kl_coefficient": self.kl_coefficient,
            "moments": {"count": self._moments.count, "mean": self._moments.mean, "squares": self._moments.squares},
            "shuffler": {
                "key": torch.from_numpy(np.asarray(key).astype(np.int64)),
                "position": int(position),
                "has_gauss": int(has_gauss),
                "cached_gaussian": float(cached),
            },
            "completed_steps": self.completed_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a learner with the same settings; load the model's weights separately.

        Of `state["optimizer"]` rank 0's counts, the others need none. Raises ValueError when only one of the two
        learners has a scheduler.
        """
        plain = {name: value for name, value in state.items() if name != "optimizer"}
        with self._ranks.together("load_state_dict", plain):
            self._load_state_dict(state)

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        if (state["lr_scheduler"] is None) != (self._lr_scheduler is None):
            raise ValueError("lr_scheduler: the saved learner and this one must both have one or both have none")
        optimizer: dict[str, Any] = state.get("optimizer", {})
        if self._ranks.count > 1:
            optimizer = spread_optimizer_state(self._optimizer, optimizer)
        self._optimizer.load_state_dict(optimizer)
        if self._lr_scheduler is not None:
            self._lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.kl_coefficient = float(state["kl_coefficient"])
        self._moments = RunningMoments(**state["moments"])
        saved = state["shuffler"]
        key = saved["key"].cpu().numpy().astype(np.uint32)
        self._shuffler.set_state(("MT19937", key, saved["position"], saved["has_gauss"], saved["cached_gaussian"]))
        self.completed_steps = int(state["completed_steps"])

    def _check_batch(self, batch: RolloutBatch) -> None:
        if len(batch) > self.config.batch_size:
            raise ValueError(f"the batch has {len(batch)} samples, batch_size is {self.config.batch_size}")
        if batch.rollout_logprobs is None:
            if self._old_logprobs == "rollout":
                raise ValueError("old_logprobs=rollout needs rollout_logprobs in the batch")
            if self._importance_cap is not None:
                raise ValueError("importance_cap needs rollout_logprobs in the batch")
        if self._reference is None and batch.reference_logprobs is None:
            raise ValueError("the batch has no reference_logprobs and the learner no reference model to compute them")

    def _shaped_scores(self, scores: Tensor) -> Tensor:
        if self.config.use_score_scaling:
            self._moments = self._moments.updated(scores)
            scores = scale_scores(scores, self._moments, subtract_mean=self.config.use_score_norm)
        if self.config.score_clip is not None:
            scores = clip_scores(scores, self.config.score_clip)
        return scores

    def _padded_inputs(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """The per-token fields that the batch brings, each [batch, time] on the device; `response_masks` always."""
        brought = {
            "response_masks": batch.response_masks or [torch.ones(len(response)) for response in batch.responses],
            "token_rewards": batch.token_rewards,
            "reference_logprobs": batch.reference_logprobs,
            "rollout_logprobs": batch.rollout_logprobs,
        }
        return {name: pad_rows(rows, self._device) for name, rows in brought.items() if rows is not None}

    def _train(self, queries: list[Tensor], responses: list[Tensor], experience: Experience) -> Statistics:
        """All epochs; the means over their mini-batches, and advantages and ratios of every token trained on."""
        config = self.config
        minibatches: list[_MiniBatch] = []
        gradient_norms: list[float] = []
        for _ in range(config.ppo_epochs):
            for update in split_into_updates(
                self._shuffler.permutation(len(queries)).tolist(),
                mini_batch_size=config.samples_per_mini_batch,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
            ):
                samples = sum(len(chosen) for chosen in update)
                for chosen in update:
                    minibatches.append(
                        self._backward(
                            [queries[row] for row in chosen],
                            [responses[row] for row in chosen],
                            experience.rows(chosen),
                            weight=len(chosen) / samples,
                        )
                    )
                gradient_norms.append(self._update(minibatches[-1].numbers))
            if config.early_stopping and minibatches[-1].numbers["ppo/policy/policykl"] > 1.5 * config.target_kl:
                break
        statistics: Statistics = {**combined_over_minibatches([minibatch.numbers for minibatch in minibatches])}
        statistics["ppo/policy/advantages"] = torch.cat([minibatch.advantages for minibatch in minibatches])
        statistics["ppo/policy/ratio"] = torch.cat([minibatch.ratio for minibatch in minibatches])
        statistics["ppo/policy/skipped"] = mean([float(minibatch.skipped) for minibatch in minibatches])
        statistics["ppo/grad_norm"] = mean(gradient_norms)
        return statistics

    def _backward(
        self, queries: list[Tensor], responses: list[Tensor], experience: Experience, *, weight: float
    ) -> _MiniBatch:
        """Add `weight` times the gradient of one mini-batch's loss."""
        config = self.config
        share = self._ranks.share(queries, responses)
        rows = self._rows(share)
        scores = torch.stack(scores_and_values(self._wrapped, rows, self.temperature), dim=-1)
        # Every rank goes on with all rows, and its loss has a gradient in its own.
        padded = nn.utils.rnn.pad_sequence(share.everyones(scores), batch_first=True)
        logprobs, entropies, values = padded.unbind(-1)
        entropies = entropies.detach()
        experience = experience.cut(padded.shape[1])
        policy = policy_loss(
            logprobs,
            experience.old_logprobs,
            experience.advantages,
            experience.mask,
            cliprange=config.cliprange,
            weights=experience.importance_weights,
        )
        value = value_loss(
            values, experience.old_values, experience.returns, experience.mask, cliprange=config.cliprange_value
        )
        tensors = minibatch_statistics(
            policy=policy,
            value=value,
            vf_coef=config.vf_coef,
            entropy=entropies,
            values=values,
            old_values=experience.old_values,
            advantages=experience.advantages,
            returns=experience.returns,
            mask=experience.mask,
        )
        mean_ratio, *scalars = torch.stack([policy.mean_ratio, *tensors.values()]).tolist()
        numbers = dict(zip(tensors, scalars, strict=True))
        loss = policy.loss + config.vf_coef * value.loss
        skipped = mean_ratio > config.ratio_threshold
        if skipped:
            # A loss of zero, not no loss: Adam's moments decay and its momentum acts, as in TRL. The loss itself may
            # have overflowed, and 0 · inf is no zero.
            loss = 0.0 * (logprobs.sum() + values.sum())
            numbers |= dict.fromkeys(("ppo/loss/policy", "ppo/loss/value", "ppo/loss/total"), 0.0)
        if not math.isfinite(numbers["ppo/loss/total"]):
            self._optimizer.zero_grad()
            raise NonFiniteLossError(f"the loss of a mini-batch is {numbers['ppo/loss/total']}", numbers)
        # DDP and FSDP make the mean over ranks of what is a sum.
        loss = loss * (weight * self._ranks.count)
        if self._accelerator is None:
            torch.autograd.backward(loss)
        else:
            self._accelerator.backward(loss)
        trained = experience.mask.bool()
        return _MiniBatch(numbers, experience.advantages[trained].cpu(), policy.ratio[trained].cpu(), skipped)

    def _update(self, numbers: dict[str, float]) -> float:
        """One optimizer step from the gradients gathered; their norm before clipping. `numbers` explain a failure."""
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        total = whole(norm).item()
        if not math.isfinite(total):
            self._optimizer.zero_grad()
            raise NonFiniteLossError(f"the norm of the gradient is {total}", numbers)
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self._trained, self.config.max_grad_norm, norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total

    def _assess(
        self,
        model: nn.Module | None,
        reference: nn.Module | None,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        *,
        with_full_kl: bool = False,
    ) -> Assessment:
        assessment = assess(
            model,
            reference,
            queries,
            responses,
            temperature=self.temperature,
            with_full_kl=with_full_kl,
            packed=self._packed,
            mini_batch_size=self.config.samples_per_mini_batch,
            pad_id=self._pad_id,
            device=self._device,
            ranks=self._ranks,
        )
        # The policy too where it was asked as its own reference: rank 0 alone parts it again when it saves.
        part_again(self._wrapped)
        if reference is not None:
            part_again(reference)
        return assessment

    def _rows(self, share: Share) -> ResponseRows:
        return collate(
            share.own_queries, share.own_responses, packed=self._packed, pad_id=self._pad_id, device=self._device
        )


def _ragged(padded: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """[batch, time] → one [t_i] on the CPU per row of `rows`."""
    return [values[: len(row)].cpu() for values, row in zip(padded, rows, strict=True)]


def _prepare_forwards(model: nn.Module) -> bool:
    """Let a language model compute as cheaply as we know how to; whether it reads packed rows."""
    fuse_activations(model)
    return isinstance(model, PreTrainedModel) and enable_packing(model)


def _packed_where_possible(reference: nn.Module | None) -> nn.Module | None:
    if reference is None:
        return None
    with_head = isinstance(reference, AutoModelForCausalLMWithValueHead)
    language_model: Any = reference.pretrained_model if with_head else reference
    return PackedReference(language_model) if _prepare_forwards(language_model) else reference


def _enable_checkpointing(model: PreTrainedModel) -> None:
    # transformers 5.20 renamed the method and warns about the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def _refuse_unsupported(accelerator: Any, ranks: Ranks) -> None:
    if accelerator.num_processes != ranks.count:
        raise ValueError(
            f"the accelerator has {accelerator.num_processes} processes, the learner {ranks.count}: python -m trainer "
            "trains in several, PPOTrainer in one"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"the accelerator has gradient_accumulation_steps={accelerator.gradient_accumulation_steps}: "
            "set it in PPOConfig alone, the learner accumulates by itself"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision={accelerator.mixed_precision} is not supported: use bf16 or no")
