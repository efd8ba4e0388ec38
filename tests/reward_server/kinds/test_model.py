from __future__ import annotations

import asyncio
import itertools
import json
import math
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward_server.kinds import Limits, RewardLoadError, Sample
from reward_server.kinds.batching import micro_batches
from reward_server.kinds.model import ModelOptions, ModelReward
from reward_server.results import Failed, Outcome, Scored
from rlhf.failures import RpcFailure, is_transient
from rlhf.reward.v1 import reward_pb2_grpc
from tests.reward_server.conftest import request, sample, until
from tests.reward_server.kinds.small_classifiers import MODELS, make_classifier
from tests.support.models import make_tiny_gpt2
from tests.support.processes import StartProcess

TEXTS = ["fine", "a film with a heart", "dull", "x", "not so very good, I must say", "fine film"]


async def started(folder: Path | str, limits: Limits | None = None, **options: Any) -> ModelReward:
    reward = ModelReward(ModelOptions(model=str(folder), device="cpu", **options), limits or Limits())
    await reward.start()
    return reward


async def judge(reward: ModelReward, texts: Sequence[str], prompt: str = "") -> list[Outcome]:
    return await reward.score([Sample(prompt=prompt, completion=text) for text in texts], None)


async def rewards(reward: ModelReward, texts: Sequence[str], prompt: str = "") -> list[float]:
    outcomes = await judge(reward, texts, prompt)
    assert all(isinstance(outcome, Scored) for outcome in outcomes), outcomes
    return [outcome.reward for outcome in outcomes if isinstance(outcome, Scored)]


def logits_alone(folder: Path, *text: str, special_tokens: bool = True) -> list[float]:
    """What transformers says of one text (or a pair), without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        inputs = tokenizer(*text, add_special_tokens=special_tokens, return_tensors="pt")
        logits: list[float] = model(**inputs).logits[0].tolist()
    return logits


@pytest.mark.parametrize("batch_tokens", [8192, 40])
@pytest.mark.parametrize("architecture", MODELS)
async def test_each_text_scores_as_it_does_alone_whatever_is_beside_it(
    architecture: str, batch_tokens: int, tmp_path: Path
) -> None:
    folder = make_classifier(tmp_path, architecture)
    alone = [logits_alone(folder, text)[0] for text in TEXTS]
    reward = await started(folder, batch_tokens=batch_tokens, max_tokens=40)
    assert await rewards(reward, TEXTS) == pytest.approx(alone, abs=1e-5)
    assert await rewards(reward, TEXTS[::-1]) == pytest.approx(alone[::-1], abs=1e-5)
    assert max(alone) - min(alone) > 0.1, "the texts must differ for this test to tell anything"


async def test_a_decoder_without_a_padding_token_judges_at_the_last_token_even_if_that_is_eos(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path, pad_token_id=None)
    texts = ["good<|endoftext|>", "good", "a much longer text than these", "\x00", "!"]
    reward = await started(folder)
    assert await rewards(reward, texts) == pytest.approx([logits_alone(folder, t)[0] for t in texts], abs=1e-5)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("logit", lambda logits: logits[1]),
        ("sigmoid", lambda logits: 1 / (1 + math.exp(-logits[1]))),
        ("softmax", lambda logits: math.exp(logits[1]) / sum(math.exp(each) for each in logits)),
    ],
)
async def test_the_reward_is_the_chosen_number_of_the_label_scaled_and_shifted(
    score: str, expected: Any, tmp_path: Path
) -> None:
    folder = make_classifier(tmp_path, "bert", labels=("bad", "good", "odd"))
    logits = logits_alone(folder, "fine")
    reward = await started(folder, label="good", score=score, scale=-3.0, shift=0.5)
    (outcome,) = await judge(reward, ["fine"])
    assert isinstance(outcome, Scored)
    assert outcome.reward == pytest.approx(expected(logits) * -3.0 + 0.5, abs=1e-5)
    assert outcome.components["logit"] == pytest.approx(logits[1], abs=1e-5)
    if score != "logit":
        assert outcome.components["probability"] == pytest.approx(expected(logits), abs=1e-6)


async def test_a_label_may_be_given_by_its_index(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path, labels=("bad", "good"))
    assert await rewards(await started(folder, label=0), ["fine"]) == pytest.approx(
        [logits_alone(folder, "fine")[0]], abs=1e-5
    )


async def test_both_reads_prompt_and_completion_as_one_text(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path)
    found = await rewards(await started(folder, text="both"), [" good"], prompt="It is")
    assert found == pytest.approx(logits_alone(folder, "It is good"), abs=1e-5)


async def test_a_pair_is_encoded_as_two_segments(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path, "bert")
    found = await rewards(await started(folder, text="pair"), ["good", "a longer answer", ""], prompt="It is")
    expected = [logits_alone(folder, "It is", text)[0] for text in ("good", "a longer answer")]
    assert found[:2] == pytest.approx(expected, abs=1e-5)
    assert found[0] != pytest.approx(logits_alone(folder, "It isgood")[0], abs=1e-3)


async def test_a_chat_is_rendered_by_the_template_with_its_own_turns_or_those_of_prompt_and_completion(
    tmp_path: Path,
) -> None:
    folder = make_classifier(tmp_path, "bert")
    reward = await started(folder, text="chat")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
    outcomes = await reward.score([Sample("Hi", "Ho"), Sample("ignored", "Ho", messages=turns)], None)
    expected = [
        logits_alone(folder, text, special_tokens=False)[0]
        for text in ("<user>Hi<assistant>Ho", "<system>Be brief.<user>Hi<assistant>Ho")
    ]
    assert [each.reward for each in outcomes if isinstance(each, Scored)] == pytest.approx(expected, abs=1e-5)


async def test_a_conversation_that_the_template_refuses_fails_alone(tmp_path: Path) -> None:
    template = "{% if messages|length > 2 %}{{ raise_exception('two turns only') }}{% endif %}{{ messages[0].content }}"
    reward = await started(make_classifier(tmp_path, chat_template=template), text="chat")
    three = [{"role": "user", "content": "a"}] * 3
    refused, scored = await reward.score([Sample("p", "c", messages=three), Sample("p", "c")], None)
    assert isinstance(refused, Failed)
    assert refused.code == "CHAT_TEMPLATE"
    assert "two turns only" in refused.message
    assert isinstance(scored, Scored)


@pytest.mark.parametrize(("truncate", "kept"), [("left", "67890"), ("right", "12345")])
async def test_a_long_text_is_cut_on_the_chosen_side_and_says_so(truncate: str, kept: str, tmp_path: Path) -> None:
    folder = make_classifier(tmp_path)
    reward = await started(folder, max_tokens=5, truncate=truncate)
    cut, whole = await judge(reward, ["1234567890", kept])
    assert isinstance(cut, Scored)
    assert isinstance(whole, Scored)
    assert cut.reward == pytest.approx(whole.reward, abs=1e-6)
    assert (cut.components["truncated"], whole.components["truncated"]) == (1.0, 0.0)


async def test_a_cut_text_keeps_its_special_tokens(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path, "bert")
    reward = await started(folder, max_tokens=5)
    assert await rewards(reward, ["1234567890"]) == pytest.approx(logits_alone(folder, "890"), abs=1e-5)


async def test_a_long_text_fails_if_that_is_wanted_and_its_neighbours_do_not(tmp_path: Path) -> None:
    reward = await started(make_classifier(tmp_path), max_tokens=5, truncate="fail")
    long, short = await judge(reward, ["123456", "12345"])
    assert isinstance(long, Failed)
    assert long.code == "TEXT_TOO_LONG"
    assert "6 tokens" in long.message
    assert isinstance(short, Scored)


async def test_by_itself_it_reads_what_the_model_can(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "roberta", "roberta")
    cut, whole = await judge(await started(folder), ["x" * 63, "x" * 62])
    assert isinstance(cut, Scored)
    assert isinstance(whole, Scored)
    assert cut.components["truncated"] == 1.0, "RoBERTa keeps two of its 66 positions for padding"
    assert whole.components["truncated"] == 0.0


async def test_an_empty_text_fails_where_it_has_no_token_and_its_neighbours_do_not(tmp_path: Path) -> None:
    reward = await started(make_classifier(tmp_path / "gpt2"), text="both")
    empty, scored = await judge(reward, ["", "good"])
    assert isinstance(empty, Failed)
    assert empty.code == "EMPTY_TEXT"
    assert isinstance(scored, Scored)
    assert isinstance((await judge(reward, [""]))[0], Failed)


async def test_an_empty_text_is_scored_where_the_tokenizer_frames_it(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path, "bert")
    assert await rewards(await started(folder), ["", "good"]) == pytest.approx(
        [logits_alone(folder, "")[0], logits_alone(folder, "good")[0]], abs=1e-5
    )


async def test_a_reward_that_is_not_finite_fails(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.wte.weight[ord("x") - ord("!")] = math.nan  # the byte tokenizer's id of "x"
    model.save_pretrained(folder)
    broken, scored = await judge(await started(folder), ["axa", "aaa"])
    assert isinstance(broken, Failed)
    assert broken.code == "NOT_FINITE"
    assert isinstance(scored, Scored)


async def refusal(folder: Path | str, **options: Any) -> str:
    with pytest.raises(RewardLoadError) as refused:
        await started(folder, **options)
    return str(refused.value)


async def test_what_cannot_be_loaded_is_explained(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "model", labels=("bad", "good"))
    assert "there is no folder" in await refusal(tmp_path / "nowhere")
    assert "there is no folder nowhere/at-all" in await refusal("nowhere/at-all")
    assert "label is one of 0 (bad), 1 (good)" in await refusal(folder)
    assert "no label 'fine'; label is one of 0 (bad), 1 (good)" in await refusal(folder, label="fine")
    assert "reads 64 at most" in await refusal(folder, label=0, max_tokens=65)
    assert "revision is for models of the hub" in await refusal(folder, label=0, revision="main")


async def test_a_limit_that_leaves_nothing_of_a_long_text_is_refused(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path, "bert")
    assert "needs 2 tokens for its own marks" in await refusal(folder, max_tokens=2)
    assert "needs 3 tokens for its own marks" in await refusal(folder, max_tokens=3, text="pair")
    assert "a text that is cut to 1" in await refusal(folder, batch_tokens=1)
    first, second = await rewards(await started(folder, max_tokens=3), ["aax", "aay"])
    assert first != second


async def test_softmax_over_one_label_is_refused_as_it_says_nothing(tmp_path: Path) -> None:
    assert "always 1" in await refusal(make_classifier(tmp_path), score="softmax")


async def test_a_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    assert "has none" in await refusal(make_classifier(tmp_path, chat_template=None), text="chat")


async def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path)
    for device, complaint in (("nonsense", "no device"), ("cuda:99", "there is no cuda:99")):
        reward = ModelReward(ModelOptions(model=str(folder), device=device), Limits())
        with pytest.raises(RewardLoadError, match=complaint):
            await reward.start()


async def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    message = await refusal(make_tiny_gpt2(tmp_path))
    assert "score.weight" in message
    assert "would be random" in message


async def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in await refusal(folder)


async def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path)
    (folder / "model.safetensors").unlink()
    assert "the classifier in" in await refusal(folder)


async def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    assert "258 tokens, its model only 257" in await refusal(folder)


def test_more_max_tokens_than_batch_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="more than batch_tokens"):
        ModelOptions(model="m", max_tokens=10, batch_tokens=9)


async def version(folder: Path, **options: Any) -> str:
    return (await started(folder, **options)).description.version


async def test_the_version_changes_with_all_that_scores_depend_on(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "a", labels=("bad", "good"))
    other_weights = make_classifier(tmp_path / "b", labels=("bad", "good"), seed=1)
    other_tokenizer = shutil.copytree(folder, tmp_path / "c")
    tokenizer = json.loads((other_tokenizer / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (other_tokenizer / "tokenizer.json").write_text(json.dumps(tokenizer))
    other_config = shutil.copytree(folder, tmp_path / "d")
    config = json.loads((other_config / "config.json").read_text())
    (other_config / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    versions = [
        await version(folder, label=0),
        await version(other_weights, label=0),
        await version(other_tokenizer, label=0),
        await version(other_config, label=0),
        await version(folder, label=1),
        await version(folder, label=0, score="softmax"),
        await version(folder, label=0, scale=2.0),
        await version(folder, label=0, shift=1.0),
        await version(folder, label=0, text="both"),
        await version(folder, label=0, max_tokens=5),
        await version(folder, label=0, truncate="right"),
        await version(folder, label=0, dtype="bfloat16"),
    ]
    assert len(set(versions)) == len(versions)


async def test_the_version_is_the_same_for_a_copy_and_for_other_batches(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "a")
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert await version(folder) == await version(copy) == await version(folder, batch_tokens=100)
    assert (await started(copy)).description.name == "copy"


async def test_a_call_that_nobody_waits_for_ends_before_its_next_forward(tmp_path: Path) -> None:
    reward = await started(make_classifier(tmp_path), batch_tokens=24, max_tokens=24)
    forwards: list[int] = []
    go_on = threading.Event()

    def stand_still(*_: Any) -> None:
        forwards.append(1)
        assert go_on.wait(30)

    hook = reward._classifier.model.register_forward_pre_hook(stand_still)
    call = asyncio.create_task(judge(reward, ["x" * 24] * 5))
    await until(lambda: forwards)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    go_on.set()
    # The one worker thread takes this call when it is done with the other.
    assert len(await rewards(reward, ["fine"])) == 1
    hook.remove()
    assert len(forwards) == 2


async def test_a_device_without_memory_makes_the_call_unavailable_and_fails_no_sample(tmp_path: Path) -> None:
    reward = await started(make_classifier(tmp_path))

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    hook = reward._classifier.model.register_forward_pre_hook(full)
    with pytest.raises(RpcFailure, match="batch_tokens=8192") as refused:
        await judge(reward, ["fine"])
    assert is_transient(refused.value)
    hook.remove()
    assert len(await rewards(reward, ["fine"])) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_half_precision_scores_near_full_precision(dtype: str, tmp_path: Path) -> None:
    folder = make_classifier(tmp_path, "bert")
    full = await rewards(await started(folder), TEXTS)
    half = await rewards(await started(folder, dtype=dtype), TEXTS)
    assert half == pytest.approx(full, abs=0.15)
    assert half != full


LENGTHS = st.lists(st.integers(1, 40), max_size=40)


@given(LENGTHS, st.integers(1, 100), st.booleans())
def test_micro_batches_hold_every_text_once_and_keep_to_the_budget(
    lengths: list[int], budget: int, padding: bool
) -> None:
    batches = list(micro_batches(lengths, budget, padding=padding))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        widths = [lengths[index] for index in batch]
        assert len(batch) == 1 or len(batch) * max(widths) <= budget
        assert padding or len(set(widths)) == 1


@given(LENGTHS, st.integers(40, 100))
def test_texts_that_fit_into_one_batch_share_it(lengths: list[int], budget: int) -> None:
    batches = list(micro_batches(lengths, budget))
    for batch, following in itertools.pairwise(batches):
        assert (len(batch) + 1) * lengths[batch[0]] > budget, "a batch ends only when it is full"
        assert min(lengths[index] for index in batch) >= lengths[following[0]], "the longest go first"


def test_a_process_serves_a_model(start_process: StartProcess, tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "model", "bert", labels=("bad", "good"))
    options = {"model": str(folder), "label": "good", "text": "pair", "score": "sigmoid"}
    server = start_process("reward_server", "--reward", "model", "--reward-options", json.dumps(options))
    server.wait_serving("rlhf.reward.v1.RewardService")
    with grpc.insecure_channel(server.address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        results = stub.Score(request(sample("a", "good"), sample("b", "")), timeout=30).results
    expected = 1 / (1 + math.exp(-logits_alone(folder, "It is", "good")[1]))
    assert results[0].scored.reward == pytest.approx(expected, abs=1e-5)
    assert results[0].scored.components["probability"] == pytest.approx(expected, abs=1e-5)
    assert results[1].WhichOneof("outcome") == "scored"
    assert server.terminate() == 0


def test_a_process_that_cannot_load_its_model_says_why_and_ends(start_process: StartProcess, tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "model", labels=("bad", "good"))
    options = json.dumps({"model": str(folder)})
    server = start_process("reward_server", "--reward", "model", "--reward-options", options)
    assert server.wait_exit() == 78
    assert "label is one of 0 (bad), 1 (good)" in server.log_text()
