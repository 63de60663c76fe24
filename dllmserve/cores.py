"""Cores: how many this process may really use, and how threads wait for each other on them.

Nothing here needs torch, because how threads wait must be settled before torch is loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

#: variables by which a user says how many threads torch has
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
#: variables by which a user says how threads wait
_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
#: Waiting threads sleep. Where other programs want the cores, threads that wait busily take the
#: time of the very thread that they wait for: see docs/benchmarks.md.
_PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass
class _Loaded:
    """How torch was loaded."""

    passive: bool = False


_loaded = _Loaded()


def threads_given(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the user has said by the environment how many threads there are to be."""
    found = os.environ if environment is None else environment
    return any(found.get(name) for name in THREAD_VARIABLES)


def wait_variables() -> dict[str, str]:
    """What a process of ours needs in its environment, so that its threads do not wait busily.

    Nothing where the user has said how they wait.
    """
    return {} if any(os.environ.get(name) for name in _WAIT_VARIABLES) else dict(_PASSIVE)


@contextmanager
def passive_waiting() -> Iterator[None]:
    """Load torch inside of this, and its threads sleep while they wait.

    The library behind them reads the environment once, when it is loaded; so this does nothing
    if torch is there already. The environment is left as it was.
    """
    if "torch" in sys.modules:
        yield
        return
    added = wait_variables()
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        _loaded.passive |= bool(added) and "torch" in sys.modules


def waits_busily() -> bool:
    """Whether torch's threads wait as the library behind them does by itself: busily."""
    return not _loaded.passive and bool(wait_variables())


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity, or less where a cgroup grants less time.

    Two hardware threads of one core count once, as they share what a matrix product needs. A
    quota is rounded down: a thread
    that the quota stops holds up all others, which costs more than an unused part of a core.

    Args:
        root: of the file system, with /proc and /sys.
    """
    cores = len(physical_cores(root))
    quota = _quota(root)
    return cores if quota is None else max(min(cores, int(quota)), 1)


def physical_cores(root: Path = Path("/")) -> set[str]:
    """A name for each core that this process may run on."""
    system = root / "sys/devices/system/cpu"
    return {
        _text(system / f"cpu{number}/topology/thread_siblings_list") or str(number)
        for number in allowed_cpus()
    }


def allowed_cpus() -> set[int]:
    """Processors, as the system counts them, that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _quota(root: Path) -> float | None:
    """Cores' worth of time that the tightest cgroup above this process grants; None is no limit."""
    found = [_limit(folder) for folder in _cgroups(root)]
    return min((limit for limit in found if limit is not None), default=None)


def _cgroups(root: Path) -> Iterator[Path]:
    """Folders of this process's cgroups that may limit its time, and of those above them."""
    paths = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if not names:  # version 2
            paths["cgroup2"] = path
        elif "cpu" in names.split(","):
            paths["cgroup"] = path
    for line in _text(root / "proc/self/mountinfo").splitlines():
        # fields are separated by " - ", and before that their number varies
        place, _, what = line.partition(" - ")
        kind, _, options = what.partition(" ")
        fields = place.split(" ")
        if kind not in paths or len(fields) < 5:
            continue
        if kind == "cgroup" and "cpu" not in options.rpartition(" ")[2].split(","):
            continue
        mount = root / fields[4].lstrip("/")
        yield mount
        yield from _below(mount, fields[3], paths[kind])


def _below(mount: Path, top: str, path: str) -> Iterator[Path]:
    """Folders from a mount, which shows what is below ``top``, to a cgroup."""
    with suppress(ValueError):  # it lies outside of what is mounted here
        folder = mount
        for part in PurePosixPath(path).relative_to(top).parts:
            if part == "..":
                return
            folder /= part
            yield folder


def _limit(folder: Path) -> float | None:
    """Cores' worth of time that one cgroup grants; None is no limit."""
    new = _text(folder / "cpu.max").split()
    old = [_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    try:
        quota, period = (float(number) for number in new or old)
    except ValueError:  # "max", or there is none
        return None
    return quota / period if quota > 0 and period > 0 else None


def _text(file: Path) -> str:
    """What a file of the system says; nothing where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
