"""Thousands of constrained answers, each held against an independent validator.

    python -m benchmarks.valid_answers --answers 10000

Every unmask rule, temperatures from 0 to 2, schemas and regexes in turn, in batches with
unconstrained requests, whose answers must be those that they have alone. The embedded model, and
random weights with its tokenizer. A constraint may be refused before the start, for want of room.
Needs ``jsonschema``. Prints counts and one JSON line; exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema

from dllmserve import LLM, SamplingParams
from dllmserve.catalog import RULES
from dllmserve.errors import InvalidParameterError

TRUTH = Path(__file__).parent.parent / "tests" / "truth"


def record(required: bool = True, **properties: Any) -> dict[str, Any]:
    """A schema of an object with these properties, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required else [],
        "additionalProperties": False,
    }


INTEGER: dict[str, Any] = {"type": "integer"}
#: beside those of the tests
SCHEMAS: list[Any] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": "integer", "minimum": -5, "maximum": 5},
    {"type": "integer", "minimum": 999},
    {"type": "integer", "multipleOf": 10},
    {"type": "number"},
    {"type": "number", "minimum": 0},
    {"type": "string", "maxLength": 6},
    {"type": "string", "minLength": 3, "maxLength": 9},
    {"type": "string", "pattern": "^[a-z]+-[0-9]+$"},
    {"type": "string", "pattern": "ab"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "email"},
    {"type": "string", "format": "ipv4"},
    {"enum": ["red", "green", 3, None, True, {"a": [1]}]},
    {"const": {"x": [1, "y", None]}},
    {"type": ["string", "null"], "maxLength": 4},
    {"type": "array", "items": INTEGER, "maxItems": 3},
    {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [INTEGER, {"type": "boolean"}], "items": False},
    record(name={"type": "string", "maxLength": 12}, age=INTEGER),
    record(False, a=INTEGER, b={"type": "boolean"}, c={"type": "null"}),
    record(point=record(x=INTEGER, y=INTEGER), label={"type": "string", "maxLength": 5}),
    {"anyOf": [INTEGER, {"type": "string", "maxLength": 3}]},
    {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
    {"$defs": {"n": INTEGER}, **record(one={"$ref": "#/$defs/n"}, two={"$ref": "#/$defs/n"})},
    {"type": "object"},
]
#: beside those of the tests
REGEXES = [
    "a",
    "(ab)+",
    "[0-9]{1,3}( [0-9]{1,3})*",
    r"\d{4}-\d{2}-\d{2}",
    "(red|green|blue)(, (red|green|blue))*",
    "[A-Z][a-z]+ [A-Z][a-z]+",
    r"[^\n]{0,20}",
    r"\w+",
    r"\S+( \S+){0,3}",
    "x*y?z+",
    r"(?:0|[1-9][0-9]*)(?:\.[0-9]+)?",
    r"[\u4e00-\u9fff]{1,4}",
    "(yes|no|maybe)[.!?]",
    r"<b>[^<>]*</b>",
    r"#[0-9a-fA-F]{6}",
    r"(\+|-)?[0-9]+ (km|m|cm)",
    r"\s?[a-c]{2,4}\s?",
    r"[aeiou]{3}|[^aeiou\s]{2}",
    "(a|b|ab)(c|bcd)",
    r".{1,12}",
]


def asked() -> list[dict[str, Any]]:
    """All constraints, as fields of SamplingParams."""
    own = json.loads((TRUTH / "schemas.json").read_text())["schemas"]
    regexes = json.loads((TRUTH / "regexes.json").read_text())["regexes"]
    found: list[dict[str, Any]] = [
        {"json_schema": s} for s in [*SCHEMAS, *(o["schema"] for o in own)]
    ]
    found += [{"regex": r} for r in [*REGEXES, *(o["regex"] for o in regexes)]]
    return [*found, {"choice": ["yes", "no", "not sure"]}]


def is_valid(constraint: dict[str, Any], text: str) -> bool:
    """Whether a text matches, by jsonschema or Python's own regular expressions."""
    if "choice" in constraint:
        return text in constraint["choice"]
    if "regex" in constraint:
        return re.fullmatch(constraint["regex"], text) is not None
    kind = jsonschema.Draft202012Validator
    try:
        value = json.loads(text, parse_constant=lambda name: [][0])
        kind(constraint["json_schema"], format_checker=kind.FORMAT_CHECKER).validate(value)
    except (ValueError, IndexError, jsonschema.ValidationError):
        return False
    return True


def sampling(dice: random.Random) -> dict[str, Any]:
    """Some rule, with numbers at which it writes one token or many."""
    rule = dice.choice([name for name in RULES.own if name != "joint"])  # which edits
    given: dict[str, Any] = {
        "unmask": rule,
        "temperature": dice.choice([0.0, 0.0, 0.7, 1.0, 2.0]),
        "gen_length": dice.choice([16, 32, 48, 96]),
        "threshold": dice.choice([0.1, 0.5, 0.9]),
        "seed": dice.randrange(1000),
        "block_length": dice.choice([8, 32, 96]),
    }
    given["steps"] = max(given["gen_length"] // dice.choice([1, 2, 4]), 1)
    if dice.random() < 0.3:
        given |= dice.choice([{"top_p": 0.8}, {"top_k": 5}, {"logit_bias": {5: 3.0}}])
    revokes = RULES[rule].revokes
    given["cache"] = dice.choice(["none", "dual"] if revokes else ["none", "dual", "prefix"])
    return given


def run(llm: LLM, count: int, seed: int, batch: int) -> Counter[str]:
    """So many constrained answers; counts of what came of them."""
    dice, constraints, found = random.Random(seed), asked(), Counter[str]()
    words = [
        "Sort the numbers: 9 41 7",
        "Copy: red green",
        "What is 3 + 4?",
        "List colours as JSON",
    ]
    free = SamplingParams(temperature=0.0, gen_length=16, steps=16)
    alone = llm.generate(words, free, use_tqdm=False)
    while found["constrained"] < count:
        core, jobs = llm._engine, []
        for _ in range(batch):
            constraint = constraints[found["constrained"] % len(constraints)]
            found["constrained"] += 1
            params = SamplingParams(**sampling(dice), **constraint)
            ids = llm.chat_ids([{"role": "user", "content": dice.choice(words)}])
            try:
                jobs.append((constraint, params, core.make_request(ids, params)))
            except InvalidParameterError as error:
                no_room = "fewer than" in str(error)
                kind = "refused: no room" if no_room else f"refused: {error}"
                found[kind] += 1
        tokenizer = llm.tokenizer
        assert tokenizer is not None
        beside = [core.make_request(tokenizer.encode(text), free) for text in words]
        mixed = [request for _, _, request in jobs] + beside
        dice.shuffle(mixed)
        for request in mixed:
            core.add(request)
        outputs = {}
        while core.has_work:
            events = core.step()
            outputs |= dict(events.finished)
            found["failed"] += len(events.failed)
        for constraint, params, request in jobs:
            output = outputs.get(request)
            found["forwards"] += output.forward_passes if output else 0
            if output is not None and is_valid(constraint, output.text):
                found["valid"] += 1
            else:
                found["invalid"] += 1
                print("INVALID", constraint, params, output and output.text, file=sys.stderr)
        same = [outputs[r].token_ids for r in beside] == [o["token_ids"] for o in alone]
        found["beside"] += len(beside)
        found["beside, changed"] += 0 if same else len(beside)
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=1000, help="of each of two checkpoints")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    wrong, record_ = 0, {}
    for name, options in (("tiny", {}), ("random", {"load_format": "dummy"})):
        sizes: dict[str, Any] = {"max_num_seqs": 48, "gpu_memory_utilization": 0.3}
        llm = LLM("tiny", device=args.device, dtype="float32", **sizes, **options)
        start = time.perf_counter()
        found = run(llm, args.answers, args.seed, args.batch)
        seconds = time.perf_counter() - start
        print(f"{name}: {dict(found)} in {seconds:.0f} s")
        wrong += found["invalid"] + found["failed"] + found["beside, changed"]
        record_[name] = dict(found)
        llm.close()
    print(json.dumps({"options": vars(args), "found": record_}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
