"""Draw docs/images/geometry-*.svg: masks, windows, a mixed step and shared pages.

The forwards of the second picture are those of a real run of a small block-causal model; the rest
is drawn from numbers below. Run it again when one of them changes::

    python tools/draw_geometries.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from dllmserve import LLM, SamplingParams
from dllmserve.core.plan import Span, StepPlan, Store

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
#: so few that the prompt of the second picture needs a chunk
STEP_TOKENS = 10
CHECKPOINT = ROOT / "tests" / "golden" / "sdar-kv2of4"

#: colours by class, on light and on dark pages; a picture brings its own background
LIGHT = {
    "card": "#ffffff",
    "edge": "#d0d7de",
    "text": "#1f2328",
    "soft": "#59636e",
    "pale": "#434c56",
    "kept": "#a8d1ff",
    "now": "#ffc680",
    "rest": "#f0f2f5",
    "line": "#57606a",
}
DARK = {
    "card": "#0d1117",
    "edge": "#3d444d",
    "text": "#e6edf3",
    "soft": "#9198a1",
    "pale": "#ced5dc",
    "kept": "#1f5fa8",
    "now": "#9a5b0b",
    "rest": "#1c2128",
    "line": "#9198a1",
}
FONT = "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif"


def css(colours: dict[str, str]) -> str:
    """Rules of one set of colours."""
    fills = "".join(f".{n}{{fill:{c}}}" for n, c in colours.items())
    edge, line = colours["edge"], colours["line"]
    return (
        f"{fills}.box{{stroke:{edge}}}.bold{{stroke:{line};stroke-width:1.6}}"
        f".rule{{stroke:{line};stroke-width:1.4;fill:none}}"
    )


@dataclass
class Picture:
    """An SVG under construction; sizes in pixels."""

    title: str
    width: float
    height: float
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, w: float, h: float, kind: str, more: str = "") -> None:
        """A rectangle of a class of colour."""
        size = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}"'
        self.parts.append(f'<rect {size} class="{kind} box" {more}/>'.replace(" />", "/>"))

    def text(self, x: float, y: float, text: str, kind: str = "text", more: str = "") -> None:
        """A line of text from x on, or around it with anchor="middle" in ``more``."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" class="{kind}" {more}>{escape(text)}</text>'.replace(
                " >", ">", 1
            )
        )

    def middle(self, x: float, y: float, text: str, kind: str = "text", more: str = "") -> None:
        """A line of text around x."""
        self.text(x, y, text, kind, f'text-anchor="middle" {more}'.strip())

    def path(self, d: str, more: str = "") -> None:
        """A line."""
        self.parts.append(f'<path d="{d}" class="rule" {more}/>'.replace(" />", "/>"))

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A line with a head, to the right or downwards."""
        self.path(f"M{x1:g} {y1:g}L{x2:g} {y2:g}")
        head = f"M{x2 - 5:g} {y2 - 4:g}L{x2:g} {y2:g}L{x2 - 5:g} {y2 + 4:g}"
        down = f"M{x2 - 4:g} {y2 - 5:g}L{x2:g} {y2:g}L{x2 + 4:g} {y2 - 5:g}"
        self.path(head if y1 == y2 else down)

    def grid(self, left: float, top: float, cell: float, kinds: list[list[str]]) -> None:
        """Cells of classes of colours, row by row."""
        for row, line in enumerate(kinds):
            for column, kind in enumerate(line):
                self.box(left + cell * column, top + cell * row, cell, cell, kind)

    def bracket(self, x1: float, x2: float, y: float, text: str) -> None:
        """A bracket below x1 .. x2, and what it stands for."""
        self.path(f"M{x1 + 2:g} {y - 3:g}V{y:g}H{x2 - 2:g}V{y - 3:g}")
        self.middle((x1 + x2) / 2, y + 17, text, "soft")

    def legend(self, y: float, entries: list[tuple[str, str]]) -> None:
        """Colours and what they mean, one line each."""
        for number, (kind, text) in enumerate(entries):
            at = y + 20 * number
            self.box(20, at - 11, 14, 14, kind)
            self.text(42, at, text, "soft")

    def save(self, name: str) -> None:
        """Write docs/images/geometry-NAME.svg."""
        size = f"{self.width:g} {self.height:g}".split()
        style = (
            f"text{{font:12.5px {FONT}}}.head{{font-weight:600;font-size:14px}}"
            f".cell{{font-size:11px}}{css(LIGHT)}"
            f"@media (prefers-color-scheme:dark){{{css(DARK)}}}"
        )
        card = f'<rect x=".5" y=".5" width="{self.width - 1:g}" height="{self.height - 1:g}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" '
            f'width="{size[0]}" height="{size[1]}" role="img">',
            f"<title>{escape(self.title)}</title>",
            f"<style>{style}</style>",
            f'{card} rx="8" class="card box"/>',
            *self.parts,
            "</svg>",
        ]
        (IMAGES / f"geometry-{name}.svg").write_text("\n".join(lines) + "\n", encoding="utf-8")


def masks() -> None:
    """What a query sees, in each geometry: 12 tokens, of which 5 are the prompt."""
    cell, tokens, prompt, block, top, gap = 17, 12, 5, 4, 92, 56
    side = cell * tokens
    picture = Picture("Masks of the three geometries", 3 * side + 2 * gap + 100, 396)
    kinds = (
        ("Full attention", "LLaDA, Dream", tokens),
        (f"Block-causal, blocks of {block}", "SDAR, Fast-dLLM v2", block),
        ("Autoregressive", "Llama, Qwen", 1),
    )
    for number, (name, models, size) in enumerate(kinds):
        left = 60 + number * (side + gap)
        picture.middle(left + side / 2, 30, name, "text head")
        picture.middle(left + side / 2, 50, models, "soft")
        picture.middle(left + side / 2, top - 10, "keys", "soft")
        if number == 0:
            picture.middle(
                left - 32,
                top + side / 2,
                "queries",
                "soft",
                f'transform="rotate(-90 {left - 32:g} {top + side / 2:g})"',
            )
        picture.grid(
            left,
            top,
            cell,
            [
                [
                    "now" if q // size == k // size else "kept" if k < q else "rest"
                    for k in range(tokens)
                ]
                for q in range(tokens)
            ],
        )
        for low, high, text in ((0, prompt, "prompt"), (prompt, tokens, "answer")):
            picture.bracket(left + cell * low, left + cell * high, top + side + 8, text)
    picture.legend(
        top + side + 60,
        [
            ("now", "seen; K,V are those of the forward itself"),
            ("kept", "seen; K,V are final, and read from pages"),
        ],
    )
    picture.save("masks")


def causal_context() -> None:
    """A block of Nemotron-Labs-Diffusion while it is filled, and when it is kept."""
    cell, prompt, block, top = 22, 3, 4, 84
    picture = Picture("Causal context", 690, 262)
    marks = ["p"] * prompt + ["a"] * block
    for number, name in enumerate(("while the block is filled", "when it is finished")):
        left = 70 + 290 * number
        picture.middle(left + cell * (prompt + block) / 2, 30, name, "text head")
        kinds = []
        for query in range(block):
            last = query if number else block - 1
            kinds.append(["kept"] * prompt + ["now" if k <= last else "rest" for k in range(block)])
            picture.middle(left - 14, top + cell * (query + 0.65), "a", "soft")
        for key, mark in enumerate(marks):
            picture.middle(left + cell * (key + 0.5), top - 8, mark, "soft")
        picture.grid(left, top, cell, kinds)
        picture.bracket(left, left + cell * prompt, top + cell * block + 8, "prompt")
        x = left + cell * prompt
        picture.bracket(x, x + cell * block, top + cell * block + 8, "block")
    left += cell * (prompt + block)
    picture.arrow(left + 4, top + cell * (block - 0.5), left + 30, top + cell * (block - 0.5))
    picture.text(left + 36, top + cell * (block - 0.5) + 4, "the next one")
    picture.legend(
        top + cell * block + 58,
        [
            ("now", "seen; K,V of this forward"),
            ("kept", "seen; K,V that are kept, computed with a causal mask"),
        ],
    )
    picture.save("causal-context")


@dataclass(frozen=True)
class Forward:
    """What one forward of the request of the second picture did."""

    span: Span
    pages: int
    written: frozenset[int]


def forwards(prompt: int, length: int, window: int, page: int) -> list[Forward]:
    """The forwards of a request, two a window, of a real run."""
    llm = LLM(
        str(CHECKPOINT),
        device="cpu",
        page_size=page,
        max_num_seqs=1,
        max_num_batched_tokens=STEP_TOKENS,
    )
    params = SamplingParams(
        temperature=0.0, gen_length=length, block_length=window, steps_per_block=2, ignore_eos=True
    )
    plans: list[StepPlan] = []
    found: list[Forward] = []
    pages = 0
    with llm.observe(plans.append):
        for canvas in llm.stream(list(range(1, prompt + 1)), params):
            written = frozenset(prompt + i for i, done in enumerate(canvas.committed) if done)
            for plan in plans:
                pages += len(plan.pages)
                found.append(Forward(plan.entries[0].span, pages, written))
            plans.clear()
    return found


def story(span: Span, window: int) -> str:
    """A forward of the second picture in a few words."""
    end = span.q_start + span.q_len
    if not span.blk_len:
        return "stores a chunk of the prompt"
    if span.store == Store.POSITIONS:
        return f"stores {span.q_start}-{end - window - 1}, and fills {end - window}-{end - 1}"
    return f"fills {span.q_start}-{end - 1}"


def windows() -> None:
    """An answer that is filled window by window, with pages behind it."""
    prompt, length, window, page = 13, 11, 4, 8
    total, cell, left, top, row = prompt + length, 19, 96, 92, 40
    found = forwards(prompt, length, window, page)
    width = left + cell * total + 240
    picture = Picture("A block-causal answer", width, top + row * len(found) + 78)
    picture.text(
        20,
        30,
        f"Prompt of {prompt}, answer of {length}, windows of {window}, pages of {page}; "
        f"two forwards a window, {STEP_TOKENS} tokens a step",
        "text head",
    )
    for number in range(total // page):
        x = left + cell * page * number
        picture.path(f"M{x + 2:g} {top - 16}v-5h{cell * page - 4}v5")
        picture.middle(x + cell * page / 2, top - 28, f"page {number + 1}", "soft")
    before: frozenset[int] = frozenset()
    for number, forward in enumerate(found):
        y, span = top + row * number, forward.span
        picture.text(20, y + 14, f"forward {number + 1}", "soft")
        last, stored = span.q_start + span.q_len, span.store == Store.POSITIONS
        for at in range(total):
            final = at < (last - (window if span.blk_len else 0) if stored else span.q_start)
            computed = span.q_start <= at < last
            kind = "kept" if final else "now" if computed else "rest"
            edge = "bold" if computed else ""
            picture.box(left + cell * at, y, cell, cell, f"{kind} {edge}".strip())
            new = at in forward.written - before
            mark = "p" if at < prompt else "a" if at in forward.written else "?"
            weight = 'font-weight="700"' if new else ""
            picture.middle(
                left + cell * (at + 0.5),
                y + 13.5,
                mark,
                "text cell" if new or at < prompt else "pale cell",
                weight,
            )
        picture.path(
            f"M{left:g} {y + cell + 5:g}h{cell * page * forward.pages:g}", 'stroke-width="3"'
        )
        picture.text(left + cell * total + 14, y + 14, story(span, window))
        before = forward.written
    picture.legend(
        top + row * len(found) + 16,
        [
            (
                "kept bold",
                "computed and stored: final from now on. Without an edge: read from pages",
            ),
            ("now bold", "computed, and not final yet"),
            (
                "rest",
                "p: prompt, a: written (bold: by this forward), ?: masked. The line below a "
                "row: pages that the request holds",
            ),
        ],
    )
    picture.save("windows")


@dataclass(frozen=True)
class Share:
    """One request's share of the step of the third picture."""

    name: str
    state: str
    cached: int
    stored: int
    filled: int
    masks: int


SHARES = (
    Share("A", "its prompt is stored, in chunks", 8, 12, 0, 0),
    Share("B", "begins a window, stores the last one", 12, 4, 4, 4),
    Share("C", "in the middle of a window", 20, 0, 4, 2),
    Share("D", "lost its pages, stores them anew", 0, 8, 0, 0),
)


def step() -> None:
    """Requests of one model in different states, in one forward."""
    cell, left, top, row = 13, 62, 76, 52
    picture = Picture("One step", 820, 432)
    picture.text(20, 30, "One step of a block-causal model, windows of 4", "text head")
    picture.text(left, 56, "in pages", "soft")
    picture.text(left + cell * 22, 56, "computed", "soft")
    for number, share in enumerate(SHARES):
        y = top + row * number
        picture.text(24, y + 11, share.name, "text head")
        for at in range(share.cached):
            picture.box(left + cell * at, y, cell, cell, "kept")
        x = left + cell * 22
        for at in range(share.stored + share.filled):
            kind = "kept bold" if at < share.stored else "now bold"
            picture.box(x + cell * at, y, cell, cell, kind)
        picture.text(left + cell * 36, y + 11, share.state)
        rows = f", {share.masks} of them masked" if share.masks else ""
        tokens = f"{share.stored + share.filled} tokens{rows}"
        picture.text(left + cell * 36, y + 29, tokens, "soft")
    x, y = left, top + row * len(SHARES) + 20
    picture.text(20, y - 8, "the forward: all of them behind each other", "soft")
    for share in SHARES:
        for at in range(share.stored + share.filled):
            kind = "kept bold" if at < share.stored else "now bold"
            picture.box(x, y + 6, cell, cell, kind)
            x += cell
        count = share.stored + share.filled
        picture.middle(x - cell * count / 2, y + 34, share.name, "soft")
        x += 6
    total = sum(s.stored + s.filled for s in SHARES)
    masked = sum(s.masks for s in SHARES)
    picture.text(x + 14, y + 17, f"{total} tokens through the layers")
    picture.text(
        20,
        y + 64,
        f"LM head: {masked} rows, the masks of B and C. Each token attends to "
        "its own request's pages, as far as its mask goes.",
    )
    picture.legend(
        y + 92,
        [
            ("kept", "final K,V; with a bold edge: computed and stored in this forward"),
            ("now bold", "the window that is filled"),
        ],
    )
    picture.save("step")


def shared() -> None:
    """Pages that requests share, and what becomes of them."""
    w, h, left, top, row = 128, 40, 108, 84, 76
    picture = Picture("Shared pages", 850, 446)
    picture.text(20, 30, "Three prompts that begin alike, pages of 32 tokens", "text head")
    chain = ("h1 = H(tokens)", "h2 = H(h1, tokens)")
    for number, name in enumerate(chain):
        x = left + (w + 28) * number
        picture.box(x, top, w, h, "kept bold", 'rx="4"')
        picture.middle(x + w / 2, top + 17, name, "text cell")
        picture.middle(x + w / 2, top + 32, "shared by 1, 2, 3", "pale cell")
        picture.arrow(x + w, top + h / 2, x + w + 28, top + h / 2)
    x = left + (w + 28) * 2
    picture.middle(left + w + 14, top - 16, "system prompt", "soft")
    own = (
        (("h3 = H(h2, ...)", "1, 2: one question", "kept"), ("not full", "1 alone", "now")),
        (("", "", ""), ("not full", "2 alone", "now")),
        (("h3' = H(h2, ...)", "3: another question", "kept"), ("not full", "3 alone", "now")),
    )
    for number, pages in enumerate(own):
        y = top + row * number
        picture.text(20, y + 24, f"request {number + 1}")
        for place, (name, who, kind) in enumerate(pages):
            if not name:
                continue
            at = x + (w + 40) * place
            wide = w + 12
            picture.box(at, y, wide, h, f"{kind} bold", 'rx="4"')
            picture.middle(at + wide / 2, y + 17, name, "text cell")
            picture.middle(at + wide / 2, y + 32, who, "pale cell")
    mid, wide = left + w + 28 + w, w + 12
    picture.path(f"M{mid + 14:g} {top + h / 2:g}V{top + 2 * row + h / 2:g}")
    picture.arrow(mid + 14, top + 2 * row + h / 2, x, top + 2 * row + h / 2)
    picture.arrow(x + wide, top + h / 2, x + w + 40, top + h / 2)
    picture.path(f"M{x + wide + 14:g} {top + h / 2:g}V{top + row + h / 2:g}")
    picture.arrow(x + wide + 14, top + row + h / 2, x + w + 40, top + row + h / 2)
    picture.arrow(x + wide, top + 2 * row + h / 2, x + w + 40, top + 2 * row + h / 2)
    y = top + 3 * row + 8
    picture.text(20, y, "when all three have ended", "soft")
    names = ("h3", "h3'", "h2", "h1")
    for number, name in enumerate(names):
        at = left + 92 * number
        picture.box(at, y + 12, 64, 26, "kept", 'rx="4"')
        picture.middle(at + 32, y + 29, name, "text cell")
        if number:
            picture.arrow(at - 28, y + 25, at, y + 25)
    picture.text(left + 92 * 4, y + 29, "free, and still found by their hashes; the one that was")
    picture.text(left + 92 * 4, y + 46, "used longest ago goes first when pages are needed")
    picture.legend(
        y + 84,
        [
            ("kept", "a full page: its name is a hash of its tokens and of all before them"),
            ("now", "a page that is not full belongs to one request"),
        ],
    )
    picture.save("pages")


def main() -> None:
    """Draw all of them."""
    for draw in (masks, causal_context, windows, step, shared):
        draw()


if __name__ == "__main__":
    main()
