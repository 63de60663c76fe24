"""Train the small model: causal warm-up with a lookup curriculum, then masked diffusion with
shifted logits.

The schedule runs on the wall clock, so a run fits the time it is given; a long run may be cut into
several calls, each covering a part of the schedule (``--begin``/``--end``) and resuming from the
checkpoint of the one before.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing as mp
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from training.batches import STATS, TAGS, Batch, worker
from training.evaluate import Question, Setting, evaluate, questions, teacher_forced
from training.export import export, load
from training.model import Net, Shape, attention_error
from training.optim import Optimizer

ASSETS = Path(__file__).resolve().parent.parent / "dllmserve" / "assets" / "tiny"
# Fixed number of loss rows a batch, as a share of its tokens, so that shapes never change.
LOSS_SHARE = 0.36
TOP_LEVEL = 96
NEEDLE = TAGS.index("needle")


@dataclass(slots=True)
class State:
    """What survives from call to call beside weights and optimizer."""

    step: int = 0
    tokens: int = 0
    level: int = 2
    masked: bool = False
    trained_s: float = 0.0


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ASSETS, help="folder of the exported model and train.log"
    )
    parser.add_argument(
        "--seconds", type=float, default=1100.0, help="wall-clock time of this call"
    )
    parser.add_argument(
        "--begin", type=float, default=0.0, help="schedule position at the start of this call"
    )
    parser.add_argument("--end", type=float, default=1.0, help="schedule position at its end")
    parser.add_argument(
        "--decay-from", type=float, default=0.55, help="where the linear decay to zero starts"
    )
    parser.add_argument(
        "--causal-seconds", type=float, default=150.0, help="longest causal warm-up"
    )
    parser.add_argument(
        "--level", type=int, default=4, help="records a lookup at the start of the curriculum"
    )
    parser.add_argument(
        "--causal-size", type=int, default=65536, help="tokens a step in the warm-up"
    )
    parser.add_argument("--masked-size", type=int, default=65536, help="tokens a step afterwards")
    parser.add_argument("--checkpoint", type=Path, default=Path("/tmp/tiny-checkpoint.pt"))
    parser.add_argument("--resume", action="store_true", help="start from the checkpoint")
    parser.add_argument(
        "--from-export", type=Path, help="start from exported weights, optimizer fresh"
    )
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--muon-lr", type=float, default=0.007)
    parser.add_argument("--adam-lr", type=float, default=0.0015)
    parser.add_argument(
        "--peak", type=float, default=1.0, help="factor on both rates, for continued runs"
    )
    parser.add_argument("--gate-every", type=float, default=90.0)
    parser.add_argument("--gate-items", type=int, default=64)
    parser.add_argument(
        "--shape", type=json.loads, default={}, help="JSON overrides of the network's sizes"
    )
    parser.add_argument(
        "--stuck-seconds",
        type=float,
        default=0.0,
        help="stop here if lookups are not learned by then",
    )
    parser.add_argument("--eager", action="store_true", help="do not compile")
    return parser.parse_args()


class Trainer:
    """Owns the network, the optimizer, the data workers and the schedule of one call."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.control: Any = mp.get_context("fork").Array(
            ctypes.c_long, [args.causal_size, 1, args.level, 0]
        )
        self.queue: Any = mp.get_context("fork").Queue(maxsize=24)
        self.state = State(level=args.level)
        args.out.mkdir(parents=True, exist_ok=True)
        self.log_file = (args.out / "train.log").open("a", encoding="utf-8")
        saved = torch.load(args.checkpoint, weights_only=True) if args.resume else None
        if saved is not None:
            self.state = State(**saved["state"])
        if args.from_export:
            self.state = State(masked=True, level=TOP_LEVEL)
        self._set_control()
        seed = int(time.time()) % 100_000
        self.workers = [
            mp.get_context("fork").Process(
                target=worker,
                args=(str(ASSETS), seed * 1000 + k, self.queue, self.control),
                daemon=True,
            )
            for k in range(args.workers)
        ]
        for process in self.workers:
            process.start()
        # Only after the fork: the workers must not inherit a CUDA context.
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(5)
        self.tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
        self.net = Net(Shape(**args.shape)).to(self.device)
        compiled = self.device.type == "cuda" and not args.eager
        if compiled:
            self.net.compile_pieces()
        if args.from_export:
            load(self.net, args.from_export)
        self.optimizer = Optimizer(self.net, args.muon_lr, args.adam_lr, compiled)
        if saved is not None:
            self.net.load_state_dict(saved["net"])
            self.optimizer.load(saved["optimizer"])
        self.gates: list[Question] = questions(self.tokenizer, args.gate_items)
        self.sums = torch.zeros(3, len(STATS), device=self.device)
        self.begun = time.time()
        self.lookup = 0.0

    def log(self, text: str) -> None:
        """Print and keep a line."""
        line = f"[{time.time() - self.begun:6.1f}] {text}"
        print(line, flush=True)
        self.log_file.write(line + "\n")
        self.log_file.flush()

    def _set_control(self) -> None:
        """Tell the workers what to produce from now on."""
        self.control[2] = self.state.level
        self.control[0] = self.args.masked_size if self.state.masked else self.args.causal_size
        self.control[1] = 0 if self.state.masked else 1

    def _next(self) -> Batch:
        """The next batch of the current stage; those of the stage before are dropped."""
        while True:
            batch: Batch = self.queue.get()
            if batch.causal is not self.state.masked:
                return batch

    def _to_device(self, array: NDArray[Any], dtype: torch.dtype) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss rows cut or padded to their fixed number; padding points at scattered rows with
        weight zero.
        """
        size = int(len(batch.ids) * LOSS_SHARE)
        have = len(batch.index)
        if have >= size:
            keep = np.sort(np.random.default_rng(have).permutation(have)[:size])
            parts = (batch.index[keep], batch.target[keep], batch.weight[keep], batch.tag[keep])
        else:
            more = size - have
            parts = (
                np.concatenate(
                    [batch.index, np.linspace(0, len(batch.ids) - 1, more).astype(np.int32)]
                ),
                np.pad(batch.target, (0, more)),
                np.pad(batch.weight, (0, more)),
                np.pad(batch.tag, (0, more)),
            )
        kinds = (torch.int64, torch.int64, torch.float32, torch.int64)
        index, target, weight, tag = (
            self._to_device(a, k) for a, k in zip(parts, kinds, strict=True)
        )
        return index, target, weight, tag

    def step(self, rate: float) -> Tensor:
        """One optimizer step."""
        batch = self._next()
        ids, pos = self._to_device(batch.ids, torch.int64), self._to_device(batch.pos, torch.int64)
        starts = self._to_device(batch.starts, torch.int32)
        index, target, weight, tag = self._rows(batch)
        net = self.net
        h = net.hidden(ids, pos, starts, batch.longest, batch.causal, True)
        loss, losses, right = net.loss(h[index], net.norm, net.head, target, weight, net.shape.eps)
        torch.autograd.backward(loss)
        self.optimizer.step(rate)
        counted = (weight >= 0.9).float()
        self.sums.index_add_(1, tag, torch.stack((losses * counted, right * counted, counted)))
        self.state.step += 1
        self.state.tokens += len(batch.ids)
        return loss.detach()

    def report(self, rate: float, place: float) -> None:
        """Log loss and accuracy a task since the last report, and move the lookup curriculum."""
        sums = self.sums.tolist()
        self.sums.zero_()
        cells = []
        for k, tag in enumerate(STATS):
            if sums[2][k]:
                cells.append(f"{tag} {sums[0][k] / sums[2][k]:.3f}/{sums[1][k] / sums[2][k]:.3f}")
        s = self.state
        speed = s.tokens / max(1e-9, s.trained_s)
        self.log(
            f"step {s.step} {s.tokens / 1e6:.1f}M {speed / 1e6:.2f}M/s lr {rate:.3f} "
            f"p {place:.3f} level {s.level} " + " ".join(cells)
        )
        accuracy = sums[1][NEEDLE] / max(1.0, sums[2][NEEDLE])
        self.lookup = accuracy
        bar = 0.80 if s.masked else 0.90
        top = TOP_LEVEL if s.masked else 32
        if accuracy > bar and s.level < top:
            s.level = min(top, s.level + max(1, s.level // 3))
            self._set_control()

    def gate(self) -> dict[str, float]:
        """Held-out exact match: causal greedy in the warm-up, masked decoding (two tokens a step)
        afterwards.
        """
        began = time.time()
        if not self.state.masked:
            scores = teacher_forced(self.net, self.tokenizer, self.gates)
            wrong: list[str] = []
        else:
            scores, _, wrong = evaluate(self.net, self.tokenizer, self.gates, Setting(tokens=2))
        cells = " ".join(f"{task} {value:.2f}" for task, value in scores.items())
        self.log(
            f"GATE {'masked' if self.state.masked else 'causal'} {cells} "
            f"({time.time() - began:.1f} s)"
        )
        for line in wrong[:8]:
            self.log(f"  wrong {line}")
        return scores

    def save(self) -> None:
        """Write the checkpoint and the exported model."""
        s = self.state
        state = {
            "step": s.step,
            "tokens": s.tokens,
            "level": s.level,
            "masked": s.masked,
            "trained_s": s.trained_s,
        }
        torch.save(
            {"net": self.net.state_dict(), "optimizer": self.optimizer.state(), "state": state},
            self.args.checkpoint,
        )
        export(self.net, self.args.out)

    def run(self) -> None:
        """Train until the time is up."""
        args, state = self.args, self.state
        size = sum(p.numel() for p in self.net.parameters())
        self.log(
            f"{size / 1e6:.2f} M parameters, {self.device}, "
            f"{len(self.workers)} workers, torch {torch.__version__}"
        )
        error = attention_error(self.device)
        self.log(f"attention error {error:.1e}")
        if not error < 0.02:
            raise RuntimeError("packed attention is wrong on this device")
        first = self.step(0.0)
        self.log(f"first step done, loss {float(first):.3f}, batches waiting {self.queue.qsize()}")
        start = last = time.time()
        gated = start - args.gate_every + (20.0 if not state.masked else args.gate_every)
        warm_until = state.step + 100
        rate = place = 0.0
        while time.time() - start < args.seconds:
            place = args.begin + (args.end - args.begin) * (time.time() - start) / args.seconds
            rate = args.peak * min(1.0, (1.0 - place) / (1.0 - args.decay_from))
            rate *= min(1.0, max(0.02, 1 - (warm_until - state.step) / 100))
            loss = self.step(rate)
            now = time.time()
            if state.step % (25 if not state.masked else 50) == 0:
                if not torch.isfinite(loss):
                    raise RuntimeError("the loss is not finite")
                state.trained_s += time.time() - last
                last = time.time()
                self.report(rate, place)
            if (
                not state.masked
                and 0 < args.stuck_seconds < now - start
                and state.level < 8
                and self.lookup < 0.6
            ):
                self.log("lookups are stuck: stopping early")
                break
            if not state.masked and now - start > args.causal_seconds:
                self._switch()
                gated, last = time.time(), time.time()
            elif now - gated > (args.gate_every if state.masked else 20.0):
                scores = self.gate()
                if state.masked:
                    self.save()
                elif (
                    state.level >= 16 and min(v for t, v in scores.items() if t != "sudoku") >= 0.95
                ):
                    self._switch()
                gated = last = time.time()
        self.gate()
        self.save()
        self.control[3] = 1
        for process in self.workers:
            process.terminate()
        self.log(f"done: {state.step} steps, {state.tokens / 1e6:.1f} M tokens")

    def _switch(self) -> None:
        """From causal to masked training, same weights."""
        self.gate()
        self.state.masked = True
        self._set_control()
        self.log("switching to masked training")


def main() -> None:
    """Entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    torch.set_float32_matmul_precision("high")
    Trainer(arguments()).run()


if __name__ == "__main__":
    main()
