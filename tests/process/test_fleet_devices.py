"""What each of several engines is started with: GPUs, or a part of cores and memory."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dllmserve.async_llm import AsyncLLM
from dllmserve.errors import ConfigError, EngineStartError, UnknownOptionError
from dllmserve.process import devices
from dllmserve.process.devices import Share, count_gpus, shares


def shared(options: dict[str, Any], engines: int) -> list[Share]:
    return asyncio.run(shares(options, engines, 60.0))


def with_gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def counted(timeout_s: float) -> int:
        assert timeout_s == 60.0
        return count

    monkeypatch.setattr(devices, "count_gpus", counted)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_one_engine_gets_what_was_asked_for(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(devices, "count_gpus")  # nobody counts
    options = {"device": device, "gpu_memory_utilization": 0.9}
    assert shared(options, 1) == [Share(options, {})]


@pytest.mark.parametrize(
    ("device", "width", "engines", "places"),
    [
        ("auto", 1, 4, [0, 1, 2, 3]),
        ("cuda", 2, 2, [0, 2]),
        ("cuda:1", 1, 2, [1, 2]),
        ("cuda:2", 3, 2, [2, 5]),
    ],
)
def test_engines_take_one_gpu_after_the_other(
    device: str, width: int, engines: int, places: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(8, monkeypatch)
    options = {"device": device, "tensor_parallel_size": width, "model": "m"}
    found = shared(options, engines)
    assert [share.options["device"] for share in found] == [f"cuda:{place}" for place in places]
    assert all(share.options["model"] == "m" and not share.environment for share in found)


@pytest.mark.parametrize(
    ("device", "gpus", "engines", "width", "message"),
    [
        ("auto", 2, 4, 1, "=4 x tensor_parallel_size=1 needs 4 GPUs, and there are 2: .*=2 would"),
        ("cuda", 7, 4, 2, "needs 8 GPUs, and there are 7: data_parallel_size=3 would work"),
        ("cuda:3", 4, 2, 1, "needs 2 GPUs from cuda:3 on, and there are 4: .*=1 would work"),
        ("cuda", 0, 2, 1, "there are 0: device='cpu' runs the engines without"),
        ("auto", 3, 2, 4, "not even one engine fits: lower tensor_parallel_size"),
    ],
)
def test_too_few_gpus(
    device: str,
    gpus: int,
    engines: int,
    width: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_gpus(gpus, monkeypatch)
    with pytest.raises(ConfigError, match=message):
        shared({"device": device, "tensor_parallel_size": width}, engines)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_on_a_cpu_they_divide_cores_and_memory(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(0, monkeypatch)
    monkeypatch.setattr(devices, "usable_cores", lambda: 7)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    options = {"device": device, "gpu_memory_utilization": 0.8}
    for engines, threads in ((2, "3"), (4, "1"), (16, "1")):
        found = shared(options, engines)
        assert len(found) == engines
        for share in found:
            assert share.environment == {"OMP_NUM_THREADS": threads}
            assert share.options["gpu_memory_utilization"] == pytest.approx(0.8 / engines)
            assert share.options["device"] == "cpu"
    given = shared({**options, "threads": 5}, 2)[0]
    assert given.options["threads"] == 2 and given.environment == {}
    assert shared({**options, "threads": 1}, 2)[0].options["threads"] == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the user knows better
    assert shared(options, 2)[0].environment == {}
    assert "threads" not in shared(options, 2)[0].options


def test_a_device_that_is_none_is_for_the_engines_to_refuse() -> None:
    assert shared({"device": "tpu"}, 2) == [Share({"device": "tpu"})] * 2


def test_gpus_are_counted_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert asyncio.run(count_gpus(100.0)) == torch.cuda.device_count()
    monkeypatch.setattr(devices, "_COUNT", "raise SystemExit('no driver')")
    with pytest.raises(EngineStartError, match="could not be counted: no driver"):
        asyncio.run(count_gpus(100.0))
    monkeypatch.setattr(devices, "_COUNT", "import time; time.sleep(100)")
    with pytest.raises(EngineStartError, match=r"in 0\.05 s"):
        asyncio.run(count_gpus(0.05))
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(EngineStartError, match="No such file"):
        asyncio.run(count_gpus(100.0))


def test_ranks_of_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"this is rank 1 of 4 .* without torchrun"):
        AsyncLLM("tiny")
    monkeypatch.setenv("WORLD_SIZE", "1")
    AsyncLLM("tiny")
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "4")  # of something else
    AsyncLLM("tiny")


def test_the_option_is_checked_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data_parallel_size must be an integer >= 1, got 0"):
        AsyncLLM("tiny", data_parallel_size=0)
    with pytest.raises(UnknownOptionError, match="did you mean 'data_parallel_size'"):
        AsyncLLM("tiny", data_paralel_size=2)
