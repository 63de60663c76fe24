"""Requests with known answers: each is run alone, in this process, before a server gets it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from chaos.model import Kind
from dllmserve import LLM, SamplingParams, SparseConfig

#: ways to decode, each with different code behind it
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "end ignored": {"temperature": 0.0, "ignore_eos": True},
    "drawn": {"temperature": 0.8, "seed": 1},
    "filtered": {"temperature": 1.0, "seed": 2, "top_p": 0.9, "top_k": 20},
    "random order": {"temperature": 0.5, "seed": 3, "remasking": "random"},
    "threshold": {"temperature": 0.0, "unmask": "threshold", "threshold": 0.3},
    "drawn threshold": {"temperature": 0.7, "seed": 4, "unmask": "threshold", "threshold": 0.2},
    "factor": {"temperature": 0.0, "unmask": "factor", "factor": 0.5},
    "prefix cache": {"temperature": 0.0, "cache": "prefix"},
    "dual cache": {"temperature": 0.3, "seed": 5, "cache": "dual"},
    "sparse": {"temperature": 0.0, "sparse": {"retention_ratio": 0.4, "default_block_len": 8}},
    "guided": {"temperature": 0.0, "cfg_scale": 0.7},
    "biased": {"temperature": 0.4, "seed": 6, "logit_bias": {"65": 4.0, "66": -100.0}},
    "two choices": {"temperature": 0.9, "seed": 7, "n": 2},
    "stopped": {"temperature": 0.0, "stop": True},
}
#: what takes the place of settings that models without full attention refuse
_INSTEAD: Mapping[str, Mapping[str, Any]] = {
    "prefix cache": {"temperature": 0.0, "unmask": "sequential", "steps_per_block": 2},
    "dual cache": {"temperature": 0.3, "seed": 5, "unmask": "dynamic", "threshold": 0.3},
    "sparse": {"temperature": 0.0, "unmask": "dynamic", "threshold": 0.4, "steps_per_block": 2},
    "guided": {"temperature": 0.0, "unmask": "entropy_bound", "entropy_bound": 1.0},
}
_USUAL = ("greedy", "end ignored", "drawn", "biased", "dual cache", "sparse", "guided")
_WORDS = ("sort", "a", "list", "of", "names", "in", "the", "capital", "naïve", "ключ", "東京", "?")


@dataclass(frozen=True)
class Choice:
    """One answer: what the model gives when nothing else runs."""

    text: str
    reason: str
    tokens: int


@dataclass(frozen=True)
class Ask:
    """One request and its answers.

    Attributes:
        name: setting and length.
        content: the user's message.
        prompt_ids: the same as token ids, with the chat template around it.
        fields: decoding fields as both APIs take them.
        gen_length: of the answer.
        n: choices; choice i has the seed ``fields["seed"] + i``.
        choices: the right answers.
    """

    name: str
    content: str
    prompt_ids: tuple[int, ...]
    fields: Mapping[str, Any]
    gen_length: int
    n: int = 1
    choices: tuple[Choice, ...] = ()

    @property
    def chat_body(self) -> dict[str, Any]:
        """For /v1/chat/completions."""
        messages = [{"role": "user", "content": self.content}]
        body = {"messages": messages, "max_tokens": self.gen_length, **self.fields}
        return body | ({"n": self.n} if self.n > 1 else {})

    def native_body(self, choice: int = 0) -> dict[str, Any]:
        """For /v1/generate, which gives one answer."""
        fields = dict(self.fields)
        if choice:
            fields["seed"] += choice
        return {"prompt": list(self.prompt_ids), "gen_length": self.gen_length, **fields}


class Known:
    """Makes requests, and answers them alone with :class:`dllmserve.LLM` in float32.

    Args:
        model: folder of the checkpoint.
        kind: what it is.
    """

    def __init__(self, model: Path, kind: Kind) -> None:
        self._model, self._kind = model, kind
        self._made: dict[Any, list[Ask]] = {}

    @cached_property
    def llm(self) -> LLM:
        """The engine in this process."""
        torch.set_num_threads(1)
        return LLM(self._model, device="cpu", dtype="float32")

    def asks(
        self,
        count: int,
        lengths: tuple[int, int] = (8, 64),
        *,
        settings: Sequence[str] = tuple(SETTINGS),
        seed: int = 0,
    ) -> list[Ask]:
        """Distinct requests that go through the settings in turn.

        Args:
            count: how many.
            lengths: shortest and longest answer.
            settings: names in SETTINGS.
            seed: of contents and lengths.
        """
        key = (count, lengths, tuple(settings), seed)
        if key not in self._made:
            rng = random.Random(seed)
            names = [settings[i % len(settings)] for i in range(count)]
            drawn = [self._draw(name, rng, lengths) for name in names]
            self._made[key] = [self.answered(ask) for ask in drawn]
        return self._made[key]

    def usual(self) -> list[Ask]:
        """Requests that take a moment, of many kinds; the same ones every time."""
        return self.asks(14, (32, 64), settings=_USUAL, seed=1)

    def short(self) -> list[Ask]:
        """Requests that take as little as requests do."""
        return self.asks(8, (8, 24), settings=("greedy", "drawn"), seed=2)

    def _draw(self, name: str, rng: random.Random, lengths: tuple[int, int]) -> Ask:
        length = rng.randint(*lengths)
        content = " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 12)))
        fields = dict(SETTINGS[name])
        if self._kind.grows and name in _INSTEAD:
            name, fields = f"instead of {name}", dict(_INSTEAD[name])
        n = fields.pop("n", 1)
        if "sparse" not in fields:
            fields |= self._kind.fields
        if "unmask" not in fields:
            # one token a step for most; models that fill block after block have no whole answer
            steps = rng.choice((length, length, max(length // 2, 1)))
            fields["steps"] = length if self._kind.grows else steps
        return self.ask(content, fields, length, n=n, name=f"{name} {length}")

    def ask(
        self, content: str, fields: Mapping[str, Any], length: int, *, n: int = 1, name: str = ""
    ) -> Ask:
        """A request without its answers."""
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            raise ValueError("the model has no tokenizer")
        messages = [{"role": "user", "content": content}]
        ids = tokenizer.encode_chat(messages, literal_contents=True)
        return Ask(name or content, content, tuple(ids), fields, length, n)

    def answered(self, ask: Ask) -> Ask:
        """The request with its answers, each from a run of its own."""
        if ask.fields.get("stop") is True:
            text = self._run({**ask.fields, "stop": None}, ask, 0).text
            ask = replace(ask, fields={**ask.fields, "stop": _middle(text)})
        return replace(ask, choices=tuple(self._run(ask.fields, ask, i) for i in range(ask.n)))

    def _run(self, fields: Mapping[str, Any], ask: Ask, choice: int) -> Choice:
        params = dict(fields)
        sparse = params.pop("sparse", None)
        if choice:
            params["seed"] += choice
        if bias := params.get("logit_bias"):
            params["logit_bias"] = {int(token): value for token, value in bias.items()}
        (output,) = self.llm.generate(
            [list(ask.prompt_ids)],
            SamplingParams(gen_length=ask.gen_length, **params),
            None if sparse is None else SparseConfig(**sparse),
            use_tqdm=False,
        )
        tokens = output["usage"]["completion_tokens"]
        return Choice(output["text"], output["finish_reason"], tokens)


def _middle(text: str) -> list[str]:
    """Stop strings of which one is in the text, where whole characters allow it."""
    whole = [c for c in text[len(text) // 3 :] if c != "\N{REPLACEMENT CHARACTER}"]
    return ["never there", *whole[:1]]


def in_turn(asks: Sequence[Ask], rng: random.Random) -> Iterator[Ask]:
    """All requests in random order, again and again."""
    while True:
        yield from rng.sample(asks, len(asks))
