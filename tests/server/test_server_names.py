"""One length under its names, the ends' options, and names that other servers know, over HTTP."""

from pathlib import Path
from typing import Any

import pytest

from tests.server.stand_in import MAX_LEN, run, serving, until

COMPLETE, CHAT, NATIVE = "/v1/completions", "/v1/chat/completions", "/v1/generate"
FRAMES: dict[str, dict[str, Any]] = {
    COMPLETE: {"prompt": "ab"},
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    NATIVE: {"prompt": "ab"},
}

SENT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_tokens": 8}, {"gen_length": 8}),
    ({"max_tokens": 64}, {"gen_length": 64}),
    ({"gen_length": 8}, {"gen_length": 8}),
    ({"max_tokens": 8, "gen_length": 8}, {"gen_length": 8}),
    ({"logits_eos_inf": True}, {"logits_eos_inf": True}),
    (
        {"confidence_eos_eot_inf": True, "temperature": 0},
        {"confidence_eos_eot_inf": True, "temperature": 0.0},
    ),
]


@pytest.mark.parametrize("path", FRAMES)
def test_what_arrives(byte_checkpoint: Path, path: str) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for count, (given, expected) in enumerate(SENT, 1):
                answer = await server.post(path, {**FRAMES[path], **given})
                assert answer.status == 200, (given, answer.body)
                await until(lambda seen=count: len(server.engine.calls) == seen)
                params = server.engine.calls[-1].submit.params
                assert {name: getattr(params, name) for name in expected} == expected

    run(main())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 5, "gen_length": 6}, "contradict each other"),
    ({"max_tokens": 10**8}, "max_tokens"),
    ({"max_tokens": MAX_LEN}, f"max_tokens is {MAX_LEN}"),
    ({"gen_length": MAX_LEN}, f"gen_length is {MAX_LEN}"),
    (
        {"max_new_tokens": 5},
        "max_new_tokens is not a parameter of this endpoint; did you mean gen_length?",
    ),
    ({"do_sample": True}, "do_sample is not a parameter of this endpoint; give temperature: 0 is"),
    ({"num_beams": 2}, "; not offered, because there is no search over several answers"),
    ({"guided_grammar": "a"}, "; not offered, because answers are constrained by regex"),
    (
        {"temprature": 1},
        "temprature is not a parameter of this endpoint; did you mean temperature?",
    ),
    ({"prefix_caching": 1}, "; the server has it as --prefix-caching"),
    ({"mask_token_id": 1}, "; the server has it as --mask-id"),
    ({"denoising_steps": 1}, "; did you mean steps_per_block?"),
    ({"remasking": "low_confidence_dynamic"}, "; give unmask='dynamic'"),
    ({"xyzzy": 1}, "xyzzy is not a parameter of this endpoint"),
    (
        {"confidence_eos_eot_inf": True, "temperature": 1},
        "confidence_eos_eot_inf=True needs a model with an id that ends a turn at temperature=1",
    ),
]


@pytest.mark.parametrize("path", FRAMES)
def test_what_is_refused(byte_checkpoint: Path, path: str) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for given, text in REFUSED:
                answer = await server.post(path, {**FRAMES[path], **given})
                assert answer.status == 400, (given, answer.body)
                assert text in answer.error["message"], given
            assert server.engine.calls == []

    run(main())
