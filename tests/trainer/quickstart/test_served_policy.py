"""The façade through a policy server in a process of its own: what it serves is always what was trained last."""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from rlhf.failures import RpcFailure
from tests.support.models import make_byte_tokenizer, make_tiny_gpt2
from tests.support.processes import ProcessUnderTest, StartProcess, process_factory
from trainer import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trainer.clients.policy import POLICY_SERVICE
from trainer.clients.publisher import PublishError
from trainer.quickstart.served_policy import ServerMismatchError

PLAIN: dict[str, Any] = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "max_new_tokens": 6}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gpt2(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessUnderTest]:
    with process_factory(tmp_path_factory.mktemp("processes")) as start:
        process = start("policy_server", "--model", str(folder))
        process.wait_serving(POLICY_SERVICE)
        yield process


def ids(text: str) -> torch.Tensor:
    return torch.tensor(make_byte_tokenizer()(text).input_ids)


QUERIES = [ids("hello"), ids("a longer prompt")]
SCORES = [torch.tensor(1.0), torch.tensor(-1.0)]


def make_trainer(
    folder: Path, address: str | None, *, peft_config: LoraConfig | None = None, **config: Any
) -> PPOTrainer:
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder, peft_config=peft_config)
    config = {"batch_size": 2, "learning_rate": 1e-2, **config}
    return PPOTrainer(PPOConfig(**config), model, None, make_byte_tokenizer(), policy_server=address)


@pytest.mark.filterwarnings("ignore::trainer.quickstart.sampling.SamplingShapeWarning")
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, lora_alpha=16)], ids=["all weights", "an adapter"])
def test_the_server_serves_the_trained_weights_after_every_step(
    folder: Path, server: ProcessUnderTest, peft_config: LoraConfig | None
) -> None:
    with make_trainer(folder, server.address, peft_config=peft_config) as trainer:
        local = PPOTrainer(trainer.config, trainer.model, None, trainer.tokenizer)
        seen = []
        for _ in range(3):
            served = trainer.generate(QUERIES, return_prompt=False, **GREEDY)
            expected = local.generate(QUERIES, return_prompt=False, **GREEDY)
            assert [row.tolist() for row in served] == [row.tolist() for row in expected]
            seen.append(served[0].tolist())
            trainer.step(QUERIES, served, SCORES)
    assert seen[0] != seen[2]  # the steps are large enough to be seen


def test_a_step_with_a_served_reference_has_the_numbers_of_one_in_process(
    folder: Path, server: ProcessUnderTest
) -> None:
    def statistics(address: str | None) -> list[dict[str, Any]]:
        with make_trainer(folder, address) as trainer:
            return [trainer.step(QUERIES, [ids("one"), ids("or two")], SCORES) for _ in range(2)]

    for ours, expected in zip(statistics(server.address), statistics(None), strict=True):
        for name in ("objective/kl", "ppo/mean_non_score_reward", "ppo/loss/total", "ppo/policy/approxkl"):
            assert float(ours[name]) == pytest.approx(float(expected[name]), rel=1e-4, abs=1e-6)
    assert abs(float(ours["objective/kl"])) > 0.01


def test_responses_keep_the_shapes_of_generation_in_process(folder: Path, server: ProcessUnderTest) -> None:
    with make_trainer(folder, server.address) as trainer:
        row = trainer.generate(QUERIES[0], **PLAIN)
        rows = trainer.generate(QUERIES, length_sampler=iter([2, 3]).__next__, batch_size=1, **PLAIN)
        completions = trainer.generate(QUERIES, return_prompt=False, **PLAIN)

    assert row.dim() == 2
    assert row[0, :5].tolist() == QUERIES[0].tolist()
    assert rows[0].numel() <= 5 + 2
    assert rows[1][:15].tolist() == QUERIES[1].tolist()
    assert all(1 <= completion.numel() <= 6 for completion in completions)
    assert {row.dtype for row in completions} == {torch.int64}


def test_the_config_seed_fixes_what_the_server_samples(folder: Path, server: ProcessUnderTest) -> None:
    def sample(seed: int) -> list[list[int]]:
        with make_trainer(folder, server.address, seed=seed) as trainer:
            return [row.tolist() for row in trainer.generate(QUERIES, return_prompt=False, **PLAIN)]

    assert sample(1) == sample(1) != sample(2)


def test_another_reference_than_the_servers_is_refused_with_both_digests(
    folder: Path, server: ProcessUnderTest, tmp_path: Path
) -> None:
    other = AutoModelForCausalLMWithValueHead.from_pretrained(make_tiny_gpt2(tmp_path, seed=9))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)

    with pytest.raises(ServerMismatchError, match=r"xxh3_128:\w+, ref_model .* has xxh3_128:\w+: .*--reference"):
        PPOTrainer(PPOConfig(batch_size=1), model, other, make_byte_tokenizer(), policy_server=server.address)


def test_another_tokenizer_than_the_servers_is_refused_with_both_digests(
    folder: Path, server: ProcessUnderTest
) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    tokenizer = make_byte_tokenizer(chat_template="{{ messages }}")

    with pytest.raises(ServerMismatchError, match=r"has tokenizer sha256:\w+, this trainer has sha256:\w+"):
        PPOTrainer(PPOConfig(batch_size=1), model, None, tokenizer, policy_server=server.address)


def test_a_padding_token_of_ones_own_choice_is_no_other_tokenizer(folder: Path, server: ProcessUnderTest) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    tokenizer = make_byte_tokenizer()
    tokenizer.pad_token = "!"

    with PPOTrainer(PPOConfig(batch_size=1), model, None, tokenizer, policy_server=server.address) as trainer:
        assert len(trainer.generate(QUERIES, **PLAIN)) == 2


def test_a_setting_that_the_server_cannot_be_asked_for_is_refused(folder: Path, server: ProcessUnderTest) -> None:
    with make_trainer(folder, server.address) as trainer, pytest.raises(ValueError, match="stop_strings"):
        trainer.generate(QUERIES, stop_strings=["x"], **PLAIN)


def test_a_prompt_that_the_server_refuses_names_the_field(folder: Path, server: ProcessUnderTest) -> None:
    with make_trainer(folder, server.address) as trainer, pytest.raises(RpcFailure, match="token_ids"):
        trainer.generate([torch.tensor([1, 100_000])], **PLAIN)


def test_a_trainer_whose_server_another_one_took_over_stops(folder: Path, server: ProcessUnderTest) -> None:
    with make_trainer(folder, server.address) as first, make_trainer(folder, server.address) as second:
        with pytest.raises(PublishError, match="took it over"):
            first.generate(QUERIES, **PLAIN)
        assert len(second.generate(QUERIES, **PLAIN)) == 2


def test_reference_numbers_of_a_server_that_another_one_took_over_are_not_believed(
    folder: Path, server: ProcessUnderTest
) -> None:
    with make_trainer(folder, server.address) as first, make_trainer(folder, server.address):
        before = [tensor.clone() for tensor in first.model.parameters()]
        with pytest.raises(PublishError, match="took it over"):
            first.step(QUERIES, [ids("one"), ids("two")], SCORES)
        assert all(torch.equal(*pair) for pair in zip(before, first.model.parameters(), strict=True))


def has_a_thread(server: ProcessUnderTest) -> bool:
    return any(thread.name == f"policy server {server.address}" for thread in threading.enumerate())


def test_closing_ends_the_connection_and_its_thread_and_may_be_repeated(folder: Path, server: ProcessUnderTest) -> None:
    trainer = make_trainer(folder, server.address)
    assert has_a_thread(server)

    trainer.close()
    trainer.close()

    assert not has_a_thread(server)
    with pytest.raises(RuntimeError, match="is closed"):
        trainer.generate(QUERIES, **PLAIN)


def test_a_trainer_that_is_let_go_closes_its_connection(folder: Path, server: ProcessUnderTest) -> None:
    trainer = make_trainer(folder, server.address)

    del trainer
    gc.collect()

    assert not has_a_thread(server)


@pytest.mark.slow
def test_a_restarted_server_gets_the_weights_again(folder: Path, start_process: StartProcess) -> None:
    flags = ("--model", str(folder), "--dtype", "bfloat16")
    first = start_process("policy_server", *flags)
    first.wait_serving(POLICY_SERVICE)
    address = first.address
    with make_trainer(folder, address) as trainer:
        trainer.step(QUERIES, trainer.generate(QUERIES, return_prompt=False, **PLAIN), SCORES)
        first.kill()
        second = start_process("policy_server", *flags, listen=address)

        responses = trainer.generate(QUERIES, return_prompt=False, **PLAIN)
        stats = trainer.step(QUERIES, responses, SCORES)

    assert abs(float(stats["objective/kl"])) > 0.0
    assert second.log_text().count("weights live") == 2
