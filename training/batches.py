"""Packed training batches: draw items, tokenize, mask, and lay them end to end in one flat window.

A batch is one row of ``size`` tokens holding many sequences; attention is confined to each by its
start offsets, so no
padding mask is needed. Worker processes build whole batches, masks included, and the trainer only
copies them.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass
from multiprocessing.queues import Queue as MpQueue
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from training.tasks import MAKERS, Item, draw
from training.tokenizer import BOS, EOS, EOT, HEAD, HEAD_END, MASK

TAGS: tuple[str, ...] = (*MAKERS, "text")
STATS: tuple[str, ...] = (
    *TAGS,
    "keys",
)  # Lookup answers repeat the key: those easy tokens are counted apart.
CAUSAL_SHARES = {
    "arith": 10,
    "word": 10,
    "listop": 14,
    "sudoku": 2,
    "needle": 34,
    "story": 10,
    "json": 12,
    "edit": 12,
    "chat": 0.5,
    "text": 2,
}
MASKED_SHARES = {
    "arith": 12,
    "word": 22,
    "listop": 14,
    "sudoku": 10,
    "needle": 20,
    "story": 10,
    "json": 8,
    "edit": 8,
    "chat": 0.7,
    "text": 4,
}
LONGEST = 2048
# Loss weight of positions beyond the block being decoded: they are not about to be committed.
AFTER_BLOCK = 0.25


@dataclass(slots=True)
class Batch:
    """One packed batch; ``index`` are positions whose hidden state predicts ``target`` (the next
    position's token).
    """

    causal: bool
    ids: NDArray[np.int32]
    pos: NDArray[np.int32]
    starts: NDArray[np.int32]
    longest: int
    index: NDArray[np.int32]
    target: NDArray[np.int32]
    weight: NDArray[np.float32]
    tag: NDArray[np.int32]


@dataclass(slots=True)
class Sequence:
    """A tokenized item: prompt and response window, and how many response tokens come before the
    fill.
    """

    tag: int
    prompt: list[int]
    response: list[int]
    content: int


class Template:
    """Ids of the chat template, built piece by piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.gap = tokenizer.encode("\n\n").ids
        self.digits = set(tokenizer.encode("0123456789").ids)
        self.roles = {
            r: [HEAD, *tokenizer.encode(r).ids, HEAD_END, *self.gap]
            for r in ("system", "user", "assistant")
        }

    def turn(self, role: str, text: list[int]) -> list[int]:
        """One finished message."""
        return [*self.roles[role], *text, EOT]

    def prompt(self, turns: list[tuple[str, list[int]]]) -> list[int]:
        """A conversation that waits for the assistant."""
        ids = [BOS]
        for role, text in turns:
            ids += self.turn(role, text)
        return ids + self.roles["assistant"]


SYSTEM = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a tiny language model.",
    "Be exact.",
)


class Stream:
    """An endless stream of sequences for one worker."""

    def __init__(self, tokenizer: Tokenizer, text: NDArray[np.uint16], seed: int) -> None:
        self.rng = random.Random(seed)
        self.np_rng = np.random.default_rng(seed)
        self.template = Template(tokenizer)
        self.encode = tokenizer.encode_batch_fast
        self.text = text
        self.mean = dict.fromkeys(TAGS, 100.0)
        self.ready: deque[Sequence] = deque()

    def _level(self, top: int) -> int:
        """Number of records of one lookup item: half of them small, the rest spread evenly over
        the octaves.
        """
        drawn: int = round(2.0 ** self.rng.uniform(1.0, math.log2(top + 0.49)))
        if self.rng.random() < 0.5:
            drawn = self.rng.randint(2, max(2, min(top, 16)))
        return max(2, min(top, drawn))

    def _window(self, length: int, causal: bool) -> int:
        """Length of the response window for an answer of ``length`` tokens, end of turn
        included.
        """
        if causal:
            return length + self.rng.randint(0, 3)
        whole: int = -(-length // 32) * 32
        roll = self.rng.random()
        if roll < 0.5:
            return whole
        if roll < 0.75:
            return length + self.rng.randint(0, 8)
        if roll < 0.93:
            return max(whole, self.rng.choice((64, 64, 96, 128)))
        return whole + self.rng.choice((32, 64, 128))

    def _chunk(self, size: int) -> Sequence:
        """A piece of running text; all of it counts as response."""
        start = self.rng.randrange(len(self.text) - size)
        ids = self.text[start : start + size].tolist()
        return Sequence(len(TAGS) - 1, [BOS], ids, size)

    def refill(self, causal: bool, level: int) -> None:
        """Draw and tokenize a few hundred items."""
        shares = CAUSAL_SHARES if causal else MASKED_SHARES
        odds = [shares[tag] / self.mean[tag] for tag in TAGS]
        picked = self.rng.choices(TAGS, odds, k=256)
        items = [
            draw(MAKERS[t], self.rng, self._level(level), False) for t in picked if t != "text"
        ]
        before: list[Item | None] = []
        for _ in items:
            task = self.rng.choice(("edit", "listop", "arith", "chat", "word"))
            before.append(
                draw(MAKERS[task], self.rng, 2, False) if self.rng.random() < 0.04 else None
            )
        prompts = self.encode([i.prompt for i in items])
        answers = self.encode([i.answer for i in items])
        for item, prompt, answer, earlier in zip(items, prompts, answers, before, strict=True):
            turns = [("user", prompt.ids)]
            if earlier is not None:
                turns = [
                    ("user", self._ids(earlier.prompt)),
                    ("assistant", self._ids(earlier.answer)),
                    *turns,
                ]
            if self.rng.random() < 0.05:
                turns.insert(0, ("system", self._ids(self.rng.choice(SYSTEM))))
            head, body = self.template.prompt(turns), [*answer.ids, EOT]
            window = min(self._window(len(body), causal), LONGEST - len(head))
            if window < len(body):
                continue
            response = body + [EOS] * (window - len(body))
            self._push(Sequence(TAGS.index(item.task), head, response, len(body)))
        for _ in range(picked.count("text")):
            self._push(self._chunk(self.rng.choice((64, 128, 256, 512))))
        self.rng.shuffle(self.ready)

    def _ids(self, text: str) -> list[int]:
        return self.template.tokenizer.encode(text).ids

    def _push(self, sequence: Sequence) -> None:
        tag = TAGS[sequence.tag]
        self.mean[tag] = 0.98 * self.mean[tag] + 0.02 * (
            len(sequence.prompt) + len(sequence.response)
        )
        self.ready.append(sequence)

    def batch(self, size: int, causal: bool, level: int) -> Batch:
        """Pack sequences into one batch of exactly ``size`` tokens; the unused end is a sequence
        without loss.
        """
        ids = np.full(size, EOS, dtype=np.int32)
        pos = np.zeros(size, dtype=np.int32)
        starts, parts, at = [0], [], 0
        while True:
            if not self.ready:
                self.refill(causal, level)
            sequence = self.ready[0]
            length = len(sequence.prompt) + len(sequence.response)
            if at + length > size:
                break
            self.ready.popleft()
            tokens = np.array(sequence.prompt + sequence.response, dtype=np.int32)
            masked, weight = (self._causal if causal else self._masked)(sequence, tokens)
            ids[at : at + length] = np.where(masked, MASK, tokens) if not causal else tokens
            pos[at : at + length] = np.arange(length)
            # Position p predicts p + 1, so a loss at token j is read at j - 1; the first token has
            # no predecessor.
            where = np.flatnonzero(weight[1:] > 0)
            parts.append(
                (at + where, tokens[where + 1], weight[where + 1], self._tags(sequence)[where + 1])
            )
            at += length
            starts.append(at)
        if at < size:
            pos[at:] = np.arange(size - at)
            starts.append(size)
        index, target, weight, tag = (np.concatenate(column) for column in zip(*parts, strict=True))
        edges = np.array(starts, dtype=np.int32)
        return Batch(
            causal,
            ids,
            pos,
            edges,
            int(np.diff(edges).max()),
            index.astype(np.int32),
            target.astype(np.int32),
            weight.astype(np.float32),
            tag.astype(np.int32),
        )

    def _tags(self, sequence: Sequence) -> NDArray[np.int64]:
        """Statistics tag of each token; in lookups only what has to be looked up counts for the
        task.
        """
        tags = np.full(len(sequence.prompt) + len(sequence.response), sequence.tag)
        if TAGS[sequence.tag] == "needle":
            # Only the first token after a key has to be looked up; the rest of the record follows
            # from it.
            tags[len(sequence.prompt) :] = len(TAGS)
            lines = [
                0,
                *(
                    k + 1
                    for k, token in enumerate(sequence.response)
                    if token == self.template.gap[0]
                ),
            ]
            for first in lines:
                number = sequence.response[first] in self.template.digits
                tags[len(sequence.prompt) + first + (3 if number else 1)] = sequence.tag
        return tags

    def _base_weight(self, sequence: Sequence) -> NDArray[np.float32]:
        """Loss weight of each response token: the fill after the answer is easy and must not drown
        the answer.
        """
        weight = np.full(len(sequence.response), 0.1, dtype=np.float32)
        weight[: sequence.content] = 1.0
        weight[sequence.content : sequence.content + 4] = 0.4
        return weight

    def _causal(
        self, sequence: Sequence, tokens: NDArray[np.int32]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Next-token loss on the response."""
        weight = np.zeros(len(tokens), dtype=np.float32)
        weight[len(sequence.prompt) :] = self._base_weight(sequence)
        return np.zeros(len(tokens), dtype=np.bool_), weight

    def _masked(
        self, sequence: Sequence, tokens: NDArray[np.int32]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Choose what to hide: random, a block in progress, a left-to-right state, or the prompt
        too.
        """
        head, body = len(sequence.prompt), len(sequence.response)
        rng, roll = self.np_rng, self.rng.random()
        masked = np.zeros(head + body, dtype=np.bool_)
        weight = np.zeros(head + body, dtype=np.float32)
        weight[head:] = self._base_weight(sequence)
        t = max(self.rng.random(), 0.5 / body)
        if sequence.tag == len(TAGS) - 1 or roll < 0.50:
            masked[head:] = rng.random(body) < t
            weight *= min(1 / t, 4.0) ** 0.5
        elif roll < 0.72:
            block = self.rng.choice((8, 16, 32, 32, 32, 64))
            first = self.rng.randrange(-(-sequence.content // block)) * block
            last = min(first + block, body)
            masked[head + first : head + last] = rng.random(last - first) < t
            masked[head + last :] = True
            weight[head + last :] *= AFTER_BLOCK
        elif roll < 0.90:
            first = self.rng.randrange(sequence.content)
            masked[head + first :] = True
            weight[head + first + 8 :] *= AFTER_BLOCK
        elif roll < 0.95:
            masked[1:] = rng.random(head + body - 1) < t
            weight[:head] = 1.0
            weight *= 0.2
        else:
            masked[:head] = True
            masked[head:] = rng.random(body) < t
            weight *= 0.3
        if not masked[head:].any():
            masked[head + self.rng.randrange(sequence.content)] = True
        weight[~masked] = 0.0
        # Loss on hidden prompt tokens only where the prompt is partly visible.
        if roll >= 0.95 and sequence.tag != len(TAGS) - 1:
            weight[:head] = 0.0
        return masked, weight


def worker(folder: str, seed: int, queue: MpQueue[Batch], control: SynchronizedArray[int]) -> None:
    """Produce batches for ever; ``control`` holds [batch size, causal flag, lookup level, stop
    flag].
    """
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    text = np.load(Path(__file__).resolve().parent / ".corpora" / "text.npy", mmap_mode="r")
    stream, state = Stream(tokenizer, text, seed), None
    while not control[3]:
        size, causal, level = int(control[0]), bool(control[1]), int(control[2])
        if state != (causal, level):
            stream.ready.clear()
            state = (causal, level)
        queue.put(stream.batch(size, causal, level))
