"""A causal language model with a value head: what PPO trains."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from trainer.adapters import (
    adapter_of,
    add_adapter,
    load_adapter,
    merged_tensors,
    names_adapter,
    save_adapter,
)
from trainer.responses.rows import ResponseRows
from trainer.responses.scoring import packed_scores

if TYPE_CHECKING:
    from peft import LoraConfig

VALUE_HEAD_PREFIX = "v_head."

# from_pretrained hands these to transformers; they also say where the value head's file lies.
_LOCATION_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# transformers counts shard sizes as integers of bytes: no model reaches this, so there is always one file.
_ONE_FILE = 2**62


class ValueHead(nn.Module):
    """A linear map from the last hidden state to one number per token, computed in the head's own dtype (fp32)."""

    def __init__(self, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.summary = nn.Linear(hidden_size, 1, dtype=torch.float32)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden] of any dtype → values [...] in the head's dtype."""
        weight = self.summary.weight
        hidden_states = self.dropout(hidden_states.to(weight.device)).to(weight.dtype)
        values: Tensor = self.summary(hidden_states)
        return values.squeeze(-1)


class AutoModelForCausalLMWithValueHead(nn.Module):
    """Any model that `AutoModelForCausalLM` loads, and a value head on its last hidden state (after the final norm).

    `pretrained_model` is the language model itself; `v_head.summary` the head. Make one with `from_pretrained`.
    `state_dict()` is torch's own (keys `pretrained_model.…`, `v_head.…`), so that it loads back; the files of
    `save_pretrained` have the language model's keys unprefixed, as transformers and TRL expect. With a LoRA adapter,
    `pretrained_model` is still transformers' class, some of whose linear layers are peft's.
    """

    def __init__(
        self,
        pretrained_model: PreTrainedModel,
        *,
        summary_dropout_prob: float | None = None,
        v_head_initializer_range: float = 0.2,
        v_head_init_strategy: Literal["normal"] | None = None,
    ) -> None:
        super().__init__()
        config = pretrained_model.config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{type(pretrained_model).__name__} is an encoder-decoder: PPO here trains causal models")
        if pretrained_model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
            raise ValueError(f"{type(pretrained_model).__name__} has no language model head: use a model that has one")
        if v_head_init_strategy not in (None, "normal"):
            raise ValueError(f'v_head_init_strategy is "normal" or None, not {v_head_init_strategy!r}')
        if summary_dropout_prob is None:
            summary_dropout_prob = getattr(config, "summary_dropout_prob", 0.1)
        self.pretrained_model = pretrained_model
        self.v_head = ValueHead(_hidden_size(config), summary_dropout_prob)
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.v_head.summary.weight, std=v_head_initializer_range)
            nn.init.zeros_(self.v_head.summary.bias)
        self.v_head.to(pretrained_model.device)
        self._forward_parameters = frozenset(inspect.signature(pretrained_model.forward).parameters)
        self._body_output_is_last: bool | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | PreTrainedModel,
        *model_args: Any,
        summary_dropout_prob: float | None = None,
        v_head_initializer_range: float = 0.2,
        v_head_init_strategy: Literal["normal"] | None = None,
        peft_config: LoraConfig | None = None,
        base_model: str | None = None,
        is_trainable: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Load a language model (folder, hub name, or one already built) and its value head, in eval mode.

        With `peft_config` it gets a fresh LoRA adapter, which is trained in its place. A folder that holds an adapter
        is loaded on top of its base model: `base_model`, or the one that the adapter names; not to be trained on, if it
        is not `is_trainable`.

        A value head stored beside the weights (by this class or by TRL) is restored; otherwise it starts as
        `nn.Linear` does, or from N(0, v_head_initializer_range²) with bias 0 for `v_head_init_strategy="normal"`.
        `summary_dropout_prob` (default: the model config's, else 0.1) acts in train mode only; the trainer never
        enters it. The rest goes to `AutoModelForCausalLM.from_pretrained`. Weights are fp32 unless `dtype` is given
        (transformers alone follows the file); the value head is fp32 always.

        Raises ValueError for a model without a language model head, for an adapter that is more than plain LoRA, and
        for arguments of TRL that are not supported.
        """
        if unsupported := sorted({"reward_adapter", "load_in_8bit", "load_in_4bit"} & kwargs.keys()):
            raise ValueError(f"{', '.join(unsupported)}: reward adapters and quantized weights are not supported")
        head_arguments: dict[str, Any] = {
            "summary_dropout_prob": summary_dropout_prob,
            "v_head_initializer_range": v_head_initializer_range,
            "v_head_init_strategy": v_head_init_strategy,
        }
        if isinstance(pretrained_model_name_or_path, PreTrainedModel):
            if model_args or kwargs:
                raise ValueError(f"the model is built already: nothing to do with {[*model_args, *kwargs]}")
            if peft_config is not None:
                add_adapter(pretrained_model_name_or_path, peft_config)
            return cls(pretrained_model_name_or_path, **head_arguments).eval()
        if not isinstance(pretrained_model_name_or_path, str | os.PathLike):
            raise ValueError(
                "pretrained_model_name_or_path is a folder, a hub name or a PreTrainedModel, "
                f"not {type(pretrained_model_name_or_path).__name__}"
            )
        source = os.fspath(pretrained_model_name_or_path)
        if "torch_dtype" in kwargs:
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        kwargs.setdefault("dtype", torch.float32)
        location = {name: kwargs[name] for name in _LOCATION_ARGUMENTS if name in kwargs}
        named = names_adapter(source, location)
        if named is None:
            language_model = _load_language_model(source, *model_args, **kwargs)
        else:
            of_base = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
            language_model = _load_language_model(base_model or named, *model_args, **of_base)
            load_adapter(language_model, source, location)
            if not is_trainable:
                language_model.requires_grad_(False)
        if peft_config is not None:
            add_adapter(language_model, peft_config)
        model = cls(language_model, **head_arguments)
        if stored := _stored_value_head(source, location):
            model.v_head.load_state_dict(stored)
        return model.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_past_key_values: bool = False,
        responses: ResponseRows | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """(logits, loss, values), and past_key_values if `return_past_key_values`.

        Given packed `responses` alone: (log-probabilities at `temperature`, entropies, values) of and before the
        response tokens, each fp32 [N]. It is here so that what wraps a module's call (autocast, DDP, FSDP) wraps it.

        input_ids, attention_mask, position_ids: [batch, time] integers. logits: fp32 [batch, time, vocabulary], or only
        the last `logits_to_keep` positions (> 0), or those that a 1-D tensor of positions names: the vocabulary
        projection is most of a small model's work. loss: None unless `labels` are given. values: fp32 [batch, time],
        every position always. `position_ids` is left out for models without positions (ALiBi).
        """
        if responses is not None:
            logprobs, entropies, hidden_states = packed_scores(self.pretrained_model, responses, temperature)
            return logprobs, entropies, self.v_head(hidden_states)
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        if position_ids is not None and "position_ids" in self._forward_parameters:
            arguments["position_ids"] = position_ids
        if past_key_values is not None:
            arguments["past_key_values"] = past_key_values
        if labels is not None:
            arguments["labels"] = labels
        keep_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        model_keeps = "logits_to_keep" in self._forward_parameters
        if not keep_all and model_keeps:
            arguments["logits_to_keep"] = logits_to_keep
        output, hidden_states = self._forward_with_hidden_states(arguments)
        logits = output.logits
        if not keep_all and not model_keeps:
            logits = logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
        result = (logits.float(), output.loss, self.v_head(hidden_states))
        return (*result, output.past_key_values) if return_past_key_values else result

    def _forward_with_hidden_states(self, arguments: dict[str, Any]) -> tuple[Any, Tensor]:
        """The language model's output and its last hidden state [batch, time, hidden].

        `output_hidden_states=True` keeps every layer's alive; the output of the model's body is the last one alone.
        Not every architecture calls its body as a module, and calling body and head apart would miss what others do
        between them (logit scaling, soft caps): so the first forward asks both ways, and later ones the cheaper way if
        it gave the same.
        """
        seen: list[Any] = []
        handle = self.pretrained_model.base_model.register_forward_hook(lambda _body, _inputs, out: seen.append(out))
        try:
            output = self.pretrained_model(
                **arguments, output_hidden_states=not self._body_output_is_last, return_dict=True
            )
        finally:
            handle.remove()
        if self._body_output_is_last:
            return output, seen[-1].last_hidden_state
        last: Tensor = output.hidden_states[-1]
        if self._body_output_is_last is None:
            body_output = getattr(seen[-1], "last_hidden_state", None) if seen else None
            self._body_output_is_last = body_output is not None and torch.equal(body_output, last)
        return output, last

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the language model."""
        return self.pretrained_model.generate(*args, **kwargs)  # type: ignore[operator]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        merge_adapter: bool = False,
        is_main_process: bool = True,
        state_dict: Any = None,
    ) -> None:
        """Write config.json, generation_config.json and one model.safetensors that holds `v_head.summary.*` too.

        The folder opens with `AutoModelForCausalLM.from_pretrained` (which leaves the value head out), with this class
        and with TRL's. Each file is replaced whole, the weights last, and files of other names stay, except those of an
        earlier save that would be taken for this one's. `state_dict` is a full `state_dict()` of this module gathered
        elsewhere (without `merge_adapter`, the adapter's part and the value head are enough); default: its own. A
        process that is not main writes nothing.

        A model with an adapter writes that alone, as peft loads it, with the value head in model.safetensors; or, to
        `merge_adapter`, the whole model with the adapter's changes in its weights.
        """
        if not is_main_process:
            return
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        tensors = {
            name.removeprefix("pretrained_model."): tensor
            for name, tensor in (self.state_dict() if state_dict is None else state_dict).items()
        }
        adapter_alone = self.is_peft_model and not merge_adapter
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as staging:
            if adapter_alone:
                save_adapter(self.pretrained_model, staging, tensors)
                head = {name: tensor for name, tensor in tensors.items() if name.startswith(VALUE_HEAD_PREFIX)}
                save_file(head, Path(staging) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
            else:
                merged = merged_tensors(self.pretrained_model, tensors)
                self.pretrained_model.save_pretrained(staging, state_dict=merged, max_shard_size=_ONE_FILE)
            readable = next(Path(staging).glob("*.json"))
            for weights in Path(staging).glob("*.safetensors"):
                # safetensors gives its file to the owner alone; a server that runs as somebody else has to read it.
                shutil.copymode(readable, weights)
            written = sorted(Path(staging).iterdir(), key=lambda path: path.name == SAFE_WEIGHTS_NAME)
            for path in written:
                _replace(path, target / path.name)
        others = ("config.json",) if adapter_alone else (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
        stale = (*target.glob("model-*-of-*.safetensors"), *(target / n for n in (SAFE_WEIGHTS_INDEX_NAME, *others)))
        for file in stale:
            file.unlink(missing_ok=True)

    def push_to_hub(self, repo_id: str, *, merge_adapter: bool = False, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes; `kwargs` as in `upload_to_hub`. Returns the commit's address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, merge_adapter=merge_adapter)
            return upload_to_hub(folder, repo_id, **kwargs)

    @property
    def is_peft_model(self) -> bool:
        """Whether the language model has an adapter, which is trained in its place."""
        return adapter_of(self.pretrained_model) is not None

    @property
    def config(self) -> PreTrainedConfig:
        """The language model's configuration."""
        config: PreTrainedConfig = self.pretrained_model.config
        return config

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The language model's generation settings."""
        return self.pretrained_model.generation_config

    @property
    def device(self) -> torch.device:
        """Where the language model's first parameter lies."""
        device: torch.device = self.pretrained_model.device
        return device


def create_reference_model(model: AutoModelForCausalLMWithValueHead) -> AutoModelForCausalLMWithValueHead:
    """A frozen copy of `model` in eval mode, sharing nothing with it."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def upload_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    commit_message: str = "Upload model with value head",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a folder as one commit to a model repository (made if new) and return the commit's address."""
    hub = HfApi(token=token)
    repository = hub.create_repo(repo_id, private=private, exist_ok=True)
    commit = hub.upload_folder(
        repo_id=repository.repo_id,
        folder_path=os.fspath(folder),
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
    )
    return str(commit.commit_url)


def _load_language_model(source: str, *model_args: Any, **kwargs: Any) -> PreTrainedModel:
    """Load without transformers' report that the checkpoint holds a value head it has no use for.

    The report comes out as ever when it tells of anything else.
    """
    reports = _HeldBack("LOAD REPORT")
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(reports)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
    finally:
        logger.removeFilter(reports)
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    if any(name for names in info.values() for name in names if not str(name).startswith(VALUE_HEAD_PREFIX)):
        for report in reports.records:
            logger.handle(report)
    return model


class _HeldBack(logging.Filter):
    """Keeps log records that contain a text from being logged, in `records`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        if self._text not in record.getMessage():
            return True
        self.records.append(record)
        return False


def _hidden_size(config: PreTrainedConfig) -> int:
    """Width of the last hidden state; OPT may project its states to another width than its layers have."""
    text = config.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)


def _stored_value_head(source: str, location: dict[str, Any]) -> dict[str, Tensor]:
    """The value head's tensors by their names inside `v_head`; empty when the checkpoint has none."""

    def find(name: str) -> str | None:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **location)

    def is_head(name: str) -> bool:
        return name.startswith(VALUE_HEAD_PREFIX)

    for weights_name, index_name in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        files = [path] if (path := find(weights_name)) else []
        if not files and (index := find(index_name)):
            weight_map: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
            shards = sorted({shard for name, shard in weight_map.items() if is_head(name)})
            files = [path for shard in shards if (path := find(shard))]
        head: dict[str, Tensor] = {}
        for file in files:
            if file.endswith(".safetensors"):
                with safe_open(file, framework="pt") as tensors:
                    head.update({name: tensors.get_tensor(name) for name in tensors.keys() if is_head(name)})  # noqa: SIM118
            else:
                stored = torch.load(file, map_location="cpu", weights_only=True)
                head.update({name: tensor for name, tensor in stored.items() if is_head(name)})
        if files:
            return {name.removeprefix(VALUE_HEAD_PREFIX): tensor for name, tensor in head.items()}
    return {}


def _replace(source: Path, target: Path) -> None:
    """Move `source`, flushed to disk, over `target`; a folder (code of a custom model) is merged."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    with source.open("rb") as file:
        os.fsync(file.fileno())
    source.replace(target)
