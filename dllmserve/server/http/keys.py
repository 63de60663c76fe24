"""API keys: where they are read from and how a secret is compared with them."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dllmserve._checks import user_path
from dllmserve.errors import ConfigError

#: shortest secret in characters
MIN_LENGTH = 16
#: longest file of keys in bytes
MAX_FILE_BYTES = 1024 * 1024

_HOW = "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
_NAMED = re.compile(r"([A-Za-z0-9._-]{1,64})=(.*)", re.DOTALL)
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_SECRET = re.compile(r"[\x21-\x7e]+")

_log = logging.getLogger("dllmserve.server")


@dataclass(frozen=True)
class Key:
    """One API key, without its secret.

    Attributes:
        name: for logs and metrics; the name given, else made from the digest.
        owner: SHA-256 of the secret in hex; who a request and its results belong to.
    """

    name: str
    owner: str = field(repr=False)


class ApiKeys:
    """The keys that a server accepts. Of their secrets only SHA-256 digests are kept.

    A key is written as ``secret``, ``name=secret``, ``sha256:<64 hex digits>`` or
    ``name=sha256:<64 hex digits>``. The secret is at least 16 characters of visible ASCII. Up
    to the first "=" is the name, so a secret with "=" in it needs a name before it.

    Args:
        keys: each with a name and a secret of its own; to join two sources, ``[*a, *b]``.
        sources: where each key was written, for messages; by default its number.

    Raises:
        ConfigError: no keys, or two with one name or one secret.
    """

    def __init__(self, keys: Iterable[Key], sources: Iterable[str] = ()) -> None:
        self._keys = tuple(keys)
        if not self._keys:
            raise ConfigError(f"no API keys; make one with: {_HOW}")
        self._digests = tuple(bytes.fromhex(key.owner) for key in self._keys)
        where = tuple(sources) or tuple(f"API key {n + 1}" for n in range(len(self)))
        _check_unique("name", where, [key.name for key in self._keys])
        _check_unique("secret", where, [key.owner for key in self._keys])

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"ApiKeys({len(self)} keys)"

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(key.name for key in self._keys)

    @classmethod
    def from_file(cls, path: str | Path) -> ApiKeys:
        """Read a file of one key a line; blank lines and lines that begin with "#" do not count.

        Warns in the log if every user of the machine can read or change the file.

        Raises:
            ConfigError: the file cannot be read, has no key, or a line is wrong. The message
                names the line and never shows what is in it.
        """
        file = user_path(path)
        try:
            with file.open("rb") as stream:
                status = os.fstat(stream.fileno())  # of what is read, whatever the name leads to
                data = stream.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                size = max(status.st_size, len(data))
                raise ConfigError(f"API key file {file} has {size} bytes, at most {MAX_FILE_BYTES}")
            text = data.decode("utf-8-sig")
        except OSError as error:
            raise ConfigError(f"cannot read API key file {file}: {error.strerror}") from error
        except UnicodeDecodeError:
            # the original would show a part of the file
            raise ConfigError(f"API key file {file} is not UTF-8 text") from None
        if status.st_mode & (stat.S_IROTH | stat.S_IWOTH):
            _log.warning("API key file %s is open to every user; run: chmod 600 on it", file)
        lines = [(f"{file} line {number}", line) for number, line in enumerate(text.split("\n"), 1)]
        kept = [(where, line.strip()) for where, line in lines]
        return cls._parsed(str(file), [(w, line) for w, line in kept if line and line[0] != "#"])

    @classmethod
    def from_env(cls, value: str, name: str = "DLLMSERVE_API_KEYS") -> ApiKeys:
        """Read an environment variable's value: keys separated by commas.

        Raises:
            ConfigError: there is no key, or one is wrong. Shows none of them.
        """
        entries = [
            (f"{name} entry {n}", part.strip()) for n, part in enumerate(value.split(","), 1)
        ]
        return cls._parsed(name, [(where, part) for where, part in entries if part])

    @classmethod
    def from_list(cls, values: Iterable[str]) -> ApiKeys:
        """Take keys from a list.

        Raises:
            ConfigError: there is no key, or one is wrong. Shows none of them.

        Example:
            >>> ApiKeys.from_list(["alice=0123456789abcdef"]).names
            ('alice',)
        """
        entries = [(f"API key {n}", value.strip()) for n, value in enumerate(values, 1)]
        return cls._parsed("the list of API keys", entries)

    @classmethod
    def _parsed(cls, source: str, entries: list[tuple[str, str]]) -> ApiKeys:
        if not entries:
            raise ConfigError(f"{source} has no API key; make one with: {_HOW}")
        keys = [_parse(where, entry) for where, entry in entries]
        return cls(keys, [where for where, _ in entries])

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def match(self, secret: str | bytes) -> Key | None:
        """The key with this secret, or None.

        Digests are compared in constant time, and with every key whether or not one has
        matched: the time taken tells nothing.
        """
        data = secret.encode("utf-8", "surrogatepass") if isinstance(secret, str) else secret
        digest = hashlib.sha256(data).digest()
        found: Key | None = None
        for key, known in zip(self._keys, self._digests, strict=True):
            if hmac.compare_digest(digest, known):
                found = key
        return found


def _check_unique(what: str, where: Iterable[str], values: Iterable[str]) -> None:
    """Raise ConfigError with both sources if a value is there twice."""
    seen: dict[str, str] = {}
    for source, value in zip(where, values, strict=True):
        if value in seen:
            raise ConfigError(f"{seen[value]} and {source} have the same {what}; remove one")
        seen[value] = source


def _parse(where: str, entry: str) -> Key:
    """One key; the error says where it stands and what to do, and shows nothing of it."""
    named = _NAMED.fullmatch(entry)
    name, value = (named[1], named[2].strip()) if named else ("", entry)
    if named and not value.strip("="):
        raise ConfigError(
            f"{where} ends in '='; write name=secret, also if the secret itself ends in '='"
        )
    if value.startswith("sha256:"):
        digest = value.removeprefix("sha256:")
        if not _DIGEST.fullmatch(digest):
            raise ConfigError(f"{where}: 'sha256:' must be followed by exactly 64 hex digits")
        owner = digest.lower()
    else:
        if not _SECRET.fullmatch(value):
            raise ConfigError(f"{where}: a key is visible ASCII without blanks; make one: {_HOW}")
        if len(value) < MIN_LENGTH:
            raise ConfigError(
                f"{where}: the key has {len(value)} characters, at least {MIN_LENGTH};"
                f" make one with: {_HOW}"
            )
        owner = hashlib.sha256(value.encode()).hexdigest()
    return Key(name or f"key-{owner[:8]}", owner)
