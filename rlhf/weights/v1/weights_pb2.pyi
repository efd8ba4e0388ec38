from rlhf.policy.v1 import policy_pb2 as _policy_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InFlight(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IN_FLIGHT_UNSPECIFIED: _ClassVar[InFlight]
    IN_FLIGHT_RECOMPUTE: _ClassVar[InFlight]
    IN_FLIGHT_KEEP_CACHE: _ClassVar[InFlight]
    IN_FLIGHT_WAIT: _ClassVar[InFlight]
    IN_FLIGHT_ABORT: _ClassVar[InFlight]

class UpdateState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPDATE_STATE_UNSPECIFIED: _ClassVar[UpdateState]
    UPDATE_STATE_STAGING: _ClassVar[UpdateState]
    UPDATE_STATE_APPLIED: _ClassVar[UpdateState]
    UPDATE_STATE_FAILED: _ClassVar[UpdateState]
IN_FLIGHT_UNSPECIFIED: InFlight
IN_FLIGHT_RECOMPUTE: InFlight
IN_FLIGHT_KEEP_CACHE: InFlight
IN_FLIGHT_WAIT: InFlight
IN_FLIGHT_ABORT: InFlight
UPDATE_STATE_UNSPECIFIED: UpdateState
UPDATE_STATE_STAGING: UpdateState
UPDATE_STATE_APPLIED: UpdateState
UPDATE_STATE_FAILED: UpdateState

class UpdateWeightsRequest(_message.Message):
    __slots__ = ("begin", "manifest", "chunk", "commit")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    begin: Begin
    manifest: Manifest
    chunk: Chunk
    commit: Commit
    def __init__(self, begin: _Optional[_Union[Begin, _Mapping]] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("update_id", "model", "weights", "if_current", "partial", "in_flight", "stream", "directory", "total_bytes", "format", "adapter_config_json")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    IF_CURRENT_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    model: str
    weights: _policy_pb2.WeightsVersion
    if_current: _policy_pb2.WeightsVersion
    partial: bool
    in_flight: InFlight
    stream: StreamSource
    directory: DirectorySource
    total_bytes: int
    format: str
    adapter_config_json: str
    def __init__(self, update_id: _Optional[str] = ..., model: _Optional[str] = ..., weights: _Optional[_Union[_policy_pb2.WeightsVersion, _Mapping]] = ..., if_current: _Optional[_Union[_policy_pb2.WeightsVersion, _Mapping]] = ..., partial: _Optional[bool] = ..., in_flight: _Optional[_Union[InFlight, str]] = ..., stream: _Optional[_Union[StreamSource, _Mapping]] = ..., directory: _Optional[_Union[DirectorySource, _Mapping]] = ..., total_bytes: _Optional[int] = ..., format: _Optional[str] = ..., adapter_config_json: _Optional[str] = ...) -> None: ...

class StreamSource(_message.Message):
    __slots__ = ("part", "part_count")
    PART_FIELD_NUMBER: _ClassVar[int]
    PART_COUNT_FIELD_NUMBER: _ClassVar[int]
    part: int
    part_count: int
    def __init__(self, part: _Optional[int] = ..., part_count: _Optional[int] = ...) -> None: ...

class DirectorySource(_message.Message):
    __slots__ = ("path",)
    PATH_FIELD_NUMBER: _ClassVar[int]
    path: str
    def __init__(self, path: _Optional[str] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape", "xxh3_64")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    XXH3_64_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    xxh3_64: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., xxh3_64: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("tensor", "offset", "data", "xxh3_64")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    XXH3_64_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    offset: int
    data: bytes
    xxh3_64: int
    def __init__(self, tensor: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., xxh3_64: _Optional[int] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UpdateWeightsResponse(_message.Message):
    __slots__ = ("state", "live")
    STATE_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    state: UpdateState
    live: _policy_pb2.WeightsVersion
    def __init__(self, state: _Optional[_Union[UpdateState, str]] = ..., live: _Optional[_Union[_policy_pb2.WeightsVersion, _Mapping]] = ...) -> None: ...

class GetWeightsRequest(_message.Message):
    __slots__ = ("model", "update_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    model: str
    update_id: str
    def __init__(self, model: _Optional[str] = ..., update_id: _Optional[str] = ...) -> None: ...

class GetWeightsResponse(_message.Message):
    __slots__ = ("live", "state", "in_place", "max_parts", "server_instance_id", "max_staging_bytes", "features")
    LIVE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IN_PLACE_FIELD_NUMBER: _ClassVar[int]
    MAX_PARTS_FIELD_NUMBER: _ClassVar[int]
    SERVER_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_STAGING_BYTES_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    live: _policy_pb2.WeightsVersion
    state: UpdateState
    in_place: bool
    max_parts: int
    server_instance_id: str
    max_staging_bytes: int
    features: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, live: _Optional[_Union[_policy_pb2.WeightsVersion, _Mapping]] = ..., state: _Optional[_Union[UpdateState, str]] = ..., in_place: _Optional[bool] = ..., max_parts: _Optional[int] = ..., server_instance_id: _Optional[str] = ..., max_staging_bytes: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ...) -> None: ...
