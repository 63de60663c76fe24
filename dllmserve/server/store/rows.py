"""Reads rows of a job store as records, and checks their values.

A file that SQLite finds sound may still hold values that no server has written, because a disk or
a tool has changed them. Only this module reads rows, so such a value is always a JobStoreError.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from dllmserve.errors import JobStoreError
from dllmserve.server.store.base import (
    MAX_JOB_ID,
    Gone,
    GoneReason,
    JobRecord,
    JobResult,
    JobStatus,
    Stored,
)

T = TypeVar("T")

#: states of a job
UNFINISHED, UNREAD, READ = 0, 1, 2
#: what :func:`read_job` takes
JOB = "id, owner, model, created, deadline, request, status, text, error, details, finished"
_EVERY_JOB = f"SELECT {JOB}, state, place, size FROM jobs"
_EVERY_GONE = "SELECT id, place, reason, owner FROM tombstones"


def read_job(row: Sequence[Any]) -> Stored:
    """A job from a row of :data:`JOB`. Raises JobStoreError if a value is wrong."""
    id, owner, model, created, deadline, request, status, text, error, details, finished = row
    where = f"job {id}"
    record = JobRecord(
        _one_of(id, int, where, "id"),
        _decoded(_one_of(owner, bytes, where, "owner"), where),
        _decoded(_one_of(model, bytes, where, "model"), where),
        _one_of(created, float, where, "created"),
        _one_of(deadline, float, where, "deadline"),
        b"" if request is None else _one_of(request, bytes, where, "request"),
    )
    if status is None:
        return Stored(record, None)
    if status not in get_args(JobStatus):
        raise _damaged(where, "status")
    result = JobResult(
        status,
        None if text is None else _decoded(_one_of(text, bytes, where, "text"), where),
        None if error is None else _decoded(_one_of(error, bytes, where, "error"), where),
        _one_of(details, bytes, where, "details"),
        _one_of(finished, float, where, "finished"),
    )
    return Stored(record, result)


def read_gone(id: int, reason: Any, owner: Any) -> Gone:
    """The tombstone of a dropped job. Raises JobStoreError if a value is wrong."""
    where = f"dropped job {id}"
    if reason not in get_args(GoneReason):
        raise _damaged(where, "reason")
    return Gone(reason, _decoded(_one_of(owner, bytes, where, "owner"), where))


def check_rows(db: sqlite3.Connection) -> None:
    """Read all rows once, so that none fails later. Raises JobStoreError for a wrong one."""
    for *job, state, place, size in db.execute(_EVERY_JOB):
        stored = read_job(job)
        record, result = stored.record, stored.result
        answer = job[7:10]
        sound = {
            "id": _is_int(record.id),
            "created": 0 <= record.created < math.inf,
            "deadline": record.created <= record.deadline < math.inf,
            "place": _is_int(place),
        }
        if result is None:
            sound["state"] = state == UNFINISHED
            sound["result"] = [*answer, job[10]] == [None] * 4 and size == 0
        else:
            sound["state"] = state in (UNREAD, READ)
            sound["finished"] = 0 <= result.finished < math.inf
            sound["request"] = not record.request
            sound["size"] = size == sum(len(part) for part in answer if part is not None)
        _refuse_first(f"job {record.id}", sound)
    for id, place, reason, owner in db.execute(_EVERY_GONE):
        read_gone(id, reason, owner)
        _refuse_first(f"dropped job {id}", {"id": _is_int(id), "place": _is_int(place)})
    ids = [id for (id,) in db.execute("SELECT id FROM next_id")]
    sound = {"next_id": len(ids) == 1 and _is_int(ids[0], MAX_JOB_ID + 1)}
    _refuse_first("the count of ids", sound)


def _refuse_first(where: str, sound: dict[str, bool]) -> None:
    for column, good in sound.items():
        if not good:
            raise _damaged(where, column)


def _is_int(value: Any, most: int = MAX_JOB_ID) -> bool:
    return isinstance(value, int) and 0 <= value <= most


def _one_of(value: Any, kind: type[T], where: str, column: str) -> T:
    if not isinstance(value, kind):
        raise _damaged(where, column)
    return value


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise JobStoreError(f"{where} has a text that is none: {error.reason}") from error


def _damaged(where: str, column: str) -> JobStoreError:
    return JobStoreError(f"{where} has a value that cannot be: {column}")
