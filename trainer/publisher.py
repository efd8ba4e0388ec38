"""WeightPublisher: brings one policy server to the trainer's weights, and back to them when it was restarted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

import grpc
from torch import Tensor

from rlhf.channel import RetryPolicy, Waiting, call_metadata, call_with_retry, open_channel, wait_until_ready
from rlhf.failures import RpcFailure, from_rpc_error, is_transient
from rlhf.weights.v1 import weights_pb2, weights_pb2_grpc
from trainer.versions import WeightsVersion

WEIGHTS_SERVICE = "rlhf.weights.v1.WeightsService"


class PublishError(RuntimeError):
    """The server holds weights that this trainer must not replace, or can't take these; the message says which."""


class WeightPublisher:
    """Publishes to one server by the stream form of UpdateWeights and remembers what that server must hold.

    The tensors of the last `publish` are kept by reference, for `ensure`; nothing may change them while a call runs.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float = 600.0,
        retry: RetryPolicy | None = None,
        on_new_server: Callable[[], Awaitable[None]] | None = None,
        on_wait: Callable[[Waiting], None] | None = None,
        on_answer: Callable[[], None] | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        """`timeout` (seconds) bounds one stream; `on_new_server` runs before weights go to a process not seen before."""

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Until the server's health says that WeightsService can stage."""

    async def publish(self, tensors: Iterable[tuple[str, Tensor]], weights: WeightsVersion) -> None:
        """Make `weights` live: names as in transformers' state dict, tied parameters once; returns when they serve.

        Raises PublishError when the server holds newer weights of this run (another trainer), and RpcFailure for what
        is final (names, shapes, room).
        """

    async def ensure(self) -> None:
        """Publish the last weights again if the server lost them (it was restarted); otherwise one cheap question."""

    async def close(self) -> None:
        """Close the channel."""
