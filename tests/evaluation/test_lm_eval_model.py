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
from dllmserve.errors import (
    InvalidParameterError,
    PromptError,
    TokenizerError,
    UnknownOptionError,
)
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


def pair(context: str, continuation: str) -> Any:
    return SimpleNamespace(args=(context, continuation))


def test_likelihoods(lm: Any) -> None:
    """The answers of a question, by a chat template and without, and what is greedy of them."""
    text = lm.apply_chat_template(user("Sort the numbers: 9 41 7"))
    requests = [pair(text, answer) for answer in ("7 9 41", "9 7 41", "41 9 7", "7 9 41")]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    assert found[0] == found[3] and found[0][0] == max(value for value, _ in found)
    assert [greedy for _, greedy in found] == [True, False, False, True]
    assert lm.partial[0] == ("loglikelihood", requests[0].args, found[0])
    ids = [lm._encode_pair(*request.args) for request in requests]
    assert all(before == lm._llm.chat_ids(user("Sort the numbers: 9 41 7")) for before, _ in ids)
    alone = lm._llm.log_likelihood(*map(list, zip(*ids, strict=True)), use_tqdm=False)
    assert [value for value, _ in found] == pytest.approx(alone, abs=1e-3)
    # blanks at the end of a context belong to what follows
    moved, plain = lm._encode_pair("The people ", "of"), lm._encode_pair("The people", " of")
    assert moved == plain and plain[0] == lm._llm.tokenizer.encode("The people")
    before, ids = lm._encode_pair("", "The people")
    assert len(before) == 1 and ids == lm._llm.tokenizer.encode("The people", special=False)
    assert lm.loglikelihood([], disable_tqdm=True) == []


def test_options_of_likelihoods(model_class: Any) -> None:
    few = model_class("tiny", max_model_len=128, mc_num=2, is_check_greedy=False, seed=4)
    requests = [pair("The president", " of the United"), pair("The president", " of")]
    (long, short) = few.loglikelihood(requests, disable_tqdm=True)
    prompt = few._llm.tokenizer.encode("The president")
    ids = few._llm.tokenizer.encode(" of the United", special=False)
    (alone,) = few._llm.log_likelihood([prompt], [ids], 2, 4, use_tqdm=False)
    assert long[0] == pytest.approx(alone, abs=1e-3) and long[1] is short[1] is False
    for given, words in (({"mc_num": 0}, "mc_num"), ({"is_check_greedy": 2}, "is_check_greedy")):
        with pytest.raises(InvalidParameterError, match=words):
            model_class("tiny", **given)


def test_whole_texts(lm: Any, model_class: Any, growing_checkpoints: dict[str, Path]) -> None:
    """Of an autoregressive model the chain over all tokens, in pieces that fit."""
    with pytest.raises(NotImplementedError, match="bounds that of an answer behind a prompt"):
        lm.loglikelihood_rolling([pair("a", "b")])
    causal = model_class(str(growing_checkpoints["qwen3"]), max_model_len=16, mc_num=1)
    texts = ["abcdefghijklmnopqrstuvwxyz0123456789", "ab"]
    found = causal.loglikelihood_rolling(
        [SimpleNamespace(args=(text,)) for text in texts], disable_tqdm=True
    )
    llm, prefix = causal._llm, causal._prefix()
    for text, value in zip(texts, found, strict=True):
        ids = llm.tokenizer.encode(text, special=False)
        whole, total = [prefix, *ids], 0.0
        for low in range(1, len(whole), 15):
            high = min(low + 15, len(whole))
            before = whole[max(high - 16, 0) : low]
            total += llm.log_likelihood([before], [whole[low:high]], use_tqdm=False)[0]
        assert value == pytest.approx(total, abs=1e-3)


def test_what_is_not_offered(model_class: Any, tmp_path: Path) -> None:
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
@pytest.mark.parametrize(
    ("task", "metric", "requests"),
    [("sort_numbers", "exact_match", 4), ("sorted_choice", "acc", 0)],
)
def test_tasks_of_the_real_lm_eval(tmp_path: Path, task: str, metric: str, requests: int) -> None:
    command = [sys.executable, "-m", "dllmserve.lm_eval", "run", "--model", "dllmserve"]
    command += ["--model_args", "pretrained=tiny,max_model_len=512,unmask=threshold,mc_num=32"]
    command += ["--tasks", task, "--include_path", ".", "--limit", "4"]
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
    assert found["results"][task][f"{metric},none"] == 1.0
    assert found["config"]["requests"] == requests and found["config"]["model_dtype"] == "float32"


@pytest.mark.skipif(not REAL, reason="lm_eval is not installed")
def test_the_real_class_is_registered() -> None:
    from lm_eval.api.registry import get_model

    kind = importlib.import_module(MODULE).DllmServeLM
    assert get_model("dllmserve") is kind
    lm = kind.create_from_arg_string("pretrained=tiny,max_model_len=512", {"device": "cuda:0"})
    assert isinstance(lm._llm, LLM) and lm.rank == 0 and lm.world_size == 1
    text = lm.apply_chat_template(user("Sort the numbers: 9 41 7"))
    assert lm.generate_until([ask(text, max_gen_toks=16)], disable_tqdm=True) == ["7 9 41"]
