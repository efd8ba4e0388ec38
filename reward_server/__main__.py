"""Serve one reward: `python -m reward_server --reward my_rewards.py:praise`."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace

from reward_server.assembly import make_reward
from reward_server.kinds import RewardKind, RewardLoadError
from reward_server.scheduler import Scheduler
from reward_server.service import SERVICE_NAME, RewardService
from reward_server.settings import RewardSettings
from rlhf.config import EX_CONFIG, load_settings
from rlhf.logs import configure_logging, get_logger
from rlhf.reward.v1 import reward_pb2_grpc
from rlhf.security.config import CredentialsError
from rlhf.server import BindError, Server
from rlhf.tracing import exporting

_log = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the reward, serve it until a signal, drain; the exit status."""
    settings = load_settings(RewardSettings, argv, prog="python -m reward_server")
    configure_logging(settings.log_format, settings.log_level)
    try:
        reward = make_reward(settings.reward, settings.reward_options, settings.limits())
        with exporting(settings.otlp_endpoint, service="rlhf-reward-server"):
            asyncio.run(_serve(reward, settings))
    except (RewardLoadError, CredentialsError) as error:
        print(f"reward_server: {error}", file=sys.stderr)
        return EX_CONFIG
    except BindError as error:
        # Not EX_CONFIG: what holds the port may be gone when we are started again.
        print(f"reward_server: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(reward: RewardKind, settings: RewardSettings) -> None:
    """Answer health at once, open the service when the reward has started, serve until a signal."""
    service = RewardService(
        max_samples=settings.max_samples,
        max_request_bytes=settings.max_message_bytes,
        max_concurrent_calls=settings.max_concurrent_calls,
    )
    server = Server.of("reward_server", settings)
    reward_pb2_grpc.add_RewardServiceServicer_to_server(service, server.grpc)  # type: ignore[no-untyped-call]
    server.register(SERVICE_NAME, serving=False)
    await server.start()
    opening = asyncio.create_task(_open(reward, service, server, settings))
    serving = asyncio.create_task(server.run_until_signalled())
    try:
        await asyncio.wait([opening, serving], return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            opening.result()
            await serving
    finally:
        opening.cancel()
        serving.cancel()
        await asyncio.gather(opening, serving, return_exceptions=True)
        await server.stop()
        await reward.close()


async def _open(reward: RewardKind, service: RewardService, server: Server, settings: RewardSettings) -> None:
    await reward.start()
    description = reward.description
    if settings.reward_version:
        description = replace(description, version=settings.reward_version)
    # What start-up made stays for good: the collector need not look through it again and again.
    gc.freeze()
    service.open(description, Scheduler(reward, settings.limits()))
    server.set_serving(SERVICE_NAME, True)
    _log.info("ready", kind=reward.kind, reward=description.name, version=description.version)


if __name__ == "__main__":
    sys.exit(main())
