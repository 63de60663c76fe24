"""API keys: how they are written, what is refused, and how they are compared."""

import hashlib
import hmac
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dllmserve.errors import ConfigError
from dllmserve.server.http import keys as module
from dllmserve.server.http.keys import ApiKeys

A, B, C = "a" * 16, "b" * 20, "c" * 43


def sha(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def write(tmp_path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path = tmp_path / "keys.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return path


def test_file(tmp_path: Path) -> None:
    text = f"\ufeff# people\r\n\r\nalice={A}\n  {B}  \n#bob=x\nsha.1=sha256:{sha(C).upper()}"
    keys = ApiKeys.from_file(write(tmp_path, text))
    assert keys.names == ("alice", f"key-{sha(B)[:8]}", "sha.1")
    assert [key.owner for key in keys] == [sha(A), sha(B), sha(C)]
    for secret in (A, B, C):
        key = keys.match(secret)
        assert key is not None and key.owner == sha(secret)
        assert keys.match(secret.encode()) is key
    for wrong in ("", "a", A + " ", A.upper(), sha(A), f"alice={A}", f"sha256:{sha(C)}", "\udc80"):
        assert keys.match(wrong) is None


def test_env_and_list() -> None:
    keys = ApiKeys.from_env(f" alice={A}, ,{B},sha256:{sha(C)} ")
    assert len(keys) == 3
    assert [key.owner for key in ApiKeys.from_list([A, f"x={B}"])] == [sha(A), sha(B)]
    joined = ApiKeys([*ApiKeys.from_list([A]), *ApiKeys.from_env(B)])
    assert [key.owner for key in joined] == [sha(A), sha(B)]


def test_secrets_with_equals_signs() -> None:
    """base64 ends in them; up to the first one is the name."""
    keys = ApiKeys.from_list([f"alice={A}==", f"bob={B}=c"])
    assert keys.match(f"{A}==") is not None
    assert keys.match(f"{B}=c") is not None
    # a template whose variable was empty must not make the name a key
    for entry in (f"{A}=", f"{A}==", "production-server="):
        with pytest.raises(ConfigError, match="ends in '='; write name=secret") as caught:
            ApiKeys.from_list([entry])
        assert entry.strip("=") not in str(caught.value)


SECRET = "hunter2hunter2hunter2"
WRONG: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "has no API key; make one with: python -c"),
    "only comments": ("# a\n \n#b=c\n", "has no API key"),
    "short": (f"{A}\nhunter2\n", "line 2: the key has 7 characters, at least 16; make one with"),
    "short with name": ("alice=hunter2", "line 1: the key has 7 characters"),
    "blank inside": (f"# x\n{SECRET} {SECRET}", "line 2: a key is visible ASCII without blanks"),
    "comment behind": (f"{SECRET} # alice", "line 1: a key is visible ASCII"),
    "control": (f"{SECRET}\x01", "line 1: a key is visible ASCII"),
    "not ASCII": (f"{SECRET}é", "line 1: a key is visible ASCII"),
    "bad name": (f"{SECRET} x={SECRET}", "line 1: a key is visible ASCII"),
    "short digest": (
        f"{A}\nsha256:abc{SECRET}",
        "line 2: 'sha256:' must be followed by exactly 64",
    ),
    "long digest": (f"x=sha256:{'0' * 65}", "line 1: 'sha256:' must be followed by exactly 64"),
    "name twice": (f"x={A}\n\nx={SECRET}", "line 1 and .* line 3 have the same name"),
    "secret twice": (f"x={SECRET}\ny={SECRET}", "line 1 and .* line 2 have the same secret"),
    "digest of another": (f"{SECRET}\ny=sha256:{sha(SECRET)}", "have the same secret"),
    "not text": (SECRET.encode() + b"\xff", "is not UTF-8 text"),
    "too long": ("#" * (1 << 20) + "\n" + SECRET, "has 1048598 bytes, at most 1048576"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(tmp_path: Path, name: str) -> None:
    text, message = WRONG[name]
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys.from_file(path)
    shown = f"{caught.value}{caught.value.__cause__}"
    assert str(path) in shown
    assert "hunter2" not in shown.replace(str(path), "")


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read API key file .*nope: No such file"):
        ApiKeys.from_file(tmp_path / "nope")
    with pytest.raises(ConfigError, match="cannot read API key file"):
        ApiKeys.from_file(tmp_path)


def test_env_errors_name_the_entry() -> None:
    with pytest.raises(ConfigError, match=r"^KEYS entry 2: the key has 3 characters"):
        ApiKeys.from_env(f"{A},abc", "KEYS")
    with pytest.raises(ConfigError, match="DLLMSERVE_API_KEYS has no API key"):
        ApiKeys.from_env(" , ")
    with pytest.raises(ConfigError, match="API key 1 and API key 3 have the same name"):
        ApiKeys.from_list([f"a={A}", B, f"a={C}"])
    with pytest.raises(ConfigError, match="list of API keys has no API key"):
        ApiKeys.from_list([])
    with pytest.raises(ConfigError, match="no API keys"):
        ApiKeys([])


def test_the_advice_works() -> None:
    command = module._HOW.removeprefix("python -c '").removesuffix("'")
    made = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    assert len(ApiKeys.from_list([made.stdout])) == 1


def test_file_open_to_everybody_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dllmserve.server"):
        for mode, warned in ((0o600, False), (0o640, False), (0o644, True), (0o602, True)):
            caplog.clear()
            ApiKeys.from_file(write(tmp_path, A, mode))
            assert bool(caplog.records) == warned, oct(mode)
    assert A not in caplog.text


def test_no_secret_is_kept_or_shown() -> None:
    keys = ApiKeys.from_list([f"alice={SECRET}"])
    kept = repr([keys.__dict__, [(key, key.__dict__) for key in keys]])
    assert SECRET not in kept
    assert repr(keys) == "ApiKeys(1 keys)"
    assert repr(next(iter(keys))) == "Key(name='alice')"


@pytest.mark.parametrize("position", [0, 1, 2, None])
def test_every_key_is_compared_in_constant_time(
    monkeypatch: pytest.MonkeyPatch, position: int | None
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: Any, b: Any) -> bool:
        compared.append((a, b))
        return bool(a == b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    secrets = [A, B, C]
    keys = ApiKeys.from_list(secrets)
    given = secrets[position] if position is not None else "x" * 16
    assert (keys.match(given) is None) == (position is None)
    digest = hashlib.sha256(given.encode()).digest()
    assert compared == [(digest, bytes.fromhex(sha(s))) for s in secrets]
