"""Block-causal and autoregressive models: upstream's own outputs, alone and in any company."""

import json
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.errors import ConfigError, ContextLengthError, InvalidParameterError
from tests import helpers
from tests.conftest import Engines
from tests.helpers import answers
from tests.parallel.threads import threaded_llm

RULES = {
    "low_confidence_static": "steps",
    "low_confidence_dynamic": "dynamic",
    "sequential": "sequential",
}
AUTOREGRESSIVE = (
    *("llama-kv2of4", "llama3rope-tied-kv2of6", "qwen2-kv2of4", "qwen2-tied-kv1of6"),
    *("qwen3-kv2of4", "qwen3-tied-kv1of3", "qwen3moe-kv2of4"),
)
SDAR = ("sdar-kv2of4", "sdar-tied-kv3of6", "sdarmoe-kv2of4")
LLADA2 = ("llada2-g4e8", "llada21-g4e12")
FAST_DLLM = ("fdv2-kv2of4", "fdv2-tied-kv1of3")
MODELS = (*AUTOREGRESSIVE, *SDAR, *FAST_DLLM, *LLADA2)
Case = tuple[list[int], SamplingParams, list[int], dict[str, int]]


def cases(name: str) -> list[Case]:
    """Prompt, parameters, answer and forwards of each case that the parameters can say."""
    found = []
    config = json.loads((helpers.GOLDEN / name / "config.json").read_text())
    for case in json.loads((helpers.GOLDEN / name / "cases.json").read_text())["cases"]:
        params = sampling(case, config["eos_token_id"])
        if params is not None:
            forwards = case["forwards"]
            counts = forwards if isinstance(forwards, dict) else {"denoise": forwards - idle(case)}
            expected = case["expected_trimmed"] if "settings" in case else case["output"]
            found.append((case["prompt_ids"], params, expected, counts))
    return found


def idle(case: dict[str, Any]) -> int:
    """Forwards of SGLang's that need not be: they write nothing, and it is known beforehand."""
    if case["kind"] == "sglang-low-confidence":
        return len(case["forwards_per_block"])  # the last of each block
    if case["kind"] != "sglang-joint-threshold":
        return 0
    # where no edits are left to make
    most = case["params"]["algorithm_config"].get("max_post_edit_steps", 16)
    unmasked = Counter(block for block, masks, _, _ in case["trace"] if not masks)
    return sum(count > most for count in unmasked.values())


def sampling(case: dict[str, Any], eos: int) -> SamplingParams | None:
    kind, given = case["kind"], case.get("settings") or case.get("params", {})
    if kind == "sdar":
        ends = given["stopping_criteria_idx"]
        return SamplingParams(
            temperature=0.0,
            gen_length=given["gen_length"],
            block_length=given["block_length"],
            steps_per_block=given["denoising_steps"],
            unmask=RULES[given["remasking_strategy"]],
            threshold=given["confidence_threshold"],
            ignore_eos=True,
            stop_token_ids=ends,
        )
    if kind == "ar-greedy":
        ends, length = given["eos_token_id"], given["max_new_tokens"]
        if ends == [eos]:
            return SamplingParams(temperature=0.0, max_tokens=length)
        return SamplingParams(
            temperature=0.0, max_tokens=length, ignore_eos=True, stop_token_ids=ends
        )
    if kind == "fdv2-generate":
        ends = given["stop_token"]
        return SamplingParams(
            temperature=0.0,
            gen_length=len(case["expected_trimmed"]) if ends is None else given["max_new_tokens"],
            block_length=given["block_size"],
            sub_block_length=given["small_block_size"],
            unmask="threshold_strict",
            threshold=given["threshold"],
            cache="sub_block" if given["use_block_cache"] else "none",
            ignore_eos=True,
            stop_token_ids=None if ends is None else [ends],
        )
    return of_llada2(case)


def of_llada2(case: dict[str, Any]) -> SamplingParams | None:
    """The same of LLaDA2's generate and of SGLang's."""
    kind, given = case["kind"], case.get("params", {})
    if kind == "llada2.0" and not upstreams_own_way(case):
        length = given["gen_length"]
        return SamplingParams(
            temperature=0.0,
            gen_length=length,
            block_length=given["block_length"],
            steps_per_block=min(given["steps"], length // given["minimal_topk"]),
            unmask="dynamic",
            threshold=given["threshold"],
            ignore_eos=given["eos_id"] < 0,
        )
    if kind == "llada2.1":
        return SamplingParams(
            temperature=0.0,
            gen_length=given["gen_length"],
            block_length=given["block_length"],
            unmask="threshold_strict",
            threshold=given["threshold"],
            edit_threshold=given["editing_threshold"],
            max_edit_steps=given["max_post_steps"],
            min_tokens_per_step=given["num_to_transfer"],
            ignore_eos=given["eos_id"] < 0,
        )
    if kind in ("sglang-joint-threshold", "sglang-low-confidence"):
        own = dict(given["algorithm_config"])
        if kind == "sglang-low-confidence":
            own = {"unmask": "threshold_strict", "threshold": own.get("threshold", 0.95)}
        elif "max_post_edit_steps" in own:
            own["max_edit_steps"] = own.pop("max_post_edit_steps")
        return SamplingParams(
            temperature=0.0,
            gen_length=given["max_new_tokens"],
            block_length=given["block_size"],
            ignore_eos=given["ignore_eos"],
            **{"unmask": "joint", **own},
        )
    return None


def upstreams_own_way(case: dict[str, Any]) -> bool:
    """Whether LLaDA2.0's generate answers in a way of its own.

    That is no steps at all; and with eos_early_stop, an answer that is not cut at the length that
    was asked for, and none at all where the prompt has an end id.
    """
    given = case["params"]
    early = given["eos_early_stop"] and (
        given["eos_id"] in case["prompt_ids"] or len(case["output"]) > given["gen_length"]
    )
    return bool(early or given["minimal_topk"] > given["gen_length"])


@pytest.mark.parametrize("name", MODELS)
def test_alone(engines: Engines, name: str) -> None:
    """Tokens and, where upstream computes the same, the number of forwards that decide."""
    llm = engines(helpers.GOLDEN / name)
    for prompt, params, expected, forwards in cases(name):
        [output] = llm.generate([prompt], params, use_tqdm=False)
        assert output["token_ids"] == expected, params
        if name in AUTOREGRESSIVE:
            assert output["usage"]["forward_passes"] == len(expected) == forwards["denoise"]
        ended = output["finish_reason"] == "stop"
        whole = (len(prompt) + params.gen_length) % (params.block_length or 1) == 0
        if name in (*SDAR, *LLADA2) and whole and not ended:
            assert output["usage"]["forward_passes"] == forwards["denoise"]


def test_where_llada2_goes_its_own_way(engines: Engines) -> None:
    """An end id in the prompt ends nothing, and an answer is never longer than was asked for."""
    llm = engines(helpers.GOLDEN / "llada2-g4e8")
    found = [c for c in helpers.golden_raw("llada2-g4e8") if c["kind"] == "llada2.0"]
    own = [case for case in found if upstreams_own_way(case)]
    assert len(own) == 3
    for case in own:
        given = case["params"]
        if given["minimal_topk"] > given["gen_length"]:
            continue  # there are no answers in no forwards
        case = {**case, "params": {**given, "eos_early_stop": False}}
        prompt, length = case["prompt_ids"], given["gen_length"]
        params = sampling({**case, "output": [], "prompt_ids": []}, 0)
        assert params is not None
        [output] = llm.generate([prompt], params, use_tqdm=False)
        ids = output["token_ids"]
        assert 0 < len(ids) <= length
        written = case["canvas_after_prompt"]
        assert all(t in (i, given["mask_id"]) for i, t in zip(ids, written, strict=False))
        assert len(ids) == length or ids.index(given["eos_id"]) == len(ids) - 1


def test_masks_are_never_proposed(engines: Engines) -> None:
    """LLaDA2.0's generate writes masks where the mask is the best token, and leaves them there."""
    llm = engines(helpers.GOLDEN / "llada2-maskprop")
    for case in helpers.golden_raw("llada2-maskprop"):
        params = sampling(case, 0)
        if params is not None:
            mask = case["params"]["mask_id"]
            assert case["mask_proposals_written"] > 0
            [output] = llm.generate([case["prompt_ids"]], params, use_tqdm=False)
            assert mask not in output["token_ids"]
            assert len(output["token_ids"]) == params.gen_length


#: engine options that must change nothing
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "few-pages": {"kv_pages": 30, "page_size": 8, "max_num_seqs": 16},
    "page-of-one": {"page_size": 1, "max_num_seqs": 5},
    "small-steps": {"max_num_batched_tokens": 64, "page_size": 7, "max_logit_rows": 7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    "name",
    [
        *(*SDAR, *LLADA2, "qwen3-kv2of4", "llama3rope-tied-kv2of6", "fdv2-kv2of4"),
        "qwen3moe-kv2of4",
    ],
)
def test_mixed(engines: Engines, name: str, options: dict[str, Any]) -> None:
    batch = cases(name)
    # all of them together once, a third of them with other sizes
    batch = random.Random(str(options)).sample(batch, len(batch) // (3 if options else 1))
    llm = engines(helpers.GOLDEN / name, **options)
    assert answers(llm, batch) == [case[2] for case in batch]


@pytest.mark.parametrize("name", ["qwen3-kv2of4", "sdar-kv2of4", "fdv2-kv2of4"])
def test_every_rule_and_sampler_alone_or_together(engines: Engines, name: str) -> None:
    """Drawn tokens, and what rules keep, depend on nothing else; not even on lost pages."""
    variants: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "top_p": 0.8, "seed": 4},
        {"unmask": "threshold", "threshold": 0.3},
        {"unmask": "factor", "logit_bias": {5: 3.0, 7: -100}},
        {"unmask": "entropy_bound", "entropy_bound": 1.0},
        {"unmask": "klass", "threshold": 0.2, "kl_threshold": 0.3},
        {"unmask": "credit", "threshold": 0.4},
        {"unmask": "hierarchy", "threshold": 0.5},
        {"confidence": "margin", "top_k": 5, "temperature": 0.7, "seed": 1},
    ]
    if name.startswith("sdar"):
        variants += [
            {"unmask": "joint", "threshold": 0.4, "edit_threshold": 0.2, "max_edit_steps": 3},
            {
                "unmask": "dynamic",
                "temperature": 0.9,
                "top_p": 0.9,
                "seed": 5,
                "edit_threshold": 0.1,
                "max_edit_steps": 2,
                "logit_bias": {9: 2.0},
            },
        ]
    batch: list[Case] = []
    for index, given in enumerate(variants):
        params = SamplingParams(
            **{"temperature": 0.0, "gen_length": 40, "ignore_eos": True, **given}
        )
        batch.append((helpers.random_prompt(index, 3 + 9 * (index % 9)), params, [], {}))
    llm = engines(helpers.GOLDEN / name)
    alone = [answers(llm, [case])[0] for case in batch]
    assert all(len(ids) == 40 for ids in alone)
    assert answers(llm, batch) == alone
    few = engines(helpers.GOLDEN / name, kv_pages=18, page_size=8, max_num_batched_tokens=80)
    assert answers(few, batch) == alone


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("qwen3-kv2of4", "sdar-kv2of4", "fdv2-kv2of4")),
        *((name, {}) for name in ("sdarmoe-kv2of4", "llada2-g4e8")),
        *((name, {"expert_parallel": True}) for name in ("qwen3moe-kv2of4", "llada2-g4e8")),
    ],
    ids=str,
)
def test_on_two_ranks(monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]) -> None:
    folder = str(helpers.GOLDEN / name)
    options = {"kv_pages": 40, "page_size": 8, "max_num_seqs": 8, **options}
    llm, _, _ = threaded_llm(monkeypatch, folder, 2, **options)
    batch = cases(name)[::3]
    assert answers(llm, batch) == [case[2] for case in batch]


@pytest.mark.parametrize(
    ("name", "cache"),
    [("qwen3-kv2of4", "none"), ("sdar-kv2of4", "none"), ("fdv2-kv2of4", "sub_block")],
)
def test_on_triton_kernels(engines: Engines, name: str, cache: str) -> None:
    """Under the interpreter on a CPU."""
    helpers.need_interpreter()
    llm = engines(helpers.GOLDEN / name, attention="triton", kernels="triton", page_size=16)
    found = [case for case in cases(name) if case[1].cache == cache]
    prompt, params, expected, forwards = min(found, key=lambda case: len(case[2]) + len(case[0]))
    length = min(6, len(expected))
    case = (prompt, replace(params, gen_length=length), expected, forwards)
    assert answers(llm, [case]) == [expected[:length]]


def test_defaults(engines: Engines) -> None:
    """An autoregressive answer has 64 tokens, a checkpoint its own block; presets keep both."""
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    [output] = engines(helpers.GOLDEN / "qwen3-kv2of4").generate([[1, 2]], params, use_tqdm=False)
    assert len(output["token_ids"]) == 64
    sdar = engines(helpers.GOLDEN / "sdar-kv2of4")
    base: dict[str, Any] = {"temperature": 0.0, "gen_length": 24, "ignore_eos": True}
    own = SamplingParams(**base, unmask="threshold", block_length=4)
    for other in ({"quality": "balanced"}, {"unmask": "threshold"}):
        pair = [own, SamplingParams(**base, **other)]
        first, second = sdar.generate([[5, 6, 7]] * 2, pair, use_tqdm=False)
        assert first["token_ids"] == second["token_ids"], other


CACHED: dict[str, Any] = {"cache": "sub_block", "sub_block_length": 8}


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("sdar-kv2of4", {"cache": "dual"}, "exact in any case: leave it out"),
        ("sdar-kv2of4", {"cfg_scale": 1.0}, "cfg_scale=1 does not work with a block-causal model"),
        ("qwen3-kv2of4", {"suffix_window": 4}, "sees nothing of that: leave it out"),
        ("sdar-kv2of4", {"suffix_window": 0}, "sees nothing of that: leave it out"),
        ("qwen3-kv2of4", {"early_end": True}, "early_end leaves out"),
        ("qwen3-kv2of4", {"block_length": 8}, "writes one token after the other"),
        ("sdar-kv2of4", {"unmask": "wino"}, "use another rule"),
        ("qwen3-kv2of4", {"sub_block_length": 8}, "writes one token after the other"),
        ("qwen3-kv2of4", CACHED, "and this is an autoregressive model: leave it out"),
        ("llada-kv2of4", CACHED, "and this is a model with full attention: leave it out"),
        ("fdv2-kv2of4", {**CACHED, "sub_block_length": 5}, "sub_block_length=5 does not divide it"),
        (
            "sdar-kv2of4",
            {**CACHED, "block_length": 4},
            "sub_block_length=8 is to be a part of a block of 4",
        ),
        ("fdv2-kv2of4", {"sub_block_length": None, "cache": "sub_block"}, "give sub_block_length"),
        ("fdv2-kv2of4", {"unmask": "joint"}, "is decided with the block before: take another rule"),
        ("qwen3-kv2of4", {"unmask": "dynamic", "edit_threshold": 0.5}, "writes one token after"),
    ],
)
def test_what_makes_no_sense_is_refused(
    engines: Engines, name: str, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidParameterError, match=words):
        engines(helpers.GOLDEN / name).generate([[1, 2]], SamplingParams(**given), use_tqdm=False)


def test_a_preset_brings_nothing_of_full_attention(engines: Engines) -> None:
    """What it fills in for full attention is left out; what somebody gave is refused."""
    llm = engines(helpers.GOLDEN / "sdar-kv2of4")
    for quality in ("exact", "balanced", "fast"):
        llm.generate([[1, 2]], SamplingParams(quality=quality, gen_length=8), use_tqdm=False)
        refused: list[dict[str, Any]] = [{"cache": "dual"}, {"suffix_window": 8}]
        for given in refused:
            params = SamplingParams(quality=quality, gen_length=8, **given)
            with pytest.raises(InvalidParameterError, match="leave it out"):
                llm.generate([[1, 2]], params, use_tqdm=False)


@pytest.mark.parametrize(
    ("name", "steps", "words"),
    [
        ("sdar-kv2of4", 8, "steps=8 counts for the whole answer .* give steps_per_block"),
        ("qwen3-kv2of4", 8, "steps=8 says nothing to an autoregressive model"),
        ("sdar-kv2of4", 16, None),  # one a token is what they take
        ("qwen3-kv2of4", 16, None),
    ],
)
def test_steps_of_the_whole_answer(
    engines: Engines, name: str, steps: int, words: str | None
) -> None:
    llm, params = engines(helpers.GOLDEN / name), SamplingParams(gen_length=16, steps=steps)
    if words is None:
        llm.generate([[1, 2, 3]], params, use_tqdm=False)
        return
    with pytest.raises(InvalidParameterError, match=words):
        llm.generate([[1, 2, 3]], params, use_tqdm=False)


@pytest.mark.parametrize(
    ("prompt", "length", "words"),
    [
        (3, 60, "fill 80 positions in blocks of 20, over max_model_len=64: gen_length may be 57"),
        (62, 1, "by 3 tokens, or take a shorter block_length"),
    ],
)
def test_blocks_are_filled_to_their_end(
    engines: Engines, prompt: int, length: int, words: str
) -> None:
    """An answer that would not fit because of that is refused, and the advice is right."""
    llm = engines(helpers.GOLDEN / "sdar-kv2of4", max_model_len=64)
    params = SamplingParams(gen_length=length, block_length=20)
    with pytest.raises(ContextLengthError, match=words):
        llm.generate([[1] * prompt], params, use_tqdm=False)
    fits = min(prompt, 59)
    params = SamplingParams(gen_length=min(length, 57), block_length=20)
    llm.generate([[1] * fits], params, use_tqdm=False)


def test_a_block_that_no_answer_could_fill() -> None:
    with pytest.raises(ConfigError, match="blocks of 128 do not fit into max_model_len=64"):
        LLM(str(helpers.GOLDEN / "sdar-kv2of4"), max_model_len=64, default_block_length=128)
