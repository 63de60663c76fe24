"""Tokenizers as checkpoints ship them."""

from __future__ import annotations

import asyncio
import json
import shutil
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dllmserve._environment import child_environment
from dllmserve.config import CODE_VARIABLE
from dllmserve.engine.tokenizer import load_tokenizer
from dllmserve.errors import ConfigError, TokenizerError
from dllmserve.process.supervisor import Supervisor, SupervisorOptions
from tests.checkpoints import byte_tokenizer

TEXT = "hello café 日本 world"


@pytest.fixture
def dream_files(tmp_path: Path) -> tuple[Path, Tokenizer]:
    """Dream's layout: Qwen2's two vocabulary files, and a class of its own that is not here."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(["hello world, the thing", "naïve café 日本"], trainer)
    model = json.loads(trained.to_str())["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))
    size = len(model["vocab"])
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    added = {
        str(size + i): {"content": name, "special": True, **flags}
        for i, name in enumerate(("<|endoftext|>", "<|mask|>"))
    }
    config = {
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "tokenizer_class": "DreamTokenizer",
        "added_tokens_decoder": added,
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "chat_template": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m.content }}{% endfor %}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path, trained


@pytest.mark.parametrize("trust", [False, True])
def test_dreams_vocabulary_needs_no_code_of_its_own(
    dream_files: tuple[Path, Tokenizer], trust: bool
) -> None:
    folder, trained = dream_files
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)  # warnings would be errors
    assert tokenizer is not None
    assert tokenizer.encode(TEXT) == trained.encode(TEXT).ids
    assert tokenizer.encode("<|mask|>") == [trained.get_vocab_size() + 1]
    assert tokenizer.decode(tokenizer.encode(TEXT + "<|endoftext|>")) == TEXT
    assert tokenizer.render_chat([{"content": "a"}, {"content": "b"}]) == "a"


def test_a_tokenizer_of_unknown_kind_asks_for_trust(
    dream_files: tuple[Path, Tokenizer],
) -> None:
    folder, _ = dream_files
    (folder / "merges.txt").unlink()
    with pytest.raises(TokenizerError, match="trust_remote_code"):
        load_tokenizer(folder)


def test_a_tokenizer_that_is_none_of_the_usual_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "rag"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RagTokenizer"}')
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


MARK = b"\xef\xbb\xbf"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def put_before(path: Path, start: bytes) -> None:
    path.write_bytes(start + path.read_bytes())


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path, chat=True)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<|user|>"}')
    (tmp_path / "added_tokens.json").write_text('{"<x>": 260}')
    plain = load_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        put_before(path, MARK)
    marked = load_tokenizer(tmp_path)
    assert plain is not None and marked is not None
    for tokenizer in (plain, marked):
        assert tokenizer.encode_chat([{"content": "a<x>"}]) == [257, 64, 260]
        assert tokenizer.end_id == 256


def test_byte_order_marks_in_files_that_transformers_reads(
    dream_files: tuple[Path, Tokenizer],
) -> None:
    folder, trained = dream_files
    (folder / "config.json").write_text('{"model_type": "Dream"}')
    for path in folder.iterdir():
        put_before(path, MARK)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.encode(TEXT) == trained.encode(TEXT).ids
    assert tokenizer.decode(tokenizer.encode(TEXT + "<|endoftext|>")) == TEXT
    assert tokenizer.end_id == trained.get_vocab_size()
    assert tokenizer.render_chat([{"content": "a"}]) == "a"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"]
)
def test_files_that_are_something_else(tmp_path: Path, name: str) -> None:
    byte_tokenizer(tmp_path, chat=False)
    for content, part in (
        (POINTER, "is a git-lfs pointer, not the file itself: run 'git lfs pull'"),
        ("{}".encode("utf-16"), "begins with UTF-16's mark; save it as UTF-8"),
        (b"\xe9", "is not UTF-8 text"),
    ):
        if (name, content) == ("tokenizer.json", b"\xe9"):
            continue  # the library says what is wrong with it
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenizerError) as caught:
            load_tokenizer(tmp_path)
        assert part in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_pointers_in_place_of_a_vocabulary(dream_files: tuple[Path, Tokenizer], name: str) -> None:
    folder, _ = dream_files
    (folder / name).write_bytes(POINTER)
    with pytest.raises(TokenizerError, match=f"{name} is a git-lfs pointer"):
        load_tokenizer(folder)


OWN_TOKENIZER = """
from transformers import PreTrainedTokenizer

class OwnTokenizer(PreTrainedTokenizer):
    def __init__(self, **options):
        super().__init__(**options)

    @property
    def vocab_size(self):
        return 128

    def get_vocab(self):
        return {chr(i): i for i in range(128)} | dict(self.added_tokens_encoder)

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)
"""


@pytest.fixture
def own_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose tokenizer is code, and whose other code must not be run."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    ends = "raise SystemExit('code of the model was run')\n"
    for name in ("configuration_own.py", "modeling_own.py"):
        (folder / name).write_text(ends)
    (folder / "tokenization_own.py").write_text(OWN_TOKENIZER)
    maps = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": maps}))
    config = {
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
        "tokenizer_class": "OwnTokenizer",
        "eos_token": "<end>",
        "added_tokens_decoder": {
            "128": {"content": "<end>", "special": True},
            "129": {"content": "<sep>", "special": False},
        },
        "chat_template": "{% for m in messages %}{{ m.content }}<end>{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_tokenizers_own_code_runs_and_the_models_does_not(own_tokenizer: Path) -> None:
    file = own_tokenizer / "tokenization_own.py"
    with pytest.warns(UserWarning, match=rf"code of a checkpoint: class OwnTokenizer of {file}, "):
        tokenizer = load_tokenizer(own_tokenizer, trust_remote_code=True)
    assert tokenizer is not None
    assert tokenizer.encode("ab<end><sep>") == [97, 98, 128, 129]
    assert tokenizer.decode([97, 128, 98]) == "ab"
    assert (tokenizer.end_id, tokenizer.turn_end()) == (128, 128)
    message = {"role": "user", "content": "a<sep><end>"}
    ids = tokenizer.encode_chat([message], literal_contents=True)
    assert ids == [*map(ord, "a<sep><end>"), 128]


def test_code_does_not_run_without_trust_or_need(own_tokenizer: Path) -> None:
    (own_tokenizer / "tokenization_own.py").write_text("raise SystemExit('code was run')\n")
    with pytest.raises(TokenizerError, match="pass trust_remote_code=True"):
        load_tokenizer(own_tokenizer)
    byte_tokenizer(own_tokenizer.parent, chat=False)
    shutil.move(own_tokenizer.parent / "tokenizer.json", own_tokenizer)
    tokenizer = load_tokenizer(own_tokenizer, trust_remote_code=True)
    assert tokenizer is not None and tokenizer.encode("a") == [64]


ENDS = "raise SystemExit('code was run')\n"


def renamed(folder: Path, classes: object) -> None:
    """Let the tokenizer's configuration name another class."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = classes
    path.write_text(json.dumps(config))


def test_the_file_is_named_before_it_is_run(own_tokenizer: Path) -> None:
    """So whoever makes an error of warnings runs nothing."""
    (own_tokenizer / "tokenization_own.py").write_text(ENDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"own/tokenization_own\.py"):
            load_tokenizer(own_tokenizer, trust_remote_code=True)


def test_a_machine_may_forbid_code(own_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also to those who ask for it, in this process and in those that it starts."""
    (own_tokenizer / "tokenization_own.py").write_text(ENDS)
    monkeypatch.setenv(CODE_VARIABLE, "0")
    assert child_environment()[CODE_VARIABLE] == "0"
    for trust in (True, False):
        with pytest.raises(TokenizerError, match=f"which {CODE_VARIABLE} forbids on this machine"):
            load_tokenizer(own_tokenizer, trust_remote_code=trust)
    monkeypatch.setenv(CODE_VARIABLE, "1")  # allows, and asks for nothing
    with pytest.raises(TokenizerError, match="pass trust_remote_code=True"):
        load_tokenizer(own_tokenizer)
    monkeypatch.setenv(CODE_VARIABLE, "perhaps")
    with pytest.raises(ConfigError, match="must be true or false, got 'perhaps'"):
        load_tokenizer(own_tokenizer)


@pytest.mark.parametrize("value", ["0", "perhaps"])
def test_the_word_of_the_machine_reaches_engines(
    own_tokenizer: Path, byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    folder = own_tokenizer.parent / "model"
    shutil.copytree(byte_checkpoint, folder)
    for path in own_tokenizer.glob("token*"):
        shutil.copy(path, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenization_own.py").write_text(ENDS)
    monkeypatch.setenv(CODE_VARIABLE, value)
    kind = TokenizerError if value == "0" else ConfigError

    async def start() -> None:
        how = SupervisorOptions(load_timeout_s=60.0)
        supervisor = Supervisor({"model": str(folder), "trust_remote_code": True}, how)
        await supervisor.start()

    with pytest.raises(kind, match=CODE_VARIABLE):
        asyncio.run(start())


@pytest.mark.parametrize(
    "named",
    [
        "other/repo--tokenization_own.OwnTokenizer",
        "../elsewhere.OwnTokenizer",
        "..elsewhere.OwnTokenizer",
        "/tmp/elsewhere.OwnTokenizer",
        "sub/tokenization_own.OwnTokenizer",
        "OwnTokenizer",
        "a.b.OwnTokenizer",
        "",
        5,
        None,
        {},
    ],
)
@pytest.mark.parametrize("form", ["pair", "text", "old"])
def test_code_from_elsewhere_is_not_run(own_tokenizer: Path, named: object, form: str) -> None:
    (own_tokenizer.parent / "elsewhere.py").write_text(ENDS)
    (own_tokenizer / "sub").mkdir()
    (own_tokenizer / "sub" / "tokenization_own.py").write_text(ENDS)
    classes = named if form == "text" else [named, None]
    renamed(own_tokenizer, classes if form == "old" else {"AutoTokenizer": classes})
    with pytest.raises(TokenizerError, match=r"which is no FILE\.CLASS of that directory"):
        load_tokenizer(own_tokenizer, trust_remote_code=True)


def test_links_out_of_the_directory_are_not_followed(own_tokenizer: Path) -> None:
    own = own_tokenizer / "tokenization_own.py"
    elsewhere = own.rename(own_tokenizer.parent / "elsewhere.py")
    for link in (elsewhere, Path("..") / "elsewhere.py", own_tokenizer / "missing.py"):
        own.symlink_to(link)
        with pytest.raises(TokenizerError, match="a link to a file elsewhere, which is not run"):
            load_tokenizer(own_tokenizer, trust_remote_code=True)
        own.unlink()
    # nor where the code itself asks for it
    own.write_text("from .helper import x\n" + OWN_TOKENIZER)
    (own_tokenizer / "helper.py").symlink_to(elsewhere)
    elsewhere.write_text(ENDS)
    with (
        pytest.warns(UserWarning, match="running the tokenizer code"),
        pytest.raises(TokenizerError, match=r"cannot be run .*helper\.py"),
    ):
        load_tokenizer(own_tokenizer, trust_remote_code=True)


def test_links_of_the_hubs_cache_are_its_own(own_tokenizer: Path) -> None:
    repository = own_tokenizer.parent / "models--a--b"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(own_tokenizer.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    file = snapshot / "tokenization_own.py"
    with pytest.warns(UserWarning, match=f"class OwnTokenizer of {file}"):
        tokenizer = load_tokenizer(snapshot, trust_remote_code=True)
    assert tokenizer is not None and tokenizer.encode("ab") == [97, 98]


def test_code_of_the_model_does_not_run_where_no_class_is_named(own_tokenizer: Path) -> None:
    """transformers looks for it in the model's configuration then."""
    path = own_tokenizer / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["tokenizer_class"]
    path.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="running the tokenizer code"):
        tokenizer = load_tokenizer(own_tokenizer, trust_remote_code=True)
    assert tokenizer is not None and tokenizer.encode("ab") == [97, 98]


def test_a_broken_tokenizer_json_is_no_reason_to_run_code(own_tokenizer: Path) -> None:
    (own_tokenizer / "tokenization_own.py").write_text(ENDS)
    (own_tokenizer / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(own_tokenizer, trust_remote_code=True)
