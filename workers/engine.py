"""The vLLM engine of a worker: vLLM's EngineCore stepped by a thread of this process.

vLLM runs its core in a process of its own behind ZMQ sockets. Here it is in the worker's process,
beside the inbox, so a decode leg goes to vLLM's scheduler in the moment its KV is whole: no
polling, and no request that waits for KV inside the scheduler holding blocks.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.executor import Executor
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder

from cluster.handoff_failure import HandoffFailure
from cluster.wire import worker_pb2
from workers.engine_listener import EngineListener
from workers.kv.codecs import CODEC_NAMES
from workers.kv.connector import RECEIVE, SEND, connector_of_this_process
from workers.kv.endpoint import KvEndpoint
from workers.kv.frames import digest_tokens
from workers.kv.incoming import Settled
from workers.kv_events import KvEventCollector, report_once
from workers.vllm_held import HeldPrefixes
from workers.vllm_resume import resume_after

logger = logging.getLogger(__name__)

IDLE_STEP_S = 0.001
"""Pause after a step that ran nothing although requests are there."""

SWEEP_EVERY_S = 0.5

NO_CLIENT = 0
"""Whom vLLM gives the stats of a step without outputs. Clients are counted from 1."""

RESET_CACHE = ("reset_prefix_cache", "pause_scheduler", "sleep")
"""Calls that reset the prefix cache, or may."""

KV_USAGE_TOLD = 0.01
"""Less of a change is told with a step's outputs, but not by itself, unless the cache is free."""


@dataclass(slots=True)
class _Waiting:
    """A decode leg whose KV is still arriving."""

    client: int
    request: EngineCoreRequest
    add: worker_pb2.AddRequest
    since_s: float
    deadline_at_s: float

    @property
    def token_ids(self) -> list[int]:
        """Prompt, and the output so far: of a request that moves, the KV is of both."""
        return [*(self.request.prompt_token_ids or ()), *self.add.resume_token_ids]


@dataclass(slots=True)
class _Compiling:
    """A resumed request whose grammar has to see the resumed tokens before it runs."""

    client: int
    request: Request
    resumed: list[int]


class EngineHost:
    def __init__(self, vllm_config: Any, endpoint: KvEndpoint, listener: EngineListener) -> None:
        self._config = vllm_config
        self._endpoint = endpoint
        self._listener = listener
        # Bounded in effect by the routers, which bound the requests they place.
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._decoder = MsgpackDecoder(EngineCoreRequest)
        self._waiting: dict[str, _Waiting] = {}
        self._compiling: list[_Compiling] = []
        self._stopping = False
        self.turns = 0
        """Turns of the loop in which nothing was due or something was done. Told without a lock."""
        self.steps = 0
        """Of them, those that ran the model."""
        self._steps_swept = 0
        """As many as there were half a second ago."""
        self._steps_ended = 0
        """Those scheduled whose outputs are here."""
        self._next_sweep_s = 0.0
        self._load_told = worker_pb2.WorkerLoad()
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._core: EngineCore | None = None
        self._kv_events: KvEventCollector | None = None
        self._held: HeldPrefixes | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- called from any thread -------------------------------------------------------------

    def start(self) -> None:
        """Load the model and start stepping. Returns when the engine is ready.

        Raises:
            whatever vLLM raised.
        """
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    @property
    def core(self) -> EngineCore:
        assert self._core is not None, "the engine is not started"
        return self._core

    @property
    def held(self) -> HeldPrefixes:
        assert self._held is not None, "the engine is not started"
        return self._held

    def add(self, client: int, message: worker_pb2.AddRequest) -> None:
        try:
            request = self._read(message.request)
        except Exception:
            logger.exception("request %s cannot be read", message.leg_id)
            self._commands.put(lambda: self._finish(client, message.leg_id, FinishReason.ERROR))
            return
        request.client_index = client
        self._commands.put(lambda: self._add(client, request, message))

    def _read(self, encoded: Iterable[bytes]) -> EngineCoreRequest:
        request: EngineCoreRequest = self._decoder.decode(list(encoded))
        report_once(request.sampling_params)
        return request

    def abort(self, request_ids: list[str]) -> None:
        self._commands.put(lambda: self._abort(request_ids))

    def drop_transfer(self, transfer_id: str) -> None:
        self._endpoint.inbox.drop(transfer_id, "the router gave it up")
        self._commands.put(lambda: self.held.release(transfer_id))

    def sender_lost(self, transfer_id: str, reason: str) -> None:
        """Do not wait for what has not come of it."""
        why = reason or "its sender is lost"
        # After the decode leg that claims it.
        self._commands.put(lambda: self._endpoint.inbox.fail(transfer_id, why))

    def hold(self, message: worker_pb2.HoldPrefix) -> None:
        """Keep what the prefix cache has of a prompt whose KV is about to come."""
        try:
            prompt = self._read(message.request)
        except Exception:
            logger.exception("the prompt of transfer %s cannot be read", message.transfer_id)
            return
        self._commands.put(lambda: self._hold(message.transfer_id, prompt))

    def move_out(self, client: int, move: worker_pb2.MoveOut) -> None:
        self._commands.put(lambda: self._move_out(client, move))

    def call(self, client: int, call_id: int, method: str, args: list[Any]) -> None:
        self._commands.put(lambda: self._call(client, call_id, method, args))

    def tell_kv(self, client: int) -> None:
        """Tell the client all that the prefix cache holds; it hears of every change after that."""
        self._commands.put(lambda: self._tell_kv(client))

    def stop(self, timeout_s: float) -> None:
        self._stopping = True
        self._commands.put(None)
        self._thread.join(timeout_s)

    # --- on the engine's thread ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            core = EngineCore(
                self._config,
                Executor.get_class(self._config),
                log_stats=True,
                executor_fail_callback=lambda: self._commands.put(self._rank_ended),
            )
            self._core = core
            self._kv_events = KvEventCollector.install(core)
            self._held = HeldPrefixes(core)
        except BaseException as error:
            self._error = error
            self._started.set()
            return
        self._started.set()
        try:
            while not self._stopping:
                self._step(core)
        except BaseException as error:
            logger.exception("the engine failed")
            self._listener.on_failed(f"{type(error).__name__}: {error}")
        finally:
            core.shutdown()

    @staticmethod
    def _rank_ended() -> None:
        raise RuntimeError("a process of a tensor-parallel rank has ended")

    def _step(self, core: EngineCore) -> None:
        busy = core.scheduler.has_requests() or bool(core.batch_queue)
        self._run_commands(wait_s=None if busy else self._idle_wait_s())
        self._expire()
        self._release_compiled()
        if not (core.scheduler.has_requests() or core.batch_queue):
            self.turns += 1
            self._tell_load(self.load(), None)
            return
        outputs, executed = core.step_fn()
        core.post_step(executed)
        self.steps += executed
        # Only running requests must get on: the others may wait for a grammar, or for the operator
        # who paused the engine.
        running = core.scheduler.get_request_counts()[0] and not core.is_scheduler_paused()
        self.turns += executed or not running
        kv_events = self._kv_events.take() if self._kv_events else None
        # Where vLLM has the next step run already, this one's outputs come a turn later.
        self._steps_ended += outputs is not None
        outputs = outputs or {}
        to_nobody = outputs.pop(NO_CLIENT, None)
        load = self.load()
        for client, client_outputs in outputs.items():
            self._listener.on_outputs(client, client_outputs, load, kv_events)
        self._tell_load(load, to_nobody and to_nobody.scheduler_stats)
        if kv_events:
            self._listener.on_kv_events(kv_events, to=None, told=outputs)
        self._endpoint.step_ended(self._steps_ended)
        for transfer_id in self._endpoint.take_released():
            self.held.release(transfer_id)
        if not executed and core.scheduler.has_requests():
            time.sleep(IDLE_STEP_S)

    def _tell_load(self, load: worker_pb2.WorkerLoad, stats: SchedulerStats | None) -> None:
        told = self._load_told
        if (
            stats is not None
            or (load.running, load.waiting) != (told.running, told.waiting)
            or load.inbox_bytes != told.inbox_bytes
            or abs(load.kv_usage - told.kv_usage) >= KV_USAGE_TOLD
            or bool(load.kv_usage) != bool(told.kv_usage)
        ):
            self._load_told = load
            self._listener.on_load(load, stats)

    def load(self) -> worker_pb2.WorkerLoad:
        running, waiting = self.core.scheduler.get_request_counts()
        return worker_pb2.WorkerLoad(
            running=running,
            waiting=waiting + len(self._waiting) + len(self._compiling),
            kv_usage=self.core.scheduler.get_kv_cache_usage(),
            inbox_bytes=self._endpoint.inbox.bytes_held,
        )

    def holdings(self) -> worker_pb2.Holdings:
        """What is held here, from any thread."""
        load = self.load()
        pool = self.core.scheduler.kv_cache_manager.block_pool
        outgoing = self._endpoint.outgoing
        return worker_pb2.Holdings(
            running=load.running,
            waiting=load.waiting,
            # One block is vLLM's own, for good.
            kv_blocks=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            inbox_transfers=self._endpoint.inbox.transfers_held,
            inbox_bytes=load.inbox_bytes,
            sending_transfers=outgoing.transfers,
            staged_bytes=outgoing.staged_bytes,
            peers=outgoing.peers,
        )

    def _idle_wait_s(self) -> float:
        return 2 * IDLE_STEP_S if self._compiling else SWEEP_EVERY_S

    def _run_commands(self, wait_s: float | None) -> None:
        """Run what was asked since the last step; with nothing to step, wait for it."""
        try:
            command = self._commands.get(block=wait_s is not None, timeout=wait_s)
            while True:
                if command is not None:
                    command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _expire(self) -> None:
        now = time.monotonic()
        if now < self._next_sweep_s:
            return
        self._next_sweep_s = now + SWEEP_EVERY_S
        for waiting in [w for w in self._waiting.values() if now > w.deadline_at_s]:
            self._endpoint.inbox.fail(
                waiting.add.receive.transfer_id,
                f"the KV was not whole {waiting.add.receive.deadline_s:g} s after the decode leg",
                HandoffFailure.LATE,
            )
        for transfer_id in self._endpoint.inbox.sweep():
            logger.warning("transfer %s was abandoned and is dropped", transfer_id)
        self.held.release_unless(self._endpoint.inbox.needs_held)
        running, waiting = self.core.scheduler.get_request_counts()
        paused = self.core.is_scheduler_paused()
        if waiting and not (running or paused) and self.steps == self._steps_swept:
            # The first of them may need more blocks than are free, and never lets by the others,
            # which what is held is for.
            self._give_up_held("other requests found no room beside what was held for it")
        self._steps_swept = self.steps

    def _give_up_held(self, reason: str) -> None:
        """Nothing is held any more. What it was for is computed instead."""
        for request in list(self.core.scheduler.requests.values()):
            transfer_id = (request.kv_transfer_params or {}).get(RECEIVE)
            if transfer_id is not None and self.held.holds(transfer_id):
                logger.warning("request %s is recomputed: %s", request.request_id, reason)
                self._drop(transfer_id, reason)
                # It was said to be handed over.
                adopted = worker_pb2.Adopted(
                    request_id=request.request_id, reason=reason, failure=HandoffFailure.DROPPED
                )
                self._listener.on_adopted(request.client_index, adopted)
        # Of legs that wait for the rest of their KV: it is told when that is here.
        self.held.release_all()

    def _add(self, client: int, request: EngineCoreRequest, message: worker_pb2.AddRequest) -> None:
        if not message.HasField("receive"):
            self._admit(client, request, message, adopt="")
            return
        now = time.monotonic()
        receive = message.receive
        self._waiting[request.request_id] = _Waiting(
            client, request, message, now, now + receive.deadline_s
        )
        self._endpoint.inbox.expect(
            receive.transfer_id,
            (receive.worker_id, receive.incarnation),
            lambda settled: self._commands.put(lambda: self._settled(request.request_id, settled)),
        )

    def _hold(self, transfer_id: str, prompt: EngineCoreRequest) -> None:
        try:
            tokens = self.held.hold(transfer_id, prompt)
        except Exception:
            logger.exception("what is cached of transfer %s cannot be looked up", transfer_id)
            tokens = 0
        if not self._endpoint.inbox.hold(transfer_id, tokens):
            self.held.release(transfer_id)

    def _drop(self, transfer_id: str, reason: str) -> None:
        self._endpoint.inbox.drop(transfer_id, reason)
        self.held.release(transfer_id)

    def _settled(self, request_id: str, settled: Settled) -> None:
        waiting = self._waiting.pop(request_id, None)
        if waiting is None:
            return
        reason, failure = settled.reason, settled.failure
        if settled.whole:
            whole = self._endpoint.inbox.admit(settled.transfer_id)
            if whole is None:
                reason, failure = "the transfer was dropped", HandoffFailure.DROPPED
            elif whole.prompt_digest != digest_tokens(waiting.token_ids[: whole.tokens]):
                reason, failure = "the KV is of another prompt", HandoffFailure.WRONG
            elif whole.held_tokens and not self.held.holds(settled.transfer_id):
                reason = "what the prefix cache had of the prompt was given away meanwhile"
                failure = HandoffFailure.DROPPED
        adopt = "" if reason else settled.transfer_id
        if reason:
            logger.warning("request %s is recomputed: %s", request_id, reason)
            self._drop(settled.transfer_id, reason)
        self._listener.on_adopted(
            waiting.client,
            worker_pb2.Adopted(
                request_id=request_id,
                handed_over=not reason,
                reason=reason,
                failure=failure or "",
                bytes=settled.bytes if adopt else 0,
                tokens=settled.tokens if adopt else 0,
                held_tokens=settled.held_tokens if adopt else 0,
                exposed_s=time.monotonic() - waiting.since_s,
                credit_wait_s=settled.credit_wait_s,
                first_layer_s=settled.first_layer_s,
                wire_s=settled.wire_s,
                transport=settled.transport,
                instead_of=settled.instead_of,
                codec="" if settled.codec is None else CODEC_NAMES[settled.codec],
                layers=self._endpoint.inbox.geometry.layers if adopt else 0,
            ),
        )
        self._admit(waiting.client, waiting.request, waiting.add, adopt)

    def _admit(
        self, client: int, core_request: EngineCoreRequest, add: worker_pb2.AddRequest, adopt: str
    ) -> None:
        """Give a request to vLLM's scheduler, as one that goes on after `resume_token_ids`."""
        resumed = list(add.resume_token_ids)
        if core_request.sampling_params is not None:
            vocab_size = self._config.model_config.get_vocab_size()
            resume_after(core_request.sampling_params, resumed, vocab_size)
        try:
            request, _ = self.core.preprocess_add_request(core_request)
        except Exception:
            logger.exception("request %s cannot be prepared", core_request.request_id)
            if adopt:
                self._drop(adopt, "the request cannot be prepared")
            self._finish(client, core_request.request_id, FinishReason.ERROR)
            return
        handoff: dict[str, Any] = {}
        if add.HasField("send"):
            handoff[SEND] = add.send
        if adopt:
            handoff[RECEIVE] = adopt
        request.kv_transfer_params = handoff or None
        if not resumed:
            self.core.add_request(request)
            return
        request.append_output_token_ids(resumed)
        # These are figures of the first prefill, which was elsewhere.
        request.prefill_stats = None
        if request.structured_output_request is None:
            self.core.add_request(request)
        else:
            self._compiling.append(_Compiling(client, request, resumed))

    def _release_compiled(self) -> None:
        for entry in [c for c in self._compiling if self._grammar_ready(c.request)]:
            self._compiling.remove(entry)
            request = entry.request
            structured = request.structured_output_request
            assert structured is not None
            if not isinstance(structured.grammar, Exception):
                self.core.structured_output_manager.accept_tokens(request, entry.resumed)
            # A grammar that failed to compile is vLLM's to report.
            self.core.add_request(request)

    @staticmethod
    def _grammar_ready(request: Request) -> bool:
        structured = request.structured_output_request
        return structured is not None and bool(structured.is_grammar_ready)

    def _tell_kv(self, client: int) -> None:
        if self._kv_events is None:
            return
        if (changed := self._kv_events.take()) is not None:
            self._listener.on_kv_events(changed, to=None)
        self._listener.on_kv_events(self._kv_events.everything(), to=client)

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            waiting = self._waiting.pop(request_id, None)
            if waiting is not None:
                self._drop(waiting.add.receive.transfer_id, "the request is aborted")
        aborted = set(request_ids)
        for compiling in [c for c in self._compiling if c.request.request_id in aborted]:
            self._compiling.remove(compiling)
            if adopt := (compiling.request.kv_transfer_params or {}).get(RECEIVE):
                self._drop(adopt, "the request is aborted")
        self.core.abort_requests(request_ids)

    def _move_out(self, client: int, move: worker_pb2.MoveOut) -> None:
        """Between two steps: all that was generated is on its way to the router."""
        request = self.core.scheduler.requests.get(move.leg_id)
        reason = "it is not here any more"
        if request is not None:
            reason = "it has not generated anything here"
            # A step may be running, of the last known token: its KV is not there yet.
            tokens = min(request.num_computed_tokens, request.num_tokens - 1)
            if self._config.parallel_config.world_size > 1:
                reason = "its KV is in the processes of its ranks"
            elif request.status is RequestStatus.RUNNING and tokens >= request.num_prompt_tokens:
                token_ids = list(request.all_token_ids[:tokens])
                block_ids = self.core.scheduler.kv_cache_manager.get_block_ids(move.leg_id)[0]
                connector_of_this_process().push_computed(move.send, token_ids, list(block_ids))
                self.core.abort_requests([move.leg_id])
                reason = ""
        self._listener.on_moved(
            client, worker_pb2.MovedOut(leg_id=move.leg_id, moved=not reason, reason=reason)
        )

    def _finish(self, client: int, request_id: str, reason: FinishReason) -> None:
        output = EngineCoreOutput(request_id, [], finish_reason=reason)
        self._listener.on_outputs(client, EngineCoreOutputs(outputs=[output]), self.load())

    def _call(self, client: int, call_id: int, method: str, args: list[Any]) -> None:
        def enqueue(outputs: EngineCoreOutputs) -> None:
            assert outputs.utility_output is not None
            self._listener.on_utility(client, call_id, outputs.utility_output)

        output = UtilityOutput(call_id)
        if method in RESET_CACHE:
            # vLLM resets none of which a block is in use.
            self._give_up_held("the prefix cache is reset")
        requests = self.core.scheduler.requests
        clients = {request_id: requests[request_id].client_index for request_id in requests}

        def invoke() -> Any:
            target = getattr(self.core, method)
            return target(*EngineCoreProc._convert_msgspec_args(target, args))

        EngineCoreProc._invoke_utility_method(
            method, invoke, output, lambda out: enqueue(EngineCoreOutputs(utility_output=out))
        )
        # A pause may end them, and vLLM says so only where its core has a process of its own.
        for request_id in clients.keys() - requests.keys():
            self._finish(clients[request_id], request_id, FinishReason.ABORT)


def encode_result(output: UtilityOutput) -> bytes:
    """A call's result as plain msgpack: Baton calls only methods whose results are plain."""
    return msgspec.msgpack.encode(output.result.result if output.result else None)
