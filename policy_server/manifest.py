"""What an update says it will send, checked against the parameters of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy_server.engine.protocol import ParameterSpec
from policy_server.validation import Violations
from rlhf.failures import invalid_argument
from rlhf.tensors import byte_view, dtype_from_name
from rlhf.weights.v1 import weights_pb2

MAX_MANIFEST_BYTES = 1 << 20
_SENDABLE = {name: dtype_from_name(name) for name in ("F32", "BF16", "F16", "F64")}


@dataclass(frozen=True)
class ManifestEntry:
    """A tensor as it will be sent; `digest` = xxh3_64 of its bytes, known beforehand only for a directory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: int | None

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class ManifestReader:
    """Reads the manifest messages of one stream in order."""

    def __init__(self, parameters: Sequence[ParameterSpec], *, with_digests: bool) -> None:
        """`with_digests`: each tensor must carry its xxh3_64 (a directory), or must not (a stream)."""
        self._parameters = {parameter.name: parameter for parameter in parameters}
        self._with_digests = with_digests
        self._entries: dict[str, ManifestEntry] = {}
        self._begun = False

    def add(self, message: weights_pb2.Manifest) -> None:
        """Take one message. Raises invalid_argument."""
        if message.ByteSize() > MAX_MANIFEST_BYTES:
            raise invalid_argument("manifest", f"a manifest message holds at most {MAX_MANIFEST_BYTES} bytes")
        self._begun = True
        violations = Violations()
        for index, spec in enumerate(message.tensors):
            self._add(violations, spec, f"manifest.tensors[{index}]")
        violations.raise_if_any()

    @property
    def begun(self) -> bool:
        """At least one message came."""
        return self._begun

    def finish(self, *, partial: bool, total_bytes: int) -> tuple[ManifestEntry, ...]:
        """All entries by their index. Raises invalid_argument when they are not what Begin announced."""
        entries = tuple(self._entries.values())
        if not entries:
            raise invalid_argument("manifest.tensors", "at least one tensor is required")
        if not partial:
            self._require_all()
        announced = sum(entry.size for entry in entries)
        if announced != total_bytes:
            raise invalid_argument("begin.total_bytes", f"is {total_bytes}, but the tensors hold {announced} bytes")
        return entries

    def _add(self, violations: Violations, spec: weights_pb2.TensorSpec, path: str) -> None:
        parameter = self._parameters.get(spec.name)
        if parameter is None:
            violations.add(f"{path}.name", f"{spec.name[:200]!r} is no parameter of the model")
            return
        if spec.name in self._entries:
            violations.add(f"{path}.name", f"{spec.name!r} is listed twice")
            return
        dtype = _SENDABLE.get(spec.dtype)
        if dtype is None:
            violations.add(f"{path}.dtype", f"{spec.dtype[:20]!r} is not among {', '.join(_SENDABLE)}")
            return
        shape = tuple(spec.shape)
        if shape != parameter.shape:
            violations.add(f"{path}.shape", f"{spec.name!r} has shape {parameter.shape} here, not {shape[:8]}")
            return
        if spec.HasField("xxh3_64") != self._with_digests:
            violations.add(f"{path}.xxh3_64", "required for a directory, and must be unset for a stream")
            return
        self._entries[spec.name] = ManifestEntry(spec.name, dtype, shape, spec.xxh3_64 if self._with_digests else None)

    def _require_all(self) -> None:
        """Of names that share one tensor, one is enough."""
        covered = {self._parameters[name].tied_to or name for name in self._entries}
        missing = [name for name, spec in self._parameters.items() if (spec.tied_to or name) not in covered]
        if missing:
            raise invalid_argument(
                "manifest.tensors",
                f"{len(missing)} parameters are missing, {missing[0]!r} first; only a partial update leaves some out",
            )


def require_equal_ties(parameters: Sequence[ParameterSpec], tensors: Mapping[str, Tensor]) -> None:
    """Raise invalid_argument when one tensor was sent by two names with different bytes."""
    sent: dict[str, str] = {}
    for parameter in parameters:
        if parameter.name not in tensors:
            continue
        twin = sent.setdefault(parameter.tied_to or parameter.name, parameter.name)
        if twin == parameter.name:
            continue
        ours, theirs = tensors[parameter.name], tensors[twin]
        if ours.dtype != theirs.dtype or byte_view(ours) != byte_view(theirs):
            raise invalid_argument("manifest.tensors", f"{parameter.name!r} and {twin!r} are tied, but differ")
