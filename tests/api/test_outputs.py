"""What generate() gives back: the end rule, stop strings, counts and the progress bar."""

from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams, SparseConfig
from tests.conftest import SHAPES, Engines
from tests.helpers import check_idle, random_prompt

EOS = SHAPES["llada-eos"].eos_ids


def variants() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"temperature": 0.0, "steps": 30, "block_length": 10},
        {"temperature": 0.0, "steps": 7},
        {"temperature": 0.0, "remasking": "random", "seed": 3, "steps": 30},
        {"temperature": 0.0, "unmask": "threshold", "threshold": 0.2, "cache": "dual"},
        {"temperature": 0.0, "unmask": "factor", "cache": "prefix", "block_length": 6},
        {"temperature": 0.0, "cfg_scale": 0.5, "steps": 15},
    ]
    sampled = [{"temperature": 1.0, "seed": s, "steps": 20, "block_length": 15} for s in range(6)]
    return [{"gen_length": 30, **options} for options in made + sampled]


def first_end(tokens: list[int | None], committed: list[bool]) -> int | None:
    """Index of the first end id with everything before it committed."""
    for index, (token, done) in enumerate(zip(tokens, committed, strict=True)):
        if not done:
            return None
        if token in EOS:
            return index
    return None


@pytest.mark.parametrize("options", variants(), ids=lambda o: str(sorted(o.values(), key=str))[:40])
def test_the_end_rule(
    engines: Engines, checkpoints: dict[str, Path], options: dict[str, Any]
) -> None:
    """The whole run, watched, says when and with what a run that heeds end ids must stop."""
    llm = engines(checkpoints["llada-eos"])
    prompt = random_prompt(len(str(options)), 6)
    expected: tuple[list[int], int] | None = None
    for step in llm.stream(prompt, SamplingParams(ignore_eos=True, **options)):
        end = first_end(step.token_ids, step.committed)
        if end is not None and expected is None:
            ids = [token for token in step.token_ids[: end + 1] if token is not None]
            expected = ids, step.forward_passes
        last = step.output
    assert last is not None
    assert (last.finish_reason, len(last.token_ids)) == ("length", 30)
    output = llm.generate([prompt], SamplingParams(**options), use_tqdm=False)[0]
    check_idle(llm)
    assert expected is not None  # a quarter of the vocabulary ends the answer
    assert output["token_ids"] == expected[0]
    assert output["usage"]["forward_passes"] == expected[1]
    assert output["usage"]["completion_tokens"] == len(expected[0])
    assert output["finish_reason"] == "stop"
    assert output["token_ids"][-1] in EOS
    assert not set(output["token_ids"][:-1]) & set(EOS)


def test_an_end_id_in_the_prompt_ends_nothing(
    engines: Engines, checkpoints: dict[str, Path]
) -> None:
    llm = engines(checkpoints["llada"])
    params = SamplingParams(temperature=0.0, gen_length=5, steps=5)
    eos = SHAPES["llada"].eos_ids[0]
    with_end = llm.generate([[3, eos, 4]], params, use_tqdm=False)[0]
    assert len(with_end["token_ids"]) == 5 or with_end["token_ids"][-1] == eos


@pytest.mark.parametrize(
    ("options", "sparse", "forwards"),
    [
        ({"steps": 12}, None, 12),
        ({"steps": 5}, None, 5),
        ({"steps": 100}, None, 12),  # a step that writes nothing is no forward
        ({"steps": 1, "block_length": 4}, None, 3),  # at least one a block
        ({"steps": 7, "block_length": 5}, None, 7),
        ({"steps": 12, "cfg_scale": 1.0}, None, 12),  # guidance counts once
        ({"steps": 6, "cache": "dual", "block_length": 4}, None, 6),
        ({"steps": 9}, SparseConfig(default_block_len=4), 9),
        ({"unmask": "threshold", "threshold": 0.0}, None, 1),
        ({"unmask": "threshold", "threshold": 1.0}, None, 12),
        ({"unmask": "entropy_bound", "entropy_bound": 1e9, "block_length": 6}, None, 2),
    ],
)
def test_forward_passes(
    engines: Engines,
    checkpoints: dict[str, Path],
    options: dict[str, Any],
    sparse: SparseConfig | None,
    forwards: int,
) -> None:
    params = SamplingParams(temperature=0.0, gen_length=12, ignore_eos=True, **options)
    llm = engines(checkpoints["llada"])
    prompt = random_prompt(1, 9)
    output = llm.generate([prompt], params, sparse, use_tqdm=False)[0]
    assert output["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 12,
        "forward_passes": forwards,
        "cached_tokens": 0,
        "edits": 0,
    }
    assert sorted(output) == ["finish_reason", "steps", "text", "token_ids", "usage"]


@pytest.fixture(scope="module")
def reader(byte_checkpoint: Path) -> LLM:
    return LLM(str(byte_checkpoint), device="cpu")


def whole(reader: LLM, prompt: str, **options: Any) -> dict[str, Any]:
    params = SamplingParams(gen_length=40, ignore_eos=True, **options)
    return reader.generate([prompt], params, use_tqdm=False)[0]


def test_text_is_the_ids_decoded(reader: LLM) -> None:
    output = whole(reader, "Hello", temperature=0.0, steps=40)
    assert output["usage"]["prompt_tokens"] == 5
    assert reader.tokenizer is not None
    assert output["text"] == reader.tokenizer.decode(output["token_ids"])
    assert len(output["token_ids"]) == 40


def test_special_tokens_are_not_text(reader: LLM) -> None:
    assert reader.tokenizer is not None
    assert reader.tokenizer.decode([*reader.tokenizer.encode("ab"), 256, 259]) == "ab"
    assert reader.tokenizer.encode("ab<|end|>")[-1] == 256


def stop_candidates(text: str) -> list[str]:
    """Readable pieces of a text: single characters and pairs, from the middle and the end."""
    places = [i for i in range(3, len(text) - 2) if text[i : i + 2].isascii()]
    assert places
    return [text[i : i + width] for i in (places[0], places[-1]) for width in (1, 2)]


@pytest.mark.parametrize("steps", [40, 9, 3])
@pytest.mark.parametrize("block_length", [None, 16])
def test_stop_strings(reader: LLM, steps: int, block_length: int | None) -> None:
    """As soon as the text that is complete from the left holds a stop string, it ends there."""
    assert reader.tokenizer is not None
    options: dict[str, Any] = {"temperature": 1.0, "seed": 2, "steps": steps, "gen_length": 40}
    options |= {"block_length": block_length, "ignore_eos": True}
    canvases = list(reader.stream("Once", SamplingParams(**options)))
    final = canvases[-1].output
    assert final is not None
    for stop in stop_candidates(final.text):
        expected_forwards = next(
            step.forward_passes
            for step in canvases
            if stop in reader.tokenizer.decode(complete(step.token_ids, step.committed))
        )
        params = SamplingParams(stop=["\0never", stop], **options)
        output = reader.generate(["Once"], params, use_tqdm=False)[0]
        assert output["text"] == final.text[: final.text.index(stop)]
        assert output["finish_reason"] == "stop"
        assert output["usage"]["forward_passes"] == expected_forwards
        count = len(output["token_ids"])
        assert output["token_ids"] == final.token_ids[:count]
        assert stop in reader.tokenizer.decode(output["token_ids"])
        assert stop not in reader.tokenizer.decode(output["token_ids"][:-1])
        assert output["usage"]["completion_tokens"] == count
    check_idle(reader)


def complete(tokens: list[int | None], committed: list[bool]) -> list[int]:
    """Committed ids from the left, up to the first gap."""
    ids: list[int] = []
    for token, done in zip(tokens, committed, strict=True):
        if not done or token is None:
            break
        ids.append(token)
    return ids


def test_a_stop_string_that_never_comes(reader: LLM) -> None:
    plain = whole(reader, "Hi", temperature=0.0, steps=10)
    stopped = whole(reader, "Hi", temperature=0.0, steps=10, stop="no such text, ever")
    assert stopped == plain
    assert stopped["finish_reason"] == "length"


def test_progress_bar(reader: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    params = SamplingParams(temperature=0.0, gen_length=4, steps=2)
    reader.generate(["a", "b", "c"], params)
    captured = capsys.readouterr()
    assert "3/3" in captured.err
    assert captured.out == ""
    reader.generate(["a", "b", "c"], params, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_results_come_in_the_order_of_the_prompts(reader: LLM) -> None:
    prompts = ["a", "bb", "ccc", "dddd"]
    params = [
        SamplingParams(temperature=0.0, gen_length=length, steps=2, ignore_eos=True)
        for length in (20, 4, 12, 1)
    ]
    outputs = reader.generate(prompts, params, use_tqdm=False)
    assert [len(o["token_ids"]) for o in outputs] == [20, 4, 12, 1]
    assert [o["usage"]["prompt_tokens"] for o in outputs] == [1, 2, 3, 4]


def test_one_character_costs_one_prompt_token_each(reader: LLM) -> None:
    """Texts and their own ids are the same prompt, and may be mixed."""
    params = SamplingParams(temperature=0.0, gen_length=8, steps=4)
    assert reader.tokenizer is not None
    ids = reader.tokenizer.encode("grün ✓")
    first, second = reader.generate(["grün ✓", ids], params, use_tqdm=False)
    assert first == second
