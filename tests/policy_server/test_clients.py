"""The clients that docs/clients.md shows, against real policy servers with TLS and tokens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc
from tests.integration.secured import access_file, bearer, token_of
from tests.integration.training import metric
from tests.support.certificates import Authority
from tests.support.names import name_server
from tests.support.processes import ROOT, ProcessUnderTest, StartProcess, process_factory, wait_for

POLICY = "rlhf.policy.v1.PolicyService"
PAGE = ROOT / "docs" / "clients.md"
FOLDER = ROOT / "docs" / "clients"
NAME = "policy.test"
PROMPT = "The film was"
SOURCES = {
    "python": FOLDER / "generate.py",
    "go": FOLDER / "go" / "main.go",
    "typescript": FOLDER / "typescript" / "src" / "generate.ts",
    "grpcurl": FOLDER / "generate.sh",
}
COMMANDS = {
    "python": (sys.executable, str(SOURCES["python"])),
    "go": (str(FOLDER / "go" / "bin" / "generate"),),
    "typescript": ("node", str(FOLDER / "typescript" / "dist" / "src" / "generate.js")),
    "grpcurl": (str(SOURCES["grpcurl"]),),
}
BUILT = [
    "python",
    pytest.param("go", marks=pytest.mark.examples),
    pytest.param("typescript", marks=pytest.mark.examples),
]
ALL = [*BUILT, pytest.param("grpcurl", marks=pytest.mark.examples)]


class Replicas:
    """Two servers of one model: one serves, the other waits for a trainer and answers UNAVAILABLE."""

    def __init__(self, folder: Path, start: StartProcess, model: Path) -> None:
        self.authority = Authority(folder / "authority")
        self.token_file = folder / "app.token"
        self.token_file.write_text(token_of("app") + "\n")
        cert, key = self.authority.issue(NAME, "127.0.0.1")
        flags = ("--model", str(model), "--threads", "1", "--tls-cert", str(cert), "--tls-key", str(key))
        flags = (*flags, "--access-file", str(access_file(folder)), "--health-listen", "127.0.0.1:0")
        self.ready: ProcessUnderTest = start("policy_server", *flags)
        self.ready.wait_serving(POLICY)
        self.port = self.ready.address.rpartition(":")[2]
        self.waiting: ProcessUnderTest = start("policy_server", *flags, "--managed", listen=f"127.0.0.2:{self.port}")
        self.waiting.wait_serving("rlhf.weights.v1.WeightsService")

    def run(self, client: str, target: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The client with the prompt, to its end."""
        own = {"TARGET": target, "CA_FILE": str(self.authority.bundle), "TOKEN_FILE": str(self.token_file)}
        return subprocess.run(
            [*COMMANDS[client], PROMPT],
            env={**os.environ, "PATH": f"{FOLDER / 'go' / 'bin'}:{os.environ['PATH']}", **own, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def expected(self) -> str:
        """What the server completes the prompt with."""
        credentials = grpc.ssl_channel_credentials(self.authority.pem)
        request = policy_pb2.GenerateRequest(
            prompt=policy_pb2.Prompt(text=PROMPT),
            sampling=policy_pb2.SamplingParams(temperature=0, max_new_tokens=16),
        )
        with grpc.secure_channel(self.ready.address, credentials) as channel:
            answer = policy_pb2_grpc.PolicyServiceStub(channel).Generate(
                request, metadata=bearer(token_of("app")), timeout=60
            )
        return str(answer.completions[0].text)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Replicas]:
    with process_factory(tmp_path_factory.mktemp("processes")) as start:
        yield Replicas(tmp_path_factory.mktemp("credentials"), start, tiny_model)


@pytest.mark.parametrize("language", SOURCES)
def test_the_page_shows_the_client_that_is_tested(language: str) -> None:
    blocks = re.findall(r"^```\w+\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert SOURCES[language].read_text() in blocks, f"{PAGE} differs from {SOURCES[language]}"


@pytest.mark.parametrize("client", BUILT)
def test_a_client_gets_a_completion_whole_and_streamed(replicas: Replicas, client: str) -> None:
    ended = replicas.run(client, replicas.ready.address)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == 2 * (replicas.expected() + "\n")


@pytest.mark.parametrize("client", ALL)
def test_a_client_without_a_good_token_is_told_so(replicas: Replicas, client: str, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.token"
    wrong.write_text("not-a-token-of-anybody\n")
    ended = replicas.run(client, replicas.ready.address, TOKEN_FILE=str(wrong))
    assert ended.returncode != 0
    assert "unauthenticated" in ended.stderr.lower()


@pytest.mark.parametrize("client", ALL)
def test_a_client_that_does_not_trust_the_authority_sends_nothing(
    replicas: Replicas, client: str, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger")
    ended = replicas.run(client, replicas.ready.address, CA_FILE=str(stranger.bundle), DEADLINE_SECONDS="5")
    assert ended.returncode != 0
    assert ended.stdout == ""


@pytest.mark.parametrize("client", ALL)
def test_a_client_waits_no_longer_than_its_deadline(replicas: Replicas, client: str) -> None:
    ended = replicas.run(client, replicas.ready.address, DEADLINE_SECONDS="0.001")
    assert ended.returncode != 0
    assert "deadline" in ended.stderr.lower()


@pytest.mark.parametrize("client", BUILT)
def test_a_client_calls_every_replica_of_a_name_and_again_where_one_does_not_serve(
    replicas: Replicas, client: str
) -> None:
    def refused() -> float:
        return metric(replicas.waiting, "grpc_server_handled_total", grpc_code="UNAVAILABLE")

    def called_both() -> bool:
        # Node.js asks the machine's name server, whatever the target says, unless it is told to use gRPC's resolver.
        ended = replicas.run(client, target, GRPC_NODE_USE_ALTERNATIVE_RESOLVER="true")
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout == 2 * (replicas.expected() + "\n")
        return refused() > before

    before = refused()
    with name_server("127.0.0.1", "127.0.0.2") as resolver:
        target = f"dns://{resolver}/{NAME}:{replicas.port}"
        wait_for(called_both, within=60, what="call to the other replica")
