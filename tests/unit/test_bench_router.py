"""`baton bench router`: the stub engine and its pace, the client's reading of HTTP, the report."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest, FinishReason

from cluster.bench.report import BenchFailed
from cluster.bench.router import VOCABULARY, RouterSettings, SideSamples, summary
from cluster.bench.stream_client import Load, Seen, ask_stub, control_of, run
from cluster.bench.stub_engine import TOKEN_ID, Pace, StubEngine
from cluster.config import BUNDLED_MODEL
from cluster.processes import free_port

DEADLINE_S = 30.0


def request(request_id: str, tokens: int) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[5, 6, 7],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=tokens),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def free_engine(pace: Pace | None = None) -> StubEngine:
    return StubEngine(pace or Pace(), paced=False)


async def until(condition: object, *, of: float = DEADLINE_S) -> None:
    assert callable(condition)
    deadline = time.monotonic() + of
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def test_the_stubs_token_is_a_digit_and_prompts_are_ascii() -> None:
    vocabulary = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text())["model"]["vocab"]
    assert vocabulary["0"] == TOKEN_ID
    texts = {token_id: text for text, token_id in vocabulary.items()}
    assert all(texts[i].isascii() and len(texts[i]) == 1 for i in range(2, VOCABULARY))


async def test_a_step_gives_every_request_a_token_until_it_has_all() -> None:
    engine = free_engine()
    engine.add(1, request("a", 2))
    engine.add(1, request("b", 1))
    engine.add(2, request("c", 9), resumed_tokens=8)
    first = await engine.next_step()
    assert {
        client: [(out.request_id, out.finish_reason) for out in outputs.outputs]
        for client, outputs in first.items()
    } == {1: [("a", None), ("b", FinishReason.LENGTH)], 2: [("c", FinishReason.LENGTH)]}
    begun, resumed = first[1].outputs[0], first[2].outputs[0]
    assert begun.events and begun.prefill_stats.num_prompt_tokens == 3
    assert resumed.events and resumed.prefill_stats is None
    assert first[1].scheduler_stats.num_running_reqs == 1
    (last,) = (await engine.next_step())[1].outputs
    assert (last.request_id, last.new_token_ids, last.events) == ("a", [TOKEN_ID], None)
    assert last.finish_reason is FinishReason.LENGTH
    assert engine.running == 0
    assert {k: len(v) for k, v in engine.take_made_s().items()} == {"a": 2, "b": 1, "c": 1}
    assert engine.take_made_s() == {}


async def test_an_aborted_request_gets_no_more() -> None:
    engine = free_engine()
    engine.add(1, request("a", 9))
    engine.add(1, request("b", 9))
    engine.abort(["a", "unknown"])
    assert [out.request_id for out in (await engine.next_step())[1].outputs] == ["b"]


async def test_steps_are_no_further_ahead_of_the_client_than_it_says(tmp_path: Path) -> None:
    port = free_port()
    pace = await Pace.listening(port)
    engine = StubEngine(pace)
    steps = 0

    async def step() -> None:
        nonlocal steps
        while True:
            await engine.next_step()
            steps += 1

    async with control_of(port) as control:
        await control.ask({"backlog_tokens": 4})
        engine.add(1, request("a", 100))
        engine.add(1, request("b", 100))
        stepping = asyncio.create_task(step())
        await until(lambda: steps == 2)
        control.tell({"received": 2})
        await until(lambda: steps == 3)
        # Less than a step of room, and none while others run.
        control.tell({"received": 3})
        await control.ask({"dump": str(tmp_path / "made.json")})
        assert steps == 3
        await control.ask({"backlog_tokens": 0})
        # At least one step, or nothing would ever be made.
        await until(lambda: steps == 4)
        await control.ask({"interval_s": 0.0001})
        await until(lambda: steps > 20)
    stepping.cancel()
    await asyncio.gather(stepping, return_exceptions=True)
    made_s = json.loads((tmp_path / "made.json").read_text())
    assert {k: len(v) for k, v in made_s.items()} == {"a": 3, "b": 3}
    assert made_s["a"] == sorted(made_s["a"])
    pace.close()


EVENT = 'data: {"id":"cmpl-%s","choices":[{"index":0,"text":"%s"}]}\n\n'


class Server:
    """Streams as vLLM does, cut into pieces at any byte."""

    def __init__(self, piece_bytes: int, texts: list[str], status: str = "200 OK") -> None:
        self._piece_bytes = piece_bytes
        self._texts = texts
        self._status = status
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                assert body["stream"] and len(body["prompt"]) == 3
                self.requests += 1
                await self._answer(writer, body["max_tokens"])
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, tokens: int) -> None:
        texts = (self._texts * tokens)[:tokens]
        events = [EVENT % (self.requests, text) for text in texts] + ["data: [DONE]\n\n"]
        chunks = "".join(f"{len(event):x}\r\n{event}\r\n" for event in events)
        head = f"HTTP/1.1 {self._status}\r\ntransfer-encoding: chunked\r\n\r\n"
        answer = f"{head}{chunks}0\r\n\r\n".encode()
        for i in range(0, len(answer), self._piece_bytes):
            writer.write(answer[i : i + self._piece_bytes])
            await asyncio.sleep(0)


async def seen_of(server: Server) -> Seen:
    port, control_port = free_port(), free_port()
    pace = await Pace.listening(control_port)
    serving = await asyncio.start_server(server.serve, "127.0.0.1", port)
    load = Load(
        port=port,
        pid=os.getpid(),
        control_port=control_port,
        model="m",
        vocabulary=100,
        pace={"backlog_tokens": 8},
        streams=2,
        prompt_tokens=3,
        output_tokens=4,
        warm_s=0.0,
        window_s=0.2,
    )
    try:
        return await run(load)
    finally:
        serving.close()
        pace.close()


@pytest.mark.parametrize("piece_bytes", [1, 7, 100_000])
async def test_the_client_counts_tokens_however_they_come(piece_bytes: int) -> None:
    server = Server(piece_bytes, ["0"])
    seen = await seen_of(server)
    assert server.requests > 4
    assert seen.tokens == seen.events > 0
    ended = [times for times in seen.token_times_s.values() if len(times) == 4]
    assert ended and all(times == sorted(times) for times in ended)


async def test_an_answer_of_the_wrong_length_ends_the_benchmark() -> None:
    with pytest.raises(BenchFailed, match=r"4 of 2 tokens|8 of 4 tokens"):
        await seen_of(Server(100_000, ["00"]))


async def test_an_error_of_the_server_ends_the_benchmark() -> None:
    with pytest.raises(BenchFailed, match="the server answered"):
        await seen_of(Server(100_000, ['"},"error":{"no'], "400 Bad Request"))


async def test_stubs_that_do_not_answer_end_the_benchmark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.bench.stream_client.DEADLINE_S", 0.05)
    with pytest.raises(BenchFailed, match="said nothing"):
        await ask_stub(free_port(), {"dump": "nowhere"})


def test_a_latency_is_from_a_tokens_step_to_the_client() -> None:
    seen = Seen(
        window_s=10.0,
        tokens=3,
        events=3,
        token_times_s={"cmpl-a": [9.0, 11.0, 12.5, 30.0], "cmpl-b": [15.0]},
        start_s=10.0,
        end_s=20.0,
    )
    made_s = {
        "cmpl-a-0-1f.1p.77": [8.5],
        "cmpl-a-0-1f.1p.77.d": [10.9, 12.0, 14.0],
        "cmpl-b-0-2f": [14.75, 16.0],
        "cmpl-c-0-3f": [1.0],
    }
    samples = SideSamples()
    samples.add_latency(seen, made_s)
    assert [round(s, 6) for s in samples.latency_s] == [0.1, 0.5, 0.25]


@pytest.mark.parametrize(("tokens_per_s", "met"), [(900.0, True), (899.0, False)])
def test_the_goal_is_a_share_of_plain_vllms_tokens(tokens_per_s: float, met: bool) -> None:
    settings = RouterSettings()
    plain = SideSamples([1000.0, 10.0, 5000.0], [1.0], [5e-5], [0.001] * 98 + [0.02] * 2)
    baton = SideSamples([tokens_per_s], [1.0], [6e-5], [0.003], {"handed_over": 2})
    sides = {"plain": plain, "baton": baton}
    report = json.loads(json.dumps(summary({"cores": 2}, settings, sides)))
    assert report["settings"] == json.loads(json.dumps(asdict(settings)))
    assert report["results"]["plain"] == {
        "tokens_per_s": 1000.0,
        "tokens_per_event": 1.0,
        "cpu_us_per_token": 50.0,
        "latency_p50_ms": 1.0,
        "latency_p99_ms": 20.0,
    }
    (goal,) = report["goals"]
    assert goal["name"] == "tokens_per_s_ratio" and goal["met"] is met


def test_each_pace_begins_a_run() -> None:
    assert replace(RouterSettings(), streams=10, backlog_steps=3).paces == {
        "throughput": {"backlog_tokens": 30},
        "latency": {"interval_s": 0.02},
    }
