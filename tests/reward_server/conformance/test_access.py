"""The kit reaches servers behind TLS, client certificates and tokens, and says when it can't."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
import trustme

from tests.reward_server.conformance.broken.requests import AnswersErrorsInBand
from tests.reward_server.conformance.conftest import Kit
from tests.reward_server.conformance.right_server import RightServer, serving

TOKEN = "a-token-for-one"


class Certificates:
    """An authority, a server's certificate for rewards.example, and a client's, as files."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        server, client = authority.issue_cert("rewards.example"), authority.issue_cert("kit@example.org")
        self.ca, self.cert, self.key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        client.cert_chain_pems[0].write_to_path(str(self.cert))
        client.private_key_pem.write_to_path(str(self.key))
        pair = (server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())
        self.server = grpc.ssl_server_credentials([pair])
        self.mutual = grpc.ssl_server_credentials([pair], authority.cert_pem.bytes(), require_client_auth=True)
        self.flags = ["--tls-ca", str(self.ca), "--tls-server-name", "rewards.example"]


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


async def test_a_server_behind_tls_and_a_token_passes(kit: Kit, certificates: Certificates, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN + "\n")
    async with serving(RightServer(), credentials=certificates.server, token=TOKEN) as address:
        ended = await kit(address, *certificates.flags, "--token-file", str(token_file))
    assert ended.code == 0, ended.out


async def test_a_server_that_asks_for_a_client_certificate_gets_it(kit: Kit, certificates: Certificates) -> None:
    own = ["--tls-cert", str(certificates.cert), "--tls-key", str(certificates.key)]
    async with serving(RightServer(), credentials=certificates.mutual) as address:
        with_own = await kit(address, *certificates.flags, *own, "--run", "info/*")
        without = await kit(address, *certificates.flags, "--timeout", "0.5")
    assert with_own.code == 0, with_own.out
    assert without.code == 69


async def test_plaintext_to_a_server_with_tls_is_unreachable(kit: Kit, certificates: Certificates) -> None:
    async with serving(RightServer(), credentials=certificates.server) as address:
        assert (await kit(address, "--timeout", "0.5")).code == 69


async def test_a_wrong_token_is_said(kit: Kit) -> None:
    async with serving(RightServer(), token=TOKEN) as address:
        ended = await kit(address, "--token", "another")
    assert ended.code == 69
    assert "does not let us in: UNAUTHENTICATED" in ended.err


async def test_the_command_to_see_a_failure_again_gets_in_and_does_not_show_the_token(
    kit: Kit, certificates: Certificates
) -> None:
    async with serving(AnswersErrorsInBand(), credentials=certificates.server, token=TOKEN) as address:
        ended = await kit(address, *certificates.flags, "--token", TOKEN, "--run", "request/no-group-id")
    assert ended.code == 1
    assert f"grpcurl -cacert {certificates.ca} -authority rewards.example" in ended.out
    assert '-H "authorization: Bearer $TOKEN"' in ended.out
    assert TOKEN not in ended.out
