"""How a frame's keys and values are written: as they are in the cache, or in one byte a channel.

A coded payload is, for keys and then values, one float32 scale for each head, token and group of 64
channels; then, in the same order, one byte for each channel. A channel's value is its byte, read as
the codec's number, times its group's scale. Scales of their own for each token keep a few large
channels of one token, which keys are known for, from costing the others their precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cluster.wire import kv_pb2

if TYPE_CHECKING:
    from cluster.wire.kv_pb2 import Codec

GROUP_CHANNELS = 64
SCALE_BYTES = 4
CODECS: dict[str, Codec] = {
    "none": kv_pb2.CODEC_NONE,
    "fp8": kv_pb2.CODEC_FP8,
    "int8": kv_pb2.CODEC_INT8,
}
"""By the name that `handoff.codec` gives."""
CODEC_NAMES: dict[int, str] = {wire: name for name, wire in CODECS.items()}
CODABLE = (torch.float32, torch.bfloat16, torch.float16)
_SCALE_MIN = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class GroupCodec:
    """One byte a channel, and a scale for each group of channels. On any device."""

    wire: Codec
    number: torch.dtype
    """What a byte is read as."""
    largest: float
    """The number that the largest channel of a group becomes."""

    def payload_bytes(self, tokens: int, heads: int, channels: int) -> int:
        return 2 * heads * tokens * (groups_of(channels) * SCALE_BYTES + channels)

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Keys and values, both [heads, tokens, channels] of any strides, as a payload of bytes.

        A group that holds an infinity or a NaN comes back as NaN and infinities, never as numbers.
        """
        heads, tokens, channels = keys.shape
        both = torch.stack((keys, values)).float()
        grouped = _grouped(both)
        scales = (grouped.abs().amax(-1, keepdim=True) / self.largest).clamp_(min=_SCALE_MIN)
        numbers = grouped.div_(scales)
        if not self.number.is_floating_point:
            numbers.round_()
        # Past the largest by no more than a rounding of the division.
        numbers.clamp_(-self.largest, self.largest)
        coded = numbers.to(self.number).flatten(-2)[..., :channels]

        payload = keys.new_empty(self.payload_bytes(tokens, heads, channels), dtype=torch.uint8)
        split = scales.numel() * SCALE_BYTES
        payload[:split].view(torch.float32).copy_(scales.flatten())
        payload[split:].view(self.number).view(coded.shape).copy_(coded)
        return payload

    def decode(
        self, payload: torch.Tensor, heads: int, tokens: int, channels: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, both [heads, tokens, channels], of a payload of bytes."""
        groups = groups_of(channels)
        split = 2 * heads * tokens * groups * SCALE_BYTES
        scales = payload[:split].view(torch.float32).view(2, heads, tokens, groups, 1)
        coded = payload[split:].view(self.number).view(2, heads, tokens, channels)
        grouped = _grouped(coded.float()).mul_(scales)
        keys, values = grouped.flatten(-2)[..., :channels].to(dtype)
        return keys, values


FP8 = GroupCodec(kv_pb2.CODEC_FP8, torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max)
INT8 = GroupCodec(kv_pb2.CODEC_INT8, torch.int8, 127.0)
_GROUP_CODECS: dict[int, GroupCodec] = {codec.wire: codec for codec in (FP8, INT8)}


def group_codec(wire: int) -> GroupCodec | None:
    """None of CODEC_NONE: its payload is the cache's own bytes.

    Raises:
        KeyError: there is no such codec.
    """
    return None if wire == kv_pb2.CODEC_NONE else _GROUP_CODECS[wire]


def groups_of(channels: int) -> int:
    return -(-channels // GROUP_CHANNELS)


def _grouped(both: torch.Tensor) -> torch.Tensor:
    """[..., channels] as [..., groups, channels of a group], the last group filled with zeros."""
    channels = both.shape[-1]
    group = min(channels, GROUP_CHANNELS)
    missing = -channels % group
    if missing:
        both = torch.nn.functional.pad(both, (0, missing))
    return both.view(*both.shape[:-1], -1, group)
