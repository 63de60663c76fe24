"""The chat template is compiled once, and what is wrong with it is said every time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dllmserve.engine.template import ChatTemplate
from dllmserve.engine.tokenizer import load_tokenizer
from dllmserve.errors import TokenizerError

CHAT = [{"role": "user", "content": "Hi"}]


def test_many_chats_compile_a_template_once(
    byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    compile_it = ImmutableSandboxedEnvironment.from_string

    def counted(self: ImmutableSandboxedEnvironment, source: str) -> object:
        compiled.append(source)
        return compile_it(self, source)

    monkeypatch.setattr(ImmutableSandboxedEnvironment, "from_string", counted)
    tokenizer = load_tokenizer(byte_checkpoint)
    assert tokenizer is not None and not compiled
    tokenizer.warm_up()
    assert len(compiled) == 2  # plain, and for texts that stay literal
    texts = {tokenizer.render_chat(CHAT) for _ in range(5)}
    ids = {tuple(tokenizer.encode_chat(CHAT, literal_contents=True)) for _ in range(5)}
    assert len(texts) == len(ids) == 1 and len(compiled) == 2


@pytest.mark.parametrize("template", ["{% for %}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}"])
def test_a_broken_template_fails_chats_only(
    byte_checkpoint: Path, tmp_path: Path, template: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(byte_checkpoint, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    tokenizer.warm_up()  # a server has to start all the same
    for _ in range(2):
        with pytest.raises(TokenizerError, match="chat template"):
            tokenizer.render_chat(CHAT)
    assert tokenizer.decode(tokenizer.encode("Hi")) == "Hi"


def test_variables_of_a_request() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ enable_thinking }}{{ tools is none }}"
    template = ChatTemplate(source, {"bos_token": "<s>"})
    chat = [{"role": "user", "content": "Hi"}]
    assert template.render(chat) == "<s>HiTrue"
    assert template.render(chat, variables={"enable_thinking": False}) == "<s>HiFalseTrue"
