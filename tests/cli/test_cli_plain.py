"""Text in a pipe arrives as it is decided and is never taken back."""

from __future__ import annotations

import subprocess
import sys

from dllmserve import LLM, SamplingParams
from dllmserve.cli.generate import plain_pieces

QUESTION = [{"role": "user", "content": "Copy: stone river garden window"}]


def test_pieces_join_to_the_answer_and_come_early() -> None:
    llm = LLM("tiny", device="cpu")
    assert llm.tokenizer is not None
    params = SamplingParams(temperature=0.0, gen_length=32, steps=32)
    steps = llm.stream(llm.chat_ids(QUESTION), params)
    pieces = list(plain_pieces(steps, llm.tokenizer))
    answer = llm.chat(QUESTION, params, use_tqdm=False)[0]["text"]
    assert "".join(pieces) == answer
    assert len([p for p in pieces if p]) > 1


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    llm = LLM("tiny", device="cpu")
    assert llm.tokenizer is not None
    params = SamplingParams(temperature=0.0, gen_length=32, steps=32, stop=["garden wi"])
    steps = llm.stream(llm.chat_ids(QUESTION), params)
    pieces = list(plain_pieces(steps, llm.tokenizer, params.stop_strings))
    assert "".join(pieces) == "stone river "


def test_the_first_words_reach_a_pipe_before_the_last() -> None:
    command = [sys.executable, "-u", "-m", "dllmserve", "generate"]
    command += ["--quality", "exact", "Repeat 6 times: window"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read1(4096)
        rest = process.stdout.read()
    assert process.returncode == 0
    assert first and rest
    assert (first + rest).decode() == ", ".join(["window"] * 6) + "\n"
