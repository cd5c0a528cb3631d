from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HoldRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Holdings(_message.Message):
    __slots__ = ("requests", "running", "waiting", "kv_blocks", "inbox_transfers", "inbox_bytes", "sending_transfers", "staged_bytes", "peers", "tasks")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    INBOX_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    INBOX_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENDING_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    STAGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    requests: int
    running: int
    waiting: int
    kv_blocks: int
    inbox_transfers: int
    inbox_bytes: int
    sending_transfers: int
    staged_bytes: int
    peers: int
    tasks: int
    def __init__(self, requests: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_blocks: _Optional[int] = ..., inbox_transfers: _Optional[int] = ..., inbox_bytes: _Optional[int] = ..., sending_transfers: _Optional[int] = ..., staged_bytes: _Optional[int] = ..., peers: _Optional[int] = ..., tasks: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerDescription(_message.Message):
    __slots__ = ("worker_id", "incarnation", "fingerprint", "kv_address", "accelerator", "max_model_len_tokens", "kv_blocks", "block_size_tokens", "max_num_seqs", "max_num_batched_tokens", "kv_bytes_per_token", "supported_tasks", "inbox_bytes_max", "block_hash_probe", "adapters_max", "adapters_at_once_max")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SUPPORTED_TASKS_FIELD_NUMBER: _ClassVar[int]
    INBOX_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASH_PROBE_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_MAX_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_AT_ONCE_MAX_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    fingerprint: Fingerprint
    kv_address: str
    accelerator: str
    max_model_len_tokens: int
    kv_blocks: int
    block_size_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_bytes_per_token: int
    supported_tasks: _containers.RepeatedScalarFieldContainer[str]
    inbox_bytes_max: int
    block_hash_probe: int
    adapters_max: int
    adapters_at_once_max: int
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., kv_address: _Optional[str] = ..., accelerator: _Optional[str] = ..., max_model_len_tokens: _Optional[int] = ..., kv_blocks: _Optional[int] = ..., block_size_tokens: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., supported_tasks: _Optional[_Iterable[str]] = ..., inbox_bytes_max: _Optional[int] = ..., block_hash_probe: _Optional[int] = ..., adapters_max: _Optional[int] = ..., adapters_at_once_max: _Optional[int] = ...) -> None: ...

class Fingerprint(_message.Message):
    __slots__ = ("model", "revision", "weights", "dtype", "kv_dtype", "layers", "kv_heads", "head_size", "vllm_version", "baton_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    VLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    BATON_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    weights: str
    dtype: str
    kv_dtype: str
    layers: int
    kv_heads: int
    head_size: int
    vllm_version: str
    baton_version: str
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., weights: _Optional[str] = ..., dtype: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_size: _Optional[int] = ..., vllm_version: _Optional[str] = ..., baton_version: _Optional[str] = ...) -> None: ...

class ToEngineBatch(_message.Message):
    __slots__ = ("number", "messages")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    number: int
    messages: _containers.RepeatedCompositeFieldContainer[ToEngine]
    def __init__(self, number: _Optional[int] = ..., messages: _Optional[_Iterable[_Union[ToEngine, _Mapping]]] = ...) -> None: ...

class ToEngine(_message.Message):
    __slots__ = ("add", "abort", "utility", "drop", "tell_kv", "hold", "move", "sender_lost", "taken")
    ADD_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    UTILITY_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    TELL_KV_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    SENDER_LOST_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    add: AddRequest
    abort: AbortRequests
    utility: UtilityCall
    drop: DropTransfer
    tell_kv: TellKv
    hold: HoldPrefix
    move: MoveOut
    sender_lost: SenderLost
    taken: BatchesTaken
    def __init__(self, add: _Optional[_Union[AddRequest, _Mapping]] = ..., abort: _Optional[_Union[AbortRequests, _Mapping]] = ..., utility: _Optional[_Union[UtilityCall, _Mapping]] = ..., drop: _Optional[_Union[DropTransfer, _Mapping]] = ..., tell_kv: _Optional[_Union[TellKv, _Mapping]] = ..., hold: _Optional[_Union[HoldPrefix, _Mapping]] = ..., move: _Optional[_Union[MoveOut, _Mapping]] = ..., sender_lost: _Optional[_Union[SenderLost, _Mapping]] = ..., taken: _Optional[_Union[BatchesTaken, _Mapping]] = ...) -> None: ...

class AddRequest(_message.Message):
    __slots__ = ("leg_id", "request", "send", "receive", "resume_token_ids")
    LEG_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SEND_FIELD_NUMBER: _ClassVar[int]
    RECEIVE_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    leg_id: str
    request: _containers.RepeatedScalarFieldContainer[bytes]
    send: SendKv
    receive: ReceiveKv
    resume_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, leg_id: _Optional[str] = ..., request: _Optional[_Iterable[bytes]] = ..., send: _Optional[_Union[SendKv, _Mapping]] = ..., receive: _Optional[_Union[ReceiveKv, _Mapping]] = ..., resume_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SendKv(_message.Message):
    __slots__ = ("transfer_id", "address", "worker_id", "incarnation", "expects_held")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EXPECTS_HELD_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    address: str
    worker_id: str
    incarnation: str
    expects_held: bool
    def __init__(self, transfer_id: _Optional[str] = ..., address: _Optional[str] = ..., worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., expects_held: _Optional[bool] = ...) -> None: ...

class ReceiveKv(_message.Message):
    __slots__ = ("transfer_id", "worker_id", "incarnation", "deadline_s")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    worker_id: str
    incarnation: str
    deadline_s: float
    def __init__(self, transfer_id: _Optional[str] = ..., worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class AbortRequests(_message.Message):
    __slots__ = ("request_ids",)
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class DropTransfer(_message.Message):
    __slots__ = ("transfer_id",)
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    def __init__(self, transfer_id: _Optional[str] = ...) -> None: ...

class SenderLost(_message.Message):
    __slots__ = ("transfer_id", "reason")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    reason: str
    def __init__(self, transfer_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class BatchesTaken(_message.Message):
    __slots__ = ("gather", "number")
    GATHER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    gather: bool
    number: int
    def __init__(self, gather: _Optional[bool] = ..., number: _Optional[int] = ...) -> None: ...

class TellKv(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HoldPrefix(_message.Message):
    __slots__ = ("transfer_id", "request")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    request: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, transfer_id: _Optional[str] = ..., request: _Optional[_Iterable[bytes]] = ...) -> None: ...

class MoveOut(_message.Message):
    __slots__ = ("leg_id", "send")
    LEG_ID_FIELD_NUMBER: _ClassVar[int]
    SEND_FIELD_NUMBER: _ClassVar[int]
    leg_id: str
    send: SendKv
    def __init__(self, leg_id: _Optional[str] = ..., send: _Optional[_Union[SendKv, _Mapping]] = ...) -> None: ...

class UtilityCall(_message.Message):
    __slots__ = ("call_id", "method", "args")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    method: str
    args: bytes
    def __init__(self, call_id: _Optional[int] = ..., method: _Optional[str] = ..., args: _Optional[bytes] = ...) -> None: ...

class FromEngineBatch(_message.Message):
    __slots__ = ("number", "messages")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    number: int
    messages: _containers.RepeatedCompositeFieldContainer[FromEngine]
    def __init__(self, number: _Optional[int] = ..., messages: _Optional[_Iterable[_Union[FromEngine, _Mapping]]] = ...) -> None: ...

class FromEngine(_message.Message):
    __slots__ = ("outputs", "utility", "adopted", "failed", "kv_events", "moved", "undelivered")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    UTILITY_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    KV_EVENTS_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    UNDELIVERED_FIELD_NUMBER: _ClassVar[int]
    outputs: StepOutputs
    utility: UtilityReply
    adopted: Adopted
    failed: EngineFailed
    kv_events: KvEvents
    moved: MovedOut
    undelivered: Undelivered
    def __init__(self, outputs: _Optional[_Union[StepOutputs, _Mapping]] = ..., utility: _Optional[_Union[UtilityReply, _Mapping]] = ..., adopted: _Optional[_Union[Adopted, _Mapping]] = ..., failed: _Optional[_Union[EngineFailed, _Mapping]] = ..., kv_events: _Optional[_Union[KvEvents, _Mapping]] = ..., moved: _Optional[_Union[MovedOut, _Mapping]] = ..., undelivered: _Optional[_Union[Undelivered, _Mapping]] = ...) -> None: ...

class StepOutputs(_message.Message):
    __slots__ = ("outputs", "load", "kv_events")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    KV_EVENTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedScalarFieldContainer[bytes]
    load: WorkerLoad
    kv_events: KvEvents
    def __init__(self, outputs: _Optional[_Iterable[bytes]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., kv_events: _Optional[_Union[KvEvents, _Mapping]] = ...) -> None: ...

class KvEvents(_message.Message):
    __slots__ = ("sequence", "reset", "stored", "removed")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    reset: bool
    stored: _containers.RepeatedScalarFieldContainer[int]
    removed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence: _Optional[int] = ..., reset: _Optional[bool] = ..., stored: _Optional[_Iterable[int]] = ..., removed: _Optional[_Iterable[int]] = ...) -> None: ...

class UtilityReply(_message.Message):
    __slots__ = ("call_id", "result", "error")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    result: bytes
    error: str
    def __init__(self, call_id: _Optional[int] = ..., result: _Optional[bytes] = ..., error: _Optional[str] = ...) -> None: ...

class Adopted(_message.Message):
    __slots__ = ("request_id", "handed_over", "reason", "failure", "bytes", "tokens", "exposed_s", "held_tokens", "credit_wait_s", "first_layer_s", "wire_s", "transport", "codec", "instead_of", "layers")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CREDIT_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_S_FIELD_NUMBER: _ClassVar[int]
    WIRE_S_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    INSTEAD_OF_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    handed_over: bool
    reason: str
    failure: str
    bytes: int
    tokens: int
    exposed_s: float
    held_tokens: int
    credit_wait_s: float
    first_layer_s: float
    wire_s: float
    transport: str
    codec: str
    instead_of: str
    layers: int
    def __init__(self, request_id: _Optional[str] = ..., handed_over: _Optional[bool] = ..., reason: _Optional[str] = ..., failure: _Optional[str] = ..., bytes: _Optional[int] = ..., tokens: _Optional[int] = ..., exposed_s: _Optional[float] = ..., held_tokens: _Optional[int] = ..., credit_wait_s: _Optional[float] = ..., first_layer_s: _Optional[float] = ..., wire_s: _Optional[float] = ..., transport: _Optional[str] = ..., codec: _Optional[str] = ..., instead_of: _Optional[str] = ..., layers: _Optional[int] = ...) -> None: ...

class Undelivered(_message.Message):
    __slots__ = ("transfer_id", "reason")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    reason: str
    def __init__(self, transfer_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class MovedOut(_message.Message):
    __slots__ = ("leg_id", "moved", "reason")
    LEG_ID_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    leg_id: str
    moved: bool
    reason: str
    def __init__(self, leg_id: _Optional[str] = ..., moved: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class EngineFailed(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("running", "waiting", "kv_usage", "inbox_bytes")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    INBOX_BYTES_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    kv_usage: float
    inbox_bytes: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_usage: _Optional[float] = ..., inbox_bytes: _Optional[int] = ...) -> None: ...
