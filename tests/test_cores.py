"""Cores that a process may use, on made-up systems; and how threads wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllmserve import cores
from dllmserve.cores import threads_given, usable_cores, wait_variables

#: the line of a mount: its root below the hierarchy, where it is, its type and options
V2 = "30 24 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw"
V1 = "31 24 0:27 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
OTHER = "32 24 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processors that the system lets this process use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def system(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A file system with a process's cgroups, mounts, and other files."""
    made = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}
    for name, text in made.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def v2(root: Path, path: str, limits: dict[str, str], top: str = "/") -> Path:
    """A system with the second kind of cgroups; ``limits``: folder to cpu.max."""
    files = {f"sys/fs/cgroup/{name}/cpu.max": text for name, text in limits.items()}
    return system(root, f"0::{path}", V2.format(root=top), files)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", 8),
        ("400000 100000", 4),
        ("1000000 100000", 8),  # more than there are
        ("150000 100000", 1),
        ("299999 100000", 2),
        ("20000 100000", 1),
        ("100000 50000", 2),
        ("", 8),
        ("nonsense", 8),
        ("100000", 8),
        ("0 0", 8),
    ],
)
def test_a_quota(tmp_path: Path, quota: str, cores: int) -> None:
    assert usable_cores(v2(tmp_path, "/a", {"a": quota})) == cores


def test_the_smallest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    limits = {"a": "600000 100000", "a/b": "300000 100000", "a/b/c": "max 100000"}
    assert usable_cores(v2(tmp_path, "/a/b/c", limits)) == 3
    # what lies beside the way, or below, does not
    assert usable_cores(v2(tmp_path / "2", "/a", limits)) == 6
    assert usable_cores(v2(tmp_path / "3", "/other", limits)) == 8
    assert usable_cores(v2(tmp_path / "4", "/a/b", {"": "500000 100000", "c": "1 1"})) == 5


def test_a_container_sees_a_part_of_the_tree(tmp_path: Path) -> None:
    """The mount shows what is below /pods/x; or the process seems to be at the top."""
    limits = {"": "200000 100000", "y": "100000 100000"}
    assert usable_cores(v2(tmp_path / "1", "/pods/x", limits, "/pods/x")) == 2
    assert usable_cores(v2(tmp_path / "2", "/pods/x/y", limits, "/pods/x")) == 1
    assert usable_cores(v2(tmp_path / "3", "/", limits)) == 2
    assert usable_cores(v2(tmp_path / "4", "/pods/z", limits, "/pods/x")) == 2
    assert usable_cores(v2(tmp_path / "5", "/../../y", limits, "/")) == 2


@pytest.mark.parametrize(
    ("quota", "cores"), [("-1", 8), ("250000", 2), ("50000", 1), ("", 8), ("x", 8)]
)
@pytest.mark.parametrize("path", ["/docker/x", "/docker/x/y"])
def test_the_first_kind_of_cgroups(tmp_path: Path, path: str, quota: str, cores: int) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct/docker/x"
    root = system(
        tmp_path,
        f"9:memory:/m\n4:cpu,cpuacct:{path}\n0::/",
        "\n".join([OTHER, V1.format(root="/"), "short line", V2.format(root="/")]),
        {
            f"{folder}/cpu.cfs_quota_us": quota,
            f"{folder}/cpu.cfs_period_us": "100000",
            # of another controller, which says nothing about time
            "sys/fs/cgroup/memory/m/cpu.max": "100000 100000",
        },
    )
    assert usable_cores(root) == cores


def test_without_anything_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores(tmp_path) == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert usable_cores(tmp_path) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path) == 1


def test_two_threads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in range(8):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert usable_cores(tmp_path) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4})
    assert usable_cores(tmp_path) == 2


def test_what_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert not threads_given()
    assert wait_variables() == {"OMP_WAIT_POLICY": "PASSIVE"}
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    assert threads_given() and wait_variables()
    for name, value in (("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "1000")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert wait_variables() == {} and not cores.waits_busily()


#: prints whether threads wait busily, and what the environment says afterwards
_SAY = "from dllmserve import cores; print(cores.waits_busily(), os.environ.get('OMP_WAIT_POLICY'))"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; from dllmserve import LLM; ", "False None"),
        ("import os, torch; from dllmserve import LLM; ", "True None"),
        ("import os; from dllmserve import SamplingParams; import torch; ", "True None"),
        (
            "import os; os.environ['OMP_WAIT_POLICY'] = 'ACTIVE'; from dllmserve import LLM; ",
            "False ACTIVE",
        ),
    ],
)
def test_torch_is_loaded_so_that_threads_sleep(code: str, said: str) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", code + _SAY], env=kept, capture_output=True, text=True
    )
    assert done.stdout.strip() == said, done.stderr
