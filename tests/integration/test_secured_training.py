"""A run over mutual TLS and tokens, in the middle of which every certificate, authority and token is replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from tests.integration.secured import Guarded, code_of
from tests.integration.training import metric
from tests.support.certificates import Authority, replace
from tests.support.models import make_tiny_gpt2
from tests.support.processes import process_factory, wait_for

STEPS = 5000  # more than there is time for
OLD, NEW = "the-old-trainer-token-0123456789", "the-new-trainer-token-0123456789"


@pytest.mark.slow
def test_a_run_goes_on_while_certificates_authorities_and_tokens_are_replaced(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"The film {row} was"}) + "\n" for row in range(40)))
    run = tmp_path / "run"
    with process_factory(tmp_path / "processes") as start:
        guarded = Guarded(tmp_path / "credentials", start)
        trainer_token = tmp_path / "trainer.token"
        trainer_token.write_text(OLD)
        known_tokens = guarded.folder / "trainer.token"
        known_tokens.write_text(OLD)
        replace(guarded.access, b"trainer: {roles: [rollout, writer, scorer], token_file: trainer.token}\n")
        model = str(make_tiny_gpt2(tmp_path / "model"))
        serve_policy = ("policy_server", "--model", model, "--managed", "--threads", "1")
        policy = guarded.server(*serve_policy)
        reward = guarded.server("reward_server", "--reward", "length", "--reward-options", "{target: 4}")
        policy.wait_serving()
        reward.wait_serving("rlhf.reward.v1.RewardService")
        trainer = start(
            "trainer",
            *("--model", model, "--data", str(data), "--run-dir", str(run), "--steps", str(STEPS)),
            *("--policy-server", policy.address, "--policy-tls", "--policy-token-file", str(trainer_token)),
            *("--reward-server", reward.address, "--reward-tls", "--reward-token-file", str(trainer_token)),
            *("--tls-ca", str(guarded.authority.bundle)),
            *("--tls-cert", str(guarded.client_cert), "--tls-key", str(guarded.client_key)),
            *("--batch-size", "8", "--mini-batch-size", "4", "--max-new-tokens", "8", "--threads", "1"),
            *("--eval-prompts", "0", "--log-format", "text"),
            listen=None,
        )

        def steps_done() -> int:
            assert trainer.poll() in (None, 0), trainer.log_text()[-4000:]
            file = run / "metrics.jsonl"
            return file.read_text().count('"step"') if file.exists() else 0

        def admitted(token: str, trusts: Authority) -> bool:
            """Whether both servers take the token, over a new connection."""
            with (
                guarded.channel(policy, trusts=trusts) as to_policy,
                guarded.channel(reward, trusts=trusts) as to_reward,
            ):
                model = policy_pb2_grpc.PolicyServiceStub(to_policy).GetModel
                info = reward_pb2_grpc.RewardServiceStub(to_reward).GetRewardInfo
                codes = {
                    code_of(model, policy_pb2.GetModelRequest(), token),
                    code_of(info, reward_pb2.GetRewardInfoRequest(), token),
                }
            return codes == {"OK"}

        wait_for(steps_done, within=120, what="first step")

        # Trust the new before anybody shows it …
        next_authority, next_clients = Authority(tmp_path / "next"), Authority(tmp_path / "next-clients")
        replace(guarded.authority.bundle, guarded.authority.pem + next_authority.pem)
        replace(guarded.clients.bundle, guarded.clients.pem + next_clients.pem)
        replace(known_tokens, f"{OLD}\n{NEW}\n".encode())
        wait_for(lambda: admitted(NEW, guarded.authority), within=60, what="new token at both servers")
        # … show it …
        next_authority.issue("127.0.0.1", into=guarded.cert.parent)
        wait_for(lambda: admitted(OLD, next_authority), within=60, what="new certificate at both servers")
        next_clients.issue("client.example", into=guarded.client_cert.parent)
        replace(trainer_token, NEW.encode())
        wait_for(lambda: "new token" in trainer.log_text(), within=60, what="new token in the trainer")
        wait_for(lambda: "new client certificate" in trainer.log_text(), within=60, what="new certificate there")
        # … and stop trusting the old.
        replace(guarded.authority.bundle, next_authority.pem)
        replace(guarded.clients.bundle, next_clients.pem)
        replace(known_tokens, NEW.encode())
        policy.kill()
        policy = guarded.server(*serve_policy, listen=policy.address)

        policy.wait_serving("rlhf.policy.v1.PolicyService")
        before = steps_done()
        wait_for(lambda: steps_done() > before + 2, within=60, what="further steps")
        assert trainer.terminate() == 143
        assert metric(policy, "grpc_server_handled_total", grpc_method="Generate", grpc_code="OK") > 0
        shown = trainer.log_text() + policy.log_text() + reward.log_text()
        assert OLD not in shown
        assert NEW not in shown
