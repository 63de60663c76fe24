"""Build the byte-level BPE tokenizer of 4096 entries.

Digits and line breaks always stand alone: digits so that sums and record numbers are read digit by
digit, line breaks
so that the end of a generation prompt has the same ids whatever text follows it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from training.tasks import MAKERS, draw
from training.tasks import vocab as words

SPECIAL: tuple[str, ...] = (
    "<|endoftext|>",
    "<|startoftext|>",
    "<|mdm_mask|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|pad|>",
    *(f"<|reserved_{k}|>" for k in range(9)),
)
EOS, BOS, MASK, EOT, HEAD, HEAD_END, PAD = range(7)
VOCAB_SIZE = 4096
PATTERN = r"\n|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]"
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}"
    "{%- endif -%}"
)


def _words() -> list[str]:
    """All words of the task lists."""
    lists = (
        words.NAMES,
        words.SURNAMES,
        words.CITIES,
        words.JOBS,
        words.COLORS,
        words.OBJECTS,
        words.ROOMS,
        words.THINGS,
        words.PETS,
        words.FOODS,
        words.WORDS,
    )
    return sorted({word for group in lists for word in group})


def _texts(corpora: Path, rng: random.Random) -> Iterator[str]:
    """Yield the BPE training text: a sample of the corpora, task items, and the words in both
    spellings.
    """
    for path in sorted(corpora.glob("*.txt")):
        blocks = path.read_text(encoding="utf-8").split("\n\n")
        rng.shuffle(blocks)
        yield from blocks[: max(1, int(3_000_000 / 2000))]
    for maker in MAKERS.values():
        for _ in range(4000):
            item = draw(maker, rng, rng.randrange(2, 6), False)
            yield f"user\n\n{item.prompt}"
            yield f"assistant\n\n{item.answer}"
    for word in _words():
        # Every task word should be one token, at the start of a text and after a space.
        yield from [word, f"\n {word}"] * 400
    yield from ["user", "assistant", "system", "user\n", "assistant\n", "system\n"] * 2000


def build(corpora: Path, out: Path) -> Tokenizer:
    """Train the tokenizer and write ``tokenizer.json`` and ``tokenizer_config.json`` to ``out``."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpora, random.Random(7)), trainer)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[PAD],
        "mask_token": SPECIAL[MASK],
        "additional_special_tokens": [SPECIAL[EOT], SPECIAL[HEAD], SPECIAL[HEAD_END]],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer


def main() -> None:
    """Build the tokenizer into the package's model folder and report what the task words cost."""
    here = Path(__file__).resolve().parent
    tokenizer = build(here / ".corpora", here.parent / "dllmserve" / "assets" / "tiny")
    lost = [
        w
        for w in _words()
        if len(tokenizer.encode(" " + w).ids) > 1 or len(tokenizer.encode(w).ids) > 1
    ]
    print(
        f"vocabulary {tokenizer.get_vocab_size()}, "
        f"task words of more than one token: {len(lost)} {lost[:20]}"
    )
    for path in sorted((here / ".corpora").glob("*.txt")):
        text = path.read_text(encoding="utf-8")[:400_000]
        print(
            f"{path.stem}: {len(text.encode()) / len(tokenizer.encode(text).ids):.2f} bytes a token"
        )


if __name__ == "__main__":
    main()
