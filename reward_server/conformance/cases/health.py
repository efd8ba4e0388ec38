"""Health and reflection, which every server has beside its reward."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import grpc
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from reward_server.conformance.case import Broken, Level, case
from reward_server.conformance.session import Session
from reward_server.conformance.status import Status, read_status
from reward_server.conformance.wire import SERVICE, outcome_of, read

_REFLECTION = ("v1", "v1alpha")  # the messages are the same


async def health_of(session: Session, service: str) -> str:
    """The health of a service by its name, or the status of the call."""
    check = session.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=partial(read, health_pb2.HealthCheckResponse),
    )
    request = health_pb2.HealthCheckRequest(service=service)
    answer, status = await outcome_of(check(request, timeout=session.timeout, metadata=session.headers))
    if status is not None:
        return status.code.name
    statuses = health_pb2.HealthCheckResponse.ServingStatus
    return str(statuses.Name(answer.status)) if answer.status in statuses.values() else f"status {answer.status}"


@case("health/alive", Level.MUST, 'grpc.health.v1 has "" SERVING from the moment the process answers at all')
async def alive(session: Session) -> None:
    """The health of the whole server, "", is SERVING."""
    answer = await health_of(session, "")
    if answer != "SERVING":
        raise Broken(f'the health of "" is {answer}')


@case("health/service", Level.MUST, '"rlhf.reward.v1.RewardService" SERVING while it judges.')
async def service(session: Session) -> None:
    """The health of the reward service is SERVING."""
    answer = await health_of(session, SERVICE)
    if answer != "SERVING":
        raise Broken(f"the health of {SERVICE!r} is {answer}")


@case(
    "health/unknown-service",
    Level.SHOULD,
    'grpc.health.v1 has "" SERVING from the moment the process answers at all, and "rlhf.reward.v1.RewardService" '
    "SERVING while it judges.",
    explained_by=("health/alive", "health/service"),
)
async def unknown_service(session: Session) -> None:
    """The health of a service that the server does not have is NOT_FOUND, as grpc.health.v1 says."""
    answer = await health_of(session, "conformance.NoSuchService")
    if answer != "NOT_FOUND":
        raise Broken(f"the health of a service that does not exist is {answer}")


@case("reflection/lists", Level.SHOULD, "It SHOULD offer server reflection.")
async def lists(session: Session) -> None:
    """Reflection (v1, or v1alpha) lists the reward service."""
    answer = await _reflect(session, list_services="*")
    if isinstance(answer, Status):
        raise Broken(f"no reflection: {answer}")
    names = sorted(each.name for each in answer.list_services_response.service)
    if SERVICE not in names:
        raise Broken(f"reflection lists {', '.join(names) or 'nothing'}")


@case(
    "reflection/describes",
    Level.SHOULD,
    "It SHOULD offer server reflection.",
    explained_by=("reflection/lists",),
)
async def describes(session: Session) -> None:
    """Reflection gives the file of the reward service, with both its methods."""
    answer = await _reflect(session, file_containing_symbol=SERVICE)
    if isinstance(answer, Status):
        raise Broken(f"no reflection: {answer}")
    given = answer.file_descriptor_response.file_descriptor_proto
    files = [read(descriptor_pb2.FileDescriptorProto, data) for data in given]
    # Only names are looked at: some libraries lose presence, comments or the path of the file.
    methods = {
        method.name
        for file in files
        if isinstance(file, descriptor_pb2.FileDescriptorProto)
        for each in file.service
        if f"{file.package}.{each.name}" == SERVICE
        for method in each.method
    }
    if not methods >= {"Score", "GetRewardInfo"}:
        raise Broken(f"reflection gives {SERVICE} the methods {', '.join(sorted(methods)) or 'none'}")


async def _reflect(session: Session, **question: Any) -> Any:
    """The answer of the first version of reflection that the server has, or a Status."""
    status = Status(grpc.StatusCode.UNIMPLEMENTED)
    for version in _REFLECTION:
        ask: Any = session.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=partial(read, reflection_pb2.ServerReflectionResponse),
        )
        requests = [reflection_pb2.ServerReflectionRequest(**question)]
        call = ask(requests, timeout=session.timeout, metadata=session.headers)
        try:
            async for answer in call:
                return answer
        except grpc.aio.AioRpcError as error:
            status = read_status(error)
        finally:
            call.cancel()
            await asyncio.sleep(0)
    return status
