"""Calls by hand: what is sent may be no message, and what comes back may be none either."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from reward_server.conformance.status import Status, read_status
from rlhf.reward.v1 import reward_pb2

SERVICE = "rlhf.reward.v1.RewardService"


def stub(channel: grpc.aio.Channel, method: str) -> Any:
    """A method of the service, which takes bytes as well as its request."""
    response = reward_pb2.ScoreResponse if method == "Score" else reward_pb2.GetRewardInfoResponse
    return channel.unary_unary(
        f"/{SERVICE}/{method}",
        request_serializer=lambda request: request if isinstance(request, bytes) else request.SerializeToString(),
        response_deserializer=partial(read, response),
    )


async def outcome_of(call: Any) -> tuple[Any, Status | None]:
    """The response, or the status in its place."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return None, read_status(error)
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
        return None, Status(grpc.StatusCode.CANCELLED, "cancelled by the kit")
    return (None, answer) if isinstance(answer, Status) else (answer, None)


def read(kind: type[Message], data: bytes) -> Message | Status:
    """The message, or what to say in its place."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return Status(grpc.StatusCode.INTERNAL, f"what came are no bytes of a {kind.DESCRIPTOR.name}")
