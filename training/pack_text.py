"""Tokenize the corpora into one array, ``.corpora/text.npy`` (uint16), documents separated by the
end token.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training.tokenizer import EOS


def main() -> None:
    """Tokenize, shuffle the documents and hold back the last fiftieth for evaluation."""
    here = Path(__file__).resolve().parent
    tokenizer = Tokenizer.from_file(
        str(here.parent / "dllmserve" / "assets" / "tiny" / "tokenizer.json")
    )
    documents: list[str] = []
    for path in sorted((here / ".corpora").glob("*.txt")):
        documents += path.read_text(encoding="utf-8").split("\n\n")
    random.Random(11).shuffle(documents)
    ids: list[int] = []
    for encoded in tokenizer.encode_batch_fast(documents):
        ids += [*encoded.ids, EOS]
    cut = len(ids) * 49 // 50
    np.save(here / ".corpora" / "text.npy", np.array(ids[:cut], dtype=np.uint16))
    np.save(here / ".corpora" / "text_held.npy", np.array(ids[cut:], dtype=np.uint16))
    print(f"{len(ids):,} tokens")


if __name__ == "__main__":
    main()
