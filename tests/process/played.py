"""A fleet whose engines are played by the test: no process runs."""

import math

from dllmserve.errors import DllmServeError, EngineStartError
from dllmserve.outputs import RequestOutput
from dllmserve.process.calls import Call
from dllmserve.process.fleet import Fleet
from dllmserve.process.messages import (
    Abort,
    Admitted,
    Counters,
    Failed,
    Finished,
    Report,
    Submit,
    ToWorker,
)
from dllmserve.process.supervisor import State, Supervisor, SupervisorOptions
from dllmserve.process.worker import Cause, Death
from dllmserve.sampling_params import SamplingParams

OUTPUT = RequestOutput("", [1], "length", 1, 1, 1)


class PlayedEngine:
    """The part of EngineProcess that a supervisor talks to."""

    pid = 1

    def __init__(self) -> None:
        self.last_message = math.inf
        self.sent: list[ToWorker] = []

    def send(self, message: ToWorker) -> None:
        self.sent.append(message)

    async def stop(self) -> None:
        return

    @property
    def submitted(self) -> list[int]:
        return [message.id for message in self.sent if isinstance(message, Submit)]

    @property
    def aborted(self) -> list[int]:
        return [name for message in self.sent if isinstance(message, Abort) for name in message.ids]


class PlayedFleet:
    """Engines die, come back and answer when the test says so.

    Attributes:
        fleet: the real thing.
        played: the engine that runs at each index, or ran last.
    """

    def __init__(self, size: int, *, restart: bool = True) -> None:
        self.fleet = Fleet({"device": "cpu"}, SupervisorOptions(restart=restart), size)
        self.played = [PlayedEngine() for _ in range(size)]
        for index in range(size):
            self.up(index)

    def __getitem__(self, index: int) -> Supervisor:
        return self.fleet.supervisors[index]

    def up(self, index: int) -> PlayedEngine:
        """An engine is ready."""
        engine = self.played[index] = PlayedEngine()
        supervisor = self[index]
        supervisor._engine = engine  # type: ignore[assignment]
        supervisor.state = State.READY
        supervisor._send_held()
        supervisor._changed()
        return engine

    def die(self, index: int, cause: Cause) -> None:
        self[index]._judge(Death(cause, f"engine {index} {cause.value}"))

    def give_up(self, index: int, error: DllmServeError | None = None) -> None:
        self[index]._give_up(error or EngineStartError(f"engine {index} is gone"))

    def silent(self, index: int, seconds: float) -> None:
        """It has said nothing for so long."""
        supervisor = self[index]
        self.played[index].last_message = math.inf if not seconds else -math.inf
        assert (supervisor.silence > 0) == bool(seconds)

    def ask(self, work: int = 1, *, admit: bool = True) -> Call:
        call = self.fleet.submit(Submit([1], SamplingParams()), work=work)
        if admit and call.in_engine:
            self.admit(call)
        return call

    def index_of(self, call: Call) -> int:
        """Where a request is; exactly one engine has it."""
        (index,) = [i for i, engine in enumerate(self.fleet.supervisors) if engine.holds(call)]
        return index

    def admit(self, *calls: Call) -> None:
        for call in calls:
            self[self.index_of(call)]._handle(Admitted([call.id]))

    def finish(self, *calls: Call) -> None:
        for call in calls:
            report = Report(Counters(), finished=[Finished(call.id, OUTPUT)])
            self[self.index_of(call)]._handle(report)

    def fail(self, call: Call) -> None:
        report = Report(Counters(), failed=[Failed(call.id, "OutOfMemoryError", "too much")])
        self[self.index_of(call)]._handle(report)

    @property
    def works(self) -> list[int]:
        return [engine.work for engine in self.fleet.supervisors]
