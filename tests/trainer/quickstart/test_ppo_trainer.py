"""The façade in one process: TRL's calls, its checks with clear words, and what it warns about."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.models import make_byte_tokenizer, make_tiny_gpt2
from trainer import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trainer.quickstart.sampling import SamplingShapeWarning

PLAIN: dict[str, Any] = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gpt2(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(folder: Path) -> AutoModelForCausalLMWithValueHead:
    return AutoModelForCausalLMWithValueHead.from_pretrained(folder)


@pytest.fixture
def trainer(model: AutoModelForCausalLMWithValueHead) -> PPOTrainer:
    return PPOTrainer(PPOConfig(batch_size=2), model, None, make_byte_tokenizer())


def ids(text: str) -> torch.Tensor:
    return torch.tensor(make_byte_tokenizer()(text).input_ids)


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_step_trains_the_model_and_leaves_the_reference_alone(trainer: PPOTrainer) -> None:
    queries = [ids("hello"), ids("a longer one")]
    responses = trainer.generate(queries, return_prompt=False, **PLAIN)
    policy, reference = parameters(trainer.model), parameters(trainer.ref_model)

    stats = trainer.step(queries, responses, [torch.tensor(1.0), torch.tensor([-1.0])])

    assert {"objective/kl", "ppo/mean_scores", "ppo/policy/approxkl", "ppo/loss/total"} <= stats.keys()
    assert stats["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert all(torch.equal(reference[name], now) for name, now in parameters(trainer.ref_model).items())
    assert any(not torch.equal(policy[name], now) for name, now in parameters(trainer.model).items())


def test_a_reference_of_ones_own_is_used_with_or_without_a_value_head(
    folder: Path, tmp_path: Path, model: AutoModelForCausalLMWithValueHead
) -> None:
    other = AutoModelForCausalLM.from_pretrained(make_tiny_gpt2(tmp_path, seed=5))
    trainer = PPOTrainer(PPOConfig(batch_size=1), model, other, make_byte_tokenizer())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SamplingShapeWarning)  # the estimate on made-up text may be anything
        stats = trainer.step([ids("hello")], [ids("world")], [torch.tensor(1.0)])

    assert abs(float(stats["objective/kl"])) > 0.1
    assert not any(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.filterwarnings("ignore::trainer.quickstart.sampling.SamplingShapeWarning")
def test_a_model_with_an_adapter_needs_no_reference_beside_it(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder, peft_config=LoraConfig(r=4))
    trainer = PPOTrainer(PPOConfig(batch_size=1, learning_rate=1e-2), model, None, make_byte_tokenizer())
    greedy = {"do_sample": False, "max_new_tokens": 5}
    before = trainer.generate(ids("hello"), **greedy)

    kls = [trainer.step([ids("hello")], [ids("world")], [torch.tensor(1.0)])["objective/kl"] for _ in range(2)]
    trainer.save_pretrained(tmp_path)
    after, base = trainer.generate(ids("hello"), generate_ref_response=True, **greedy)

    assert trainer.ref_model is None
    assert kls[0] == pytest.approx(0.0, abs=1e-5)
    assert abs(kls[1]) > 1e-3
    assert not torch.equal(after, before)
    assert torch.equal(base, before)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert all(torch.equal(parameters(again)[name], now) for name, now in parameters(model).items())


def test_one_prompt_gives_one_row_and_a_list_gives_a_list(trainer: PPOTrainer) -> None:
    query = ids("hello")

    whole = trainer.generate(query, **PLAIN)
    alone = trainer.generate(query, return_prompt=False, **PLAIN)
    rows = trainer.generate([query, ids("x")], **PLAIN)

    assert whole.shape[0] == 1
    assert whole[0, :5].tolist() == query.tolist()
    assert alone.dim() == 2
    assert 1 <= alone.shape[1] <= 5
    assert [row[:1].tolist() for row in rows] == [query[:1].tolist(), ids("x").tolist()]


def test_the_reference_answers_beside_the_policy_on_request(trainer: PPOTrainer) -> None:
    greedy = {"do_sample": False, "max_new_tokens": 5}
    with pytest.warns(SamplingShapeWarning, match="do_sample"):
        response, reference_response = trainer.generate([ids("hello")], generate_ref_response=True, **greedy)

    assert response[0].tolist() == reference_response[0].tolist()


def test_the_same_seed_samples_the_same_responses(folder: Path) -> None:
    def sample(seed: int) -> list[int]:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
        trainer = PPOTrainer(PPOConfig(batch_size=1, seed=seed), model, None, make_byte_tokenizer())
        [response] = trainer.generate([ids("hello")], **PLAIN)
        return response.tolist()

    assert sample(3) == sample(3) != sample(4)


def test_settings_that_bias_the_kl_are_warned_about_once_and_plain_ones_never(trainer: PPOTrainer) -> None:
    query = [ids("hello")]
    trainer.generate(query, **PLAIN)  # warnings are errors in these tests

    with pytest.warns(SamplingShapeWarning, match="temperature=0.7, top_k=50"):
        trainer.generate(query, do_sample=True, temperature=0.7, max_new_tokens=2)
    trainer.generate(query, do_sample=True, temperature=0.8, max_new_tokens=2)
    with pytest.warns(SamplingShapeWarning, match="top_p=0.9"):
        trainer.generate(query, do_sample=True, top_p=0.9, max_new_tokens=2)


def test_a_kl_estimate_far_below_zero_is_warned_about(
    folder: Path, tmp_path: Path, model: AutoModelForCausalLMWithValueHead
) -> None:
    other = AutoModelForCausalLMWithValueHead.from_pretrained(make_tiny_gpt2(tmp_path, seed=5))
    likely_there = other.generate(ids("hello")[None], do_sample=False, max_new_tokens=8, pad_token_id=256)[0, 5:]
    trainer = PPOTrainer(PPOConfig(batch_size=1), model, other, make_byte_tokenizer())

    with pytest.warns(SamplingShapeWarning, match="KL estimate is -"):
        trainer.step([ids("hello")], [likely_there], [torch.tensor(1.0)])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"queries": (torch.tensor([1]), torch.tensor([2]))}, "queries is a list"),
        ({"responses": [torch.tensor([1])]}, r"responses has 1 entries, config.batch_size is 2"),
        ({"scores": [1.0, 2.0]}, r"scores\[0\] is a tensor, not float"),
        ({"scores": [torch.tensor(1.0), torch.tensor([1.0, 2.0])]}, r"scores\[1\] has shape \[2\]"),
        ({"scores": [torch.tensor(1.0), torch.tensor(float("nan"))]}, r"scores\[1\] is nan"),
        ({"queries": [torch.tensor([1]), torch.tensor([[2]])]}, r"queries\[1\] has shape \[1, 1\]"),
        ({"responses": [torch.tensor([1]), torch.tensor([], dtype=torch.int64)]}, r"responses\[1\] is empty"),
        ({"response_masks": [torch.tensor([1]), torch.tensor([1, 1])]}, r"response_masks\[1\] has shape \[2\]"),
    ],
)
def test_input_that_does_not_fit_is_refused_by_name_before_anything_changes(
    trainer: PPOTrainer, change: dict[str, Any], complaint: str
) -> None:
    before = parameters(trainer.model)
    arguments: dict[str, Any] = {
        "queries": [torch.tensor([1]), torch.tensor([2])],
        "responses": [torch.tensor([3]), torch.tensor([4])],
        "scores": [torch.tensor(1.0), torch.tensor(0.0)],
        **change,
    }

    with pytest.raises(ValueError, match=complaint):
        trainer.step(**arguments)

    assert all(torch.equal(before[name], now) for name, now in parameters(trainer.model).items())


@pytest.mark.parametrize(
    "query", [torch.tensor([[1, 2]]), [torch.tensor([1]), torch.tensor(3)], [[1, 2]], torch.tensor([])]
)
def test_prompts_of_another_shape_are_refused(trainer: PPOTrainer, query: Any) -> None:
    with pytest.raises(ValueError, match="query_tensor is a 1-D tensor"):
        trainer.generate(query, **PLAIN)


def test_masked_response_tokens_do_not_train(folder: Path) -> None:
    def trained_on(last: int) -> float:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(folder, v_head_init_strategy="normal")
        trainer = PPOTrainer(PPOConfig(batch_size=1), model, None, make_byte_tokenizer())
        mask = torch.tensor([1, 1, 0])
        stats = trainer.step([ids("hi")], [torch.tensor([60, 61, last])], [torch.tensor(1.0)], [mask])
        return float(stats["objective/entropy"])

    assert trained_on(62) == pytest.approx(trained_on(80))


class Prompts(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": ids("p" * (index + 1)), "index": torch.tensor(index)}


def test_a_dataset_becomes_shuffled_whole_batches_through_the_collator(
    model: AutoModelForCausalLMWithValueHead,
) -> None:
    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
        return {name: [row[name] for row in rows] for name in rows[0]}

    trainer = PPOTrainer(
        PPOConfig(batch_size=2), model, tokenizer=make_byte_tokenizer(), dataset=Prompts(), data_collator=collate
    )
    assert trainer.dataloader is not None
    batches = list(trainer.dataloader)

    assert [len(batch["input_ids"]) for batch in batches] == [2, 2]
    assert len({int(index) for batch in batches for index in batch["index"]}) == 4


def test_an_optimizer_and_a_scheduler_of_ones_own_are_used(model: AutoModelForCausalLMWithValueHead) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    trainer = PPOTrainer(
        PPOConfig(batch_size=1), model, None, make_byte_tokenizer(), optimizer=optimizer, lr_scheduler=scheduler
    )

    trainer.step([ids("hello")], [ids("world")], [torch.tensor(1.0)])

    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_what_trl_code_touches_is_there(trainer: PPOTrainer) -> None:
    assert trainer.accelerator.device == trainer.current_device == torch.device("cpu")
    assert trainer.accelerator.is_main_process
    assert not trainer.is_distributed
    assert trainer.kl_ctl.value == 0.2
    assert trainer.dataloader is None
    trainer.step([ids("a"), ids("b")], [ids("cd"), ids("e")], [torch.tensor(1.0), torch.tensor(0.0)])
    assert trainer.kl_ctl.value != 0.2


def test_a_saved_folder_holds_model_value_head_and_tokenizer(trainer: PPOTrainer, tmp_path: Path) -> None:
    trainer.save_pretrained(tmp_path)

    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)

    assert all(torch.equal(trainer.model.state_dict()[name], now) for name, now in again.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path)("hi").input_ids == ids("hi").tolist()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"config": {"batch_size": 1}}, "config is a PPOConfig, not dict"),
        ({"model": "gpt2"}, "model is an AutoModelForCausalLMWithValueHead, not str"),
        ({"ref_model": "gpt2"}, "ref_model is a causal language model or None, not str"),
        ({"tokenizer": None}, "tokenizer is a transformers tokenizer, not NoneType"),
        ({"num_shared_layers": 1}, "num_shared_layers"),
        ({"training_data_collator": list}, "training_data_collator"),
        ({"config": PPOConfig(kl_penalty="full"), "policy_server": "localhost:1"}, "kl_penalty=full"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(
    model: AutoModelForCausalLMWithValueHead, change: dict[str, Any], complaint: str
) -> None:
    arguments: dict[str, Any] = {
        "config": PPOConfig(batch_size=1),
        "model": model,
        "tokenizer": make_byte_tokenizer(),
        **change,
    }
    with pytest.raises(ValueError, match=complaint):
        PPOTrainer(**arguments)


def test_statistics_go_to_the_trackers_of_a_given_accelerator(
    model: AutoModelForCausalLMWithValueHead, tmp_path: Path
) -> None:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker, on_main_process

    class Kept(GeneralTracker):
        name = "kept"
        requires_logging_directory = False
        logged: list[tuple[int | None, dict[str, float]]]

        def __init__(self) -> None:
            super().__init__()
            self.logged = []

        @property
        def tracker(self) -> list[tuple[int | None, dict[str, float]]]:
            return self.logged

        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

        @on_main_process
        def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
            self.logged.append((step, values))

    kept = Kept()
    accelerator = Accelerator(log_with=[kept])
    accelerator.init_trackers("test")
    trainer = PPOTrainer(PPOConfig(batch_size=1), model, None, make_byte_tokenizer(), accelerator=accelerator)
    rewards = [torch.tensor(2.0)]

    stats = trainer.step([ids("hello")], [ids("world")], rewards)
    trainer.log_stats(stats, {"query": ["hello"], "response": ["world"]}, rewards)

    [(step, values)] = kept.logged
    assert step == 1
    assert values["env/reward_mean"] == 2.0
    assert values["env/reward_std"] == 0.0
    assert values["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert all(isinstance(value, float) for value in values.values())
