"""Names of other engines: the right field, or why there is none; on every surface."""

from dataclasses import fields

import pytest

from dllmserve import LLM, AsyncLLM, SamplingParams, SparseConfig, foreign
from dllmserve.catalog import RULES
from dllmserve.cli.main import main
from dllmserve.config import EngineConfig
from dllmserve.errors import InvalidParameterError, UnknownOptionError
from dllmserve.foreign import advice
from dllmserve.server.config import ServerConfig
from dllmserve.tools.evaluation.settings import parse_setting

FIELDS = {
    kind: {f.name for f in fields(kind)}
    for kind in (SamplingParams, SparseConfig, EngineConfig, ServerConfig)
}
EVERY = set().union(*FIELDS.values())


def test_the_table_names_fields_that_there_are() -> None:
    named = [field for field, *_ in (*foreign._SAME, *foreign._ALIKE)]
    assert set(named) <= EVERY
    owners = {"SamplingParams": SamplingParams, "SparseConfig": SparseConfig, "LLM": EngineConfig}
    assert set(foreign.owners()) == set().union(*(FIELDS[kind] for kind in owners.values()))
    assert all(name in FIELDS[owners[owner]] for name, owner in foreign.owners().items())
    assert {rule for rule, _ in foreign._RULES} <= set(RULES)


def test_no_name_has_a_field_and_a_reason() -> None:
    names = [name for *_, group in (*foreign._SAME, *foreign._ALIKE) for name in group.split()]
    assert not set(names) & set(foreign._REASONS)
    assert not set(foreign._REASONS) & EVERY
    listed = [name for _, group in foreign._NOT_OFFERED for name in group.split()]
    assert len(listed) == len(set(listed))


REFUSED = [
    (name, f"not offered, because {reason}")
    for reason, names in (
        ("top_p and top_k are", "min_p typical_p"),
        (
            "tokens that an answer already has are not counted",
            "repetition_penalty presence_penalty frequency_penalty no_repeat_ngram_size",
        ),
        ("there is no search", "num_beams best_of length_penalty early_stopping penalty_alpha"),
        ("a request has one answer", "n num_return_sequences"),
        ("an answer ends at the checkpoint's end ids", "stopping_criteria"),
        ("answers are constrained by regex", "guided_grammar ebnf"),
        ("log-probabilities are those", "prompt_logprobs"),
        ("text leaves", "skip_special_tokens detokenize include_stop_str_in_output"),
    )
    for name in names.split()
]
OF_REQUESTS = [
    ("max_new_tokens", "did you mean 'gen_length'?"),
    ("max_length", "give 'gen_length': the length of the answer alone"),
    ("do_sample", "give 'temperature': 0 is greedy"),
    ("stop_strings", "did you mean 'stop'?"),
    ("num_inference_steps", "did you mean 'steps'?"),
    ("block_size", "did you mean 'block_length'?"),
    ("guidance_scale", "give 'cfg_scale': it is guidance_scale - 1"),
    ("alg", "give 'confidence': with schedule='dream'"),
    ("use_cache", "give 'cache': 'none'"),
    ("guided_json", "did you mean 'json_schema'?"),
    ("response_format", "give 'json_schema': a JSON schema"),
    ("top_logprobs", "give 'logprobs': of each token"),
    ("keep_ratio", "retention_ratio belongs to SparseConfig"),
    ("temprature", "did you mean 'temperature'?"),
    ("block", "did you mean 'block_length'?"),
    ("dtype", "dtype belongs to LLM"),
    ("tp", "tensor_parallel_size belongs to LLM"),
    *REFUSED,
    ("min_tokens", "not offered, because the length is gen_length"),
    ("mask_id", "mask_id belongs to LLM"),
    ("mask_token_id", "mask_id belongs to LLM"),
    ("pad_token_id", "not offered, because requests are not padded"),
    ("eos_token_id", "give 'stop_token_ids': ids that end the answer beside the checkpoint's own"),
    ("eos_ids", "eos_ids belongs to LLM"),
    ("default_block_length", "default_block_length belongs to LLM"),
    ("prefix_caching", "prefix_caching belongs to LLM"),
    ("prefix_isolation", "prefix_isolation belongs to LLM"),
    ("enable_prefix_caching", "prefix_caching belongs to LLM"),
    ("threads", "threads belongs to LLM"),
    ("small_block_size", "did you mean 'sub_block_length'?"),
    ("use_block_cache", "give 'cache': 'sub_block' is Fast-dLLM v2's"),
    ("dynamic_threshold", "did you mean 'threshold'?"),
    ("denoising_steps", "did you mean 'steps_per_block'?"),
    ("alg_temp", "not offered, because confidences are never drawn"),
    ("mirostat", "not offered, because"),
    ("xyzzy", "known options: block_length, cache, "),
]
OF_ENGINES = [
    ("torch_dtype", "did you mean 'dtype'?"),
    ("block_size", "did you mean 'page_size'?"),
    ("block_length", "did you mean 'default_block_length'?"),
    ("mask_token_id", "did you mean 'mask_id'?"),
    ("eos_token_id", "did you mean 'eos_ids'?"),
    ("max_len", "did you mean 'max_model_len'?"),
    ("max_seq_len", "did you mean 'max_model_len'?"),
    ("tensor_parallel", "did you mean 'tensor_parallel_size'?"),
    ("gpu_memory", "did you mean 'gpu_memory_utilization'?"),
    ("temperature", "temperature belongs to SamplingParams"),
    ("max_tokens", "max_tokens belongs to SamplingParams"),
    ("max_new_tokens", "gen_length belongs to SamplingParams"),
    ("stop_token_ids", "stop_token_ids belongs to SamplingParams"),
    ("steps_per_block", "steps_per_block belongs to SamplingParams"),
    ("small_block_size", "sub_block_length belongs to SamplingParams"),
    ("suffix_window", "suffix_window belongs to SamplingParams"),
    ("retention_ratio", "retention_ratio belongs to SparseConfig"),
    ("load_in_8bit", "not offered, because quantization=.fp8. runs matrices in eight bits"),
    ("swap_space", "not offered, because weights and K,V stay"),
    ("tokenizer", "not offered, because the tokenizer is that of the model"),
    ("revision", "not offered, because"),
    ("enable_prefix_caching", "did you mean 'prefix_caching'?"),
    ("enable_chunked_prefill", "not offered, because prompts of block-causal and autoregressive"),
    ("log_optimize_level", "not offered, because in the original project"),
    ("xyzzy", "known options: attention, device, "),
]


@pytest.mark.parametrize(("name", "text"), OF_REQUESTS)
def test_sampling_params(name: str, text: str) -> None:
    with pytest.raises(UnknownOptionError) as caught:
        SamplingParams(**{name: 1})
    assert f"SamplingParams got an unknown option {name!r}; {text}" in str(caught.value)


@pytest.mark.parametrize(("name", "text"), OF_ENGINES)
def test_engines(name: str, text: str) -> None:
    for kind in (LLM, AsyncLLM):
        with pytest.raises(UnknownOptionError) as caught:
            kind("tiny", **{name: 1})
        assert f"{kind.__name__} got an unknown option {name!r}; {text}"[:60] in str(caught.value)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("low_confidence_static", "steps"),
        ("low_confidence_dynamic", "dynamic"),
        ("sequential", "sequential"),
        ("entropy_bounded", "entropy_bound"),
    ],
)
def test_strategies_of_sdar(value: str, rule: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        SamplingParams(remasking=value)
    assert str(caught.value).endswith(f"got {value!r}; give unmask={rule!r}")
    with pytest.raises(InvalidParameterError, match=r"got 'high_confidence'$"):
        SamplingParams(remasking="high_confidence")


def test_other_surfaces() -> None:
    with pytest.raises(UnknownOptionError, match="'block_size'; did you mean 'default_block_len'"):
        SparseConfig(block_size=8)
    with pytest.raises(UnknownOptionError, match="'max_new_tokens'; did you mean 'gen_length'"):
        parse_setting("a: max-new-tokens=8")
    assert advice("max_tokens", FIELDS[ServerConfig]) == "did you mean 'default_max_tokens'?"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["generate", "--max-new-tokens", "8"], "--max-new-tokens; did you mean --gen-length?"),
        (["generate", "--min-p", "1"], "--min-p; not offered, because top_p and top_k"),
        (["generate", "--temprature", "1"], "--temprature; did you mean --temperature?"),
        (["eval", "--num-beams", "2"], "--num-beams; not offered, because there is no search"),
        (["serve", "--max-tokens", "8"], "--max-tokens; did you mean --default-max-tokens?"),
        (["serve", "--batch-size", "8"], "--batch-size; did you mean --max-num-seqs?"),
        (["generate", "--no-such-thing"], "--no-such-thing; --help lists the options"),
    ],
    ids=lambda v: " ".join(v)[:40],
)
def test_command_line(capfd: pytest.CaptureFixture[str], args: list[str], text: str) -> None:
    assert main(args) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: No such option: {text}")
    assert error.count("\n") == 1


def test_a_name_of_the_original_project() -> None:
    with pytest.raises(ImportError, match=r"there is no ModelType: the checkpoint's config\.json"):
        exec("from dllmserve.engine.sequence import ModelType")
    import dllmserve.engine.sequence as module

    with pytest.raises(AttributeError, match="no attribute 'Sequence'"):
        _ = module.Sequence
