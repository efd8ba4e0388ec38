"""Where the policy servers are, by a resolver that tests choose, and by the real one for this machine's own name."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import pytest

from trainer.clients.discovery import Discovery, resolved


async def two_addresses(host: str, port: int) -> Sequence[str]:
    assert (host, port) == ("policy.svc", 50051)
    return [f"127.0.0.1:{port}", f"127.0.0.2:{port}"]


async def nothing(host: str, port: int) -> Sequence[str]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


async def test_every_address_of_a_name_is_a_replica_beside_those_that_are_listed() -> None:
    discovery = Discovery(["unix:/p.sock", "dns:///policy.svc:50051", "127.0.0.2:50051"], resolve=two_addresses)

    assert await discovery.targets() == ["unix:/p.sock", "127.0.0.1:50051", "127.0.0.2:50051"]
    assert discovery.changes
    assert discovery.several


@pytest.mark.parametrize(("servers", "several"), [(["a:1"], False), (["a:1", "a:1"], False), (["a:1", "b:1"], True)])
async def test_a_list_stays_what_it_is(servers: list[str], several: bool) -> None:
    discovery = Discovery(servers, resolve=nothing)

    assert await discovery.targets() == list(dict.fromkeys(servers))
    assert (discovery.changes, discovery.several) == (False, several)


async def test_a_name_without_an_address_is_named() -> None:
    with pytest.raises(OSError, match=r"dns:///policy\.svc:1: .*not known"):
        await Discovery(["dns:///policy.svc:1"], resolve=nothing).targets()


async def test_this_machines_own_name_resolves_to_one_address() -> None:
    assert await resolved("localhost", 1234) == ["127.0.0.1:1234"]
