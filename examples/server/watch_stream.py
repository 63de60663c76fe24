"""Watch an answer being filled in: _ is masked, a word in brackets is still a proposal.

dllmserve serve
python examples/server/watch_stream.py [URL] [KEY]
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx

#: what the embedded model's chat template makes of a question
PROMPT = (
    "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n"
    "Sort the numbers: 9 41 7<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and data of each event; comment lines keep the connection alive and mean nothing."""
    name = "message"
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def main() -> None:
    """Draw every step."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    headers = {"X-Api-Key": sys.argv[2]} if len(sys.argv) > 2 else {}
    body = {"prompt": PROMPT, "temperature": 0, "gen_length": 12, "steps": 12, "block_length": 4}
    cells: list[str] = []
    address = f"{url}/v1/generate/stream"
    with httpx.stream("POST", address, json=body, headers=headers, timeout=60) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"{answer.status_code}: {answer.read().decode()}")
        for name, data in events(answer.iter_lines()):
            if name == "step":
                cells = cells or ["_"] * data["length"]
                for change in data["changed"]:
                    text = change["text"] or "."  # special tokens have no text
                    cell = text if change["committed"] else f"[{text}]"
                    cells[change["position"]] = "_" if change["token_id"] is None else cell
                print(f"{data['forward_passes']:3d}  {' '.join(cells)}")
            elif name == "done":
                print(f"\n{data['text']}")
            elif name == "error":
                raise SystemExit(data["message"])


if __name__ == "__main__":
    main()
