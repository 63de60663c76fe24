"""The model class of lm-eval: with a stand-in for lm-eval, and with the real one if it is there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dllmserve import LLM
from dllmserve.errors import PromptError, TokenizerError, UnknownOptionError
from tests.checkpoints import Shape, write_random

TASK = Path(__file__).parents[2] / "examples" / "lm_eval"
REAL = importlib.util.find_spec("lm_eval") is not None
MODULE = "dllmserve.tools.lm_eval.model"
#: what users import
DOCUMENTED = "dllmserve.lm_eval.model"


class StandInLM:
    """The parts of lm_eval.api.model.LM that the class builds on."""

    def __init__(self) -> None:
        self.partial: list[tuple[Any, ...]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *args: self.partial.append(args))


@pytest.fixture
def model_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class, made with a stand-in for lm-eval."""
    registered: dict[str, type] = {}

    def register_model(name: str) -> Callable[[type], type]:
        return lambda kind: registered.setdefault(name, kind)

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api")}
    modules["lm_eval.api.model"] = ModuleType("lm_eval.api.model")
    modules["lm_eval.api.registry"] = ModuleType("lm_eval.api.registry")
    modules["lm_eval.api.model"].LM = StandInLM  # type: ignore[attr-defined]
    modules["lm_eval.api.registry"].register_model = register_model  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in (MODULE, DOCUMENTED):
        monkeypatch.delitem(sys.modules, name, raising=False)
    kind = importlib.import_module(DOCUMENTED).DllmServeLM
    assert registered == {"dllmserve": kind} and kind.__module__ == MODULE
    yield kind
    for name in (MODULE, DOCUMENTED):
        sys.modules.pop(name, None)


@pytest.fixture
def lm(model_class: Any) -> Any:
    return model_class("tiny", max_model_len=512, unmask="threshold", threshold=0.9)


def ask(context: str, **given: Any) -> Any:
    return SimpleNamespace(args=(context, given))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_answers(lm: Any, capfd: pytest.CaptureFixture[str]) -> None:
    first = lm.apply_chat_template(user("Sort the numbers: 9 41 7"))
    second = lm.apply_chat_template(user("Sort the numbers: 98 54 6"))
    requests = [
        ask(first, until=["\n"], max_gen_toks=32),
        ask(second, until=["54"], max_gen_toks=32, do_sample=False),
    ]
    assert lm.generate_until(requests, disable_tqdm=True) == ["7 9 41", "6 "]
    assert capfd.readouterr().err == ""
    assert lm.partial[1] == ("generate_until", requests[1].args, "6 ")
    assert lm.generate_until([]) == []
    found = lm.get_model_info()
    assert (found["requests"], found["decoding"]["unmask"]) == (2, "threshold")
    assert found["forward_passes_per_request"] >= 1 and found["tokens_per_forward"] > 1
    json.dumps(found)


def test_the_same_as_chat(lm: Any) -> None:
    text = lm.apply_chat_template(user("Spell: river stone"))
    assert lm._encode(text) == lm._llm.chat_ids(user("Spell: river stone"))
    (answer,) = lm.generate_until([ask(text, max_gen_toks=32)], disable_tqdm=True)
    setting = lm._base.params(32)
    (alone,) = lm._llm.chat(user("Spell: river stone"), setting, use_tqdm=False)
    assert answer == alone["text"]


def test_begun_answers(lm: Any) -> None:
    begun = [*user("Sort the numbers: 9 41 7"), {"role": "assistant", "content": "7 9"}]
    text = lm.apply_chat_template(begun, add_generation_prompt=False)
    assert text.endswith("assistant<|end_header_id|>\n\n7 9")
    with pytest.raises(PromptError, match="must end in the assistant's"):
        lm.apply_chat_template(user("Hi"), add_generation_prompt=False)


def test_repeats(lm: Any) -> None:
    """Repeated requests differ among each other, and are the same in the next run."""
    request = ask("Sort the numbers:", max_gen_toks=8, do_sample=True, temperature=1.0, seed=1)
    once = lm.generate_until([request] * 4, disable_tqdm=True)
    assert len(set(once)) > 1
    assert lm.generate_until([request] * 4, disable_tqdm=True) == once


def test_special_tokens_are_not_given_twice(lm: Any) -> None:
    """A tokenizer that begins prompts with a token, and a prompt that has it already."""

    class Adds:
        def encode(self, text: str, *, special: bool = True) -> list[int]:
            ids = [1 if c == "^" else ord(c) for c in text]
            return [1, *ids] if special else ids

    lm._tokenizer = Adds()
    assert lm._encode("ab") == [1, 97, 98]
    assert lm._encode("^ab") == [1, 97, 98]
    lm._rendered.add("cd")
    assert lm._encode("cd") == [99, 100]


def test_names_and_template(lm: Any) -> None:
    assert lm.tokenizer_name.startswith("tiny-")
    assert "start_header_id" in lm.chat_template(True)
    assert lm.chat_template("other") == lm.chat_template(True) and lm.chat_template(False) is None


def test_what_is_not_offered(lm: Any, model_class: Any, tmp_path: Path) -> None:
    for name in ("loglikelihood", "loglikelihood_rolling"):
        with pytest.raises(NotImplementedError, match=r"generate_until tasks alone.*such as gsm8k"):
            getattr(lm, name)([])
    with pytest.raises(UnknownOptionError, match="did you mean 'threshold'"):
        model_class("tiny", thresold=0.9)
    folder = write_random(tmp_path / "bare", Shape(family="dream"))
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        model_class(str(folder))


def test_without_lm_eval() -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None; "
        "from dllmserve.tools.lm_eval.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install 'lm_eval>=0.4.13'")


@pytest.mark.skipif(not REAL, reason="lm_eval is not installed")
def test_a_task_of_the_real_lm_eval(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dllmserve.lm_eval", "run", "--model", "dllmserve"]
    command += ["--model_args", "pretrained=tiny,max_model_len=512,unmask=threshold"]
    command += ["--tasks", "sort_numbers", "--include_path", ".", "--limit", "4"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [*command, "--apply_chat_template", "--output_path", str(tmp_path / "out")],
        cwd=TASK,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["results"]["sort_numbers"]["exact_match,none"] == 1.0
    assert found["config"]["requests"] == 4 and found["config"]["model_dtype"] == "float32"


@pytest.mark.skipif(not REAL, reason="lm_eval is not installed")
def test_the_real_class_is_registered() -> None:
    from lm_eval.api.registry import get_model

    kind = importlib.import_module(MODULE).DllmServeLM
    assert get_model("dllmserve") is kind
    lm = kind.create_from_arg_string("pretrained=tiny,max_model_len=512", {"device": "cuda:0"})
    assert isinstance(lm._llm, LLM) and lm.rank == 0 and lm.world_size == 1
    text = lm.apply_chat_template(user("Sort the numbers: 9 41 7"))
    assert lm.generate_until([ask(text, max_gen_toks=16)], disable_tqdm=True) == ["7 9 41"]
