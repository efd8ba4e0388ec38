"""The http kind: a reward model behind POST with JSON, as OpenRLHF's remote reward models are asked."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import httpx2
from pydantic import Field, field_validator, model_validator

from reward_server.kinds import Description, Limits, RewardKind, Sample
from reward_server.kinds.peer import Peer, PeerOptions
from reward_server.kinds.versions import version_of
from reward_server.kinds.web import check_secret, parsed_url, place, quiet_request_log, retry_after, secret
from reward_server.results import Abstained, Failed, FailureCode, Outcome, Pending, Scored
from rlhf.failures import internal, unavailable
from rlhf.reward_answers import MalformedAnswerError

# Of these the samples are to blame, so the others go on; any other status below 500 means that the options are wrong.
_ABOUT_THE_SAMPLES = frozenset({400, 413, 422})
_TRANSIENT = frozenset({408, 425, 429})


class HttpOptions(PeerOptions):
    """A reward model behind POST."""

    url: str = Field(description="Where batches are posted to")
    query: Literal["both", "completion"] = Field(
        default="both", description="What `query` holds: prompt and completion in one text, or the completion alone"
    )
    label_column: str = Field(
        default="", description="Column that is sent as `labels`, and that every sample needs; empty = empty labels"
    )
    headers: dict[str, str] = Field(default_factory=dict, description="Further headers of each request; no secrets")
    token_file: Path | None = Field(
        default=None, description="File whose content is sent as a bearer token; read for each request"
    )
    version: str = Field(
        default="", description="Part of the reward's version: change it when the model behind the URL changes"
    )
    concurrency: int | None = Field(
        default=None, ge=1, description="Requests at once; unset = the server's max_concurrent_calls [requests]"
    )
    batch_size: int | None = Field(
        default=None, ge=1, description="Most samples in one request; unset = the server's batch_size [samples]"
    )

    @field_validator("url")
    @classmethod
    def _url_is_absolute(cls, url: str) -> str:
        parsed_url(url)
        return url

    @field_validator("headers")
    @classmethod
    def _headers_can_be_sent(cls, headers: dict[str, str]) -> dict[str, str]:
        for text in (*headers, *headers.values()):
            if not (text.isascii() and text.isprintable()):
                raise ValueError(f"{text!r} is not plain ASCII in one line")
        return headers

    @model_validator(mode="after")
    def _one_authorization(self) -> HttpOptions:
        if self.token_file is not None and any(name.lower() == "authorization" for name in self.headers):
            raise ValueError("token_file and an Authorization header exclude each other")
        return self


class HttpReward(RewardKind):
    """Posts batches and reads one reward per sample."""

    kind = "http"

    def __init__(self, options: HttpOptions, limits: Limits) -> None:
        self._options = options
        self.concurrency = options.concurrency or limits.concurrency
        self.batch_size = options.batch_size or limits.batch_size
        url = parsed_url(options.url)
        self._place = place(url)
        self._peer = Peer(self.kind, "reward model", self._place, options)
        self._client: httpx2.AsyncClient | None = None
        self.description = Description(
            name=f"{url.netloc.decode()}{url.path}",
            version=version_of(
                "http",
                url=options.url,
                query=options.query,
                label_column=options.label_column,
                headers=options.headers,
                version=options.version,
            ),
            required_metadata=(options.label_column,) if options.label_column else (),
        )

    async def start(self) -> None:
        """Check what can be checked without a sample; the reward model may come up later."""
        if self._options.token_file is not None:
            check_secret(self._options.token_file)
        quiet_request_log()
        self._client = httpx2.AsyncClient(
            timeout=self._options.timeout, limits=httpx2.Limits(max_connections=self.concurrency)
        )

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    async def score(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
        """What the reward model answers; Pending while it is away.

        A request that runs is not cut when its caller is told PENDING: the model remembers nothing, and would begin
        anew when the caller comes back.
        """
        column = self._options.label_column
        lacks = Failed(FailureCode.MISSING_METADATA, f"the reward needs the column {column!r}")
        judged = [sample for sample in samples if not column or column in sample.metadata]
        answers = iter(await self._judge(judged, answer_by) if judged else ())
        return [next(answers) if not column or column in sample.metadata else lacks for sample in samples]

    async def _judge(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
        content = json.dumps(self._body(samples)).encode()
        answer = await self._peer.ask_and_read(
            lambda: self._post(content),
            lambda body: body if isinstance(body, Failed) else _rewards(body, len(samples)),
            until=self._peer.deadline(answer_by),
        )
        if isinstance(answer, Pending | Failed):
            return [answer] * len(samples)
        return [_outcome(reward) for reward in answer]

    def _body(self, samples: Sequence[Sample]) -> dict[str, list[Any]]:
        column, alone = self._options.label_column, self._options.query == "completion"
        return {
            "query": [sample.completion if alone else sample.prompt + sample.completion for sample in samples],
            "prompts": [sample.prompt for sample in samples],
            "labels": [sample.metadata[column] if column else "" for sample in samples],
        }

    async def _post(self, content: bytes) -> bytes | Failed:
        """The body of a good answer, or why the samples were refused; raises RpcFailure for anything else."""
        assert self._client is not None
        headers = {**self._options.headers, "content-type": "application/json"}
        if self._options.token_file is not None:
            headers["authorization"] = f"Bearer {secret(self._options.token_file)}"
        try:
            # httpx2's own timeouts are about each read; a server that dribbles keeps within them for ever.
            async with asyncio.timeout(self._options.timeout):
                answer = await self._client.post(self._options.url, content=content, headers=headers)
        except TimeoutError:
            raise unavailable(f"no answer within {self._options.timeout:g} s") from None
        except httpx2.RequestError as error:
            raise unavailable(f"{type(error).__name__}: {error}") from error
        status = answer.status_code
        if answer.is_success:
            return answer.content
        if status >= 500 or status in _TRANSIENT:
            raise unavailable(f"status {status}", retry_after(answer.headers))
        if status in _ABOUT_THE_SAMPLES:
            return Failed(FailureCode.REMOTE_REFUSED, f"status {status}: {answer.text[:200]}")
        raise internal(
            f"reward model {self._place} answers with status {status}, which no sample is to blame for:"
            " check url, token_file and headers"
        )


def _rewards(body: bytes, count: int) -> list[Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise MalformedAnswerError("the answer is not JSON") from None
    rewards = content.get("rewards") if isinstance(content, dict) else None
    if not isinstance(rewards, list):
        raise MalformedAnswerError("the answer is no JSON object with a list `rewards`")
    if len(rewards) != count:
        raise MalformedAnswerError(f"{len(rewards)} rewards for {count} samples")
    return rewards


def _outcome(reward: Any) -> Outcome:
    if isinstance(reward, list) and len(reward) == 1:
        (reward,) = reward
    if reward is None:
        return Abstained("the reward model answered null")
    if not isinstance(reward, int | float):
        return Failed(FailureCode.WRONG_RESULT, f"the reward is {json.dumps(reward)[:100]}, not a number")
    try:
        number = float(reward)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return Failed(FailureCode.NOT_FINITE, f"the reward is {number}, not a finite number")
    return Scored(number)
