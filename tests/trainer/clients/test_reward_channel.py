"""What the reward client asks of the connection: the server may be anybody's."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from rlhf.channel import ANY_SERVERS, open_channel
from trainer.clients import rewards


async def test_a_reward_server_is_pinged_as_any_grpc_server_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    def note(target: str, **options: Any) -> grpc.aio.Channel:
        opened.append(options.get("keepalive"))
        return open_channel(target, **options)

    monkeypatch.setattr(rewards, "open_channel", note)
    await rewards.RewardClient("127.0.0.1:1", run_id="run").close()

    assert opened == [ANY_SERVERS]
