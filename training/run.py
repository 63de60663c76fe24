"""Rerun everything: corpora, tokenizer, training, held-out set, scores.

``python -m training.run`` needs network access for the corpora, a CUDA device and about 20 minutes.
The model in ``dllmserve/assets/tiny`` is overwritten.
"""

from __future__ import annotations

import subprocess
import sys

STEPS: tuple[tuple[str, ...], ...] = (
    ("training.corpora",),
    ("training.tokenizer",),
    ("training.pack_text",),
    ("training.train", "--seconds", "840", "--decay-from", "0.5", "--causal-seconds", "140"),
    ("training.score", "--write"),
    ("training.score",),
)


def main() -> None:
    """Run the steps one after the other, each in a fresh process, and stop at the first failure."""
    for step in STEPS:
        print("==", " ".join(step), flush=True)
        subprocess.run([sys.executable, "-m", *step], check=True)


if __name__ == "__main__":
    main()
