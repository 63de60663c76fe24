"""Messages for wrong requests, from pydantic's errors and the API's schema.

pydantic's own texts name its classes, and for a field with alternatives they list what each of the
alternatives would have wanted. So only the location, the kind of error and the value come from
pydantic. What the location takes is read from the schema that /openapi.json shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dllmserve.server.http.escape import shown

#: most errors that a message names
_MAX_TOLD = 5
_MAX_VALUE = 60

#: what is wrong with a text that has a lone surrogate
NO_CHARACTER = "holds a lone surrogate, which is no character"

Schema = Mapping[str, Any]


@dataclass
class _Finding:
    """One error.

    Attributes:
        kind: pydantic's name for it.
        value: the value that was given.
        note: the text of one of our own validators, if that found it.
        path: keys and indices that lead to its location.
        takes: the alternative schemas of the location.
        unions: locations on the path that have several alternatives, each with the alternative
            that this error is about.
    """

    kind: str
    value: Any
    note: str = ""
    path: list[str | int] = field(default_factory=list)
    takes: list[Schema] = field(default_factory=list)
    unions: list[tuple[int, str, list[Schema]]] = field(default_factory=list)


def explain(
    details: Sequence[Mapping[str, Any]],
    schema: Schema,
    components: Schema,
    hint: Callable[[str], str] = lambda _: "",
) -> tuple[str, str | None]:
    """A message, and the name of the parameter that it is about.

    Args:
        details: errors of pydantic for the body, a query or a path.
        schema: the schema of the object with all parameters.
        components: named schemas that it refers to.
        hint: returns what is said behind the name of an unknown parameter, or "".
    """
    reader = _Reader(components, hint)
    found = [reader.finding(detail, schema) for detail in details]
    told = _settle(found)
    parts = list(dict.fromkeys(reader.sentence(f) for f in told))
    if len(parts) > _MAX_TOLD:
        parts = [*parts[:_MAX_TOLD], "and more"]
    first = told[0].path[:1] if told else []
    return "; ".join(parts) or "The body is wrong.", shown(first[0], 100) if first else None


def _settle(found: Sequence[_Finding], level: int = 0) -> list[_Finding]:
    """Choose, at each location with alternatives, the errors of the alternative that was meant.

    A list reports its first wrong element only. So the alternative whose first error comes latest
    is the one that was meant. If no alternative has an error inside, or two have equally late ones,
    the error names the location itself.
    """
    told: list[_Finding] = []
    groups: dict[tuple[str | int, ...], list[_Finding]] = {}
    for finding in found:
        if level < len(finding.unions):
            depth = finding.unions[level][0]
            location = tuple(finding.path[:depth])
            if location not in groups:
                told.append(finding)  # holds the group's location
            groups.setdefault(location, []).append(finding)
        else:
            told.append(finding)
    settled: list[_Finding] = []
    for finding in told:
        if level >= len(finding.unions):
            settled.append(finding)
            continue
        depth, _, takes = finding.unions[level]
        group = groups[tuple(finding.path[:depth])]
        inside: dict[str, list[_Finding]] = {}
        for other in group:
            if len(other.path) > depth:
                inside.setdefault(other.unions[level][1], []).append(other)
        reached = {n: max(_index(f.path[depth]) for f in fs) for n, fs in inside.items()}
        meant = [name for name, index in reached.items() if index == max(reached.values())]
        if len(meant) == 1:
            settled += _settle(inside[meant[0]], level + 1)
        else:
            here = [f for f in group if len(f.path) == depth] or group
            noted = next((f.note for f in here if f.note), "")
            kind = "value_error" if noted else "union"
            settled.append(_Finding(kind, here[0].value, noted, finding.path[:depth], takes))
    return settled


def _index(step: str | int) -> int:
    return step if isinstance(step, int) else 0


class _Reader:
    """Reads schemas.

    Args:
        components: named schemas.
        hint: see :func:`explain`.
    """

    def __init__(self, components: Schema, hint: Callable[[str], str]) -> None:
        self._components, self._hint = components, hint
        # by location, and by what was chosen on the way to it
        self._chosen: dict[tuple[object, ...], list[str]] = {}

    def finding(self, detail: Mapping[str, Any], schema: Schema) -> _Finding:
        """An error of pydantic with its location in the schema."""
        error = (detail.get("ctx") or {}).get("error")
        made = _Finding(
            kind=str(detail.get("type")),
            value=detail.get("input"),
            note=str(error) if detail.get("type") == "value_error" else "",
            takes=list(self._options(schema)),
        )
        if made.kind == "string_unicode":
            made.kind, made.note = "value_error", NO_CHARACTER
        for step in detail.get("loc", ())[1:]:
            if step == "[key]":
                made.kind, made.value = "key", made.path.pop()
                made.takes = list(self._options(self._at(schema, made.path)))
                break
            tagged = [s for s in made.takes if s.get("x-tag") == step]
            inside = list(self._inside(made.takes, step))
            if tagged:  # a tag may be a field's name, too
                made.takes = [{k: v for k, v in s.items() if k != "x-tag"} for s in tagged]
            elif inside:
                made.path.append(step)
                made.takes = [o for s in inside for o in self._options(s)]
            elif isinstance(step, str) and len(made.takes) > 1:
                self._choose(made, step)
            else:
                made.path.append(step)
                made.takes = []
        return made

    def _at(self, schema: Schema, path: Sequence[str | int]) -> Schema:
        takes = list(self._options(schema))
        for step in path:
            takes = [o for s in self._inside(takes, step) for o in self._options(s)]
        return takes[0] if takes else {}

    def _choose(self, made: _Finding, name: str) -> None:
        """Go into one of the alternatives of a location."""
        # every alternative has failed, so the errors name all of them in the order of the schema
        location = (*made.path, *(other for _, other, _ in made.unions))
        names = self._chosen.setdefault(location, [])
        if name not in names:
            names.append(name)
        made.unions.append((len(made.path), name, made.takes))
        number = names.index(name)
        made.takes = made.takes[number : number + 1] or made.takes

    def _options(self, schema: Schema) -> Iterator[Schema]:
        """The alternatives of a schema, without null, which stands for "not given"."""
        if "$ref" in schema:
            yield from self._options(self._components[schema["$ref"].rpartition("/")[2]])
            return
        options = schema.get("anyOf") or schema.get("oneOf")
        if options is None:
            if schema.get("type") != "null":
                yield schema
            return
        if "enum" in schema:
            yield schema
            return
        said = {"x-takes": schema["x-takes"]} if "x-takes" in schema else {}
        tagged = schema.get("discriminator", {})
        by, tags = tagged.get("propertyName"), tagged.get("mapping", {})
        for option in options:
            names = [tag for tag, ref in tags.items() if ref == option.get("$ref")]
            for found in self._options(option):
                marks = [{"x-tag": name, "x-tagged-by": by} for name in names] or [{}]
                yield from ({**found, **said, **mark} for mark in marks)

    @staticmethod
    def _inside(takes: Sequence[Schema], step: str | int) -> Iterator[Schema]:
        """What the alternatives take under a key or an index."""
        for schema in takes:
            if isinstance(step, int):
                if isinstance(schema.get("items"), Mapping):
                    yield schema["items"]
                continue
            values = schema.get("additionalProperties")
            patterns = schema.get("patternProperties")
            if step in schema.get("properties", ()):
                yield schema["properties"][step]
            elif len(takes) == 1 and "properties" not in schema:
                # with several alternatives a step may be the name of one, rather than a key
                if isinstance(patterns, Mapping):
                    yield from patterns.values()
                elif isinstance(values, Mapping):
                    yield values

    def sentence(self, finding: _Finding) -> str:
        """One error in words."""
        name = _name(finding.path)
        takes = self.takes(finding.takes) if finding.path else "a JSON object"
        if finding.kind == "extra_forbidden":
            hint = self._hint(name) if len(finding.path) == 1 else ""
            return f"{name} is not a parameter of this endpoint{hint}"
        special = _SENTENCES.get(finding.kind)
        if special is not None:
            return special(name, finding, takes)
        return f"{name} must be {takes}, got {_value(finding.value)}"

    def takes(self, schemas: Sequence[Schema], inside: bool = False) -> str:
        """What a location takes, in words."""
        if schemas and all("x-tag" in schema for schema in schemas):
            return "an object"
        texts = list(dict.fromkeys(self._kind(schema, inside) for schema in schemas))
        if not texts:
            return "something else"
        *most, last = texts
        return f"{', '.join(most)} or {last}" if most else last

    def _kind(self, schema: Schema, inside: bool) -> str:
        if "x-takes" in schema:
            return str(schema["x-takes"])
        allowed = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if allowed is not None:
            values = [_value(value) for value in allowed if value is not None]
            return f"one of {', '.join(values)}" if len(values) > 1 else "".join(values) or "null"
        kind = schema.get("type")
        if kind == "array":
            return self._list(schema, inside)
        if kind == "string":
            low, high = schema.get("minLength", 0), schema.get("maxLength")
            if high is not None:
                return f"a text of {low} to {high} characters"
            return "a text that is not empty" if low else "a text"
        if kind in ("integer", "number"):
            return _range("an integer" if kind == "integer" else "a number", schema)
        if kind == "boolean":
            return "true or false"
        most = schema.get("maxProperties")
        return "an object" if most is None else f"an object of at most {most} entries"

    def _list(self, schema: Schema, inside: bool) -> str:
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        size = " that is not empty" if low else ""
        if high is not None:
            size = f" of {low} to {high} entries" if low else f" of at most {high} entries"
        items = schema.get("items")
        if inside or not isinstance(items, Mapping):
            return f"a list{size}"
        each = self.takes(list(self._options(items)), inside=True)
        return f"a list{size} (each {each})"


def _missing(name: str, finding: _Finding, takes: str) -> str:
    return f"{name} is missing: it must be {takes}"


def _noted(name: str, finding: _Finding, takes: str) -> str:
    return f"{name} {finding.note}"


def _key(name: str, finding: _Finding, takes: str) -> str:
    named = finding.takes[0].get("propertyNames", {}) if finding.takes else {}
    keys = named.get("description", "other texts")
    return f"{name} has the key {_value(finding.value)}, and its keys must be {keys}"


def _tag(name: str, finding: _Finding, takes: str) -> str:
    value, tagged = finding.value, [schema for schema in finding.takes if "x-tag" in schema]
    tags = ", ".join(_value(schema["x-tag"]) for schema in tagged)
    if not isinstance(value, dict):
        return f"{name} must be an object, got {_value(value)}"
    by = next((schema["x-tagged-by"] for schema in tagged), "type")
    if by not in value:
        return f"{name}.{by} is missing: it must be one of {tags}"
    return f"{name}.{by} must be one of {tags}, got {_value(value[by])}"


#: kinds of errors that have a sentence of their own
_SENTENCES: dict[str, Callable[[str, _Finding, str], str]] = {
    "missing": _missing,
    "value_error": _noted,
    "key": _key,
    "union_tag_invalid": _tag,
    "union_tag_not_found": _tag,
}


def _name(path: Sequence[str | int]) -> str:
    """A location in words: ``messages.0.content``."""
    return ".".join(shown(step, 100) for step in path) or "The body"


def _range(kind: str, schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    over = schema.get("exclusiveMinimum")
    left = f"({_number(over)}" if over is not None else f"[{_number(low)}"
    if high is not None and (low is not None or over is not None):
        return f"{kind} in {left}, {_number(high)}]"
    if high is not None:
        return f"{kind} <= {_number(high)}"
    if over is not None:
        return f"{kind} > {_number(over)}"
    return kind if low is None else f"{kind} >= {_number(low)}"


def _number(value: Any) -> str:
    return str(int(value)) if value is not None and value == int(value) else str(value)


def _value(value: Any) -> str:
    """What was given, cut and escaped."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"'{shown(value, _MAX_VALUE)}'" if value else "an empty text"
    if isinstance(value, list):
        count = "1 entry" if len(value) == 1 else f"{len(value)} entries"
        return f"a list of {count}" if value else "an empty list"
    return "an object" if isinstance(value, dict) else shown(value, _MAX_VALUE)
