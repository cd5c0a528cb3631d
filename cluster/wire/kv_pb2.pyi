from cluster.wire import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_NONE: _ClassVar[Codec]
    CODEC_FP8: _ClassVar[Codec]
    CODEC_INT8: _ClassVar[Codec]

class KeyOrder(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KEY_ORDER_TOKENS_CHANNELS: _ClassVar[KeyOrder]
    KEY_ORDER_CHANNELS_TOKENS: _ClassVar[KeyOrder]
    KEY_ORDER_BLOCKS: _ClassVar[KeyOrder]
CODEC_NONE: Codec
CODEC_FP8: Codec
CODEC_INT8: Codec
KEY_ORDER_TOKENS_CHANNELS: KeyOrder
KEY_ORDER_CHANNELS_TOKENS: KeyOrder
KEY_ORDER_BLOCKS: KeyOrder

class PairRequest(_message.Message):
    __slots__ = ("worker_id", "incarnation", "fingerprint", "to_worker_id", "to_incarnation")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TO_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TO_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    fingerprint: _worker_pb2.Fingerprint
    to_worker_id: str
    to_incarnation: str
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., fingerprint: _Optional[_Union[_worker_pb2.Fingerprint, _Mapping]] = ..., to_worker_id: _Optional[str] = ..., to_incarnation: _Optional[str] = ...) -> None: ...

class PairReply(_message.Message):
    __slots__ = ("accepted", "reason", "transports")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    transports: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, accepted: _Optional[bool] = ..., reason: _Optional[str] = ..., transports: _Optional[_Iterable[str]] = ...) -> None: ...

class ToGroup(_message.Message):
    __slots__ = ("join", "headers")
    JOIN_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    join: GroupMember
    headers: FrameHeaders
    def __init__(self, join: _Optional[_Union[GroupMember, _Mapping]] = ..., headers: _Optional[_Union[FrameHeaders, _Mapping]] = ...) -> None: ...

class GroupMember(_message.Message):
    __slots__ = ("worker_id", "incarnation", "to_incarnation", "transport", "nixl")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TO_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    NIXL_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    to_incarnation: str
    transport: str
    nixl: NixlMemory
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., to_incarnation: _Optional[str] = ..., transport: _Optional[str] = ..., nixl: _Optional[_Union[NixlMemory, _Mapping]] = ...) -> None: ...

class NixlMemory(_message.Message):
    __slots__ = ("agent", "metadata", "trial", "trial_address")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    TRIAL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    agent: str
    metadata: bytes
    trial: bytes
    trial_address: int
    def __init__(self, agent: _Optional[str] = ..., metadata: _Optional[bytes] = ..., trial: _Optional[bytes] = ..., trial_address: _Optional[int] = ...) -> None: ...

class FromGroup(_message.Message):
    __slots__ = ("place", "taken")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    place: GroupPlace
    taken: Taken
    def __init__(self, place: _Optional[_Union[GroupPlace, _Mapping]] = ..., taken: _Optional[_Union[Taken, _Mapping]] = ...) -> None: ...

class GroupPlace(_message.Message):
    __slots__ = ("host", "port")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    host: str
    port: int
    def __init__(self, host: _Optional[str] = ..., port: _Optional[int] = ...) -> None: ...

class Taken(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FrameHeaders(_message.Message):
    __slots__ = ("headers", "address")
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    headers: _containers.RepeatedScalarFieldContainer[bytes]
    address: int
    def __init__(self, headers: _Optional[_Iterable[bytes]] = ..., address: _Optional[int] = ...) -> None: ...

class FrameHeader(_message.Message):
    __slots__ = ("transfer_id", "open", "kv", "abort", "end")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    open: OpenTransfer
    kv: KvFrame
    abort: AbortTransfer
    end: EndTransfer
    def __init__(self, transfer_id: _Optional[str] = ..., open: _Optional[_Union[OpenTransfer, _Mapping]] = ..., kv: _Optional[_Union[KvFrame, _Mapping]] = ..., abort: _Optional[_Union[AbortTransfer, _Mapping]] = ..., end: _Optional[_Union[EndTransfer, _Mapping]] = ...) -> None: ...

class OpenTransfer(_message.Message):
    __slots__ = ("tokens", "prompt_digest", "from_worker_id", "from_incarnation", "to_incarnation", "expects_held", "transport", "instead_of", "first_head", "heads")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FROM_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TO_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EXPECTS_HELD_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    INSTEAD_OF_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    prompt_digest: bytes
    from_worker_id: str
    from_incarnation: str
    to_incarnation: str
    expects_held: bool
    transport: str
    instead_of: str
    first_head: int
    heads: int
    def __init__(self, tokens: _Optional[int] = ..., prompt_digest: _Optional[bytes] = ..., from_worker_id: _Optional[str] = ..., from_incarnation: _Optional[str] = ..., to_incarnation: _Optional[str] = ..., expects_held: _Optional[bool] = ..., transport: _Optional[str] = ..., instead_of: _Optional[str] = ..., first_head: _Optional[int] = ..., heads: _Optional[int] = ...) -> None: ...

class EndTransfer(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbortTransfer(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class KvFrame(_message.Message):
    __slots__ = ("layer", "first_token", "tokens", "first_head", "heads", "codec", "key_order", "checksum", "block_tokens")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    KEY_ORDER_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    first_token: int
    tokens: int
    first_head: int
    heads: int
    codec: Codec
    key_order: KeyOrder
    checksum: int
    block_tokens: int
    def __init__(self, layer: _Optional[int] = ..., first_token: _Optional[int] = ..., tokens: _Optional[int] = ..., first_head: _Optional[int] = ..., heads: _Optional[int] = ..., codec: _Optional[_Union[Codec, str]] = ..., key_order: _Optional[_Union[KeyOrder, str]] = ..., checksum: _Optional[int] = ..., block_tokens: _Optional[int] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("credit", "result")
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    credit: Credit
    result: TransferResult
    def __init__(self, credit: _Optional[_Union[Credit, _Mapping]] = ..., result: _Optional[_Union[TransferResult, _Mapping]] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("held_tokens",)
    HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    held_tokens: int
    def __init__(self, held_tokens: _Optional[int] = ...) -> None: ...

class TransferResult(_message.Message):
    __slots__ = ("delivered", "reason")
    DELIVERED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    delivered: bool
    reason: str
    def __init__(self, delivered: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...
