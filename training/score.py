"""Write the held-out set that ships with the model, and score the exported weights on it.

``python -m training.score --write`` draws the set; without ``--write`` the shipped set is scored
with threshold 0.9, one token a step, and a whole block of 32 in one call, and the result is written
to ``scores.json`` beside the weights.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer

from training.evaluate import Question, Setting, evaluate, questions
from training.export import load
from training.model import Net, Shape
from training.train import ASSETS

HELD_OUT = "heldout.jsonl.gz"
SETTINGS = {
    "threshold-0.9": Setting(threshold=0.9),
    "one-token": Setting(),
    "one-call": Setting(tokens=32),
}


def write(folder: Path, count: int) -> None:
    """Draw ``count`` items a task and write them as compressed JSON lines."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lines, seen = [], dict[str, int]()
    for question in questions(tokenizer, count):
        seen[question.task] = seen.get(question.task, 0) + 1
        lines.append(
            json.dumps({"id": f"{question.task}/{seen[question.task]}", **asdict(question)})
        )
    # A fixed time stamp keeps the file identical from run to run.
    packed = gzip.compress("\n".join(lines).encode() + b"\n", mtime=0)
    (folder / HELD_OUT).write_bytes(packed)
    print(f"{len(lines)} items, {len(packed) / 1024:.0f} KiB")


def read(folder: Path) -> list[Question]:
    """Read the shipped held-out set."""
    rows = [
        json.loads(line) for line in gzip.decompress((folder / HELD_OUT).read_bytes()).splitlines()
    ]
    return [Question(r["task"], r["prompt"], r["answer"], r["gen_length"]) for r in rows]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--count", type=int, default=200, help="items a task")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--tasks", nargs="+", help="only these")
    parser.add_argument("--folder", type=Path, default=ASSETS)
    args = parser.parse_args()
    if args.write:
        write(args.folder, args.count)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = Net(Shape()).to(device)
    net.bf16 = True
    load(net, args.folder)
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    path = args.folder / "scores.json"
    items = read(args.folder)
    for name in args.settings:
        for task in args.tasks or list(dict.fromkeys(item.task for item in items)):
            chosen = [item for item in items if item.task == task][: args.count]
            began = time.time()
            right, calls, wrong = evaluate(net, tokenizer, chosen, SETTINGS[name], chunk=4000)
            scores: dict[str, dict[str, object]] = (
                json.loads(path.read_text()) if path.exists() else {}
            )
            scores.setdefault(task, {})[name] = {
                "n": len(chosen),
                "accuracy": round(right[task], 4),
                "calls": round(calls[task], 1),
                "gen_length": chosen[0].gen_length,
                "block_length": SETTINGS[name].block,
            }
            print(
                f"{name} {task} {right[task]:.3f} calls {calls[task]:.1f} "
                f"({time.time() - began:.0f} s)",
                flush=True,
            )
            for line in wrong:
                print(f"  wrong {line}")
            path.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
