"""The embedded model's JSON task with and without its schema: how many are right, and the forwards.

    python -m benchmarks.json_task

The 200 held-out items; the schema has the keys that a question names, as texts or whole numbers.
Prints a line for each unmask rule and one JSON line.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from dllmserve import LLM, SamplingParams
from dllmserve.tools.evaluation.items import held_out
from dllmserve.tools.evaluation.judge import judge

RULES: dict[str, dict[str, Any]] = {
    "steps": {"unmask": "steps", "steps": 64},
    "threshold 0.9": {"unmask": "threshold", "threshold": 0.9},
    "factor 1": {"unmask": "factor"},
}


def schema_of(question: str) -> dict[str, Any]:
    """The keys of "Extract age, city as JSON: ..."; ages are numbers."""
    keys = question.removeprefix("Extract ").partition(" as JSON")[0].split(", ")
    text = {"type": "string", "maxLength": 30}
    properties = {key: {"type": "integer"} if key == "age" else text for key in keys}
    return {"type": "object", "properties": properties, "required": keys}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    llm = LLM("tiny", device=args.device)
    items = [item for item in held_out() if item.task == "json"][: args.items]
    chats, questions = (
        [item.messages for item in items],
        [item.messages[-1]["content"] for item in items],
    )
    found = []
    for rule, given in RULES.items():
        for constrained in (False, True):
            params = [
                SamplingParams(
                    temperature=0.0,
                    gen_length=64,
                    block_length=32,
                    json_schema=schema_of(question) if constrained else None,
                    **given,
                )
                for question in questions
            ]
            outputs = llm.chat(chats, params, use_tqdm=False)
            right = sum(
                judge(item.match, item.task, question, item.answers, output["text"])
                for item, question, output in zip(items, questions, outputs, strict=True)
            )
            forwards = sum(output["usage"]["forward_passes"] for output in outputs) / len(outputs)
            name = "with schema" if constrained else "without"
            print(f"{rule:14} {name:12} right {right} of {len(items)}, {forwards:.2f} forwards")
            found.append(
                {"rule": rule, "schema": constrained, "right": right, "forwards": forwards}
            )
    print(json.dumps({"options": vars(args), "found": found}))


if __name__ == "__main__":
    main()
