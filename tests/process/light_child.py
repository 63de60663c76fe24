"""An engine process without a model: it answers every prompt with the prompt's first ids.

    light_child.py HOW DIRECTORY DESCRIPTOR OWNER

HOW is a fault, or "none". A prompt that begins with POISON brings it about.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from dllmserve.core.limits import Limits
from dllmserve.core.model_spec import ModelSpec
from dllmserve.outputs import RequestOutput
from dllmserve.process.channel import Channel, ChannelClosed
from dllmserve.process.messages import (
    Abort,
    Admitted,
    Configure,
    Counters,
    EngineInfo,
    Finished,
    FromWorker,
    NotLoaded,
    Ready,
    Report,
    Stop,
    Submit,
    decode_to_worker,
    encode,
)

POISON = 7
SPEC = ModelSpec(
    architecture="test",
    vocab_size=260,
    embedding_size=260,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_size=8,
    max_model_len=256,
    rope_theta=1e4,
    norm_eps=1e-5,
    mask_id=259,
    eos_ids=(256,),
)
LIMITS = Limits(
    max_model_len=256,
    max_num_seqs=8,
    max_num_batched_tokens=4096,
    max_logit_rows=1024,
    page_size=16,
    num_pages=512,
)


class LightEngine:
    def __init__(self, how: str, channel: Channel) -> None:
        self.how, self.channel = how, channel
        self.steps = 0

    def send(self, message: FromWorker) -> None:
        self.channel.send(encode(message))

    def run(self, directory: str) -> None:
        while True:
            for data in self.channel.receive(0.1):
                message = decode_to_worker(data)
                if isinstance(message, Configure):
                    self.load(directory)
                elif isinstance(message, Submit):
                    self.answer(message)
                elif isinstance(message, Stop):
                    return
                else:
                    assert isinstance(message, Abort)
            self.send(Report(Counters(steps=self.steps, spans=self.steps)))

    def load(self, directory: str) -> None:
        if self.how == "garbage-load":
            self.channel.send(b"\xc1")
        if self.how == "slow-load":
            (Path(directory) / f"loading-{os.getpid()}").touch()
            time.sleep(60)
        if self.how == "stops-loading" and first_of(directory):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.how == "stops-ranks" and first_of(directory):
            self.send(NotLoaded("RankError", "rank 1 has been stopped for 10 s", stopped=True))
            sys.exit(65)
        if self.how == "dies-at-once" and not first_of(directory):
            sys.exit(3)
        self.send(Ready(EngineInfo(directory, SPEC, LIMITS, "cpu", "float32", "none")))
        if self.how == "stops-ready" and first_of(directory):
            os.kill(os.getpid(), signal.SIGSTOP)

    def answer(self, submit: Submit) -> None:
        self.send(Admitted([submit.id]))
        if submit.prompt_ids[0] == POISON:
            if self.how == "garbage":
                self.channel.send(b"\xc1 no message")
                time.sleep(60)
            if self.how == "talks":
                os.write(2, b"x" * 200_000 + b"\nwas here\n")
            if self.how == "kill" or self.how == "dies-at-once":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "exit":
                os._exit(0)
            if self.how == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.how == "holds-lock":
                ctypes.PyDLL(None).sleep(3)  # no other Python code runs meanwhile
            if self.how == "waits":
                return
        self.steps += 1
        ids = submit.prompt_ids[:4]
        output = RequestOutput("", ids, "length", len(submit.prompt_ids), len(ids), 1)
        counters = Counters(steps=self.steps, spans=self.steps)
        self.send(Report(counters, finished=[Finished(submit.id, output)]))


def first_of(directory: str) -> bool:
    """Whether no engine has been there before."""
    try:
        (Path(directory) / "started").touch(exist_ok=False)  # one of several at once is the first
    except FileExistsError:
        return False
    return True


def main() -> None:
    how, directory, descriptor, owner = sys.argv[1:]
    assert os.getppid() == int(owner)
    if how == "stops-always" or (how == "stops-starting" and first_of(directory)):
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        LightEngine(how, Channel.inherited(int(descriptor))).run(directory)
    except ChannelClosed:
        return


if __name__ == "__main__":
    main()
