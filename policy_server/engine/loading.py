"""From a folder or hub name to models that are ready to serve."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.utils.deterministic as deterministic
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from policy_server.engine.weights import rehouse
from rlhf.fingerprints import weights_digest


@dataclass(frozen=True)
class LoadedModels:
    """Two separate models in evaluation mode, and the policy's tokenizer; digests are of the weights as served."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    policy_digest: str
    reference_digest: str


def load_models(
    model: str | Path,
    reference: str | Path | None,
    dtype: torch.dtype,
    device: str | torch.device | Literal["auto"],
    reproducible: bool,
) -> LoadedModels:
    """Load the policy, its tokenizer and the frozen reference (None = a copy of the initial policy).

    `reproducible` also sets torch, for the whole process, to deterministic algorithms. Raises what transformers
    raises for a model that it can't load.
    """
    if reproducible:
        make_deterministic()
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    policy = _load(model, dtype, place)
    digest = weights_digest(policy.named_parameters(), dtype)
    return LoadedModels(
        policy=policy,
        reference=copy.deepcopy(policy) if reference is None else (other := _load(reference, dtype, place)),
        tokenizer=AutoTokenizer.from_pretrained(model, trust_remote_code=False),
        policy_digest=digest,
        reference_digest=digest if reference is None else weights_digest(other.named_parameters(), dtype),
    )


def make_deterministic() -> None:
    """Make torch choose kernels whose results don't depend on timing."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when CUDA starts
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property that stubs don't show
    torch.backends.cudnn.benchmark = False


def _load(source: str | Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    module: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    module.train(False)
    torch.nn.Module.to(module, device)
    rehouse(module)
    return module
