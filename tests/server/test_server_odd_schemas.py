"""Whatever stands where a schema is asked for: an answer, or a refusal that names the field."""

import random
from pathlib import Path
from typing import Any

import pytest

from dllmserve.constraints.sequence import SEQUENCE
from tests.server.stand_in import run, serving

_KEYS = (
    "type properties required additionalProperties items minItems maxItems enum const anyOf oneOf "
    "allOf $ref $defs pattern minLength maxLength minimum maximum format not prefixItems title "
    "default description nullable patternProperties multipleOf uniqueItems if then"
)
KEYS = [*_KEYS.split(), SEQUENCE]
TYPES = ["object", "string", "integer", "array", "null", "boolean", "number"]
VALUES = [*TYPES, 0, 1, 5, -1, 2.5, True, False, None, "a+", "(", "#", "#/$defs/a", "date", [], {}]


class Odd:
    """Draws schemas, of which few are good ones."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)

    def value(self, depth: int) -> Any:
        kind = self._draw.random()
        if depth <= 0 or kind < 0.4:
            return self._draw.choice(VALUES)
        if kind < 0.5:
            return [self.value(depth - 1) for _ in range(self._draw.randrange(3))]
        return self.schema(depth - 1)

    def schema(self, depth: int) -> dict[str, Any]:
        made = {}
        for key in self._draw.choices(KEYS, k=self._draw.randrange(1, 4)):
            several = range(self._draw.randrange(3) if depth > 0 else 0)
            if key == "type":
                made[key] = self._draw.choice([*TYPES, ["string", "null"], "x"])
            elif key in ("properties", "$defs", "patternProperties"):
                made[key] = {"abc"[i]: self.schema(depth - 1) for i in several}
            elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
                made[key] = [self.schema(depth - 1) for _ in several]
            else:
                made[key] = self.value(depth)
        return made


@pytest.mark.parametrize("seed", range(2))
def test_odd_schemas(byte_checkpoint: Path, seed: int) -> None:
    odd, seen = Odd(seed), set()

    async def main() -> None:
        async with serving(byte_checkpoint, max_len=4096) as server:
            for number in range(150):
                schema = odd.schema(3)
                function = {"name": "f", "parameters": schema}
                asked: dict[str, Any] = (
                    {"tools": [{"type": "function", "function": function}]}
                    if number % 2
                    else {"guided_json": schema}
                )
                body = {"messages": [{"role": "user", "content": "Hi"}], **asked}
                answer = await server.post("/v1/chat/completions", body)
                seen.add(answer.status)
                assert answer.status in (200, 400), (schema, answer.body)
                if answer.status == 400:
                    assert answer.error["param"] in asked, (schema, answer.error)

    run(main())
    assert seen == {200, 400}
