"""Names that other engines and scripts use: the right field here, or why there is none.

vLLM, SGLang, TGI, llama.cpp, transformers, OpenAI's API, and the scripts of LLaDA, Dream, SDAR and
Fast-dLLM. Every surface (Python, command line, HTTP, settings) asks :func:`advice`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from importlib import import_module

#: field here -> names that mean the same; of several fields of a name, the first known one counts
_SAME: tuple[tuple[str, str], ...] = (
    (
        "gen_length",
        "max_new_tokens max_gen_toks max_gen_len max_gen_length max_gen_tokens num_predict "
        "n_predict max_output_tokens max_completion_tokens output_len output_length answer_length "
        "response_length gen_len max_len length",
    ),
    ("default_max_tokens", "max_tokens gen_length max_new_tokens max_completion_tokens n_predict"),
    ("temperature", "temp sampling_temperature"),
    ("top_p", "nucleus_p"),
    ("steps", "num_steps n_steps diffusion_steps num_diffusion_steps timesteps"),
    ("steps", "denoise_steps num_inference_steps num_denoising_steps sampling_steps sample_steps"),
    ("steps_per_block", "denoising_steps"),
    ("sub_block_length", "small_block_size small_block_length sub_block_size"),
    ("cfg_scale", "cfg cfg_weight"),
    ("remasking", "remask remasking_strategy remask_strategy remasking_method"),
    ("block_length", "block_size block_len blk_len blocksize bd_size diffusion_block_size"),
    ("default_block_len", "block_length block_size block_len"),
    ("default_block_length", "block_length"),
    ("mask_id", "mask_token_id"),
    ("prefix_caching", "enable_prefix_caching"),
    ("eos_ids", "eos_token_id eos_token_ids eos_id"),
    ("page_size", "block_size kvcache_block_size kv_block_size"),
    ("kv_pages", "num_gpu_blocks_override num_kvcache_blocks num_gpu_blocks"),
    ("unmask", "algorithm dllm_algorithm unmasking unmask_rule unmask_strategy decoding_strategy"),
    ("threshold", "confidence_threshold conf_threshold unmask_threshold token_threshold"),
    ("threshold", "dynamic_threshold"),
    ("entropy_bound", "entropy_threshold entropy_budget"),
    ("edit_threshold", "editing_threshold"),
    ("max_edit_steps", "max_post_steps max_post_edit_steps"),
    ("min_tokens_per_step", "num_to_transfer"),
    ("steps_per_block", "minimal_topk"),
    ("retention_ratio", "keep_ratio retain_ratio"),
    ("pool_kernel", "kernel_size"),
    ("early_end", "early_stop eos_early_stop eos_early_exit"),
    ("seed", "random_seed manual_seed rng_seed sampling_seed"),
    ("json_schema", "guided_json"),
    ("regex", "guided_regex"),
    ("choice", "guided_choice"),
    ("stop", "stop_strings stop_sequences stop_words stop_str stop_sequence until"),
    ("dtype", "torch_dtype precision"),
    ("device", "device_map"),
    ("model", "model_path model_name model_name_or_path pretrained_model_name_or_path"),
    ("max_model_len", "max_len max_seq_len max_seq_length max_context_len context_length n_ctx"),
    ("max_num_seqs", "max_batch_size batch_size max_num_requests max_running_requests"),
    ("tensor_parallel_size", "tp tp_size num_gpus tensor_model_parallel_size"),
    ("gpu_memory_utilization", "mem_fraction_static gpu_memory_fraction gpu_mem_util"),
    ("attention", "attention_backend attn_implementation attn_backend"),
)

#: what is as good as another field, but not the same: field here -> how, and the names
_ALIKE: tuple[tuple[str, str, str], ...] = (
    ("gen_length", "the length of the answer alone, without the prompt", "max_length"),
    ("temperature", "0 is greedy, above it tokens are drawn", "do_sample greedy use_greedy"),
    ("cfg_scale", "it is guidance_scale - 1, so 0 is off", "guidance_scale"),
    (
        "confidence",
        "with schedule='dream', 'probability' is maskgit_plus, 'margin' topk_margin and "
        "'neg_entropy' entropy; origin is not offered",
        "alg",
    ),
    ("cache", "'none', or 'prefix' or 'dual' as Fast-dLLM's", "use_cache dual_cache"),
    ("cache", "'sub_block' is Fast-dLLM v2's, with a sub_block_length", "use_block_cache"),
    ("cache", "'prefix' is Fast-dLLM's, 'dual' its dual cache", "use_prefix_cache prefix_cache"),
    (
        "logit_bias",
        "-100 bans a token id",
        "bad_words_ids suppress_tokens bad_words sequence_bias allowed_token_ids",
    ),
    (
        "stop_token_ids",
        "ids that end the answer beside the checkpoint's own",
        "eos_token_id eos_token_ids eos_id",
    ),
    (
        "logprobs",
        "of each token of the answer, and of so many of the likeliest",
        "top_logprobs output_scores output_logits return_logprob",
    ),
    (
        "json_schema",
        "a JSON schema; {'type': 'object'} is any object",
        "response_format guided_decoding structured_outputs",
    ),
    ("enforce_eager", "True is without CUDA graphs", "use_cuda_graph disable_cuda_graph"),
)

#: why there is no such field, and the names
_NOT_OFFERED: tuple[tuple[str, str], ...] = (
    (
        "top_p and top_k are the filters here",
        "min_p typical_p typical top_a tfs tfs_z epsilon_cutoff eta_cutoff top_n_sigma "
        "mirostat mirostat_mode mirostat_tau mirostat_eta dynatemp_range dynatemp_exponent "
        "xtc_probability xtc_threshold",
    ),
    (
        "tokens that an answer already has are not counted (diffusion models fill its positions in "
        "any order); logit_bias changes the logits of single tokens",
        "repetition_penalty presence_penalty frequency_penalty repeat_penalty repeat_last_n "
        "no_repeat_ngram_size encoder_repetition_penalty encoder_no_repeat_ngram_size "
        "dry_multiplier penalty_last_n",
    ),
    (
        "there is no search over several answers",
        "num_beams best_of beam_width use_beam_search length_penalty early_stopping "
        "num_beam_groups diversity_penalty penalty_alpha",
    ),
    (
        "a request has one answer: send the prompt several times, with different seeds "
        "(OpenAI's endpoints of the server take n)",
        "n num_return_sequences num_samples",
    ),
    (
        "the length is gen_length, and ignore_eos fills all of it",
        "min_tokens min_length min_new_tokens",
    ),
    (
        "an answer ends at the checkpoint's end ids; stop and stop_token_ids take more",
        "stopping_criteria",
    ),
    ("requests are not padded", "pad_token_id"),
    ("config.json has the id", "bos_token_id"),
    ("log-probabilities are those of the answer's tokens", "prompt_logprobs"),
    (
        "answers are constrained by regex, json_schema or choice",
        "guided_grammar grammar ebnf structural_tag",
    ),
    (
        "text leaves special tokens and the stop string out; token_ids has every id",
        "skip_special_tokens spaces_between_special_tokens detokenize "
        "include_stop_str_in_output no_stop_trim clean_up_tokenization_spaces",
    ),
    (
        "a prompt that is too long is an error: shorten it before",
        "truncate_prompt_tokens truncation truncate",
    ),
    (
        "confidences are never drawn; remasking='random' ranks positions at random",
        "alg_temp",
    ),
    ("logit_bias is what changes logits here", "logits_processors logits_processor"),
    ("LLM.stream shows an answer being filled in", "streamer"),
    ("what generate returns does not depend on it", "return_dict_in_generate output_kind"),
    (
        "quantization='fp8' runs matrices in eight bits, a checkpoint says itself how it is "
        "quantized, and K and V have the dtype of activations",
        "load_in_8bit load_in_4bit quantization_config kv_cache_dtype",
    ),
    ("weights and K,V stay on the device", "swap_space cpu_offload_gb offload_folder"),
    (
        "the tokenizer is that of the model's directory",
        "tokenizer tokenizer_mode tokenizer_path skip_tokenizer_init tokenizer_revision",
    ),
    (
        "download the model with the tool of your hub, and give its directory as the model",
        "revision download_dir cache_dir hf_token code_revision",
    ),
    (
        "prompts of block-causal and autoregressive models always come in chunks, and with full "
        "attention a forward takes the whole canvas",
        "enable_chunked_prefill max_num_partial_prefills",
    ),
    (
        "tensor_parallel_size is the way to use several GPUs, and data_parallel_size of a server",
        "pipeline_parallel_size distributed_executor_backend pp dp dp_size",
    ),
    ("adapters are not loaded: merge them first", "enable_lora max_loras max_lora_rank"),
    ("a step already writes several tokens", "speculative_config speculative_model"),
    (
        "in the original project it chose among copies of the sampling code: leave it out",
        "log_optimize_level",
    ),
    ("nothing is counted unless it is asked for", "disable_log_stats"),
)

#: values of other engines' fields that are a rule here: the rule, and the values
_RULES: tuple[tuple[str, str], ...] = (
    ("steps", "low_confidence_static"),
    ("dynamic", "low_confidence_dynamic"),
    ("sequential", "sequential"),
    ("entropy_bound", "entropy_bounded"),
    ("threshold_strict", "LowConfidence"),
    ("joint", "JointThreshold"),
)

#: whose fields are often given to the wrong class: its name, module and class. Loaded by name,
#: because these modules come here when they refuse a field
_KINDS: tuple[tuple[str, str, str], ...] = (
    ("SamplingParams", "dllmserve.sampling_params", "SamplingParams"),
    ("SparseConfig", "dllmserve._values", "SparseConfig"),
    ("LLM", "dllmserve.config", "EngineConfig"),
)
_REASONS = {name: reason for reason, names in _NOT_OFFERED for name in names.split()}


@cache
def owners() -> Mapping[str, str]:
    """The class that each field belongs to; of several, the first."""
    found: dict[str, str] = {}
    for owner, module, kind in _KINDS:
        for field in fields(getattr(import_module(module), kind)):
            found.setdefault(field.name, owner)
    return found


def rule_meant(name: str, value: object) -> str:
    """What to do about a wrong value that is a rule's name elsewhere; "" if it is none.

    Example:
        >>> rule_meant("remasking", "low_confidence_dynamic")
        "give unmask='dynamic'"
    """
    rules = [rule for rule, values in _RULES if value in values.split()]
    return f"give unmask={rules[0]!r}" if rules and name in ("remasking", "unmask") else ""


def _belongs(field: str, owner: str) -> str:
    return f"{field} belongs to {owner}"


def _fields(name: str) -> Iterator[tuple[str, str]]:
    """Fields that a name stands for, each with what is to be said of it."""
    yield from ((field, "") for field, names in _SAME if name in names.split())
    yield from ((field, f": {how}") for field, how, names in _ALIKE if name in names.split())


def advice(
    name: str,
    known: Iterable[str],
    show: Callable[[str], str] = repr,
    belongs: Callable[[str, str], str] = _belongs,
) -> str:
    """What to do about a name that nothing reads; "" if there is nothing to say.

    Args:
        name: as it was given, with or without dashes.
        known: fields that may be given in its place.
        show: how a field is written where the name was given.
        belongs: says where a field of another class is given, from the two names.

    Example:
        >>> advice("max_new_tokens", ["gen_length", "steps"])
        "did you mean 'gen_length'?"
        >>> advice("min_p", ["top_p"])
        'not offered, because top_p and top_k are the filters here'
    """
    plain = name.strip().lstrip("-").replace("-", "_").lower()
    here = sorted(known)
    meant = list(_fields(plain))
    for field, how in meant:
        if field in here:
            return f"give {show(field)}{how}" if how else f"did you mean {show(field)}?"
    if plain in _REASONS:
        return f"not offered, because {_REASONS[plain]}"
    for field, how in [*meant, (plain, "")]:
        if field in owners():
            return f"{belongs(field, owners()[field])}{how}"
    near = [field for field in here if field.startswith(f"{plain}_")]
    if len(near) != 1:
        swapped = [field for field in here if sorted(field) == sorted(plain)]
        near = swapped or difflib.get_close_matches(plain, here, n=1, cutoff=0.8)
    return f"did you mean {show(near[0])}?" if near else ""
