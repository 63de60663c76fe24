"""What values a JSON schema allows, beside how they are written."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from dllmserve.constraints import charset
from dllmserve.constraints.dfa import Dfa, all_of, complement
from dllmserve.constraints.json_formats import FORMATS, REFUSED, format_automaton, looks_like
from dllmserve.constraints.json_numbers import Bounds, decimals, integers, multiples
from dllmserve.constraints.nfa import automaton
from dllmserve.constraints.nodes import (
    ANY_TEXT,
    EMPTY,
    NOTHING,
    Chars,
    Repeat,
    either,
    optional,
    text,
)
from dllmserve.constraints.regex import parse
from dllmserve.constraints.schema_flat import Flattener
from dllmserve.constraints.schema_merge import (
    TYPES,
    Flat,
    SchemaError,
    merged,
    refused,
    same,
    type_of,
)
from dllmserve.errors import InvalidParameterError

_MAX_DIVISOR = 1000
_MAX_DIGITS = 100


class Values:
    """Answers questions about the values of one schema.

    ``flat`` gives the alternatives of a part, see :class:`Flattener`; most methods take one of them
    and its JSON pointer, for errors.
    """

    def __init__(self, root: Any) -> None:
        self.flat = Flattener(root, self._apart).flat
        self._searched: dict[tuple[str, bool], Dfa] = {}

    def strings(self, flat: Flat, where: str, outer: bool = False) -> Dfa:
        """Strings that are valid, as characters, not as JSON.

        ``outer``: at least those that anyone may call valid; otherwise none that anyone may not.
        """
        low, high = flat.get("minLength", 0), flat.get("maxLength")
        if high is not None and low > high:
            return automaton(NOTHING)
        found = self._conditions(flat, where, outer)
        if low or high is not None or not found:
            found.append(automaton(Repeat(Chars(charset.ALL), low, high)))
        for part in self.forbidden(flat, "string", where):
            if "enum" in part:
                values = [v for v in part["enum"] if self.valid(v, part, where, not outer)]
                texts = automaton(either(text(v) for v in values if isinstance(v, str)))
            else:
                texts = self.strings(part, where, not outer)
            found.append(complement(texts))
        return all_of(found)

    def integers(self, flat: Flat, where: str) -> Dfa:
        """Integers that are valid, as they are written."""
        found = [automaton(integers(self.bounds(flat, where)))]
        divisor = flat.get("multipleOf", Decimal(1))
        if divisor != int(divisor) or divisor > _MAX_DIVISOR:
            raise refused(
                where,
                f"multipleOf {divisor} is not supported: only integers from 1 to {_MAX_DIVISOR}",
            )
        if divisor != 1:
            found.append(multiples(int(divisor)))
        for part in self.forbidden(flat, "integer", where):
            if "enum" in part:
                values = [v for v in part["enum"] if self.valid(v, part, where)]
                whole = [int(v) for v in values if type_of(v) == "integer"]
                texts = automaton(either(text(str(v)) for v in whole))
            else:
                texts = self.integers(part, where)
            found.append(complement(texts))
        return all_of(found)

    def forbidden(self, flat: Flat, kind: str, where: str) -> list[Flat]:
        """What ``not`` forbids among the values of a type."""
        found: list[Flat] = []
        for schema in flat.get("not", ()):
            for part in self.flat(schema, f"{where}/not", flat["$refs"]):
                types = tuple(map(type_of, part.get("enum", ()))) or part.get("type", TYPES)
                both = kind in types or (kind == "integer" and "number" in types)
                if both or (kind == "number" and "integer" in types):
                    found.append(part)
        return found

    def _conditions(self, flat: Flat, where: str, outer: bool) -> list[Dfa]:
        """What strings have to match beside their length."""
        self.check_formats(flat, where)
        found = [self._search(pattern, where, outer) for pattern in flat.get("pattern", ())]
        names = [name for name in flat.get("format", ()) if name in FORMATS]
        if not outer:
            return found + [format_automaton(name) for name in names]
        return found + [looks for looks in map(looks_like, names) if looks is not None]

    def _search(self, pattern: str, where: str, outer: bool) -> Dfa:
        """Strings in which a pattern is found, anywhere if it is not anchored."""
        if (pattern, outer) not in self._searched:
            # for Python's "$" a newline may follow the end, for JavaScript's not
            end = optional(text("\n")) if outer else EMPTY
            try:
                found = automaton(parse(pattern, "pattern", search=ANY_TEXT, end=end))
            except InvalidParameterError as error:
                raise refused(where, str(error)) from error
            self._searched[pattern, outer] = found
        return self._searched[pattern, outer]

    def check_formats(self, flat: Flat, where: str) -> None:
        """Refuse formats that are not supported."""
        for name in flat.get("format", ()):
            if name in REFUSED:
                known = ", ".join(sorted(FORMATS))
                raise refused(where, f"the format {name!r} is not supported; these are: {known}")

    def bounds(self, flat: Flat, where: str) -> Bounds:
        """Bounds of a number."""
        low, high = flat.get("minimum"), flat.get("maximum")
        above, below = flat.get("exclusiveMinimum"), flat.get("exclusiveMaximum")
        for bound in (low, high, above, below):
            if bound is not None and len(f"{bound:f}") > _MAX_DIGITS:
                raise refused(where, f"a bound of a number has more than {_MAX_DIGITS} digits")
        low_open = above is not None and (low is None or above >= low)
        high_open = below is not None and (high is None or below <= high)
        return Bounds(above if low_open else low, below if high_open else high, low_open, high_open)

    def valid(self, value: Any, flat: Flat, where: str, outer: bool = False) -> bool:
        """Whether a constant is valid under a flat schema; for ``outer`` see :meth:`strings`."""
        kind = type_of(value)
        types = flat.get("type", TYPES)
        if kind not in types and not (kind == "integer" and "number" in types):
            return False
        if "enum" in flat and not any(same(value, other) for other in flat["enum"]):
            return False
        schemas = flat.get("not", ())
        if any(self._valid_any(value, schema, flat, where, not outer) for schema in schemas):
            return False
        if kind == "string":
            fits = flat.get("minLength", 0) <= len(value) <= flat.get("maxLength", len(value))
            conditions = self._conditions(flat, where, outer)
            return fits and all(condition.accepts(value) for condition in conditions)
        if kind in ("integer", "number"):
            number = Decimal(value)
            divisor = flat.get("multipleOf", Decimal(0))
            whole = not divisor or number % divisor == 0
            return whole and self.bounds(flat, where).contains(number)
        if kind == "array":
            return self._valid_array(value, flat, where, outer)
        return kind != "object" or self._valid_object(value, flat, where, outer)

    def _valid_any(self, value: Any, schema: Any, flat: Flat, where: str, outer: bool) -> bool:
        parts = self.flat(schema, where, flat["$refs"])
        return any(self.valid(value, part, where, outer) for part in parts)

    def _valid_array(self, value: list[Any], flat: Flat, where: str, outer: bool) -> bool:
        if not flat.get("minItems", 0) <= len(value) <= flat.get("maxItems", len(value)):
            return False
        pairs = [(a, b) for i, a in enumerate(value) for b in value[:i]]
        if flat.get("uniqueItems") and any(same(a, b) for a, b in pairs):
            return False
        prefix = flat.get("prefixItems", [])
        schemas = prefix[: len(value)] + [flat.get("items", True)] * (len(value) - len(prefix))
        pairs = list(zip(value, schemas, strict=True))
        return all(self._valid_any(item, schema, flat, where, outer) for item, schema in pairs)

    def _valid_object(self, value: dict[str, Any], flat: Flat, where: str, outer: bool) -> bool:
        if not flat.get("minProperties", 0) <= len(value) <= flat.get("maxProperties", len(value)):
            return False
        if any(name not in value for name in flat.get("required", [])):
            return False
        properties, others = flat.get("properties", {}), flat.get("additionalProperties", True)
        return all(
            self._valid_any(item, properties.get(name, others), flat, where, outer)
            for name, item in value.items()
        )

    def _apart(self, a: Flat, b: Flat) -> bool:
        """Whether no value is valid under both; False also if that cannot be shown."""
        try:
            both = merged(a, b)
            return both is None or self._impossible(both)
        except SchemaError:
            return False

    def _impossible(self, flat: Flat) -> bool:
        """Whether no value is valid; False also if that cannot be shown."""
        if "enum" in flat:
            return not any(self.valid(value, flat, "", True) for value in flat["enum"])
        return all(self._impossible_type(kind, flat) for kind in flat.get("type", TYPES))

    def _impossible_type(self, kind: str, flat: Flat) -> bool:
        if kind == "string":
            return self.strings(flat, "", True).empty
        if kind in ("integer", "number"):
            maker = integers if kind == "integer" else decimals
            return automaton(maker(self.bounds(flat, ""))).empty
        if kind == "object":
            properties, others = flat.get("properties", {}), flat.get("additionalProperties", True)
            schemas = [properties.get(name, others) for name in flat.get("required", [])]
            crowded = flat.get("minProperties", 0) > flat.get("maxProperties", 1 << 60)
        elif kind == "array":
            low = flat.get("minItems", 0)
            prefix = flat.get("prefixItems", [])
            schemas = prefix[:low] + [flat.get("items", True)] * (low > len(prefix))
            crowded = low > flat.get("maxItems", 1 << 60)
        else:
            return False
        return crowded or any(
            all(map(self._impossible, self.flat(schema, "", flat["$refs"]))) for schema in schemas
        )
