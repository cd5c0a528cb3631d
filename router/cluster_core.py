"""vLLM's engine core, as a cluster: what vLLM's front end takes for one engine is many workers.

The way of a request, on one screen: `add_request_async` asks the scheduler for a place and carries
out its actions; workers' messages come in at `_on_message`, go through the scheduler, and what is
the client's goes to `get_output_async`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from cluster.membership import WorkerRecord, WorkerState
from cluster.scheduler.adapters import Adapters
from cluster.scheduler.life import (
    MOVED,
    Action,
    CancelLeg,
    Deliver,
    DropTransfer,
    FailRequest,
    Failure,
    Finish,
    MoveOut,
    Path,
    Phase,
    StartDecode,
    StartLocal,
    StartPrefill,
    StopAwaiting,
)
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.view import WorkerKey, WorkerView
from cluster.vllm_blocks import BlockHasher
from cluster.wire import worker_pb2
from router.asking import ask_of, why_not_sendable
from router.every_worker import ConnectedWorker, EveryWorker, with_lasting_id
from router.link import WorkerLink
from router.metrics import RouterMetrics
from router.placing import PLACING, Placing
from router.tally import Tally
from router.together import Together
from router.tracing import trace_handoff

logger = logging.getLogger(__name__)

TICK_S = 1.0
_FINISHES = {
    FinishReason.STOP: Finish.STOP,
    FinishReason.LENGTH: Finish.LENGTH,
    FinishReason.REPETITION: Finish.STOP,
    FinishReason.ABORT: Finish.ABORT,
    FinishReason.ERROR: Finish.ERROR,
}


class WrongWorker(Exception):
    """An address belongs to another worker, or to another start of it, than the membership says;
    or it serves another model than this router."""


@dataclass(slots=True)
class CoreResources:
    """The part of vLLM's client state that its front end asks for."""

    engine_dead: bool = False


class ClusterCore(EveryWorker):
    def __init__(
        self,
        vllm_config: VllmConfig,
        scheduler: Scheduler,
        metrics: RouterMetrics,
        handoff_deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(scheduler)
        self.vllm_config = vllm_config
        self.metrics = metrics
        self.tally = Tally(metrics)
        self.resources = CoreResources()
        self.engine_ranks_managed = [0]
        self._handoff_deadline_s = handoff_deadline_s
        self._clock = clock
        # Bounded by the outputs of the requests in flight.
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._reader: asyncio.Task[Any] | None = None
        self._requests: dict[str, EngineCoreRequest] = {}
        self._placings: dict[str, Placing] = {}
        self._refuses = ""
        """Why, if it takes no more requests."""
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        cache = vllm_config.cache_config
        self._hasher = (
            BlockHasher(cache.prefix_caching_hash_algo) if cache.enable_prefix_caching else None
        )

    # --- requests, called by vLLM's front end -----------------------------------------------------

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        if request.lora_request is not None:
            request.lora_request = with_lasting_id(request.lora_request)
        self._requests[request.request_id] = request
        placing = PLACING.get()
        if placing is not None:
            self._placings[request.request_id] = placing
        if self._refuses:
            self._fail(FailRequest(request.request_id, self._refuses, Failure.STOPPING))
            return
        # Before anything is charged for it. It may wait, and be sent when others' messages come.
        if wrong := why_not_sendable(request, self._encoder):
            self._fail(FailRequest(request.request_id, wrong, Failure.INVALID))
            return
        policy = placing.policy if placing else None
        blocks = self._hasher.blocks_of(request) if self._hasher else None
        ask = ask_of(request, placing, blocks)
        self._carry_out(self.scheduler.on_arrival(ask, self._clock(), policy))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        # Who reads outputs finds stop strings in them; others abort for a client that has left.
        finish = Finish.STOP if asyncio.current_task() is self._reader else Finish.ABORT
        for request_id in request_ids:
            if life := self.scheduler.lives.get(request_id):
                self.tally.request_ended(finish, life.path)
            self._carry_out(self._ended(request_id, self.scheduler.on_abort(request_id)))

    def refuse_all(self, reason: str) -> None:
        """From now on, and those that run."""
        self._refuses = reason
        # Those that wait first: else they would get the place of one that runs.
        lives = self.scheduler.lives.values()
        for life in sorted(lives, key=lambda life: life.phase is not Phase.QUEUED):
            request_id = life.ask.request_id
            self._carry_out(self.scheduler.on_abort(request_id))
            self._fail(FailRequest(request_id, reason, Failure.STOPPING))

    def why_not_ready(self) -> str:
        """Why a request that comes now would have to wait for a worker. Empty if it would not."""
        workers = self.scheduler.view.workers.values()
        if self._refuses or not workers:
            return self._refuses or "no worker is in reach"
        return "all workers drain" if all(worker.draining for worker in workers) else ""

    async def get_output_async(self) -> EngineCoreOutputs:
        self._reader = asyncio.current_task()
        return await self._outputs.get()

    # --- workers, called by the membership watcher ------------------------------------------------

    async def connect(
        self,
        key: WorkerKey,
        address: str,
        newest_record: Callable[[], WorkerRecord],
        on_lost: Callable[[str], None],
    ) -> None:
        """Link to a worker and, unless it drains by then, give it work.

        Raises:
            grpc.aio.AioRpcError: it does not answer.
            WrongWorker: another one answers at its address.
        """
        # The callbacks come only once the link is started, and by then the key is known.
        link = WorkerLink(address, lambda said: self._on_messages(worker, said), on_lost)
        try:
            description = await link.connect()
            found = WorkerKey(description.worker_id, description.incarnation)
            if found != key:
                raise WrongWorker(f"{address} was to be {key} and is {found}")
            served = self.vllm_config.model_config.served_model_name
            if description.fingerprint.model not in ("", served):
                raise WrongWorker(f"{key} serves {description.fingerprint.model}, not {served}")
        except BaseException:
            await link.close()
            raise
        worker = ConnectedWorker(key, link, description)
        self.workers[key] = worker
        link.start()
        self._apply_limits(description)
        record = newest_record()
        view = WorkerView(
            key=key,
            pool=record.pool,
            model=description.fingerprint.SerializeToString(deterministic=True).hex(),
            max_model_len_tokens=description.max_model_len_tokens,
            kv_tokens=description.kv_blocks * description.block_size_tokens,
            kv_bytes_per_token=description.kv_bytes_per_token,
            inbox_bytes_max=description.inbox_bytes_max,
            block_tokens=self._block_tokens(key, description),
            adapters=Adapters(description.adapters_max, description.adapters_at_once_max),
            draining=record.state is WorkerState.DRAINING,
        )
        self._carry_out(self.scheduler.on_worker_up(view))
        self._worker_up.set()
        if why := self.unjoined().get(key):
            logger.warning("%s can be joined to no worker of the other pool: %s", key, why)

    def remove(self, key: WorkerKey) -> WorkerLink | None:
        """The worker is gone: its requests go on elsewhere. The link is the caller's to close."""
        worker = self.workers.pop(key, None)
        if worker is None:
            return None
        resumed = self.scheduler.on_worker_lost(key, self._clock())
        self.metrics.resumed.inc(sum(isinstance(a, StartPrefill | StartLocal) for a in resumed))
        self._carry_out(resumed)
        worker.lost()
        return worker.link

    def relieve(self, key: WorkerKey, left_s: float) -> None:
        """A worker drains, and has this time left: its requests go on elsewhere when it is due."""
        actions = self.scheduler.on_draining(key, left_s, self._clock())
        self._count_recomputed(actions)
        self._carry_out(actions)

    def _count_recomputed(self, actions: list[Action]) -> None:
        """Those that leave without their KV. What becomes of KV that moves is told when it has."""
        cancelled = sum(isinstance(action, CancelLeg) for action in actions)
        placed = sum(isinstance(action, StartPrefill | StartLocal) for action in actions)
        # One that is cancelled may have to wait for a place; one that has stopped is not cancelled.
        self.metrics.moved.labels("recomputed").inc(max(cancelled, placed))

    def tick(self) -> None:
        """To be called every TICK_S."""
        self._carry_out(self.scheduler.on_tick(self._clock()))

    # --- carrying out the scheduler's decisions ---------------------------------------------------

    def _carry_out(self, actions: list[Action]) -> None:
        """One that cannot be carried out fails its own request, and no other."""
        for action in actions:
            try:
                self._carry_out_one(action)
            except Exception as error:
                logger.exception("%s cannot be carried out", type(action).__name__)
                if isinstance(action, StartPrefill | StartDecode | StartLocal | MoveOut):
                    self._carry_out(self.scheduler.on_abort(action.request_id))
                    self._fail(FailRequest(action.request_id, f"{type(error).__name__}: {error}"))

    def _carry_out_one(self, action: Action) -> None:
        match action:
            case StartPrefill():
                self._note_placement(action.request_id)
                self._start_prefill(action)
            case StartDecode():
                self._start_decode(action)
            case StartLocal():
                self._note_placement(action.request_id)
                request = self._requests[action.request_id]
                add = self._leg(request, action.leg_id, action.resume_tokens)
                self._send(action.worker, worker_pb2.ToEngine(add=add))
            case MoveOut():
                self._move_out(action)
            case CancelLeg():
                abort = worker_pb2.AbortRequests(request_ids=[action.leg_id])
                self._send(action.worker, worker_pb2.ToEngine(abort=abort))
            case DropTransfer():
                drop = worker_pb2.DropTransfer(transfer_id=action.transfer_id)
                self._send(action.worker, worker_pb2.ToEngine(drop=drop))
            case StopAwaiting():
                lost = worker_pb2.SenderLost(transfer_id=action.transfer_id, reason=action.reason)
                self._send(action.worker, worker_pb2.ToEngine(sender_lost=lost))
            case FailRequest():
                self._fail(action)
            case Deliver():
                pass  # `_on_outputs` delivers, as it has the output

    def _note_placement(self, request_id: str) -> None:
        placement = self.scheduler.lives[request_id].placement
        assert placement is not None
        self.metrics.placements.labels(placement.reason).inc()
        placing = self._placings.get(request_id)
        if placing is not None:
            placing.placements[request_id] = placement

    def _start_prefill(self, action: StartPrefill) -> None:
        request = self._requests[action.request_id]
        params = request.sampling_params.clone()
        params.max_tokens = len(action.resume_tokens) + 1
        params.min_tokens = min(params.min_tokens, params.max_tokens)
        one_token = msgspec.structs.replace(request, sampling_params=params)
        add = self._leg(one_token, action.leg_id, action.resume_tokens)
        add.send.CopyFrom(self._send_kv(action.receiver, action.transfer_id))
        placement = self.scheduler.lives[action.request_id].placement
        if placement is not None and placement.decode_cached_tokens:
            # First, so that it is known there when the sender asks.
            hold = worker_pb2.HoldPrefix(transfer_id=action.transfer_id, request=add.request)
            self._send(action.receiver, worker_pb2.ToEngine(hold=hold))
            add.send.expects_held = True
        self.tally.handoff_started()
        self._send(action.worker, worker_pb2.ToEngine(add=add))

    def _move_out(self, action: MoveOut) -> None:
        send = self._send_kv(action.receiver, action.transfer_id)
        self.tally.handoff_started()
        move = worker_pb2.MoveOut(leg_id=action.leg_id, send=send)
        self._send(action.worker, worker_pb2.ToEngine(move=move))

    def _send_kv(self, receiver: WorkerKey, transfer_id: str) -> worker_pb2.SendKv:
        return worker_pb2.SendKv(
            transfer_id=transfer_id,
            address=self.workers[receiver].description.kv_address,
            worker_id=receiver.worker_id,
            incarnation=receiver.incarnation,
        )

    def _start_decode(self, action: StartDecode) -> None:
        add = self._leg(self._requests[action.request_id], action.leg_id, action.resume_tokens)
        add.receive.CopyFrom(
            worker_pb2.ReceiveKv(
                transfer_id=action.transfer_id,
                worker_id=action.sender.worker_id,
                incarnation=action.sender.incarnation,
                deadline_s=self._handoff_deadline_s,
            )
        )
        if action.sender in self.workers:
            self.workers[action.sender].handoffs_out += 1
        self._send(action.worker, worker_pb2.ToEngine(add=add))

    def _leg(
        self, request: EngineCoreRequest, leg_id: str, resume: tuple[int, ...]
    ) -> worker_pb2.AddRequest:
        leg = msgspec.structs.replace(request, request_id=leg_id)
        encoded = [bytes(buffer) for buffer in self._encoder.encode(leg)]
        return worker_pb2.AddRequest(leg_id=leg_id, request=encoded, resume_token_ids=resume)

    def _send(self, key: WorkerKey, message: worker_pb2.ToEngine) -> None:
        worker = self.workers.get(key)
        if worker is not None:
            worker.link.send(message)

    def _fail(self, failed: FailRequest) -> None:
        request_id = failed.request_id
        if failed.failure in (Failure.LOST, Failure.STOPPING):
            logger.error("request %s failed: %s", request_id, failed.reason)
            self.tally.request_ended(Finish.ERROR, Path.KEPT_LOCAL)
        else:
            # Many may be refused when there is too much to do: no time for a line each.
            logger.debug("request %s is refused: %s", request_id, failed.reason)
            self.metrics.refused.labels(failed.failure).inc()
        placing = self._placings.get(request_id)
        if placing is not None and failed.failure is not Failure.LOST:
            placing.refusal = failed
        output = EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR)
        self._outputs.put_nowait(EngineCoreOutputs(outputs=[output]))
        self._forget(request_id)

    def _ended(self, request_id: str, actions: list[Action]) -> list[Action]:
        self._forget(request_id)
        return actions

    def _forget(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self._placings.pop(request_id, None)

    # --- what workers say -------------------------------------------------------------------------

    def _on_messages(
        self, worker: ConnectedWorker, messages: Sequence[worker_pb2.FromEngine]
    ) -> None:
        """All that came in one batch."""
        together = Together() if len(messages) > 1 else None
        for message in messages:
            match message.WhichOneof("kind"):
                case "outputs":
                    worker.load = load = message.outputs.load
                    self.scheduler.on_load(
                        worker.key, load.running, load.waiting, load.kv_usage, load.inbox_bytes
                    )
                    outputs = self._decoder.decode(list(message.outputs.outputs))
                    self._on_outputs(worker, outputs, together)
                    if message.outputs.HasField("kv_events"):
                        self.on_kv_events(worker, message.outputs.kv_events)
                case "adopted":
                    self._on_adopted(worker, message.adopted)
                case "moved":
                    moved = message.moved
                    if not moved.moved:
                        logger.info("leg %s is computed again: %s", moved.leg_id, moved.reason)
                    actions = self.scheduler.on_moved_out(moved.leg_id, moved.moved, self._clock())
                    self._count_recomputed(actions)
                    self._carry_out(actions)
                case "undelivered":
                    lacking = message.undelivered
                    self._carry_out(
                        self.scheduler.on_undelivered(lacking.transfer_id, lacking.reason)
                    )
                case "utility":
                    self.on_reply(worker, message.utility)
                case "kv_events":
                    self.on_kv_events(worker, message.kv_events)

    def _on_outputs(
        self, worker: ConnectedWorker, outputs: EngineCoreOutputs, together: Together | None
    ) -> None:
        # Workers' clocks are their own; the front end takes differences against this process's. And
        # the steps of one batch did not end at one time.
        now, step_ended_s = self._clock(), outputs.timestamp
        outputs.timestamp = worker.clock.here_s(step_ended_s, now)
        shift_s = outputs.timestamp - step_ended_s
        legs = {
            output.request_id: output.prefill_stats and output.prefill_stats.num_computed_tokens
            for output in outputs.outputs
        }
        if legs:
            self.scheduler.on_step(worker.key, outputs.timestamp, legs)
        delivered: list[EngineCoreOutput] = []
        for output in outputs.outputs:
            leg_id = output.request_id
            life = self.scheduler.life_of_leg(leg_id)
            if life is None:
                continue
            first_leg = not life.tokens
            finish = None if output.finish_reason is None else _FINISHES[output.finish_reason]
            deliver, *others = self.scheduler.on_output(leg_id, output.new_token_ids, finish)
            assert isinstance(deliver, Deliver)
            output.request_id = deliver.request_id
            if deliver.finish is None:
                output.finish_reason = None
            for event in output.events or ():
                event.timestamp += shift_s
            if first_leg:
                self.tally.first_token(deliver.request_id, step_ended_s, now)
            else:
                # Queueing and scheduling of a later leg are not the request's.
                output.events = None
            if not (together and self._joins(together, output)):
                delivered.append(output)
            if others:
                self._carry_out(others)
            if deliver.finish is not None:
                self.tally.request_ended(deliver.finish, life.path)
                self._forget(deliver.request_id)
        if outputs.scheduler_stats is not None:
            worker.stats = outputs.scheduler_stats
            outputs.scheduler_stats = self.cluster_stats(outputs.scheduler_stats)
        outputs.outputs = delivered
        if delivered or outputs.scheduler_stats is not None:
            self._outputs.put_nowait(outputs)

    def _joins(self, together: Together, output: EngineCoreOutput) -> bool:
        # Where text ends a request, what comes behind it is not to be seen.
        params = self._requests[output.request_id].sampling_params
        return params is not None and not params.stop and together.joins(output)

    def _on_adopted(self, worker: ConnectedWorker, adopted: worker_pb2.Adopted) -> None:
        known = self.scheduler.life_of_leg(adopted.request_id)
        again = known is not None and known.handoff_ended
        life = self.scheduler.on_adopted(adopted.request_id, adopted.handed_over, adopted.exposed_s)
        request_id = life.ask.request_id if life else adopted.request_id
        if not adopted.handed_over:
            logger.warning("%s recomputes %s: %s", worker.key, request_id, adopted.reason)
        if again:
            # It came whole, and its worker has given it up since. A hand-off is counted once.
            return
        placement = life.placement if life else None
        sender = str(placement.prefill) if placement else ""
        if placement and placement.reason == MOVED:
            self.metrics.moved.labels("kv" if adopted.handed_over else "recomputed").inc()
        self.tally.handoff_ended(adopted, request_id, sender, str(worker.key))
        request = self._requests.get(request_id)
        traced_id = (request and request.external_req_id) or request_id
        headers = request.trace_headers if request else None
        trace_handoff(adopted, traced_id, headers, sender, str(worker.key), time.time())
        if adopted.handed_over:
            worker.handoffs_in += 1
            worker.handoff_bytes_in += adopted.bytes

    def _block_tokens(self, key: WorkerKey, description: worker_pb2.WorkerDescription) -> int:
        """0 if what the worker tells of its prefix cache would mean nothing here."""
        probe = description.block_hash_probe
        if self._hasher is None or not probe:
            return 0
        if probe != self._hasher.probe:
            logger.warning(
                "%s hashes blocks in another way: its prefix cache is not seen here. Check that "
                "PYTHONHASHSEED is the same everywhere, and --prefix-caching-hash-algo sha256",
                key,
            )
            return 0
        return description.block_size_tokens

    def dp_engines_running(self) -> bool:
        return False

    def shutdown(self, timeout: float | None = None) -> None:
        """Requests have ended by then, and links are closed by whoever opened them: see
        router.stopping and router.server."""

    def _apply_limits(self, description: worker_pb2.WorkerDescription) -> None:
        """What the workers found out at their start bounds what the front end may accept."""
        model, cache = self.vllm_config.model_config, self.vllm_config.cache_config
        model.max_model_len = min(model.max_model_len, description.max_model_len_tokens)
        cache.block_size = description.block_size_tokens
        cache.num_gpu_blocks = sum(w.description.kv_blocks for w in self.workers.values())
