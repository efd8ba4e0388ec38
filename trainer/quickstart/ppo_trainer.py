"""PPOTrainer: TRL's quickstart with only the imports changed, in one process or through a policy server."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate.accelerator import Accelerator
from accelerate.utils.random import set_seed
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.logs import get_logger
from trainer.adapters import ADAPTER_OFF, without_adapter
from trainer.learning.batch import RolloutBatch
from trainer.learning.learner import PPOLearner
from trainer.model import AutoModelForCausalLMWithValueHead, create_reference_model, upload_to_hub
from trainer.ppo.config import PPOConfig
from trainer.ppo.kl import KlPenalty
from trainer.ppo.statistics import Statistics
from trainer.quickstart.generation import generate_batched, generate_one
from trainer.quickstart.sampling import (
    ServedSampling,
    served_sampling,
    shaping_settings,
    switched_off,
    warn_of_negative_kl,
    warn_of_shaping,
)
from trainer.tokenizers import save_tokenizer

if TYPE_CHECKING:
    from trainer.quickstart.served_policy import ServedPolicy

_log = get_logger(__name__)

# What transformers' generate falls back to when neither the call nor the model's generation_config says.
_TRANSFORMERS_DEFAULTS = {"top_k": 50}


@dataclass(frozen=True)
class KlController:
    """The KL coefficient under TRL's name."""

    value: float


class PPOTrainer:
    """TRL 0.11.4's trainer of the same name: `generate` → rewards of your own → `step`, over and over.

    config, model, ref_model, tokenizer: as in TRL. Without `ref_model` the reference is a frozen copy of `model` as it
    is now, or, if it has an adapter, the model with that off. dataset: its batches of `config.batch_size`, shuffled and
    collated by `data_collator`, are `dataloader`. optimizer: Adam unless given. lr_scheduler: of that optimizer, or a
    function that makes one of Adam; stepped once per `step`. accelerator: one of your own, with trackers that
    `log_stats` writes to.

    policy_server: "host:port" of a policy server. Then responses and reference log-probabilities come from there, and
    the weights go there now and after every `step`. The server's tokenizer and its reference must be this trainer's
    (ServerMismatchError, a ValueError, otherwise). Close the trainer, or use it in a `with` block.

    Seeds all generators with `config.seed`, as TRL does. Raises ValueError for arguments that do not fit together and
    for TRL's that have no meaning here.
    """

    def __init__(
        self,
        config: PPOConfig,
        model: AutoModelForCausalLMWithValueHead,
        ref_model: AutoModelForCausalLMWithValueHead | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Any | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: LRScheduler | Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
        training_data_collator: Callable[[list[Any]], Any] | None = None,
        *,
        accelerator: Accelerator | None = None,
        policy_server: str | None = None,
    ) -> None:
        _check_types(config, model, ref_model, tokenizer)
        assert tokenizer is not None
        if num_shared_layers is not None:
            raise ValueError("num_shared_layers: the reference is a whole frozen copy here; leave it out")
        if training_data_collator is not None:
            raise ValueError("training_data_collator: the learner pads its own rows; leave it out")
        self.accelerator = accelerator or Accelerator()
        if policy_server is not None and config.kl_penalty is KlPenalty.FULL:
            raise ValueError("kl_penalty=full needs the reference's whole distributions: leave policy_server out")
        if policy_server is not None and self.accelerator.num_processes > 1:
            raise ValueError("policy_server: one process publishes and generates; for more use python -m trainer")
        set_seed(config.seed)
        self.config = config
        self.model = model.to(self.accelerator.device).eval()
        self.tokenizer = tokenizer
        self._policy_server: ServedPolicy | None = None
        self._warned_of: set[str] = set()
        self._step = 0
        reference = _with_value_head(ref_model)
        if reference is not None and reference.is_peft_model:
            raise ValueError("ref_model has an adapter: merge it, or leave ref_model out for the model without its own")
        if reference is None and not model.is_peft_model:
            reference = create_reference_model(model)
        if policy_server is not None:
            # In one process nothing of gRPC is needed.
            from trainer.quickstart.served_policy import ServedPolicy

            self._policy_server = ServedPolicy(policy_server, tokenizer=tokenizer, reference=reference or model)
        self.ref_model = reference and reference.requires_grad_(False).eval().to(self.accelerator.device)
        self.learner = PPOLearner(
            model,
            config,
            reference=None if policy_server is not None else self.ref_model or ADAPTER_OFF,
            tokenizer_pad_id=self._pad_id,
            accelerator=self.accelerator,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        self.dataloader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        self._publish()

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample responses with the policy.

        query_tensor: one prompt [q], answered by a tensor [1, q + t]; or a list of prompts, answered by a list of
        tensors [q_i + t_i], `batch_size` at a time in this process, each ending with its EOS unless it ran out of
        tokens. Without `return_prompt` the prompt is left out. length_sampler: gives `max_new_tokens`, for each batch
        anew. generate_ref_response: also ask the reference; the answer is then a pair. The rest are transformers'
        generation settings; `min_length=-1` and `top_k=0.0` mean off.

        Warns once about settings under which step() compares other log-probabilities than were sampled from. Raises
        ValueError for prompts of the wrong shape and for settings that a policy server can't be asked for.
        """
        queries = [query_tensor] if isinstance(query_tensor, Tensor) else query_tensor
        for index, query in enumerate(queries):
            if not isinstance(query, Tensor) or query.dim() != 1 or query.numel() == 0:
                raise ValueError(
                    "query_tensor is a 1-D tensor of at least one token id or a list of such tensors; "
                    f"query {index} is {list(query.shape) if isinstance(query, Tensor) else type(query).__name__}"
                )
        settings = switched_off(generation_kwargs)
        self._warn_of_shaping(settings)
        if self._policy_server is not None:
            answer = self._generate_served(query_tensor, length_sampler, batch_size, return_prompt, settings)
        else:
            answer = self._generate_here(self.model, query_tensor, length_sampler, batch_size, return_prompt, settings)
        if not generate_ref_response:
            return answer
        with without_adapter(self.model) if self.ref_model is None else contextlib.nullcontext():
            model = self.ref_model or self.model
            other = self._generate_here(model, query_tensor, length_sampler, batch_size, return_prompt, settings)
        return answer, other

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> Statistics:
        """One PPO step on `config.batch_size` samples; returns TRL's statistics by their names (objective/kl, …).

        queries, responses: token ids [q_i] and [t_i]. scores: one number each, as tensors [] or [1]. response_masks: 1
        on the response tokens to train on, [t_i]. With a policy server the new weights are live when this returns.

        Warns when the KL estimate is far below 0. Raises ValueError, naming the argument, for input that does not fit,
        before anything changes, and trainer.learning.learner.NonFiniteLossError in place of the update that would have
        spoiled the weights.
        """
        batch = self._rollout(queries, responses, scores, response_masks)
        statistics = self.learner.step(batch)
        warn_of_negative_kl(statistics["objective/kl"])
        self._step += 1
        self._publish()
        return statistics

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Tensor] | Tensor,
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Write the numbers in `stats` and the rewards' mean and deviation to the log and the accelerator's trackers.

        `batch` columns named in `columns_to_log` go to a W&B table (game_log) where W&B is a tracker.
        """
        values = torch.as_tensor([float(reward) for reward in rewards], device=self.accelerator.device)
        values = self.accelerator.gather(values)  # type: ignore[no-untyped-call]
        if not self.accelerator.is_main_process:
            return
        numbers = {name: float(value) for name, value in stats.items() if _is_number(value)}
        numbers["env/reward_mean"] = values.mean().item()
        numbers["env/reward_std"] = values.std(correction=0).item()
        self.accelerator.log(numbers, step=self._step)
        columns = [name for name in columns_to_log if name in batch]
        for tracker in self.accelerator.trackers:
            if columns and tracker.name == "wandb":
                rows = [[*row] for row in zip(*(batch[name] for name in columns), values.tolist(), strict=True)]
                tracker.log_table("game_log", columns=[*columns, "reward"], data=rows, step=self._step)
        _log.info(
            "ppo step",
            step=self._step,
            reward=numbers["env/reward_mean"],
            kl=numbers.get("objective/kl"),
            loss=numbers.get("ppo/loss/total"),
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, merge_adapter: bool = False) -> None:
        """Write the model with its value head, and the tokenizer: a folder for AutoModelForCausalLM, TRL and this.

        A model with an adapter writes that alone, or to `merge_adapter` the whole with the adapter in its weights.
        """
        self.model.save_pretrained(
            save_directory, merge_adapter=merge_adapter, is_main_process=self.accelerator.is_main_process
        )
        if self.accelerator.is_main_process:
            save_tokenizer(self.tokenizer, save_directory)

    def push_to_hub(self, repo_id: str, *, merge_adapter: bool = False, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes; `kwargs` as in `upload_to_hub`. Returns the commit's address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, merge_adapter=merge_adapter)
            return upload_to_hub(folder, repo_id, **kwargs)

    def prepare_dataloader(
        self, dataset: Any, data_collator: Callable[[list[Any]], Any] | None = None
    ) -> DataLoader[Any]:
        """Shuffled batches of `config.batch_size` of a map-style dataset, an incomplete last one left out."""
        loader = DataLoader(
            dataset, batch_size=self.config.batch_size, collate_fn=data_collator, shuffle=True, drop_last=True
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)  # type: ignore[no-untyped-call]
        return prepared

    def close(self) -> None:
        """Close the connection to the policy server, if there is one; again does nothing."""
        if self._policy_server is not None:
            self._policy_server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def current_device(self) -> torch.device:
        """Where the policy's weights lie."""
        return self.model.device

    @property
    def is_distributed(self) -> bool:
        """True under several processes."""
        return bool(self.accelerator.num_processes > 1)

    @property
    def kl_ctl(self) -> KlController:
        """The KL coefficient that the next step uses."""
        return KlController(self.learner.kl_coefficient)

    @property
    def _pad_id(self) -> int:
        # Padding is masked everywhere: any id will do for a tokenizer without one.
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0

    def _generate_here(
        self,
        model: AutoModelForCausalLMWithValueHead,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None,
        batch_size: int,
        return_prompt: bool,
        settings: dict[str, Any],
    ) -> Tensor | list[Tensor]:
        settings = {"pad_token_id": self._pad_id, **settings}
        if isinstance(query_tensor, Tensor):
            if length_sampler is not None:
                settings["max_new_tokens"] = length_sampler()
            return generate_one(
                model, query_tensor.to(self.current_device), return_prompt=return_prompt, settings=settings
            )
        return generate_batched(
            model,
            [query.to(self.current_device) for query in query_tensor],
            pad_id=self._pad_id,
            batch_size=batch_size,
            return_prompt=return_prompt,
            length_sampler=length_sampler,
            settings=settings,
        )

    def _generate_served(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None,
        batch_size: int,
        return_prompt: bool,
        settings: dict[str, Any],
    ) -> Tensor | list[Tensor]:
        assert self._policy_server is not None
        queries = [query_tensor] if isinstance(query_tensor, Tensor) else query_tensor
        sampling: list[ServedSampling] = []
        for index in range(len(queries)):
            if length_sampler is not None and index % batch_size == 0:
                settings = {**settings, "max_new_tokens": length_sampler()}
            sampling.append(served_sampling(settings, eos_token_ids=self._policy_server.info.eos_token_ids))
        completions = self._policy_server.generate(queries, sampling)
        rows = [
            torch.cat([query.to(self.current_device), completion.to(self.current_device)])
            if return_prompt
            else completion.to(self.current_device)
            for query, completion in zip(queries, completions, strict=True)
        ]
        return rows[0][None] if isinstance(query_tensor, Tensor) else rows

    def _rollout(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None,
    ) -> RolloutBatch:
        given = {"queries": queries, "responses": responses, "scores": scores}
        if response_masks is not None:
            given["response_masks"] = response_masks
        for name, tensors in given.items():
            if not isinstance(tensors, list):
                raise ValueError(f"{name} is a list of tensors, not {type(tensors).__name__}")
            if len(tensors) != self.config.batch_size:
                raise ValueError(f"{name} has {len(tensors)} entries, config.batch_size is {self.config.batch_size}")
            for index, tensor in enumerate(tensors):
                if not isinstance(tensor, Tensor):
                    raise ValueError(f"{name}[{index}] is a tensor, not {type(tensor).__name__}")
        for index, score in enumerate(scores):
            if score.numel() != 1 or score.dim() > 1:
                raise ValueError(f"scores[{index}] has shape {list(score.shape)}: a score is one number")
        batch = RolloutBatch(
            queries=[query.detach().cpu().long() for query in queries],
            responses=[response.detach().cpu().long() for response in responses],
            scores=torch.tensor([score.item() for score in scores], dtype=torch.float32),
            response_masks=None if response_masks is None else [mask.detach().cpu() for mask in response_masks],
        )
        if self._policy_server is None:
            return batch
        reference_logprobs = self._policy_server.reference_logprobs(batch.queries, batch.responses)
        return dataclasses.replace(batch, reference_logprobs=reference_logprobs)

    def _publish(self) -> None:
        if self._policy_server is not None:
            self._policy_server.publish(self.learner.policy_parameters(), frozen=self.learner.frozen_parameters)

    def _warn_of_shaping(self, settings: dict[str, Any]) -> None:
        """Once for each name: a loop would say it at every step."""
        defaults: dict[str, Any] = {}
        if self._policy_server is None:
            config = settings.get("generation_config", self.model.generation_config)
            own = {} if config is None else {k: v for k, v in config.to_dict().items() if v is not None}
            defaults = {**_TRANSFORMERS_DEFAULTS, **own}
        shaping = shaping_settings(settings, defaults)
        if new := {name: value for name, value in shaping.items() if name not in self._warned_of}:
            self._warned_of |= new.keys()
            warn_of_shaping(new)


def _check_types(config: Any, model: Any, ref_model: Any, tokenizer: Any) -> None:
    if not isinstance(config, PPOConfig):
        raise ValueError(f"config is a PPOConfig, not {type(config).__name__}")
    if not isinstance(model, AutoModelForCausalLMWithValueHead):
        raise ValueError(f"model is an AutoModelForCausalLMWithValueHead, not {type(model).__name__}")
    if not isinstance(ref_model, AutoModelForCausalLMWithValueHead | PreTrainedModel | None):
        raise ValueError(f"ref_model is a causal language model or None, not {type(ref_model).__name__}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer is a transformers tokenizer, not {type(tokenizer).__name__}")


def _with_value_head(
    model: AutoModelForCausalLMWithValueHead | PreTrainedModel | None,
) -> AutoModelForCausalLMWithValueHead | None:
    return AutoModelForCausalLMWithValueHead(model) if isinstance(model, PreTrainedModel) else model


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
