"""Rules, caches, models and backends of other packages, installed as users install them."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dllmserve
from dllmserve.catalog import RULES, Catalog, RuleInfo
from dllmserve.errors import ConfigError
from tests.server.clients.started import started

NAME = "dllmserve_extra"
FILES = {
    "__init__.py": """
from dllmserve.catalog import BackendInfo, CacheInfo, ModelInfo, RuleInfo

LEFTMOST = RuleInfo("dllmserve_extra.leftmost:LeftmostRule")
PERIODIC = CacheInfo("dllmserve_extra.periodic:PeriodicCache")
MODEL = ModelInfo("dllmserve_extra.model:Extra")
UNFUSED = BackendInfo("dllmserve_extra.unfused:UnfusedBackend")
""",
    "leftmost.py": """
import torch
from dllmserve.decoding.rule import write_best

class LeftmostRule:
    def apply(self, view):
        place = torch.arange(view.tokens.shape[1]).expand_as(view.tokens)
        key = torch.where(view.eligible, -place.double(), -torch.inf)
        return write_best(view, key, view.quota.clamp(min=1))
""",
    "periodic.py": """
from dllmserve.cache.dual import DualCache
from dllmserve.cache.policy import whole_canvas
from dllmserve.core.plan import Store

class PeriodicCache(DualCache):
    def span(self, request, spec, row):
        if request.progress.step_in_block % 4 == 0:
            return whole_canvas(request, row, Store.POSITIONS)
        return super().span(request, spec, row)
""",
    "model.py": """
from dllmserve.models.dream import Dream

class Extra(Dream):
    name = "ExtraModelLM"
""",
    "unfused.py": """
from dllmserve.attention.sdpa import SdpaBackend

class UnfusedBackend(SdpaBackend):
    pass
""",
}
POINTS = """
[dllmserve.rules]
leftmost = dllmserve_extra:LEFTMOST
[dllmserve.caches]
periodic = dllmserve_extra:PERIODIC
[dllmserve.models]
ExtraModelLM = dllmserve_extra:MODEL
[dllmserve.backends]
unfused = dllmserve_extra:UNFUSED
"""


def wheel(folder: Path, points: str, files: dict[str, str]) -> Path:
    """A package as a file that pip installs."""
    path = folder / f"{NAME}-1.0-py3-none-any.whl"
    info = f"{NAME}-1.0.dist-info"
    found = {f"{NAME}/{name}": text for name, text in files.items()}
    found[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n"
    found[f"{info}/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    found[f"{info}/entry_points.txt"] = points
    found[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*found, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in found.items():
            archive.writestr(name, text)
    return path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH, with the package."""
    folder = tmp_path_factory.mktemp("extra")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    target = folder / "site"
    subprocess.run([*pip, "--target", target, wheel(folder, POINTS, FILES)], check=True)
    return target


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model under the package's architecture."""
    folder = tmp_path_factory.mktemp("checkpoint") / "extra"
    shutil.copytree(Path(dllmserve.__file__).parent / "assets" / "tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["ExtraModelLM"]}))
    return folder


REQUEST: dict[str, Any] = {
    "temperature": 0.0,
    "unmask": "leftmost",
    "cache": "periodic",
    "block_length": 4,
    "steps": 2,  # a fixed schedule would be done after two
    "ignore_eos": True,
}

SCRIPT = f"""
import sys
from dllmserve import LLM, SamplingParams
llm = LLM(sys.argv[1], attention="unfused", device="cpu")
params = SamplingParams(gen_length=8, **{REQUEST!r})
canvases = list(llm.stream("The president", params))
assert [c.committed.count(True) for c in canvases] == [1, 2, 3, 4, 5, 6, 7, 8], canvases
print(llm.generate(["The president"], params, use_tqdm=False)[0]["text"])
"""


@pytest.fixture(scope="module")
def offline(installed: Path, checkpoint: Path) -> str:
    """What LLM answers."""
    env = {**os.environ, "PYTHONPATH": f"{installed}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", SCRIPT, str(checkpoint)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def test_a_server_runs_what_another_package_adds(
    installed: Path, checkpoint: Path, offline: str, tmp_path: Path
) -> None:
    """AsyncLLM, its API process and its engine process, over HTTP."""
    options = (str(checkpoint), "--attention", "unfused", "--device", "cpu")
    path = f"{installed}:{os.environ.get('PYTHONPATH', '')}"
    with started(tmp_path, *options, "--job-store", "memory", PYTHONPATH=path) as server:
        body = {"prompt": "The president", "max_tokens": 8, "model": "extra", **REQUEST}
        asked = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            found = json.load(answer)
        assert found["choices"][0]["text"] == offline
        assert found["usage"]["forward_passes"] == 8
        with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=60) as answer:
            fields = json.load(answer)["components"]["schemas"]["CompletionRequest"]["properties"]
        assert "leftmost" in fields["unmask"]["enum"] and "periodic" in fields["cache"]["enum"]


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts a package with these entry points where Python finds it."""

    def put(points: str, files: dict[str, str]) -> Catalog[RuleInfo]:
        with zipfile.ZipFile(wheel(tmp_path, points, files)) as archive:
            archive.extractall(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, NAME, raising=False)
        return Catalog("unmask rule", "dllmserve.rules", RuleInfo, RULES.own)

    yield put
    sys.modules.pop(NAME, None)


def test_names_of_others_come_after_ours_in_one_order(on_path: Any) -> None:
    points = "[dllmserve.rules]\nzebra = dllmserve_extra:Z\nant = dllmserve_extra:Z\n"
    rules = on_path(points, {"__init__.py": "raise ImportError('only if it is used')"})
    assert list(rules) == [*RULES.own, "ant", "zebra"] and len(rules) == len(RULES.own) + 2
    assert rules.index("zebra") == len(rules) - 1 and rules.index("steps") == 0
    assert "ant" in rules and "bee" not in rules
    with pytest.raises(KeyError):
        rules["bee"]
    assert rules["steps"] is RULES["steps"], "what is broken is in nobody's way"
    with pytest.raises(ConfigError, match=r"'ant' of package 'dllmserve_extra'.*only if it is use"):
        rules["ant"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("dllmserve_extra:RULE", "must be a dllmserve.catalog.RuleInfo, and dllmserve_extra:RULE"),
        ("dllmserve_extra:ABSENT", "cannot be loaded (dllmserve_extra:ABSENT)"),
        ("dllmserve_absent:RULE", "cannot be loaded (dllmserve_absent:RULE)"),
    ],
)
def test_an_entry_that_leads_elsewhere_is_named(on_path: Any, value: str, message: str) -> None:
    rules = on_path(f"[dllmserve.rules]\nmine = {value}\n", {"__init__.py": "class RULE: ..."})
    with pytest.raises(ConfigError) as refused:
        rules["mine"]
    assert "the unmask rule 'mine' of package 'dllmserve_extra'" in str(refused.value)
    assert message in str(refused.value)


def test_a_name_that_is_taken_is_refused(on_path: Any) -> None:
    rules = on_path("[dllmserve.rules]\nsteps = dllmserve_extra:RULE\n", {"__init__.py": ""})
    assert rules["steps"] is RULES["steps"]
    with pytest.raises(ConfigError, match="adds the unmask rule 'steps', and there is one"):
        list(rules)
