"""Templates for tests: from rows with holes, and at random."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllmserve import Hole

TRUTH = Path(__file__).parent / "truth" / "infill"
Range = tuple[int, int]


def truths(name: str) -> list[dict[str, Any]]:
    """Upstream's cases for a checkpoint of tests/golden."""
    found: list[dict[str, Any]] = json.loads((TRUTH / f"{name}.json").read_text())["cases"]
    return found


def template(row: Sequence[int], holes: Sequence[Range], **given: Any) -> list[Any]:
    """A template of ids; ``given`` goes to every hole."""
    pieces, at = list[Any](), 0
    for low, high in holes:
        pieces += [list(row[at:low])] if low > at else []
        pieces.append(Hole(high - low, **given))
        at = high
    return pieces + ([list(row[at:])] if at < len(row) else [])


def random_row(dice: random.Random, vocab: int = 59) -> tuple[list[int], list[Range]]:
    """Given ids anywhere: at the start, in the middle, at the end, or only a few."""
    holes, position = list[Range](), dice.randrange(9)
    for _ in range(dice.randrange(1, 5)):
        end = position + dice.randrange(1, 9)
        holes.append((position, end))
        position = end + dice.randrange(1, 9)
    length = dice.choice([position, holes[-1][1]])
    return [dice.randrange(1, vocab) for _ in range(length)], holes


def joined(result: dict[str, Any], pieces: Sequence[Any]) -> bool:
    """Whether the whole's ids are those that were given and those of the holes, in order."""
    holes = iter(result["holes"])
    ids = list[int]()
    for piece in pieces:
        ids += next(holes)["token_ids"] if isinstance(piece, Hole) else piece
    return bool(ids == result["token_ids"])
