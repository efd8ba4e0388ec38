"""The trainer's settings: what is refused at start, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from rlhf.config import ConfigurationError, ProcessSettings, load_settings, read_settings
from trainer.settings import TrainerSettings

GIVEN: dict[str, Any] = {
    "model": "model",
    "policy_server": "127.0.0.1:1",
    "reward_server": "127.0.0.1:2",
    "run_dir": Path("run"),
    "data": "data.jsonl",
}


def settings(**values: Any) -> TrainerSettings:
    return read_settings(TrainerSettings, {**GIVEN, **values}, {})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"kl_penalty": "full"}, "set reference=trainer"),
        ({"kl_penalty": "full", "reference": "trainer", "old_logprobs": "rollout"}, "set old_logprobs=trainer"),
        ({"reference_model": "x"}, "only used with reference=trainer"),
        ({"top_p": 0.9}, "only temperature may shape sampling"),
        ({"min_new_tokens": 4}, "only temperature may shape sampling"),
        ({"temperature": 0}, "greater than 0"),
        ({"batch_size": 10, "mini_batch_size": 4}, "must be a multiple of"),
        ({"run_id": "läuft"}, "run-id.*pattern"),
        ({"run_id": "a/b"}, "run-id.*pattern"),
        ({"run_id": "r" * 65}, "run-id.*at most 64"),
        ({"max_staleness": -1}, "greater than or equal to 0"),
        ({"max_staleness": 1, "reproducible": True}, "max_staleness=1 can't be reproducible"),
        ({"oversample": -0.1}, "greater than or equal to 0"),
        ({"oversample": 0.5, "reproducible": True}, "oversample=0.5 can't be reproducible"),
        ({"policy_server": ""}, "policy-server.*at least 1"),
        ({"policy_server": "localhost"}, "'localhost' is none of host:port"),
        ({"policy_server": "a:1,dns://b:2"}, "'dns://b:2' is none of"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"lora_rank": 0}, "greater than or equal to 1"),
        ({"lora_alpha": 16}, r"lora_alpha \(16.0\) is of an adapter, and there is none: set lora_rank"),
        ({"lora_targets": "q_proj"}, r"lora_targets \(\['q_proj'\]\) is of an adapter"),
        ({"lora_rank": 8, "lora_targets": ""}, "lora-targets.*at least 1"),
        ({"lr_scheduler": "cosinus"}, "'constant', 'linear', 'cosine' or 'inverse_sqrt'"),
        ({"lr_warmup_steps": 5, "steps": 5}, r"lr_warmup_steps \(5\) must be less than steps \(5\)"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_reason(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        settings(**values)


def test_a_local_reference_allows_the_full_kl() -> None:
    assert settings(kl_penalty="full", reference="trainer").ppo_config().kl_penalty.value == "full"


def test_ppo_gets_its_own_settings_and_the_length_of_the_run_in_samples() -> None:
    config = settings(steps=20, batch_size=64, learning_rate=1e-4).ppo_config()

    assert (config.batch_size, config.mini_batch_size, config.learning_rate, config.steps) == (64, 64, 1e-4, 1280)


def test_policy_servers_are_a_list_of_addresses_and_names() -> None:
    given = "127.0.0.1:1, unix:/run/p.sock,[::1]:3,dns:///policy.rlhf.svc:4"

    servers = settings(policy_server=given).policy_server

    assert servers == ["127.0.0.1:1", "unix:/run/p.sock", "[::1]:3", "dns:///policy.rlhf.svc:4"]


def test_every_number_has_a_unit() -> None:
    def is_number(annotation: Any) -> bool:
        return annotation in (int, float) or any(part in (int, float) for part in get_args(annotation))

    numbers = {
        name: field
        for name, field in TrainerSettings.model_fields.items()
        if is_number(field.annotation) and name not in ProcessSettings.model_fields
    }

    assert len(numbers) > 25
    assert [name for name, field in numbers.items() if "unit" not in (field.json_schema_extra or {})] == []


def test_a_mistake_on_the_command_line_exits_78(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_settings(TrainerSettings, ["--model", "m"], prog="python -m trainer")

    assert stop.value.code == 78
    assert "--policy-server" in capsys.readouterr().err
