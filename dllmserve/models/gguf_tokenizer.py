"""The tokenizer of a GGUF file, as a tokenizer.json: byte-level BPE with known pre-tokenizers.

Source of the pre-tokenizers' patterns: llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllmserve.errors import TokenizerError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: patterns that cut a text, one after the other, by the pre-tokenizer's name
PATTERNS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "llama-bpe": (_LLAMA3,),
}
_LLAMA3_NAMES = ("llama3", "llama-v3")
_CONTROL, _USER = 3, 4
_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


def tokenizer_files(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The texts of tokenizer.json and the object of tokenizer_config.json.

    Args:
        fields: the file's metadata.

    Raises:
        TokenizerError: a kind of tokenizer that is not read, or one that is incomplete.

    Example:
        >>> tokenizer_files(GgufFile(path).fields)[1]["eos_token"]
        '<|im_end|>'
    """
    name = _pre_tokenizer(fields)
    tokens = [str(token) for token in fields.get("tokenizer.ggml.tokens") or ()]
    lines = [str(line).split(" ") for line in fields.get("tokenizer.ggml.merges") or ()]
    if not tokens or any(len(pair) != 2 for pair in lines):
        raise TokenizerError("the GGUF file's tokenizer has no tokens, or merges that are no pairs")
    merges = [(left, right) for left, right in lines]
    roles = _roles(fields, tokens)
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", name == "llama-bpe"))
    text = _built(name, tokens, merges, fields, roles["bos_token"] if add_bos else None)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {key: token for key, token in roles.items() if token is not None}
    config |= {"add_bos_token": add_bos, "clean_up_tokenization_spaces": False}
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return text, config


def _pre_tokenizer(fields: Mapping[str, Any]) -> str:
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        why = "; SentencePiece scores are not merges" if kind == "llama" else ""
        raise TokenizerError(
            f"the GGUF file's tokenizer is {kind!r}; 'gpt2', byte-level BPE, is read{why}"
        )
    name = str(fields.get("tokenizer.ggml.pre") or "default")
    name = "llama-bpe" if name in _LLAMA3_NAMES else name
    if name not in PATTERNS:
        raise TokenizerError(
            f"the GGUF file's pre-tokenizer is {name!r}; these are known: {', '.join(PATTERNS)}"
        )
    return name


def _roles(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, str | None]:
    """Special tokens by their names in tokenizer_config.json."""
    roles = dict[str, str | None]()
    for role, short in _ROLES.items():
        number = fields.get(f"tokenizer.ggml.{role}_token_id")
        if number is not None and not 0 <= number < len(tokens):
            raise TokenizerError(f"the GGUF file's {role} token {number} is not in its vocabulary")
        roles[f"{short}_token"] = None if number is None else tokens[number]
    return roles


def _built(
    name: str,
    tokens: list[str],
    merges: list[tuple[str, str]],
    fields: Mapping[str, Any],
    bos: str | None,
) -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise TokenizerError("the GGUF file's vocabulary has a token twice")
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=name == "llama-bpe")
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"the GGUF file's merges do not fit its tokens: {error}") from error
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(p), "isolated") for p in PATTERNS[name]]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, level])
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type") or ()
    kinds = list(zip(tokens, types, strict=False))
    special = [t for t, kind in kinds if kind == _CONTROL]
    plain = [t for t, kind in kinds if kind == _USER]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in plain])
    if bos is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return str(tokenizer.to_str())
