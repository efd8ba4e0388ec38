"""TLS, certificates, tokens and roles, over real processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rlhf.config import EX_CONFIG
from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from rlhf.weights.v1 import weights_pb2, weights_pb2_grpc
from tests.integration.secured import ROLES, Guarded, access_file, bearer, code_of, token_of
from tests.integration.training import metric
from tests.rlhf.security.test_roles import MATRIX, POLICY, REWARD, WEIGHTS
from tests.support.certificates import Authority, replace, swap_link
from tests.support.models import make_tiny_gpt2
from tests.support.processes import ProcessUnderTest, StartProcess, process_factory, wait_for

PROMPT = policy_pb2.GenerateRequest(
    prompt=policy_pb2.Prompt(token_ids=policy_pb2.TokenIds(ids=[5, 6])),
    sampling=policy_pb2.SamplingParams(max_new_tokens=2, min_new_tokens=2),
)
REQUESTS: dict[str, Any] = {
    f"{POLICY}/Generate": PROMPT,
    f"{POLICY}/StreamGenerate": policy_pb2.StreamGenerateRequest(request=PROMPT),
    f"{POLICY}/LogProbs": policy_pb2.LogProbsRequest(),
    f"{POLICY}/GetModel": policy_pb2.GetModelRequest(),
    f"{WEIGHTS}/UpdateWeights": weights_pb2.UpdateWeightsRequest(),
    f"{WEIGHTS}/GetWeights": weights_pb2.GetWeightsRequest(),
    f"{REWARD}/Score": reward_pb2.ScoreRequest(),
    f"{REWARD}/GetRewardInfo": reward_pb2.GetRewardInfoRequest(),
}
STUBS: dict[str, Any] = {
    POLICY: policy_pb2_grpc.PolicyServiceStub,
    WEIGHTS: weights_pb2_grpc.WeightsServiceStub,
    REWARD: reward_pb2_grpc.RewardServiceStub,
}
LENGTH = ("--reward", "length", "--reward-options", "{target: 4}")
INFO = f"{REWARD}/GetRewardInfo"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartProcess]:
    with process_factory(tmp_path_factory.mktemp("processes")) as start:
        yield start


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, start: StartProcess) -> Guarded:
    return Guarded(tmp_path_factory.mktemp("credentials"), start)


@pytest.fixture(scope="module")
def reward(guarded: Guarded) -> ProcessUnderTest:
    server = guarded.server("reward_server", *LENGTH)
    server.wait_serving("rlhf.reward.v1.RewardService")
    return server


@pytest.fixture(scope="module")
def policy(guarded: Guarded) -> ProcessUnderTest:
    model = make_tiny_gpt2(guarded.folder / "model")
    server = guarded.server("policy_server", "--model", str(model), "--threads", "1")
    server.wait_serving("rlhf.policy.v1.PolicyService")
    return server


@pytest.fixture
def own(tmp_path: Path, start: StartProcess) -> Guarded:
    """Credentials that a test may change."""
    return Guarded(tmp_path, start)


def call(channel: grpc.Channel, rpc: str, token: str | None) -> str:
    """The status code of an RPC."""
    service, _, method = rpc.rpartition("/")
    request = REQUESTS[rpc]
    return code_of(
        getattr(STUBS[service](channel), method), iter([request]) if method == "UpdateWeights" else request, token
    )


def code_over(
    guarded: Guarded, server: ProcessUnderTest, token: str | None = token_of("scorer"), **channel: Any
) -> str:
    """What a new connection gets for GetRewardInfo."""
    with guarded.channel(server, **channel) as connection:
        return call(connection, INFO, token)


@pytest.mark.parametrize("role", ROLES)
def test_each_role_may_call_what_it_is_for_and_is_denied_the_rest(
    role: str, guarded: Guarded, policy: ProcessUnderTest, reward: ProcessUnderTest
) -> None:
    with guarded.channel(policy) as to_policy, guarded.channel(reward) as to_reward:
        codes = {rpc: call(to_reward if rpc.startswith(REWARD) else to_policy, rpc, token_of(role)) for rpc in REQUESTS}
    allowed = set(REQUESTS) if role == "admin" else {str(rpc) for rpc in MATRIX[role]}  # type: ignore[index]
    assert {rpc for rpc, code in codes.items() if code != "PERMISSION_DENIED"} == allowed, codes
    assert "UNAUTHENTICATED" not in codes.values()
    assert {codes[rpc] for rpc in allowed if not rpc.endswith(("Score", "UpdateWeights", "LogProbs"))} == {"OK"}


@pytest.mark.parametrize("token", [None, "", "wrong", token_of("scorer")[:-1], token_of("scorer") + "x"])
def test_a_missing_and_a_wrong_token_are_unauthenticated_for_every_rpc(
    token: str | None, guarded: Guarded, policy: ProcessUnderTest, reward: ProcessUnderTest
) -> None:
    with guarded.channel(policy) as to_policy, guarded.channel(reward) as to_reward:
        codes = {call(to_reward if rpc.startswith(REWARD) else to_policy, rpc, token) for rpc in REQUESTS}
    assert codes == {"UNAUTHENTICATED"}


def test_reflection_and_a_watch_of_health_want_an_identity_and_a_check_does_not(
    guarded: Guarded, reward: ProcessUnderTest
) -> None:
    check, listing = health_pb2.HealthCheckRequest(), reflection_pb2.ServerReflectionRequest(list_services="")
    with guarded.channel(reward) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        assert code_of(health.Check, check, None) == "OK"
        assert code_of(health.Watch, check, None) == "UNAUTHENTICATED"
        assert code_of(reflection.ServerReflectionInfo, iter([listing]), None) == "UNAUTHENTICATED"
        assert code_of(reflection.ServerReflectionInfo, iter([listing]), token_of("app")) == "OK"


def test_only_clients_with_a_certificate_of_the_right_authority_that_holds_get_in(
    guarded: Guarded, reward: ProcessUnderTest, tmp_path: Path
) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    expired = guarded.clients.issue("client.example", into=tmp_path / "expired", not_after=yesterday)
    foreign = Authority(tmp_path / "foreign").issue("client.example")
    assert code_over(guarded, reward) == "OK"
    assert code_over(guarded, reward, pair=expired) == "UNAVAILABLE"
    assert code_over(guarded, reward, pair=foreign) == "UNAVAILABLE"
    anonymous = grpc.ssl_channel_credentials(guarded.authority.pem)
    with grpc.secure_channel(reward.address, anonymous) as channel:
        assert call(channel, INFO, token_of("scorer")) == "UNAVAILABLE"
    with grpc.insecure_channel(reward.address) as channel:
        assert call(channel, INFO, token_of("scorer")) == "UNAVAILABLE"


def test_a_client_does_not_talk_to_a_server_of_another_authority_or_with_an_expired_certificate(
    own: Guarded, tmp_path: Path
) -> None:
    own.authority.issue("127.0.0.1", into=own.cert.parent, not_after=datetime.now(UTC) - timedelta(days=1))
    server = own.server("reward_server", *LENGTH)
    server.wait_serving()
    assert code_over(own, server) == "UNAVAILABLE"
    own.authority.issue("127.0.0.1", into=own.cert.parent)
    wait_for(lambda: code_over(own, server) == "OK", within=30, what="connection with the new certificate")
    assert code_over(own, server, trusts=Authority(tmp_path / "other")) == "UNAVAILABLE"


def test_health_for_probes_is_in_plaintext_and_is_all_that_there_is(guarded: Guarded, reward: ProcessUnderTest) -> None:
    assert reward.health_address != reward.address
    with grpc.insecure_channel(reward.health_address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert (
            code_of(health.Check, health_pb2.HealthCheckRequest(service="rlhf.reward.v1.RewardService"), None) == "OK"
        )
        assert call(channel, INFO, token_of("admin")) == "UNIMPLEMENTED"


def test_certificates_and_the_authority_are_rotated_without_a_restart(own: Guarded, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, authority, clients in (
        (old, own.authority, own.clients),
        (new, Authority(tmp_path / "next-authority"), Authority(tmp_path / "next-clients")),
    ):
        authority.issue("127.0.0.1", into=folder)
        (folder / "client-ca.pem").write_bytes(clients.pem)
    data = tmp_path / "..data"
    swap_link(data, old)
    own.cert, own.key, own.clients.bundle = data / "cert.pem", data / "key.pem", data / "client-ca.pem"
    server = own.server("reward_server", *LENGTH)
    server.wait_serving()
    before = own.client_cert, own.client_key
    after = clients.issue("client.example")

    with own.channel(server) as kept:
        assert call(kept, INFO, token_of("scorer")) == "OK"
        swap_link(data, new)
        wait_for(
            lambda: code_over(own, server, trusts=authority, pair=after) == "OK", within=30, what="new certificate"
        )
        assert code_over(own, server, pair=before) == "UNAVAILABLE"
        assert code_over(own, server, trusts=authority, pair=before) == "UNAVAILABLE"
        assert call(kept, INFO, token_of("scorer")) == "OK", "a connection that was open goes on"
    assert metric(server, "rlhf_credentials_reloads_total", what="server certificate", outcome="ok") == 1


def test_a_certificate_without_its_key_changes_nothing_until_the_key_comes(own: Guarded, tmp_path: Path) -> None:
    server = own.server("reward_server", *LENGTH)
    server.wait_serving()
    next_authority = Authority(tmp_path / "next")
    cert, key = next_authority.issue("127.0.0.1")
    replace(own.cert, cert.read_bytes())
    wait_for(
        lambda: code_over(own, server) == "OK" and metric(server, "rlhf_credentials_broken", what="server certificate"),
        within=30,
        what="broken pair",
    )
    assert "they do not belong together" in server.log_text()
    replace(own.key, key.read_bytes())
    wait_for(lambda: code_over(own, server, trusts=next_authority) == "OK", within=30, what="new certificate")
    assert metric(server, "rlhf_credentials_broken", what="server certificate") == 0


def test_tokens_are_rotated_without_a_restart_and_a_broken_file_keeps_the_old_ones(
    own: Guarded, tmp_path: Path
) -> None:
    server = own.server("reward_server", *LENGTH)
    server.wait_serving()
    with own.channel(server) as channel:
        token_file = tmp_path / "judge.token"
        token_file.write_text("the-judge-token-0123456789\n")
        access_file(tmp_path, "judge: {roles: [scorer], token_file: judge.token}")
        wait_for(lambda: call(channel, INFO, "the-judge-token-0123456789") == "OK", within=30, what="new identity")
        replace(token_file, b"another-judge-token-0123456789\n")
        wait_for(lambda: call(channel, INFO, "another-judge-token-0123456789") == "OK", within=30, what="new token")
        assert call(channel, INFO, "the-judge-token-0123456789") == "UNAUTHENTICATED"

        replace(own.access, b"judge: {roles: [scorer], token_file: absent.token}\n")
        wait_for(
            lambda: (
                call(channel, INFO, token_of("scorer")) == "OK"
                and metric(server, "rlhf_credentials_broken", what="access file")
            ),
            within=30,
            what="broken file",
        )
        assert call(channel, INFO, "another-judge-token-0123456789") == "OK"


def test_a_token_that_is_bound_to_a_certificate_is_worth_nothing_without_it(own: Guarded) -> None:
    access_file(
        own.folder, "bound:", "  roles: [scorer]", "  token_file: bound.token", "  certificates: [bound.example]"
    )
    (own.folder / "bound.token").write_text("the-bound-token-0123456789")
    server = own.server("reward_server", *LENGTH)
    server.wait_serving()
    assert code_over(own, server, "the-bound-token-0123456789") == "UNAUTHENTICATED"
    assert code_over(own, server, "the-bound-token-0123456789", pair=own.clients.issue("bound.example")) == "OK"


def test_a_certificate_alone_can_be_an_identity(own: Guarded) -> None:
    access_file(own.folder, 'judge: {roles: [scorer], certificates: ["spiffe://example.org/judge"]}')
    server = own.server("reward_server", *LENGTH)
    server.wait_serving()
    spiffe = own.clients.issue("spiffe://example.org/judge")
    assert code_over(own, server, None, pair=spiffe) == "OK"
    assert code_over(own, server, None) == "UNAUTHENTICATED"
    assert code_over(own, server, "wrong", pair=spiffe) == "UNAUTHENTICATED"


def test_no_token_is_in_logs_or_metrics(guarded: Guarded, policy: ProcessUnderTest, reward: ProcessUnderTest) -> None:
    for server in (policy, reward):
        with guarded.channel(server) as channel:
            call(channel, INFO if server is reward else f"{POLICY}/GetModel", "a-wrong-token-0123456789")
            call(channel, INFO if server is reward else f"{POLICY}/GetModel", token_of("writer"))
        shown = server.metrics_text() + server.log_text()
        assert "rlhf_calls_denied_total" in shown
        assert "a call was refused" in shown
        assert not [token for token in ("a-wrong-token", *map(token_of, ROLES)) if token in shown]


def test_denied_calls_are_counted_by_reason(own: Guarded) -> None:
    server = own.server("reward_server", *LENGTH)
    server.wait_serving()
    for token in (None, "wrong", token_of("app")):
        code_over(own, server, token)
    counts = {
        reason: metric(server, "rlhf_calls_denied_total", reason=reason)
        for reason in ("no_token", "wrong_token", "role")
    }
    assert counts == {"no_token": 1, "wrong_token": 1, "role": 1}


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--listen", "0.0.0.0:0"], "other machines can reach"),
        (["--access-file", "no-such-file.yaml"], "no-such-file.yaml: No such file"),
        (["--tls-cert", "no-such.pem", "--tls-key", "no-such.pem"], "no-such.pem: No such file"),
    ],
)
def test_a_server_that_is_not_secured_as_it_says_does_not_start(
    start: StartProcess, flags: list[str], why: str
) -> None:
    server = start("reward_server", *LENGTH, *flags, listen=None)
    assert server.wait_exit() == EX_CONFIG
    assert why in server.log_text()


def test_a_public_address_is_served_insecurely_only_where_that_is_said(start: StartProcess) -> None:
    server = start("reward_server", *LENGTH, "--insecure", listen="0.0.0.0:0")
    server.wait_serving()


def test_beyond_its_quota_an_identity_is_sent_away_and_others_are_served(own: Guarded) -> None:
    access_file(
        own.folder,
        "hungry:",
        "  roles: [scorer]",
        "  token_file: hungry.token",
        "  quota: {per_second: 0.01, burst: 3}",
    )
    (own.folder / "hungry.token").write_text("the-hungry-token-0123456789")
    server = own.server("reward_server", *LENGTH)
    server.wait_serving("rlhf.reward.v1.RewardService")
    sample = reward_pb2.Sample(sample_id="a", group_id="a", group_size=1, completion="four", prompt="p")
    request = reward_pb2.ScoreRequest(run_id="run", samples=[sample])
    with own.channel(server) as channel:
        score = reward_pb2_grpc.RewardServiceStub(channel).Score
        codes = [code_of(score, request, "the-hungry-token-0123456789") for _ in range(4)]
        assert codes == ["OK", "OK", "OK", "RESOURCE_EXHAUSTED"]
        with pytest.raises(grpc.RpcError) as refused:
            score(request, metadata=bearer("the-hungry-token-0123456789"), timeout=10)
        assert any(key == "grpc-status-details-bin" for key, _ in refused.value.trailing_metadata())
        assert code_of(score, request, token_of("scorer")) == "OK"
    assert metric(server, "rlhf_quota_spent_total", identity="hungry") == 3
    assert metric(server, "rlhf_quota_refused_total", identity="hungry") == 2


def test_tokens_of_a_completion_are_what_the_policy_server_counts(own: Guarded) -> None:
    access_file(
        own.folder, "chat:", "  roles: [app]", "  token_file: chat.token", "  quota: {per_second: 0.01, burst: 5}"
    )
    (own.folder / "chat.token").write_text("the-chat-token-0123456789")
    model = make_tiny_gpt2(own.folder / "model")
    server = own.server("policy_server", "--model", str(model), "--threads", "1")
    server.wait_serving("rlhf.policy.v1.PolicyService")
    with own.channel(server) as channel:
        codes = [call(channel, f"{POLICY}/Generate", "the-chat-token-0123456789") for _ in range(3)]
    assert codes == ["OK", "OK", "RESOURCE_EXHAUSTED"]
    assert metric(server, "rlhf_quota_spent_total", identity="chat") == 4
    shutil.rmtree(model)
