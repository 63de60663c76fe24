"""``dllmserve generate``: answer prompts, live in a terminal, plainly in a pipe."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dllmserve.catalog import RULES
from dllmserve.cli.canvas import CanvasText
from dllmserve.cli.commands import short_errors
from dllmserve.cli.loading import loading
from dllmserve.cli.options import (
    ENGINE,
    SAMPLING,
    SPARSE,
    Group,
    ModelOption,
    chosen_quality,
    engine_config,
    sampling_params,
    with_options,
    with_quality,
)
from dllmserve.cli.prompts import DEMO_PROMPTS, read_prompts
from dllmserve.cli.screen import Screen
from dllmserve.config import EngineConfig
from dllmserve.engine.text import CommittedText
from dllmserve.errors import TokenizerError
from dllmserve.knobs import knob
from dllmserve.outputs import CanvasStep, RequestOutput

if TYPE_CHECKING:  # loads torch
    from dllmserve.engine.tokenizer import Tokenizer
    from dllmserve.llm import LLM
    from dllmserve.sampling_params import SamplingParams

#: how prompts are decoded if nothing else is asked for
DEFAULT_QUALITY = "balanced"
#: more prompts than this run as one batch, which is faster but cannot be watched
LIVE_PROMPTS = 3

EPILOG = """
[bold]Examples[/bold]

dllmserve generate --demo

dllmserve generate "Compute 347 + 586 step by step."

dllmserve generate --quality exact "Sort the numbers: 9 41 7"

dllmserve generate --file prompts.txt --json > answers.jsonl

dllmserve generate -m GSAI-ML/LLaDA-8B-Instruct "Who are you?"
"""

PromptArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROMPT",
        help="Prompts. Without any, standard input is one prompt; at a terminal a demo runs.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Options:
    """What is asked, and how answers are shown."""

    file: str | None = knob(
        None, "File of prompts, one a line (.jsonl: JSON lines); - is standard input."
    )
    demo: bool = knob(False, "Run the demo prompts.")
    chat: bool | None = knob(
        None,
        "Use the chat template, or send the text as it is. Chat, if the checkpoint has a template.",
    )
    json: bool = knob(False, "Print one JSON object per prompt.")
    no_live: bool = knob(False, "Do not show the answer being filled in.")


OPTIONS = Group(
    Options,
    "Options",
    names={"file": "--file -f", "chat": "--chat/--raw"},
    metavars={"file": "FILE"},
    flags=frozenset({"demo", "json", "no_live"}),
)


@with_options(OPTIONS, with_quality(SAMPLING, DEFAULT_QUALITY), SPARSE, ENGINE)
def generate(prompts: PromptArguments = None, model: ModelOption = "tiny", **options: Any) -> None:
    """Answer prompts. In a terminal, watch the answer being filled in.

    Text is decided; masks get denser as the model gets surer of them.
    In a pipe, only the answers are printed, and the questions of the demo.

    Decoded with --quality balanced: options that are given win over it.
    --quality exact is one token a step. So are --steps and --sparse alone.
    """
    with short_errors():
        options["quality"] = chosen_quality(options, DEFAULT_QUALITY)
        params = sampling_params(options)
        config = engine_config(model, options)
        asked = Options(**OPTIONS.given(options))
        texts = read_prompts(prompts or [], asked.file, asked.demo)
        terminal = sys.stdout.isatty() and not asked.json
        with loading(config.model):
            job = _Job(config, texts, asked.chat, params)
        if asked.json:
            job.print_json()
        elif not terminal:
            job.print_plain(headings=texts[: len(DEMO_PROMPTS)] == list(DEMO_PROMPTS))
        else:
            console = Console(highlight=False, emoji=False)
            live = not asked.no_live and len(texts) <= LIVE_PROMPTS and not console.is_dumb_terminal
            label = f"quality {params.quality}" if params.quality else ""
            screen = Screen(console, label=label)
            job.show(screen, live=live, headings=len(texts) > 1 or texts != prompts)


class _Job:
    """A loaded model with checked prompts."""

    def __init__(
        self,
        config: EngineConfig,
        texts: list[str],
        chat: bool | None,
        params: SamplingParams,
    ) -> None:
        from dllmserve.llm import LLM

        self._llm: LLM = LLM(**asdict(config))
        self._texts = texts
        self._params = params
        tokenizer = self._llm.tokenizer
        if tokenizer is None:
            raise TokenizerError(f"model {config.model!r} has no tokenizer, so it reads no text")
        self._tokenizer = tokenizer
        if tokenizer.has_chat_template if chat is None else chat:
            self._ids = [self._llm.chat_ids([{"role": "user", "content": t}]) for t in texts]
        else:
            self._ids = [tokenizer.encode(text) for text in texts]

    def print_json(self) -> None:
        """One JSON object per prompt, one a line."""
        outputs, seconds = self._batch()
        # an ASCII terminal gets escapes, everything else readable text
        escape = not (sys.stdout.encoding or "").lower().startswith("utf")
        for prompt, output in zip(self._texts, outputs, strict=True):
            line = {"prompt": prompt, **output.as_dict(), "seconds": round(seconds, 4)}
            typer.echo(json.dumps(line, ensure_ascii=escape))

    def print_plain(self, *, headings: bool) -> None:
        """The answers, below their prompts if asked for; a few are written as one reads."""

        def heading(place: int) -> None:
            if headings:
                gap = "\n" if place else ""
                _write(gap + "".join(f"> {line}\n" for line in self._texts[place].split("\n")))

        if len(self._texts) > LIVE_PROMPTS:
            for place, output in enumerate(self._batch()[0]):
                heading(place)
                _write(output.text + "\n")
            return
        for place, ids in enumerate(self._ids):
            heading(place)
            steps = self._llm.stream(ids, self._params)
            stops, whole = self._params.stop_strings, settles_by_block(self._params)
            for piece in plain_pieces(steps, self._tokenizer, stops, blocks=whole):
                _write(piece)
            _write("\n")

    def show(self, screen: Screen, *, live: bool, headings: bool) -> None:
        """Show the answers in a terminal."""
        if live:
            for place in range(len(self._texts)):
                self._heading(screen, place, headings)
                self._show_live(screen, self._ids[place])
            return
        outputs, seconds = self._batch()
        for place, output in enumerate(outputs):
            self._heading(screen, place, headings)
            screen.answer(output, seconds if len(outputs) == 1 else None)
        if len(outputs) > 1:
            tokens = sum(o.completion_tokens for o in outputs)
            screen.blank()
            screen.note(
                f"{len(outputs)} answers, {tokens} tokens in {seconds:.2f} s, "
                f"{tokens / max(seconds, 1e-9):.1f} tokens/s"
            )

    def _heading(self, screen: Screen, place: int, headings: bool) -> None:
        if headings:
            if place:
                screen.blank()
            screen.heading(self._texts[place])

    def _show_live(self, screen: Screen, ids: list[int]) -> None:
        ends = () if self._params.ignore_eos else self._llm.spec.eos_ids
        canvas = CanvasText(self._tokenizer.decode, ends, screen.marks)
        screen.live(self._llm.stream(ids, self._params), canvas)

    def _batch(self) -> tuple[list[RequestOutput], float]:
        """Answer all prompts at once; seconds are those of the whole batch."""
        begin = time.perf_counter()
        bar = len(self._ids) > 1 and sys.stderr.isatty()
        answers = self._llm.generate(self._ids, self._params, use_tqdm=bar)
        seconds = time.perf_counter() - begin
        return [_output(answer) for answer in answers], seconds


def settles_by_block(params: SamplingParams) -> bool:
    """Whether tokens that are written may change until their block is left."""
    return params.edits or RULES[params.unmask].revokes


def plain_pieces(
    steps: Iterable[CanvasStep],
    tokenizer: Tokenizer,
    stops: Sequence[str] = (),
    *,
    blocks: bool = False,
) -> Iterator[str]:
    """Pieces of an answer's text; joined, they are exactly the finished text.

    A piece holds only what can no longer change: tokens that are committed without a gap
    from the left, without an unfinished character and without what may turn out to be the
    beginning of a stop string; with ``blocks`` only those of blocks that have been left.
    """
    text, read = CommittedText(tokenizer, stops), 0
    for step in steps:
        if step.output is not None:
            yield text.finish(step.output.text)
            return
        gap = step.committed.index(False) if False in step.committed else len(step.committed)
        if blocks:
            gap = min(gap, step.block[0])
        yield text.add([t for t in step.token_ids[read:gap] if t is not None])
        read = gap


def _write(text: str) -> None:
    """Write to standard output at once, whatever its encoding can hold."""
    encoding = sys.stdout.encoding or "utf-8"
    typer.echo(text.encode(encoding, "replace").decode(encoding), nl=False)


def _output(answer: dict[str, Any]) -> RequestOutput:
    """The answer of LLM.generate as an object again."""
    rest = {key: value for key, value in answer.items() if key != "usage"}
    return RequestOutput(**rest, **answer["usage"])
