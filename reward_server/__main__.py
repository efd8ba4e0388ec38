"""Serve one reward: `python -m reward_server --reward my_rewards.py:praise`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from reward_server.kinds.function import FunctionReward
from reward_server.kinds.loading import RewardLoadError, load_function
from reward_server.memory import OutcomeMemory
from reward_server.scheduler import Scheduler
from reward_server.service import SERVICE_NAME, RewardService
from reward_server.settings import RewardSettings
from rlhf.config import EX_CONFIG, load_settings
from rlhf.logs import configure_logging, get_logger
from rlhf.reward.v1 import reward_pb2_grpc
from rlhf.server import BindError, Server


def main(argv: Sequence[str] | None = None) -> int:
    """Load the reward, serve it until a signal, drain; the exit status."""
    settings = load_settings(RewardSettings, argv, prog="python -m reward_server")
    configure_logging(settings.log_format, settings.log_level)
    try:
        function = load_function(settings.reward, settings.reward_options)
    except RewardLoadError as error:
        print(f"reward_server: {error}", file=sys.stderr)
        return EX_CONFIG
    reward = FunctionReward(
        function,
        threads=settings.reward_threads,
        async_calls=settings.max_concurrent_calls,
        version=settings.reward_version,
    )
    try:
        asyncio.run(_serve(reward, settings))
    except BindError as error:
        # Not EX_CONFIG: what holds the port may be gone when we are started again.
        print(f"reward_server: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(reward: FunctionReward, settings: RewardSettings) -> None:
    scheduler = Scheduler(
        reward,
        batch_size=settings.batch_size,
        max_queue_samples=settings.max_queue_samples,
        memory=OutcomeMemory(settings.remember_samples),
    )
    service = RewardService(
        reward.description,
        scheduler,
        max_samples=settings.max_samples,
        max_request_bytes=settings.max_message_bytes,
        max_concurrent_calls=settings.max_concurrent_calls,
    )
    server = Server(
        "reward_server",
        listen=settings.listen,
        metrics_port=settings.metrics_port,
        metrics_host=settings.metrics_host,
        max_message_bytes=settings.max_message_bytes,
        drain_seconds=settings.drain_seconds,
        grace_seconds=settings.grace_seconds,
        endpoint_file=settings.endpoint_file,
    )
    reward_pb2_grpc.add_RewardServiceServicer_to_server(service, server.grpc)  # type: ignore[no-untyped-call]
    server.register(SERVICE_NAME, serving=True)
    get_logger(__name__).info("loaded", reward=reward.description.name, version=reward.description.version)
    await server.start()
    await server.run_until_signalled()


if __name__ == "__main__":
    sys.exit(main())
