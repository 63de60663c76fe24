"""Jobs: requests of POST /v1/generate, which are answered when somebody asks.

A job is in the store before it is acknowledged, and stays there until its retention ends;
what the store still holds as unfinished when a server starts is run.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec

from dllmserve.core.request import Request
from dllmserve.errors import (
    DeadlineError,
    DllmServeError,
    JobStoreError,
    RequestAbortedError,
)
from dllmserve.outputs import RequestOutput
from dllmserve.process.messages import Value, changed_fields
from dllmserve.sampling_params import SamplingParams
from dllmserve.server.admission import Place
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
from dllmserve.sparse.state import SparseConfig

_log = logging.getLogger("dllmserve.server")

#: longest wait of a long poll, in seconds
MAX_WAIT_S = 60.0
_EXPIRE_EVERY_S = 5.0
_FIRST_RETRY_S, _LAST_RETRY_S = 0.2, 10.0
_DRAWS = 8


class StoredRequest(msgspec.Struct, array_like=True, frozen=True):
    """What it takes to run a job again."""

    prompt_ids: list[int]
    params: dict[str, Value]
    sparse: dict[str, Value] | None


class Details(msgspec.Struct, frozen=True):
    """More about a finished job, on request."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    forward_passes: int
    queue_time: float | None = None


class _Live:
    """A job that is not finished."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.done = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.deleted = False


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
        self._expiring: asyncio.Task[None] | None = None
        self._stopping = False

    async def open(self) -> None:
        """Open the store. Raises ConfigError if it cannot be used."""
        await self._store.open()
        self._service.store_stats = self._store.stats()
        self._expiring = asyncio.create_task(self._expire())

    async def resume(self) -> None:
        """Run what an earlier server had accepted and not finished."""
        records = await self._store.unfinished()
        if records:
            _log.info("%d accepted jobs of an earlier run are finished now", len(records))
        for record in records:
            live = self._live[record.id] = _Live(record.owner)
            live.task = asyncio.create_task(self._resume(record, live))

    async def submit(
        self, requests: Sequence[Request], owner: str, timeout_s: float | None
    ) -> list[int]:
        """Accept all of the requests, or none; returns their ids.

        Raises:
            OverloadedError: there is no room.
            JobStoreError: they cannot be stored.
        """
        service = self._service
        places = service.take_places(requests)
        try:
            limit = service.settings.server.request_timeout
            seconds = limit if timeout_s is None else min(limit, timeout_s)
            records = await asyncio.shield(
                asyncio.ensure_future(self._insert(requests, owner, seconds))
            )
        except BaseException:
            for place in places:
                service.admission.give_back(place, done=False)
            raise
        for record, request, place in zip(records, requests, places, strict=True):
            live = self._live[record.id] = _Live(owner)
            live.task = asyncio.create_task(self._run(record, request, place, live))
        return [record.id for record in records]

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
                with suppress(JobStoreError):  # a hint, which a full disk may lose
                    await self._store.mark_read(id)
            return found
        return found if found is not None and found.owner == owner else None

    async def delete(self, id: int, owner: str) -> Gone | bool:
        """Drop a job of this owner: True if it was there; why it was gone; False."""
        found = await self.find(id, owner, 0)
        if not isinstance(found, Stored):
            return found if found is not None else False
        live = self._live.get(id)
        if live is not None:
            live.deleted = True
        deleted = await self._store.delete(id)
        if live is not None and live.task is not None:
            live.task.cancel()
        self._service.store_stats = self._store.stats()
        return deleted

    async def close(self) -> None:
        """Stop; a durable store keeps what is unfinished for the next start."""
        self._stopping = True
        tasks = [live.task for live in self._live.values() if live.task is not None]
        if self._expiring is not None:
            tasks.append(self._expiring)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._store.close()

    async def _insert(
        self, requests: Sequence[Request], owner: str, seconds: float
    ) -> list[JobRecord]:
        now = time.time()
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
                continue  # after a switch of schemes a counted id may be taken
            return records
        raise JobStoreError("no free job ids were found: try again")

    async def _resume(self, record: JobRecord, live: _Live) -> None:
        """Run a job of an earlier process; it may wait, but it is never refused."""
        service = self._service
        if record.model != service.model_name:
            text = (
                f"the job was accepted for model {record.model!r}, and the server was started "
                f"again with {service.model_name!r}"
            )
            await self._finish(record.id, _failed(text), live)
            return
        try:
            request = self._unpack(record)
        except (DllmServeError, msgspec.MsgspecError) as error:
            await self._finish(record.id, _failed(str(error)), live)
            return
        place = service.admission.take_anyway(request)
        await self._run(record, request, place, live)

    def _unpack(self, record: JobRecord) -> Request:
        stored = msgspec.msgpack.decode(record.request, type=StoredRequest)
        params: dict[str, Any] = dict(stored.params)
        sparse: dict[str, Any] | None = stored.sparse
        return self._service.llm.check(
            stored.prompt_ids,
            SamplingParams(**params),
            None if sparse is None else SparseConfig(**sparse),
        )

    async def _run(self, record: JobRecord, request: Request, place: Place, live: _Live) -> None:
        """Run a job to its end and store what came of it."""
        left = record.deadline - time.time()
        run: Run | None = None
        try:
            if left <= 0:
                self._service.admission.give_back(place, done=False)
                raise DeadlineError("the job's time was over before it could be run")
            run = self._service.run(request, place, timeout_s=left)
            output = await run.output()
            result = _finished(output, run.queue_time)
        except asyncio.CancelledError:
            if run is not None:
                run.close("deleted" if live.deleted else "shutdown")
            else:
                self._service.admission.give_back(place, done=False)
            self._live.pop(record.id, None)
            live.done.set()
            raise
        except DllmServeError as error:
            if isinstance(error, RequestAbortedError) and self._durable:
                # dropped by a shutdown: the next server finishes it
                self._live.pop(record.id, None)
                live.done.set()
                return
            result = _failed(str(error))
        await self._finish(record.id, result, live)

    async def _finish(self, id: int, result: JobResult, live: _Live) -> None:
        """Store a result, as often as it takes: the disk may be full for a while."""
        pause = _FIRST_RETRY_S
        while True:
            try:
                await self._store.finish(id, replace(result, finished=time.time()))
                break
            except JobStoreError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_RETRY_S)
        self._service.store_stats = self._store.stats()
        self._live.pop(id, None)
        live.done.set()

    async def _expire(self) -> None:
        ttl = self._service.settings.server.result_ttl
        while True:
            await asyncio.sleep(min(_EXPIRE_EVERY_S, max(ttl / 4, 0.05)))
            try:
                await self._store.expire(time.time())
            except JobStoreError as error:
                _log.warning("expired results are still there: %s", error)
            self._service.store_stats = self._store.stats()


def _pack(request: Request) -> bytes:
    sparse = None if request.sparse is None else changed_fields(request.sparse)
    stored = StoredRequest(request.prompt_ids, changed_fields(request.params), sparse)
    return msgspec.msgpack.encode(stored)


def _finished(output: RequestOutput, queue_time: float | None) -> JobResult:
    details = Details(
        output.finish_reason,
        output.prompt_tokens,
        output.completion_tokens,
        output.forward_passes,
        queue_time,
    )
    packed = msgspec.msgpack.encode(details)
    return JobResult("finished", output.text, None, packed, time.time())


def _failed(text: str) -> JobResult:
    return JobResult("failed", None, text, b"", time.time())
