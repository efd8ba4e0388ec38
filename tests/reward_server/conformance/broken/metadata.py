"""Columns of the data."""

from __future__ import annotations

from collections.abc import Sequence

from tests.reward_server.conformance.broken.marking import caught_by
from tests.reward_server.conformance.right_server import RightServer, Sample


@caught_by("metadata/missing")
class WrongCodeForMissingMetadata(RightServer):
    def failure_of(self, sample: Sample, json_keys: Sequence[str]) -> str | None:
        code = super().failure_of(sample, json_keys)
        return "INVALID_METADATA" if code == "MISSING_METADATA" and "topic" not in sample.metadata else code


@caught_by("metadata/null")
class TakesNullForAValue(RightServer):
    def failure_of(self, sample: Sample, json_keys: Sequence[str]) -> str | None:
        code = super().failure_of(sample, json_keys)
        return None if code == "MISSING_METADATA" and "topic" in sample.metadata else code


@caught_by("metadata/not-json")
class TakesNanForJson(RightServer):
    def failure_of(self, sample: Sample, json_keys: Sequence[str]) -> str | None:
        code = super().failure_of(sample, json_keys)
        return None if "NaN" in sample.metadata.values() else code


@caught_by("metadata/plain-text")
class TakesEveryColumnForJson(RightServer):
    def failure_of(self, sample: Sample, json_keys: Sequence[str]) -> str | None:
        broken = any(value == "{" for key, value in sample.metadata.items() if key not in json_keys)
        return "INVALID_METADATA" if broken else super().failure_of(sample, json_keys)


@caught_by("metadata/unused-json-key")
class NeedsEveryJsonKey(RightServer):
    def failure_of(self, sample: Sample, json_keys: Sequence[str]) -> str | None:
        absent = [key for key in json_keys if key not in sample.metadata]
        return "MISSING_METADATA" if absent else super().failure_of(sample, json_keys)


@caught_by("metadata/extra-columns")
class FailsOnExtraColumns(RightServer):
    def failure_of(self, sample: Sample, json_keys: Sequence[str]) -> str | None:
        return super().failure_of(sample, json_keys) or ("EXTRA_COLUMN" if len(sample.metadata) > 2 else None)
