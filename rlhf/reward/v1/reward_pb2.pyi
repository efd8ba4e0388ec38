import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_EOS: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]

class Scope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCOPE_UNSPECIFIED: _ClassVar[Scope]
    SCOPE_SAMPLE: _ClassVar[Scope]
    SCOPE_GROUP: _ClassVar[Scope]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_EOS: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
SCOPE_UNSPECIFIED: Scope
SCOPE_SAMPLE: Scope
SCOPE_GROUP: Scope

class ScoreRequest(_message.Message):
    __slots__ = ("reward", "run_id", "samples", "json_metadata_keys")
    REWARD_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    JSON_METADATA_KEYS_FIELD_NUMBER: _ClassVar[int]
    reward: str
    run_id: str
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    json_metadata_keys: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, reward: _Optional[str] = ..., run_id: _Optional[str] = ..., samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ..., json_metadata_keys: _Optional[_Iterable[str]] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("sample_id", "group_id", "group_size", "prompt", "completion", "messages", "completion_token_ids", "sampled_ranges", "finish_reason", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_RANGES_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    group_id: str
    group_size: int
    prompt: str
    completion: str
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    completion_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampled_ranges: _containers.RepeatedCompositeFieldContainer[TokenRange]
    finish_reason: FinishReason
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, sample_id: _Optional[str] = ..., group_id: _Optional[str] = ..., group_size: _Optional[int] = ..., prompt: _Optional[str] = ..., completion: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., completion_token_ids: _Optional[_Iterable[int]] = ..., sampled_ranges: _Optional[_Iterable[_Union[TokenRange, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class TokenRange(_message.Message):
    __slots__ = ("first", "past_last")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    PAST_LAST_FIELD_NUMBER: _ClassVar[int]
    first: int
    past_last: int
    def __init__(self, first: _Optional[int] = ..., past_last: _Optional[int] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "parts", "extra_json")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    EXTRA_JSON_FIELD_NUMBER: _ClassVar[int]
    role: str
    parts: _containers.RepeatedCompositeFieldContainer[ContentPart]
    extra_json: str
    def __init__(self, role: _Optional[str] = ..., parts: _Optional[_Iterable[_Union[ContentPart, _Mapping]]] = ..., extra_json: _Optional[str] = ...) -> None: ...

class ContentPart(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[SampleResult]
    def __init__(self, results: _Optional[_Iterable[_Union[SampleResult, _Mapping]]] = ...) -> None: ...

class SampleResult(_message.Message):
    __slots__ = ("sample_id", "scored", "abstained", "pending", "failed")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    ABSTAINED_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    scored: Scored
    abstained: Abstained
    pending: Pending
    failed: Failed
    def __init__(self, sample_id: _Optional[str] = ..., scored: _Optional[_Union[Scored, _Mapping]] = ..., abstained: _Optional[_Union[Abstained, _Mapping]] = ..., pending: _Optional[_Union[Pending, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...

class Scored(_message.Message):
    __slots__ = ("reward", "components", "token_rewards")
    class ComponentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REWARD_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_REWARDS_FIELD_NUMBER: _ClassVar[int]
    reward: float
    components: _containers.ScalarMap[str, float]
    token_rewards: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, reward: _Optional[float] = ..., components: _Optional[_Mapping[str, float]] = ..., token_rewards: _Optional[_Iterable[float]] = ...) -> None: ...

class Abstained(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Pending(_message.Message):
    __slots__ = ("retry_after",)
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    retry_after: _duration_pb2.Duration
    def __init__(self, retry_after: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class GetRewardInfoRequest(_message.Message):
    __slots__ = ("reward",)
    REWARD_FIELD_NUMBER: _ClassVar[int]
    reward: str
    def __init__(self, reward: _Optional[str] = ...) -> None: ...

class GetRewardInfoResponse(_message.Message):
    __slots__ = ("name", "version", "max_samples", "max_request_bytes", "max_concurrent_calls", "scope", "required_metadata", "needs_token_ids", "features", "remembers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENT_CALLS_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_METADATA_FIELD_NUMBER: _ClassVar[int]
    NEEDS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    REMEMBERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    max_samples: int
    max_request_bytes: int
    max_concurrent_calls: int
    scope: Scope
    required_metadata: _containers.RepeatedScalarFieldContainer[str]
    needs_token_ids: bool
    features: _containers.RepeatedScalarFieldContainer[str]
    remembers: _duration_pb2.Duration
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., max_samples: _Optional[int] = ..., max_request_bytes: _Optional[int] = ..., max_concurrent_calls: _Optional[int] = ..., scope: _Optional[_Union[Scope, str]] = ..., required_metadata: _Optional[_Iterable[str]] = ..., needs_token_ids: _Optional[bool] = ..., features: _Optional[_Iterable[str]] = ..., remembers: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
