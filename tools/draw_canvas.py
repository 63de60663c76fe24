"""Draw docs/images/constrained_canvas.svg: an answer under a schema, forward by forward.

What is drawn is a real answer of the embedded model. Run it again when decoding changes::

    python tools/draw_canvas.py
"""

from __future__ import annotations

import json
from pathlib import Path
from xml.sax.saxutils import escape

from dllmserve import LLM, SamplingParams

TARGET = Path(__file__).parents[1] / "docs" / "images" / "constrained_canvas.svg"
QUESTION = (
    "Extract name, age, city as JSON: My neighbour is called Sandra Price. Life in Malmo is good. "
    "That makes 50 years so far."
)
#: so that every answer needs some forwards
NAME = {"type": "string", "pattern": "^[A-Z][a-z]{1,8}( [A-Z][a-z]{1,8})?$"}
SCHEMA = {
    "type": "object",
    "properties": {"name": NAME, "age": {"type": "integer"}, "city": NAME},
    "required": ["name", "age", "city"],
}
FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
SIZE, LETTER, ROW, GAP, LEFT, TOP = 13, 7.9, 34, 3, 96, 44
STYLE = (
    ".card{fill:#fff}.text{fill:#1f2328}.soft{fill:#59636e}.new{fill:#ffc680}.old{fill:#a8d1ff}"
    ".open{fill:#f0f2f5}.box{stroke:#d0d7de}"
    "@media(prefers-color-scheme:dark){.card{fill:#0d1117}.text{fill:#e6edf3}.soft{fill:#9198a1}"
    ".new{fill:#9a5b0b}.old{fill:#1f5fa8}.open{fill:#1c2128}.box{stroke:#3d444d}}"
)


def canvases() -> tuple[list[list[str | None]], list[str]]:
    """Pieces of the answer after each forward, None where nothing stands; and the whole answer."""
    llm = LLM("tiny", device="cpu")
    params = SamplingParams(
        temperature=0.0, gen_length=40, unmask="threshold", threshold=0.9999, json_schema=SCHEMA
    )
    ids = llm.chat_ids([{"role": "user", "content": QUESTION}])
    steps = list(llm.stream(ids, params))
    output, tokenizer = steps[-1].output, llm.tokenizer
    assert output is not None and tokenizer is not None
    json.loads(output.text)
    length = len(output.token_ids) - 1  # without the end
    whole = [tokenizer.decode([token]) or "?" for token in output.token_ids[:length]]
    rows: list[list[str | None]] = [[None] * length]
    rows += [
        [t if done else None for t, done in zip(whole, step.committed, strict=False)]
        for step in steps
    ]
    return rows, whole


def draw(rows: list[list[str | None]], whole: list[str]) -> str:
    """A row of boxes for each forward; what it has written is marked."""
    widths = [max(len(piece), 1) * LETTER + 8 for piece in whole]
    width = LEFT + sum(widths) + GAP * len(widths) + 16
    parts = []
    for index, row in enumerate(rows):
        y, x = TOP + index * ROW, float(LEFT)
        label = "before" if not index else f"forward {index}"
        parts.append(f'<text class="soft" x="14" y="{y + 17}">{label}</text>')
        for place, (piece, size) in enumerate(zip(row, widths, strict=True)):
            before = rows[index - 1][place] if index else None
            kind = "open" if piece is None else "old" if before is not None else "new"
            where = f'x="{x:.1f}" y="{y}" width="{size:.1f}" height="25" rx="3"'
            parts.append(f'<rect class="box {kind}" {where}/>')
            if piece is not None:
                text = escape(piece).replace(" ", "\u00a0")
                parts.append(f'<text class="text" x="{x + 4:.1f}" y="{y + 17}">{text}</text>')
            x += size + GAP
    height = TOP + len(rows) * ROW + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}" font-family="{FONT}" font-size="{SIZE}">'
        f"<title>An answer under a JSON schema, forward by forward</title><style>{STYLE}</style>"
        f'<rect class="card" width="100%" height="100%" rx="8"/>'
        f'<text class="soft" x="14" y="24">orange: written now; blue: before; grey: open</text>'
        + "".join(parts)
        + "</svg>\n"
    )


def main() -> None:
    """Write the picture."""
    TARGET.write_text(draw(*canvases()), encoding="utf-8")


if __name__ == "__main__":
    main()
