"""Jobs: requests of POST /v1/generate, whose answers clients ask for later.

A job is in the store before it is acknowledged, and stays there until its retention ends. A server
that starts runs the jobs that its store holds as unfinished.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any

import msgspec

from dllmserve._checks import check_known
from dllmserve._values import SparseConfig
from dllmserve.core.request import Request
from dllmserve.errors import (
    DeadlineError,
    DllmServeError,
    EngineDiedError,
    EngineError,
    JobStoreError,
    OverloadedError,
    RequestAbortedError,
)
from dllmserve.knobs import knobs
from dllmserve.outputs import RequestOutput, TokenLogprob
from dllmserve.process.messages import plain
from dllmserve.process.supervisor import State
from dllmserve.sampling_params import SamplingParams
from dllmserve.server.admission import AdmissionSlot
from dllmserve.server.failures import explained
from dllmserve.server.service import Run, Service
from dllmserve.server.store import (
    MAX_JOB_ID,
    Gone,
    JobIdTaken,
    JobRecord,
    JobResult,
    JobStore,
    Stored,
)

_log = logging.getLogger("dllmserve.server")

#: longest wait of a long poll, in seconds
MAX_WAIT_S = 60.0
_EXPIRE_EVERY_S = 5.0
_FIRST_RETRY_S, _LAST_RETRY_S = 0.2, 10.0
_DRAWS = 8


class StoredRequest(msgspec.Struct, array_like=True, frozen=True):
    """The part of a request that is needed to run its job again."""

    prompt_ids: list[int]
    params: dict[str, Any]
    #: the SparseConfig, where older versions stored it
    sparse: dict[str, Any] | None = None


class Details(msgspec.Struct, frozen=True):
    """More about a finished job, on request."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    forward_passes: int
    queue_time: Annotated[float, msgspec.Meta(ge=0, le=1e12)] | None = None
    cached_tokens: int = 0
    steps: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    edits: int = 0


class _Live:
    """A job that is not finished.

    Attributes:
        owner: the owner of the job.
        slot: its admission slot; None until it has one.
        done: set when it has a result, is deleted, or is left to the next server.
        task: runs it; None while the model is being loaded.
        run: its request, once the engine has it.
    """

    def __init__(self, owner: str, slot: AdmissionSlot | None = None) -> None:
        self.owner, self.slot = owner, slot
        self.done = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.run: Run | None = None


class Jobs:
    """All jobs of one server.

    Args:
        service: runs them.
        store: keeps them.
        sequential: ids count from 0; otherwise they are random.
        durable: the store outlives the process.
    """

    def __init__(
        self, service: Service, store: JobStore, *, sequential: bool, durable: bool
    ) -> None:
        self._service, self._store = service, store
        self._sequential, self._durable = sequential, durable
        self._live: dict[int, _Live] = {}
        self._unfinished: list[JobRecord] = []
        self._expiring: asyncio.Task[None] | None = None
        self._stopping = False

    async def open(self) -> None:
        """Open the store. Raises ConfigError if it cannot be used."""
        await self._store.open()
        self._note_stats()
        self._unfinished = await self._store.unfinished()
        self._live.update((record.id, _Live(record.owner)) for record in self._unfinished)
        self._expiring = asyncio.create_task(self._expire())

    async def resume(self) -> None:
        """Run the jobs that an earlier server had accepted and not finished."""
        records, self._unfinished = self._unfinished, []
        if records:
            _log.info("%d accepted jobs of an earlier run are finished now", len(records))
        for record in records:
            live = self._live.get(record.id)
            if live is not None:  # it was not deleted meanwhile
                self._start(record.id, live, self._resume(record, live))

    async def submit(
        self, requests: Sequence[Request], owner: str, timeout_s: float | None
    ) -> list[int]:
        """Accept all of the requests, or none; returns their ids.

        Raises:
            QuotaError: the owner has its share.
            OverloadedError: there is no room.
            CapacityError: there never is for so many.
            JobStoreError: they cannot be stored.
        """
        service = self._service
        slots = service.take_slots(requests, owner)
        try:
            limit = service.settings.server.request_timeout
            seconds = limit if timeout_s is None else min(limit, timeout_s)
            records = await asyncio.shield(
                asyncio.ensure_future(self._insert(requests, owner, seconds))
            )
            if self._stopping and not self._durable:
                raise OverloadedError("the server is shutting down")
        except BaseException:
            for slot in slots:
                service.admission.give_back(slot)
            raise
        for record, request, slot in zip(records, requests, slots, strict=True):
            if self._stopping:  # the next server runs it
                service.admission.give_back(slot)
                continue
            live = self._live[record.id] = _Live(owner, slot)
            self._start(record.id, live, self._run(record, request, slot, live))
        return [record.id for record in records]

    async def keep(self, id: int, owner: str, details: bytes) -> None:
        """Store something that is finished already, as long as results are stored.

        Raises:
            JobStoreError: it cannot be stored.
        """
        now, model = self._store.clock(), self._service.model_name
        await self._store.insert([JobRecord(id, owner, model, now, now, b"")])
        await self._store.finish(id, JobResult("finished", None, None, details, time.time()))
        self._note_stats()

    async def find(self, id: int, owner: str, wait_s: float) -> Stored | Gone | None:
        """A job of this owner, after it has finished or ``wait_s`` is over."""
        live = self._live.get(id)
        if live is not None and live.owner == owner and wait_s > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(wait_s, MAX_WAIT_S)):
                    await live.done.wait()
        found = await self._store.find(id)
        if isinstance(found, Stored):
            if found.record.owner != owner:
                return None
            if found.result is not None:
                with suppress(JobStoreError):  # the mark is a hint, which a full disk may lose
                    await self._store.mark_read(id)
            return found
        return found if found is not None and found.owner == owner else None

    async def delete(self, id: int, owner: str) -> Gone | bool:
        """Drop a job of this owner: True if it was there, else why it is gone, or False."""
        found = await self.find(id, owner, 0)
        if not isinstance(found, Stored):
            return found if found is not None else False
        if not await self._store.delete(id):  # it was dropped meanwhile
            gone = await self._store.find(id)
            return gone if isinstance(gone, Gone) else False
        self._note_stats()
        live = self._live.get(id)
        if live is not None:
            self._drop(id, live, "deleted")
        return True

    async def close(self) -> None:
        """Stop; a durable store keeps what is unfinished for the next start."""
        self._stopping = True
        tasks = [live.task for live in self._live.values() if live.task is not None]
        for id, live in list(self._live.items()):
            self._drop(id, live, "shutdown")
        if self._expiring is not None:
            self._expiring.cancel()
            tasks.append(self._expiring)
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._store.close()

    def _start(self, id: int, live: _Live, work: Coroutine[Any, Any, None]) -> None:
        live.task = asyncio.create_task(work)
        live.task.add_done_callback(lambda _: self._ended(id, live))

    def _drop(self, id: int, live: _Live, reason: str) -> None:
        """Stop running a job; ``reason`` is for the metrics."""
        if live.run is not None:
            live.run.reason = reason
        if live.task is None:
            self._ended(id, live)
        else:
            live.task.cancel()

    def _ended(self, id: int, live: _Live) -> None:
        """Forget a job that has ended, free its slot, and wake those who wait for it."""
        if self._live.get(id) is live:
            del self._live[id]
        if live.slot is not None:
            self._service.admission.give_back(live.slot)
        live.done.set()

    async def _insert(
        self, requests: Sequence[Request], owner: str, seconds: float
    ) -> list[JobRecord]:
        now = self._store.clock()
        payloads = [_pack(request) for request in requests]
        for _ in range(_DRAWS):
            if self._sequential:
                ids = await self._store.reserve_ids(len(requests))
            else:
                ids = [secrets.randbelow(MAX_JOB_ID + 1) for _ in requests]
            records = [
                JobRecord(id, owner, self._service.model_name, now, now + seconds, payload)
                for id, payload in zip(ids, payloads, strict=True)
            ]
            try:
                await self._store.insert(records)
            except JobIdTaken:
                continue  # a sequential id may be taken if earlier ids were random
            return records
        raise JobStoreError("no free job ids were found: try again")

    async def _resume(self, record: JobRecord, live: _Live) -> None:
        """Run a job that an earlier process had accepted. It may wait; it is never refused."""
        service = self._service
        if record.model != service.model_name:
            text = (
                f"the job was accepted for model {record.model!r}, and the server was started "
                f"again with {service.model_name!r}"
            )
            await self._finish(record.id, _failed(text))
            return
        try:
            request = await self._unpack(record)
        except DllmServeError as error:
            await self._finish(record.id, _failed(str(error)))
            return
        except Exception as error:  # whatever a damaged file may hold
            _log.error("job %d of an earlier run cannot be run again: %s", record.id, error)
            await self._finish(record.id, _failed("the job's request cannot be read any more"))
            return
        live.slot = service.admission.take_anyway(request, record.owner)
        await self._run(record, request, live.slot, live)

    async def _unpack(self, record: JobRecord) -> Request:
        stored = msgspec.msgpack.decode(record.request, type=StoredRequest)
        nested = stored.params.get("sparse")
        for kind, values in ((SamplingParams, stored.params), (SparseConfig, nested or {})):
            # msgspec would ignore fields that a newer version has written
            check_known(kind.__name__, values, knobs(kind))
        params = msgspec.convert(stored.params, SamplingParams)
        older = None if stored.sparse is None else SparseConfig(**stored.sparse)
        await self._service.llm.prepare(params)
        return self._service.llm.check(stored.prompt_ids, params, older)

    async def _run(
        self, record: JobRecord, request: Request, slot: AdmissionSlot, live: _Live
    ) -> None:
        """Run a job to its end and store its result."""
        try:
            # by the store's clock: time in which no server ran does not count
            left = min(record.deadline - self._store.clock(), record.deadline - record.created)
            if left <= 0:
                raise DeadlineError("the job's time was over before it could be run")
            live.run = Run(self._service, request, slot, timeout_s=left)
            output = await live.run.output()
            result = _finished(output, live.run.queue_time)
        except DllmServeError as error:
            if self._durable and self._is_left(error, live):
                return
            result = _failed(explained(error))
        except Exception as error:
            _log.exception("a job failed")
            result = _failed(explained(error))
        finally:
            self._service.admission.give_back(slot)
        await self._finish(record.id, result)

    def _is_left(self, error: DllmServeError, live: _Live) -> bool:
        """Whether a job failed because the server ends, so that the next server runs it."""
        if isinstance(error, RequestAbortedError):
            return True
        over = self._service.llm.fleet.state in (State.FAILED, State.CLOSED)
        if not (over and isinstance(error, EngineError)):
            return False
        # a job that ran when the engine died for good may be what killed it
        began = live.run is not None and live.run.call.started is not None
        return not (began and isinstance(error, EngineDiedError))

    async def _finish(self, id: int, result: JobResult) -> None:
        """Store a result, and try again until that works: the disk may be full for a while."""
        pause = _FIRST_RETRY_S
        while True:
            try:
                await self._store.finish(id, replace(result, finished=time.time()))
                break
            except JobStoreError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_RETRY_S)
        self._note_stats()

    def _note_stats(self) -> None:
        self._service.store_stats = self._store.stats()

    async def _expire(self) -> None:
        ttl = self._service.settings.server.result_ttl
        while True:
            await asyncio.sleep(min(_EXPIRE_EVERY_S, max(ttl / 4, 0.05)))
            try:
                await self._store.expire(time.time())
            except JobStoreError as error:
                _log.warning("expired results are still there: %s", error)
            self._note_stats()


def details_of(result: JobResult) -> Details | None:
    """More about a result, if there is any. Raises JobStoreError if it cannot be read."""
    if not result.details:
        return None
    try:
        return msgspec.msgpack.decode(result.details, type=Details)
    except (msgspec.MsgspecError, ValueError) as error:
        raise JobStoreError(f"the details of a result are damaged: {error}") from error


def _pack(request: Request) -> bytes:
    # as StoredRequest, whose params are made when it is read
    return msgspec.msgpack.encode((request.prompt_ids, request.params), enc_hook=plain)


def _finished(output: RequestOutput, queue_time: float | None) -> JobResult:
    details = Details(
        output.finish_reason,
        output.prompt_tokens,
        output.completion_tokens,
        output.forward_passes,
        queue_time,
        output.cached_tokens,
        output.steps,
        output.logprobs,
        output.edits,
    )
    packed = msgspec.msgpack.encode(details)
    return JobResult("finished", output.text, None, packed, time.time())


def _failed(text: str) -> JobResult:
    return JobResult("failed", None, text, b"", time.time())
