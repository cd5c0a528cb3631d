"""An engine core's process without an engine, for `baton bench router`: vLLM's API server talks to
it as to its own, over ZMQ.

    python -m cluster.bench.stub_core CONTROL_PORT FOLDER
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import msgspec
import uvloop
import zmq
import zmq.asyncio
from vllm import __version__
from vllm.v1.engine import (
    EngineCoreOutputs,
    EngineCoreReadyResponse,
    EngineCoreRequest,
    EngineCoreRequestType,
    UtilityOutput,
)
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from cluster.bench.plain_stub import input_address, output_address
from cluster.bench.stub_engine import Pace, StubEngine

MAX_MODEL_LEN_TOKENS = 4096
KV_BLOCKS = 65_536
BLOCK_SIZE_TOKENS = 16
ENGINE = (0).to_bytes(2, "little")
"""What the client calls its first engine."""


class StubCore:
    """The engine's end of the two sockets. They are bound by the client, whenever it starts."""

    def __init__(self, engine: StubEngine, folder: Path) -> None:
        self._engine = engine
        self._context = zmq.asyncio.Context()
        self._input = self._context.socket(zmq.DEALER)
        self._input.setsockopt(zmq.IDENTITY, ENGINE)
        self._output = self._context.socket(zmq.PUSH)
        self._input.connect(input_address(folder))
        self._output.connect(output_address(folder))
        self._encoder = MsgpackEncoder()
        self._requests = MsgpackDecoder(EngineCoreRequest)
        self._others = MsgpackDecoder()

    async def read(self) -> None:
        await self._input.send(msgspec.msgpack.encode(_ready()))
        while True:
            kind, *frames = await self._input.recv_multipart()
            if kind == EngineCoreRequestType.ADD.value:
                self._engine.add(0, self._requests.decode(frames))
            elif kind == EngineCoreRequestType.ABORT.value:
                self._engine.abort(self._others.decode(frames))
            elif kind == EngineCoreRequestType.UTILITY.value:
                _, call_id, method, _ = self._others.decode(frames)
                result = UtilityResult(["generate"] if method == "get_supported_tasks" else None)
                await self._send(
                    EngineCoreOutputs(utility_output=UtilityOutput(call_id, result=result))
                )

    async def step(self) -> None:
        while True:
            for outputs in (await self._engine.next_step()).values():
                await self._send(outputs)

    async def _send(self, outputs: EngineCoreOutputs) -> None:
        await self._output.send_multipart(self._encoder.encode(outputs), copy=False)

    def close(self) -> None:
        self._context.destroy(linger=0)


def _ready() -> EngineCoreReadyResponse:
    return EngineCoreReadyResponse(
        max_model_len=MAX_MODEL_LEN_TOKENS,
        num_gpu_blocks=KV_BLOCKS,
        block_size=BLOCK_SIZE_TOKENS,
        dp_stats_address=None,
        dtype="torch.float32",
        vllm_version=__version__,
        world_size=1,
        data_parallel_size=1,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        data_parallel_rank=0,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        instance_id="stub",
        supports_lora=False,
        max_loras=0,
    )


async def serve(control_port: int, folder: Path) -> None:
    """Serve until SIGTERM, or until something fails."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    pace = await Pace.listening(control_port)
    core = StubCore(StubEngine(pace), folder)
    tasks = [asyncio.create_task(part) for part in (core.read(), core.step())]
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (stopping, *tasks):
            task.cancel()
        await asyncio.gather(stopping, *tasks, return_exceptions=True)
        pace.close()
        core.close()


def main() -> None:
    control_port, folder = sys.argv[1:]
    uvloop.run(serve(int(control_port), Path(folder)))


if __name__ == "__main__":
    main()
