"""Service: engines, admission, jobs and metrics of one server, without HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from dllmserve.async_llm import AsyncLLM
from dllmserve.core.request import Request
from dllmserve.engine.filled import Template
from dllmserve.errors import (
    ContextLengthError,
    DeadlineError,
    DllmServeError,
    OverloadedError,
    QuotaError,
    RequestAbortedError,
)
from dllmserve.holes import Holes
from dllmserve.outputs import RequestOutput, TextDelta
from dllmserve.process.calls import Call, Event, Started
from dllmserve.process.messages import EngineInfo
from dllmserve.process.supervisor import State, SupervisorOptions
from dllmserve.server.admission import Admission, AdmissionSlot
from dllmserve.server.http.rate import RateLimit
from dllmserve.server.http.slots import ConnectionStats
from dllmserve.server.metrics import EngineGauges, Gauges, Metrics
from dllmserve.server.settings import Settings
from dllmserve.server.store import StoreStats

_log = logging.getLogger("dllmserve.server")

_LOADING = "the model is being loaded: try again later"
_DRAINING = "the server is shutting down"
#: seconds without a heartbeat after which the engine counts as stalled; heartbeats come every half
#: second, unless a step takes longer
_PATIENCE_S = 30.0
#: seconds in which waiting clients are told that their requests were dropped
_TELL_S = 1.0


class Run:
    """An admitted request under way. Close it, however it ends; :meth:`output` does.

    Args:
        service: the owner.
        request: the checked request.
        slot: its admission slot.
        stream, watch: what the engine is to report.
        timeout_s: seconds from now in which it has to end, at most the server's request_timeout;
            None is that timeout.
        queue_s: seconds from now in which it has to start, or None.

    Attributes:
        reason: why it was dropped, for the metrics; None if its client has gone.
        queue_time: seconds until it was started.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        slot: AdmissionSlot,
        *,
        stream: bool = False,
        watch: bool = False,
        timeout_s: float | None = None,
        queue_s: float | None = None,
    ) -> None:
        self.request = request
        self._service, self._slot = service, slot
        self._began = time.monotonic()
        now, limit = asyncio.get_running_loop().time(), service.settings.server.request_timeout
        self._timeout_s = limit if timeout_s is None else min(limit, timeout_s)
        self._until = now + self._timeout_s
        self._start_until = None if queue_s is None else now + queue_s
        self._queue_s = queue_s
        self._last_text: float | None = None
        self._forwards: int | None = None
        self._tokens = 0
        # each run is counted once: as finished, failed or dropped
        self._counted = False
        self.reason: str | None = None
        self.queue_time: float | None = None
        try:
            self.call: Call = service.llm.submit(
                request,
                stream=stream,
                watch=watch,
                work=slot.work,
                owner=service.admission.engine_name(slot.owner),
            )
        except BaseException:
            service.admission.give_back(slot)
            raise
        service.runs.add(self)
        service.metrics.accepted(request.prompt_len, request.params.gen_length)

    async def output(self) -> RequestOutput:
        """Wait for the end.

        Raises:
            DllmServeError: it failed, or took too long. A cancelled call drops the request.
        """
        try:
            while True:
                event = await self.next()
                if isinstance(event, RequestOutput):
                    return event
        finally:
            self.close()

    async def text(self) -> AsyncIterator[TextDelta]:
        """Committed text as it comes; the last piece carries the output."""
        try:
            async for delta in self._service.llm.deltas(self.call, self.next):
                self._note_text(delta)
                yield delta
        finally:
            self.close()

    async def next(self) -> Event:
        """The next event; see :meth:`Call.next`.

        Raises:
            DeadlineError: its time is over.
            OverloadedError: it waited too long to be started.
        """
        until = self._until
        if self._start_until is not None and self.call.started is None:
            until = min(until, self._start_until)
        try:
            async with asyncio.timeout_at(until):
                event = await self.call.next()
        except TimeoutError as error:
            self.reason = "deadline"
            if until < self._until:
                raise OverloadedError(
                    f"the request waited for queue_timeout={self._queue_s:g} s and was not started",
                    retry_after=self._service.admission.retry_after(self._slot.owner),
                ) from error
            raise DeadlineError(
                f"the request did not finish in {self._timeout_s:g} s; ask for less, or for "
                "more time"
            ) from error
        except DllmServeError as error:
            if not self._counted:
                self._counted = True
                self._service.metrics.failed(error.code)
            raise
        if isinstance(event, Started):
            self.queue_time = event.at - self._began
            self._service.metrics.queue.observe(self.queue_time)
        elif isinstance(event, RequestOutput):
            self._finished(event)
        return event

    def close(self) -> None:
        """Drop the request if it has not ended, and give its slot back."""
        if self not in self._service.runs:
            return
        self._service.runs.discard(self)
        if not self._counted:  # also one that ended after its client had gone
            self._counted = True
            self._service.metrics.aborted(self.reason or "disconnect")
        self._service.llm.abort(self.call)
        self._service.admission.give_back(self._slot, self._forwards, self._tokens)

    def drop(self, reason: str, text: str) -> None:
        """End the request from outside; the task that waits for it gets a RequestAbortedError."""
        if not self.call.ended:
            self._counted = True
            self._service.metrics.aborted(reason)
            self._service.llm.abort(self.call, RequestAbortedError(text))

    def _finished(self, output: RequestOutput) -> None:
        metrics, now = self._service.metrics, time.monotonic()
        self._forwards, self._counted = output.forward_passes, True
        self._tokens = output.completion_tokens
        metrics.finished(output.finish_reason, self._tokens, self._forwards, output.edits)
        metrics.total.observe(now - self._began)
        if self.call.started is not None:
            metrics.inference.observe(now - self.call.started)

    def _note_text(self, delta: TextDelta) -> None:
        if not delta.text:
            return
        metrics, now = self._service.metrics, time.monotonic()
        if self._last_text is None:
            metrics.first_text.observe(now - self._began)
        elif delta.tokens:
            metrics.between_tokens.observe((now - self._last_text) / delta.tokens)
        self._last_text = now


class Service:
    """What the endpoints work with.

    Args:
        settings: all options.

    Attributes:
        llm: the engines.
        admission: what is under way.
        rate: the rate limit of each owner.
        metrics: for Prometheus.
        runs: requests under way.
        connections: of the HTTP server.
        store_stats: of the job store; set by its owner.
        failure: why the server cannot go on; None while it can.
    """

    def __init__(self, settings: Settings) -> None:
        server = settings.server
        self.settings = settings
        self.model_name = settings.model_name
        self.created = int(time.time())
        self.llm = AsyncLLM(
            data_parallel_size=server.data_parallel_size,
            supervision=SupervisorOptions(
                watchdog_s=server.watchdog_timeout,
                load_timeout_s=server.load_timeout,
                restart=server.restart,
            ),
            **asdict(settings.engine),
        )
        self.admission = Admission(
            server.max_requests,
            server.max_outstanding_work,
            max_per_owner=server.max_parallel_per_key,
            several=settings.several_keys,
            progress=self._progress,
        )
        self.rate = RateLimit(server.requests_per_minute)
        self.admission.closed_because = _LOADING
        self.metrics = Metrics(self.model_name, server.metrics_compat)
        self.runs: set[Run] = set()
        self.connections = ConnectionStats()
        self.store_stats = StoreStats(0, 0, 0, {})
        self.failure: DllmServeError | None = None
        self._started = False
        self._draining = False

    async def start(self) -> None:
        """Load the model. Raises what :meth:`AsyncLLM.start` raises."""
        began = time.monotonic()
        info = await self.llm.start()
        self._started = True
        self.admission.at_once = info.limits.max_num_seqs * len(self.llm.fleet.supervisors)
        if not self._draining:
            self.admission.closed_because = None
        self._log_ready(info, time.monotonic() - began)

    def _log_ready(self, info: EngineInfo, seconds: float) -> None:
        """One line; of several engines, one more for each."""
        supervisors = self.llm.fleet.supervisors
        several = len(supervisors) > 1
        _log.info(
            "%s is ready after %.1f s: %s, %s, max_model_len %d%s",
            self.model_name,
            seconds,
            f"{len(supervisors)} engines" if several else info.device,
            info.dtype,
            info.limits.max_model_len,
            "" if several else f"; {info.memory}",
        )
        for index, supervisor in enumerate(supervisors if several else ()):
            if (own := supervisor.info) is not None:
                _log.info("engine %d: %s; %s", index, own.device, own.memory)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait for those under way, then drop the rest."""
        self.refuse_new()
        await self._until_idle(timeout_s)
        if self.runs:
            _log.warning("%d requests are dropped: shutdown_timeout is over", len(self.runs))
        for run in list(self.runs):
            run.drop("shutdown", "the server shut down before the request was finished")
        await self._until_idle(_TELL_S)

    async def _until_idle(self, timeout_s: float) -> None:
        """Wait until nothing is under way, including jobs that are being accepted."""
        until = time.monotonic() + timeout_s
        while self.admission.requests and time.monotonic() < until and self.failure is None:
            await asyncio.sleep(0.02)

    def refuse_new(self) -> None:
        """Refuse new requests from now on; the readiness probe reports it."""
        self._draining = True
        self.admission.closed_because = _DRAINING

    async def stop(self) -> None:
        """End the engines."""
        await self.llm.close()

    async def watch(self) -> DllmServeError:
        """Wait until all engines are gone for good; returns why."""
        self.failure = await self.llm.fleet.failed()
        return self.failure

    @property
    def status(self) -> str:
        """One word that says why requests are not answered now; "ok" if they are."""
        if self._draining:
            return "draining"
        state = self.llm.fleet.state
        if self.failure is not None or state is State.FAILED:
            return "failed"
        if not self._started:
            return "loading"
        if state is not State.READY:
            return "restarting"
        patience = min(_PATIENCE_S, self.settings.server.watchdog_timeout)
        return "stalled" if self.llm.fleet.silence > patience else "ok"

    @property
    def lost(self) -> bool:
        """Whether only a restart of the server helps, because the watchdogs have not helped.

        It is False while one engine answers or is being started again.
        """
        limit = self.settings.server.watchdog_timeout + _PATIENCE_S
        return self.status == "failed" or all(
            supervisor.state is State.FAILED or supervisor.silence > limit
            for supervisor in self.llm.fleet.supervisors
        )

    def admit(
        self,
        requests: Sequence[Request],
        owner: str = "",
        *,
        stream: bool = False,
        watch: bool = False,
        timeout_s: float | None = None,
    ) -> list[Run]:
        """Take all of the requests of an owner, or none.

        Raises:
            QuotaError: the owner has its share.
            OverloadedError: there is no room.
            CapacityError: there never is for so many.
        """
        slots = self.take_slots(requests, owner)
        how: dict[str, Any] = {"stream": stream, "watch": watch, "timeout_s": timeout_s}
        how["queue_s"] = self.settings.server.queue_timeout
        runs: list[Run] = []
        try:
            for request, slot in zip(requests, slots, strict=True):
                runs.append(Run(self, request, slot, **how))
        except BaseException:
            close_all(runs)
            for slot in slots:
                self.admission.give_back(slot)
            raise
        return runs

    def take_slots(self, requests: Sequence[Request], owner: str = "") -> list[AdmissionSlot]:
        """Places for all of the requests, or for none. Raises what :meth:`admit` raises."""
        try:
            self.rate.check(owner, len(requests))
            slots = self.admission.take(requests, owner)
        except OverloadedError as error:
            self._count_refusal(error)
            raise
        self.rate.take(owner, len(requests) - 1)
        return slots

    def _count_refusal(self, error: OverloadedError) -> None:
        """Count a refusal in the metrics, by its reason."""
        if isinstance(error, QuotaError):
            self.metrics.rejected(error.code)
        else:
            closed = self.admission.closed_because is not None
            self.metrics.rejected(self.status if closed else "full")

    def _progress(self) -> tuple[float, int]:
        """Seconds in which the engines had work, and forward passes of all requests."""
        fleet = self.llm.fleet
        counters = fleet.counters
        # the counters add the seconds of all engines, which run at the same time
        return counters.busy / max(fleet.serving, 1), counters.spans

    async def prompt_ids(
        self, prompt: str | Sequence[int], name: str = "prompt", owner: str = ""
    ) -> list[int]:
        """Token ids of a prompt. A text that cannot fit is refused before it is tokenised."""
        self.require_engine(owner)
        if isinstance(prompt, str):
            self._check_length(len(prompt), name)
            await asyncio.sleep(0)  # other tasks run between the prompts of a batch
        return await self.llm.prompt_ids(prompt)

    async def template_row(
        self, template: Template, name: str = "template", owner: str = ""
    ) -> tuple[list[int], Holes]:
        """Ids of a template's row, and its holes. What cannot fit is refused before."""
        self.require_engine(owner)
        self._check_length(sum(len(p) for p in template if isinstance(p, str)), name)
        return await self.llm.template_row(template, name)

    async def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        owner: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Prompt ids of a conversation; special tokens in messages are ordinary text.

        Args:
            messages: as a chat template reads them, see :mod:`dllmserve.messages`.
            owner: who asks.
            tools, variables, continue_final_message: see :meth:`Tokenizer.chat_ids`.
        """
        self.require_engine(owner)
        said = (str(value) for m in messages for key, value in m.items() if key != "role")
        self._check_length(sum(map(len, said)), "messages")
        self._check_length(sum(len(str(tool)) for tool in tools or ()), "tools")
        asked: dict[str, Any] = {"tools": tools, "variables": variables}
        asked["continue_final_message"] = continue_final_message
        return await self.llm.chat_ids(messages, literal_contents=True, **asked)

    def require_engine(self, owner: str = "") -> None:
        """Raise OverloadedError while no request of this owner can be taken."""
        if self.status == "failed":
            self.metrics.rejected("failed")
            raise OverloadedError("the engine is gone; the server has to be started again", 30)
        try:
            if self.admission.closed_because is not None:
                raise OverloadedError(self.admission.closed_because, self.admission.retry_after())
            # a refusal must cost little, or refusing many clients takes the time of all others
            self.admission.check_room(1, owner)
        except OverloadedError as error:
            self._count_refusal(error)
            raise

    @property
    def most_ids(self) -> int:
        """Token ids of the largest request that could be answered."""
        return self.settings.server.max_prompts * self.llm.info.limits.max_model_len

    def _check_length(self, characters: int, name: str) -> None:
        limit = 16 * self.llm.info.limits.max_model_len
        if characters > limit:
            raise ContextLengthError(
                f"{name} has {characters} characters, over the {limit} that "
                f"max_model_len={self.llm.info.limits.max_model_len} tokens could hold"
            )

    def gauges(self) -> Gauges:
        """What is read when Prometheus asks."""
        running = sum(run.call.running for run in self.runs)
        stats = self.store_stats
        return Gauges(
            engine=self.llm.fleet.counters,
            engines=[
                EngineGauges(
                    up=supervisor.state is State.READY,
                    running=supervisor.running,
                    work=supervisor.work,
                    restarts=supervisor.restarts,
                )
                for supervisor in self.llm.fleet.supervisors
            ],
            waiting=len(self.runs) - running,
            running=running,
            work=self.admission.work,
            results=stats.results,
            result_bytes=stats.bytes,
            evicted={str(reason): count for reason, count in stats.evicted.items()},
            restarts=self.llm.fleet.restarts,
            ready=self.status == "ok",
            connections=self.connections,
        )


def close_all(runs: Sequence[Run]) -> None:
    """Close all runs, whether they have ended or not."""
    for run in runs:
        run.close()


async def finish_all(runs: Sequence[Run]) -> list[RequestOutput]:
    """Outputs of all runs; the first failure drops the others."""
    tasks = [asyncio.create_task(run.output()) for run in runs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError, DllmServeError):
                await task
