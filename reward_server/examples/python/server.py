"""The process: `LISTEN=127.0.0.1:50052 python server.py` serves the reward until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from rlhf.reward.v1 import reward_pb2_grpc

from memory import Memory
from service import MAX_REQUEST_BYTES, SERVICE_NAME, RewardService

REMEMBERED_SAMPLES = 65_536
GRACE_SECONDS = 10


async def serve(listen: str) -> None:
    """Serve until a signal, then let the calls in flight finish. Raises RuntimeError where it can't listen."""
    server = grpc.aio.server(
        options=[
            # Otherwise a second server on the same port would start without a word, and get half of the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ]
    )
    reward_pb2_grpc.add_RewardServiceServicer_to_server(RewardService(Memory(REMEMBERED_SAMPLES)), server)
    # It starts with "" SERVING: the process is alive. The service's own name says that it judges.
    healths = health.aio.HealthServicer()
    await healths.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    reflection.enable_server_reflection([SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME], server)

    signalled = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signalled.set)
    port = server.add_insecure_port(listen)
    await server.start()
    print(f"listening on {listen.rpartition(':')[0]}:{port}", flush=True)

    await signalled.wait()
    await healths.enter_graceful_shutdown()
    # Refuses new calls at once. The grace is bounded because an open health Watch never ends by itself.
    await server.stop(GRACE_SECONDS)


def main() -> None:
    """Run the server; the exit status is 0 after a signal."""
    listen = os.environ.get("LISTEN", "127.0.0.1:50052")
    try:
        asyncio.run(serve(listen))
    except RuntimeError as error:
        sys.exit(f"can't listen on {listen}: {error}")


if __name__ == "__main__":
    main()
