"""Generate, StreamGenerate, LogProbs and GetModel when all is well."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.policy.v1 import policy_pb2
from tests.policy_server.harness import Served, generate, greedy, publish, serving, tokens, update, version, weights_of

EOS = 256
BOTH = [policy_pb2.LOG_PROB_KIND_RAW, policy_pb2.LOG_PROB_KIND_PROCESSED]


async def test_generate_returns_every_completion_with_its_seed_spans_and_logprobs(served: Served) -> None:
    answer = await served.policy.Generate(generate(n=3, seed=7, logprobs=BOTH, temperature=0.7))

    assert list(answer.prompt_token_ids) == [40, 41, 42]
    assert [completion.index for completion in answer.completions] == [0, 1, 2]
    assert [completion.seed for completion in answer.completions] == [7, 8, 9]
    for completion in answer.completions:
        count = len(completion.token_ids)
        assert 1 <= count <= 8
        assert completion.finish_reason in (policy_pb2.FINISH_REASON_EOS, policy_pb2.FINISH_REASON_LENGTH)
        assert len(completion.raw_logprobs) == len(completion.processed_logprobs) == count
        assert sum(span.token_count for span in completion.spans) == count
        assert all(span.weights == policy_pb2.WeightsVersion() for span in completion.spans)


async def test_logprobs_that_were_not_asked_for_are_empty(served: Served) -> None:
    answer = await served.policy.Generate(generate())

    assert not answer.completions[0].raw_logprobs
    assert not answer.completions[0].processed_logprobs


async def test_one_completion_can_be_asked_for_again_by_its_seed(served: Served) -> None:
    three = await served.policy.Generate(generate(n=3, seed=2**64 - 1))
    again = await served.policy.Generate(generate(seed=three.completions[2].seed))

    assert three.completions[1].seed == 0
    assert again.completions[0].token_ids == three.completions[2].token_ids


async def test_a_request_without_a_seed_gets_one_that_repeats_it(served: Served) -> None:
    request = generate()
    request.sampling.ClearField("seed")

    first = (await served.policy.Generate(request)).completions[0]
    other = (await served.policy.Generate(request)).completions[0]
    again = (await served.policy.Generate(generate(seed=first.seed))).completions[0]

    assert first.seed != other.seed
    assert again.token_ids == first.token_ids


async def test_a_completion_goes_on_from_a_prefix_as_if_never_interrupted(served: Served) -> None:
    whole = (await served.policy.Generate(generate(seed=3, min_new_tokens=8))).completions[0]
    rest = await served.policy.Generate(generate(seed=3, min_new_tokens=8, completion_prefix=whole.token_ids[:3]))

    assert list(rest.completions[0].token_ids) == list(whole.token_ids[3:])


async def test_text_is_encoded_by_the_models_tokenizer(served: Served, tiny_model: Path) -> None:
    answer = await served.policy.Generate(generate(policy_pb2.Prompt(text="héllo")))

    assert list(answer.prompt_token_ids) == AutoTokenizer.from_pretrained(tiny_model)("héllo")["input_ids"]


async def test_sampling_that_is_unset_takes_the_contracts_defaults(tiny_model: Path) -> None:
    async with serving(tiny_model, default_max_new_tokens=5) as served:
        answer = await served.policy.Generate(policy_pb2.GenerateRequest(prompt=tokens(40)))

    assert len(answer.completions) == 1
    assert len(answer.completions[0].token_ids) <= 5


async def test_a_stop_string_ends_the_completion_and_is_left_out_of_the_text(served: Served) -> None:
    plain = (await served.policy.Generate(generate(max_new_tokens=60, seed=5))).completions[0]
    stop = next(character for character in plain.text if character.isascii())

    request = generate(max_new_tokens=60, seed=5, stop_strings=["never seen", stop])
    stopped = (await served.policy.Generate(request)).completions[0]

    assert stopped.finish_reason == policy_pb2.FINISH_REASON_STOP
    assert stopped.stop_string == stop
    assert stopped.text == plain.text.split(stop)[0]
    assert list(stopped.token_ids) == list(plain.token_ids[: len(stopped.token_ids)])


async def test_a_stop_token_is_the_last_token_of_its_completion(served: Served) -> None:
    plain = await greedy(served)
    answer = await served.policy.Generate(generate(temperature=0.0, stop_token_ids=[plain[1]]))

    completion = answer.completions[0]
    assert completion.finish_reason == policy_pb2.FINISH_REASON_STOP
    assert completion.token_ids[-1] == plain[1]
    assert completion.stop_string == ""


async def test_the_context_ends_a_completion_that_asks_for_more(served: Served) -> None:
    answer = await served.policy.Generate(generate(tokens(*[40] * 126), max_new_tokens=50, min_new_tokens=50))

    assert len(answer.completions[0].token_ids) == 2
    assert answer.completions[0].finish_reason == policy_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("interval", [None, 3, 1000])
async def test_streaming_adds_up_to_the_unary_answer(served: Served, interval: int | None) -> None:
    request = generate(n=3, seed=11, max_new_tokens=20, logprobs=BOTH)
    unary = await served.policy.Generate(request)
    added = [policy_pb2.Completion(index=index) for index in range(3)]
    prompts = []
    async for message in served.policy.StreamGenerate(
        policy_pb2.StreamGenerateRequest(request=request, stream_interval=interval)
    ):
        delta = message.delta
        whole = added[delta.index]
        assert whole.finish_reason == policy_pb2.FINISH_REASON_UNSPECIFIED
        if delta.finish_reason == policy_pb2.FINISH_REASON_UNSPECIFIED:
            assert len(delta.token_ids) >= (interval or 1)
        whole.token_ids.extend(delta.token_ids)
        whole.text += delta.text
        whole.raw_logprobs.extend(delta.raw_logprobs)
        whole.processed_logprobs.extend(delta.processed_logprobs)
        whole.finish_reason = delta.finish_reason
        prompts.append(list(message.prompt_token_ids))
        assert delta.seed == 11 + delta.index

    assert prompts[0] == [40, 41, 42]
    assert not any(prompts[1:])
    for streamed, plain in zip(added, unary.completions, strict=True):
        assert streamed.token_ids == plain.token_ids
        assert streamed.text == plain.text
        assert streamed.finish_reason == plain.finish_reason
        assert list(streamed.raw_logprobs) == pytest.approx(list(plain.raw_logprobs), abs=1e-5)


async def test_a_callers_disconnect_frees_the_engine(tiny_model: Path) -> None:
    async with serving(tiny_model, max_batch_rows=1) as served:
        call = served.policy.StreamGenerate(
            policy_pb2.StreamGenerateRequest(request=generate(max_new_tokens=120, min_new_tokens=120))
        )
        await call.read()
        call.cancel()

        answer = await served.policy.Generate(generate(max_new_tokens=1), timeout=20)

    assert len(answer.completions[0].token_ids) == 1


async def test_a_chat_is_rendered_with_the_models_template(served: Served, tiny_model: Path) -> None:
    chat = policy_pb2.Chat(
        messages=[
            policy_pb2.ChatMessage(role="system", parts=[policy_pb2.ContentPart(text="Be brief.")]),
            policy_pb2.ChatMessage(
                role="user", parts=[policy_pb2.ContentPart(text="Hel"), policy_pb2.ContentPart(text="lo")]
            ),
        ]
    )
    answer = await served.policy.Generate(generate(policy_pb2.Prompt(chat=chat)))

    rendered = AutoTokenizer.from_pretrained(tiny_model).decode(answer.prompt_token_ids)
    assert rendered == "system: Be brief.\nuser: Hello\nassistant: "


async def test_template_arguments_reach_the_template(served: Served, tiny_model: Path) -> None:
    chat = policy_pb2.Chat(
        messages=[policy_pb2.ChatMessage(role="user", parts=[policy_pb2.ContentPart(text="Hi")])],
        template_arguments_json='{"add_generation_prompt": false}',
    )
    answer = await served.policy.Generate(generate(policy_pb2.Prompt(chat=chat)))

    assert AutoTokenizer.from_pretrained(tiny_model).decode(answer.prompt_token_ids) == "user: Hi\n"


@pytest.mark.parametrize("model", ["", "policy", "reference"])
async def test_logprobs_are_the_models_under_the_temperature(served: Served, tiny_model: Path, model: str) -> None:
    answer = await served.policy.LogProbs(
        policy_pb2.LogProbsRequest(
            model=model,
            sequences=[
                policy_pb2.Sequence(prompt_token_ids=[40, 41], completion_token_ids=[50, 51, EOS]),
                policy_pb2.Sequence(prompt_token_ids=[42], completion_token_ids=[60]),
            ],
            temperature=0.5,
            entropies=True,
        )
    )

    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(tiny_model)(torch.tensor([[40, 41, 50, 51, EOS]])).logits
    expected = (logits[0, 1:4] / 0.5).log_softmax(-1)
    assert list(answer.sequences[0].logprobs) == pytest.approx(
        [expected[0, 50].item(), expected[1, 51].item(), expected[2, EOS].item()], abs=1e-4
    )
    entropies = -(expected.exp() * expected).sum(-1)
    assert list(answer.sequences[0].entropies) == pytest.approx(entropies.tolist(), abs=1e-4)
    assert len(answer.sequences[1].logprobs) == 1
    assert answer.weights == policy_pb2.WeightsVersion()


async def test_get_model_tells_limits_kinds_and_digests(tiny_model: Path) -> None:
    async with serving(
        tiny_model, max_context_tokens=100, default_max_new_tokens=9, max_message_bytes=8 << 20
    ) as served:
        policy = await served.policy.GetModel(policy_pb2.GetModelRequest())
        reference = await served.policy.GetModel(policy_pb2.GetModelRequest(model="reference"))

    assert policy.model == "policy"
    assert policy.vocab_size == 257
    assert list(policy.eos_token_ids) == [EOS]
    assert policy.max_context_tokens == 100
    assert policy.default_max_new_tokens == 9
    assert policy.max_message_bytes == 8 << 20
    assert policy.serving_dtype == "float32"
    assert list(policy.logprobs) == BOTH
    assert policy.tokenizer_digest.startswith("sha256:")
    assert policy.weights_digest.startswith("xxh3_128:")
    assert reference.model == "reference"
    assert reference.weights_digest == policy.weights_digest


async def test_a_reference_of_its_own_is_served_beside_the_policy(tiny_model: Path, other_model: Path) -> None:
    async with serving(tiny_model, reference=str(other_model)) as served:
        policy = await served.policy.GetModel(policy_pb2.GetModelRequest())
        reference = await served.policy.GetModel(policy_pb2.GetModelRequest(model="reference"))
        of_policy, of_reference = await asyncio.gather(greedy(served), greedy(served, model="reference"))

    assert policy.weights_digest != reference.weights_digest
    assert of_policy != of_reference


async def test_tokens_carry_the_version_that_sampled_them(served: Served, other_model: Path) -> None:
    await publish(served, update(weights_of(other_model), version(4)))

    policy = await served.policy.Generate(generate())
    reference = await served.policy.Generate(generate(model="reference"))
    scores = await served.policy.LogProbs(
        policy_pb2.LogProbsRequest(sequences=[policy_pb2.Sequence(prompt_token_ids=[1], completion_token_ids=[2])])
    )

    assert [span.weights for span in policy.completions[0].spans] == [version(4)]
    assert [span.weights for span in reference.completions[0].spans] == [policy_pb2.WeightsVersion()]
    assert scores.weights == version(4)
