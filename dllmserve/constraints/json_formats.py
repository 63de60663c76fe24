"""Formats of strings: what each may be. All are ASCII; nothing that is accepted here is invalid."""

from __future__ import annotations

import functools

from dllmserve.constraints.dfa import Dfa, complement, intersection
from dllmserve.constraints.nfa import automaton
from dllmserve.constraints.regex import parse

_TWO_DIGITS_BY_4 = r"(?:0[48]|[2468][048]|[13579][26])"
_LEAP_DAY = rf"(?:[0-9]{{2}}{_TWO_DIGITS_BY_4}|(?:[02468][048]|[13579][26])00)-02-29"
_DAY = (
    r"[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = rf"(?:{_DAY}|{_LEAP_DAY})"
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]+)?(?:Z|[+-]{_CLOCK})"
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_DOMAIN = r"[A-Za-z0-9]+(?:-+[A-Za-z0-9]+)*"
_CLOCK_PART = r"(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
_CALENDAR = r"(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
_H16 = r"[0-9A-Fa-f]{1,4}"
_IPV6 = "|".join(
    [
        rf"(?:{_H16}:){{7}}{_H16}",
        rf"::(?:(?:{_H16}:){{0,6}}{_H16})?",
        *(rf"(?:{_H16}:){{{n}}}:(?:(?:{_H16}:){{0,{6 - n}}}{_H16})?" for n in range(1, 7)),
        rf"(?:{_H16}:){{7}}:",
    ]
)
_PCHAR = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
_HOST = r"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+"
_URI = (
    rf"[A-Za-z][A-Za-z0-9+.-]*:(?://{_HOST}(?::[0-9]{{1,4}})?(?:/{_PCHAR}*)*"
    rf"|/(?:{_PCHAR}+(?:/{_PCHAR}*)*)?|{_PCHAR}+(?:/{_PCHAR}*)*)"
    rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
)

_PATTERNS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}T{_TIME}",
    "duration": rf"P(?:[0-9]+W|{_CALENDAR}(?:T{_CLOCK_PART})?|T{_CLOCK_PART})",
    "uuid": r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "email": rf"{_ATOM}(?:\.{_ATOM})*@{_DOMAIN}(?:\.{_DOMAIN})+",
    "hostname": rf"{_LABEL}(?:\.{_LABEL})*",
    "ipv4": rf"{_OCTET}(?:\.{_OCTET}){{3}}",
    "ipv6": _IPV6,
    "uri": _URI,
}
#: what a string of a format surely looks like, whoever judges it
_LOOKS = {
    "date": r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
    "time": r"[0-9]{2}:[0-9]{2}.*",
    "date-time": r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt\s_].*",
    "duration": r"P.*",
    "uuid": r"[0-9A-Fa-f-]{36}",
    "email": r"(?:.|\n)*@(?:.|\n)*",
    "ipv4": r"[0-9.]*",
    "ipv6": r"[0-9A-Fa-f]*:(?:.|\n)*",
}
#: years that no calendar has
_NO_YEAR = r"0000-.*"

#: formats that are supported
FORMATS = frozenset(_PATTERNS)
#: formats that JSON Schema defines, and that are not supported
REFUSED = frozenset(
    {
        "idn-email",
        "idn-hostname",
        "iri",
        "iri-reference",
        "json-pointer",
        "regex",
        "relative-json-pointer",
        "uri-reference",
        "uri-template",
    }
)


@functools.cache
def format_automaton(name: str) -> Dfa:
    """The strings of a format, which is one of :data:`FORMATS`."""
    found = automaton(parse(_PATTERNS[name], "format"))
    if name in ("date", "date-time"):
        found = intersection(found, complement(automaton(parse(_NO_YEAR, "format"))))
    return found


@functools.cache
def looks_like(name: str) -> Dfa | None:
    """All strings that anyone may take for one of a format, and more; None if that can be any."""
    pattern = _LOOKS.get(name)
    return None if pattern is None else automaton(parse(pattern, "format"))
