"""What constraints cost: how long they take to compile, and what they do to the speed of a batch.

    python -m benchmarks.constraints llada-8b

A batch of requests whose answers have to match something, beside the same batch without: tokens per
second, forwards, and milliseconds a forward, medians of the runs that are not warm-up. Random
weights, random prompts and a made-up byte-level vocabulary of the model's size. Answers fill their
canvases in both, so that forwards are comparable. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

from dllmserve import LLM, SamplingParams
from dllmserve.constraints.compile import compile_grammar
from dllmserve.constraints.compiled import Compiled
from dllmserve.constraints.vocabulary import Vocabulary
from dllmserve.core.plan import StepPlan

_STRING = r'"[^"\\\x00-\x1f]{0,%d}"'
#: by name: a record of a few fields, and a list of long texts
GRAMMARS = {
    "record": r'\{"name": "[A-Za-z ]{1,24}", "age": (0|[1-9][0-9]{0,2}), "ok": (true|false), '
    r'"about": "[^"\\\x00-\x1f]*"\}',
    "texts": rf"\[{_STRING % 60}(, {_STRING % 60}){{0,5}}, {_STRING.replace('{0,%d}', '*')}\]",
}


def vocabulary(size: int) -> Vocabulary:
    """Single bytes, digits, pieces of JSON, and words with and without a space before them."""
    dice = random.Random(1)
    pieces: dict[bytes, None] = {bytes([b]): None for b in range(256)}
    marks = ['"', '":', '": "', '",', '", "', "{", '{"', "}", "[", "]", ", ", ": ", ".", "\\n"]
    pieces |= {text.encode(): None for text in [*marks, *map(str, range(1000))]}
    letters, weights = "etaoinshrdlucmfwygpbvkxqjzäéß中文", [20, *[12] * 7, *[6] * 8, *[2] * 15]
    while len(pieces) < size - 64:
        word = "".join(dice.choices(letters, weights, k=dice.choice([2, 3, 4, 5, 6, 7, 9])))
        word = word.capitalize() if dice.random() < 0.2 else word
        pieces[(" " * dice.randint(0, 1) + word).encode()] = None
    return Vocabulary([*pieces, *[None] * (size - len(pieces))])


def compiled(llm: LLM, known: Vocabulary, regex: str) -> tuple[Compiled, dict[str, Any]]:
    """A grammar whose texts fill their canvases, with its sizes and the seconds that it took."""
    spec, start = llm.spec, time.perf_counter()
    grammar = compile_grammar(
        regex=regex,
        vocabulary=known,
        vocab_size=spec.embedding_size,
        mask_id=spec.mask_id,
    )
    seconds = time.perf_counter() - start
    return Compiled(grammar), {
        "states": grammar.states,
        "classes": grammar.classes,
        "compile_s": round(seconds, 3),
    }


def measure(
    llm: LLM, args: argparse.Namespace, params: SamplingParams, grammar: Compiled | None
) -> dict[str, Any]:
    """Tokens per second, forwards and milliseconds a forward of a batch: medians."""
    core, rates, steps, lasts = llm._engine, list[float](), list[int](), list[float]()
    grammars = None if grammar is None else [grammar]
    for run in range(args.warmup + args.runs):
        draw = random.Random(run)
        prompts = [
            [draw.randrange(1000, llm.spec.vocab_size // 2) for _ in range(args.prompt_len)]
            for _ in range(args.n)
        ]
        count = [0]

        def note(_: StepPlan, count: list[int] = count) -> None:
            count[0] += 1

        core.observers.append(note)
        for prompt in prompts:
            core.add(core.make_request(prompt, params, grammars=grammars))
        start, tokens = time.perf_counter(), 0
        while core.has_work:
            tokens += sum(len(output.token_ids) for _, output in core.step().finished)
        seconds = time.perf_counter() - start
        core.observers.remove(note)
        if run >= args.warmup:
            rates.append(tokens / seconds)
            steps.append(count[0])
            lasts.append(seconds / count[0] * 1000)
    return {
        "tokens_per_s": round(statistics.median(rates), 1),
        "steps": statistics.median(steps),
        "ms_per_step": round(statistics.median(lasts), 2),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-n", type=int, default=64, help="requests at once")
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--cache", default="dual")
    parser.add_argument("--unmask", default="steps")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    args = parser.parse_args()
    llm = LLM(args.model, load_format="dummy", max_num_seqs=args.n, max_model_len=1024)
    known = vocabulary(llm.spec.vocab_size)
    _ = known.levels  # made once per tokenizer
    given: dict[str, Any] = {"cache": args.cache, "unmask": args.unmask}
    if llm.spec.geometry == "full":
        given |= {"steps": args.steps or args.gen_length, "block_length": args.block_length}
    else:
        given = {"steps_per_block": args.steps}
    params = SamplingParams(
        temperature=0.0, gen_length=args.gen_length, ignore_eos=True, threshold=0.05, **given
    )
    plain = measure(llm, args, params, None)
    found = {"plain": plain}
    print(f"{'':8} {'tokens/s':>9} {'steps':>6} {'ms/step':>8}   of plain, by step")
    print(f"{'plain':8} {plain['tokens_per_s']:9} {plain['steps']:6} {plain['ms_per_step']:8}")
    for name, regex in GRAMMARS.items():
        grammar, sizes = compiled(llm, known, regex)
        one = measure(llm, args, params, grammar) | sizes
        found[name] = one
        shares = (
            one["tokens_per_s"] / plain["tokens_per_s"],
            plain["ms_per_step"] / one["ms_per_step"],
        )
        print(
            f"{name:8} {one['tokens_per_s']:9} {one['steps']:6} {one['ms_per_step']:8}"
            f"   {shares[0]:.3f} {shares[1]:.3f}  {sizes}"
        )
    print(json.dumps({"options": vars(args), "found": found}))


if __name__ == "__main__":
    main()
