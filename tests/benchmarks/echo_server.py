"""The floor: a bare grpc.aio server that answers a ScoreRequest with itself.

As a process: python -m tests.benchmarks.echo_server PORT_FILE, into which it writes its port.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import grpc

from rlhf.reward.v1 import reward_pb2

METHOD = "/benchmark.Echo/Echo"


async def _echo(request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreRequest:
    return request


async def _serve(port_file: Path) -> None:
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        _echo,
        request_deserializer=reward_pb2.ScoreRequest.FromString,
        response_serializer=reward_pb2.ScoreRequest.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark.Echo", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    partial = port_file.with_suffix(".partial")
    partial.write_text(str(port))
    partial.replace(port_file)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
