"""The rules of weights versions: which answers a precondition allows, and which publish may replace what is live."""

from __future__ import annotations

from policy_server.engine.protocol import WeightsPrecondition, WeightsVersion
from rlhf import failures


def check_precondition(wanted: WeightsPrecondition, live: WeightsVersion) -> None:
    """Raise weights_behind, weights_ahead or other_run unless `live` satisfies `wanted`.

    A model that never got published weights is behind every run: whoever publishes may still bring it there.
    """
    if wanted.exact is not None and live != wanted.exact:
        raise _mismatch(wanted.exact, live)
    if wanted.minimum is not None and live != wanted.minimum and not live.is_after(wanted.minimum):
        raise _mismatch(wanted.minimum, live)


def check_swap(new: WeightsVersion, live: WeightsVersion, if_current: WeightsVersion | None) -> None:
    """Raise unless `new` may replace `live`.

    aborted STALE_VERSION: not above the live version of the same run. failed_precondition CURRENT_MISMATCH:
    `if_current` isn't live. other_run: another run is live and `if_current` didn't name it.
    """
    if new.run_id == live.run_id and not new.is_after(live):
        raise failures.aborted("STALE_VERSION", f"{_show(new)} is not above the live {_show(live)}")
    if if_current is not None and if_current != live:
        raise failures.failed_precondition(
            "CURRENT_MISMATCH", f"if_current is {_show(if_current)}, but {_show(live)} is live"
        )
    if if_current is None and live.run_id not in ("", new.run_id):
        raise failures.other_run(f"{_show(live)} is live; name it in if_current to replace it with {_show(new)}")


def _mismatch(wanted: WeightsVersion, live: WeightsVersion) -> failures.RpcFailure:
    message = f"{_show(wanted)} is asked for, but {_show(live)} is live"
    if wanted.is_after(live) or not live.run_id:
        return failures.weights_behind(message)
    if live.is_after(wanted):
        return failures.weights_ahead(message)
    return failures.other_run(message)


def _show(version: WeightsVersion) -> str:
    if not version.run_id:
        return "the initial weights"
    return f"run {version.run_id[:64]!r} incarnation {version.incarnation} version {version.version}"
