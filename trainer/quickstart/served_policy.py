"""A policy server behind blocking calls: what the in-process façade needs of one, on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import uuid
import weakref
from collections.abc import Collection, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.channel import RetryPolicy, call_metadata
from rlhf.fingerprints import tokenizer_digest, weights_digest
from rlhf.security.config import ClientSecurity
from trainer.adapters import base_parameters
from trainer.clients.policy import REFERENCE, ModelInfo, PolicyClient
from trainer.clients.publisher import WeightPublisher
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.quickstart.sampling import ServedSampling
from trainer.versions import WeightsVersion

T = TypeVar("T")

# Enough to fill a server's batch; the server queues or pushes back on more.
_REQUESTS_AT_ONCE = 64
_SEQUENCES_PER_CALL = 32

# Somebody sits in front of it: a server that is back should be noticed soon.
_RETRY = RetryPolicy(maximum=2.0)


class ServerMismatchError(ValueError):
    """The server has another tokenizer or reference model than this trainer: its numbers would be of other things."""


class ServedPolicy:
    """One policy server that this object alone publishes to, under a run id of its own.

    Every generation and every reference log-probability belongs to exactly the weights published last; a server that
    was restarted gets them again. Calls wait as long as the server is away. Not for use by several threads at once.
    """

    def __init__(
        self,
        target: str,
        *,
        tokenizer: PreTrainedTokenizerBase,
        reference: AutoModelForCausalLMWithValueHead,
        security: ClientSecurity | None = None,
    ) -> None:
        """Connect to `target` ("host:port") and compare tokenizer and reference weights with this side's.

        reference: of a model with an adapter, what is under that. security: None = neither TLS nor a token.

        Raises ServerMismatchError when either differs.
        """
        self.target = target
        self._reference = reference
        self._security = security
        self._tokenizer_digest = tokenizer_digest(tokenizer)
        self._version = WeightsVersion(run_id=uuid.uuid4().hex, incarnation=1, version=0)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"policy server {target}", daemon=True)
        self._thread.start()
        self._client, self._publisher = self._run(self._connect())
        self._close = weakref.finalize(self, _close, self._loop, self._thread, self._client, self._publisher)
        self._reference_digests: dict[str, str] = {}
        self.info: ModelInfo
        try:
            self._run(self._check_server())
        except BaseException:
            self.close()
            raise

    def publish(self, tensors: Iterable[tuple[str, Tensor]], *, frozen: Collection[str] = ()) -> WeightsVersion:
        """Make these the served policy's weights (transformers' names, tied ones once) and return their version.

        frozen: names of those that are the same each time.
        """
        version = WeightsVersion(self._version.run_id, self._version.incarnation, self._version.version + 1)
        self._run(self._publisher.publish(list(tensors), version, frozen=frozen))
        self._version = version
        return version

    def generate(self, queries: Sequence[Tensor], sampling: Sequence[ServedSampling]) -> list[Tensor]:
        """One completion [t_i] per prompt [q_i], with its terminating token; seeds come from torch's generator."""
        seeds = [int(seed) for seed in torch.randint(2**63 - 1, (len(queries),))]
        return self._run(self._generate(queries, sampling, seeds))

    def reference_logprobs(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> list[Tensor]:
        """Log-probabilities [t_i] of each response under the served reference, fp32."""
        return self._run(self._log_probs(queries, responses))

    def close(self) -> None:
        """Close the connection and end the thread; again does nothing."""
        self._close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if not self._thread.is_alive():
            work.close()
            raise RuntimeError(f"the connection to policy server {self.target} is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _connect(self) -> tuple[PolicyClient, WeightPublisher]:
        # Channels belong to the loop they are made on.
        metadata = call_metadata(run_id=self._version.run_id)
        this = weakref.ref(self)

        async def check_new_server() -> None:
            if (served := this()) is not None:
                await served._check_server()

        publisher = WeightPublisher(
            self.target, retry=_RETRY, on_new_server=check_new_server, metadata=metadata, security=self._security
        )
        client = PolicyClient(
            self.target, retry=_RETRY, recover=publisher.ensure, metadata=metadata, security=self._security
        )
        return client, publisher

    async def _check_server(self) -> None:
        policy, reference = await asyncio.gather(self._client.get_model(), self._client.get_model(REFERENCE))
        if policy.tokenizer_digest != self._tokenizer_digest:
            raise ServerMismatchError(
                f"policy server {self.target} has tokenizer {policy.tokenizer_digest}, this trainer has "
                f"{self._tokenizer_digest}: start the server with the folder that this tokenizer came from"
            )
        ours = self._reference_digest(reference.serving_dtype)
        if reference.weights_digest != ours:
            raise ServerMismatchError(
                f"policy server {self.target} serves a reference with weights {reference.weights_digest}, ref_model "
                f"(the model itself when none is given) has {ours}: start the server with --reference on the folder "
                "that ref_model came from"
            )
        self.info = policy

    def _reference_digest(self, serving_dtype: str) -> str:
        if serving_dtype not in self._reference_digests:
            dtype = getattr(torch, serving_dtype, None)
            if not isinstance(dtype, torch.dtype):
                raise ServerMismatchError(
                    f"policy server {self.target} serves its reference as {serving_dtype!r}, which torch can't cast "
                    "to: its weights can't be compared with ref_model's"
                )
            self._reference_digests[serving_dtype] = weights_digest(
                base_parameters(self._reference.pretrained_model), dtype
            )
        return self._reference_digests[serving_dtype]

    async def _generate(
        self, queries: Sequence[Tensor], sampling: Sequence[ServedSampling], seeds: Sequence[int]
    ) -> list[Tensor]:
        slots = asyncio.Semaphore(_REQUESTS_AT_ONCE)

        async def one(query: Tensor, asked: ServedSampling, seed: int) -> Tensor:
            prompt = query.tolist()
            async with slots:
                [completion] = await self._client.generate(
                    prompt,
                    seed=seed,
                    max_new_tokens=asked.most_new_tokens(len(prompt)),
                    temperature=asked.temperature,
                    top_k=asked.top_k,
                    top_p=asked.top_p,
                    min_new_tokens=asked.least_new_tokens(len(prompt)),
                    weights=self._version,
                )
            return torch.tensor(completion.token_ids, dtype=torch.int64)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(*row)) for row in zip(queries, sampling, seeds, strict=True)]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _log_probs(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> list[Tensor]:
        sequences = [(q.tolist(), r.tolist()) for q, r in zip(queries, responses, strict=True)]
        lengths = [len(query) + len(response) for query, response in sequences]
        rows: list[list[float]] = []
        for group in self.info.log_probs_groups(lengths, rows=_SEQUENCES_PER_CALL):
            rows.extend(await self._client.log_probs(REFERENCE, sequences[group.start : group.stop]))
        # A server that was restarted since may have answered with another reference, and is checked here if it was.
        await self._publisher.ensure()
        return [torch.tensor(row, dtype=torch.float32) for row in rows]


def _close(
    loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: PolicyClient, publisher: WeightPublisher
) -> None:
    async def close_channels() -> None:
        await client.close()
        await publisher.close()

    asyncio.run_coroutine_threadsafe(close_channels(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
