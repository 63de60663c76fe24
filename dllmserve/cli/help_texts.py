"""Help text of every generated option; a test compares the keys with the dataclasses."""

from __future__ import annotations

from dllmserve.catalog import BACKENDS, RULES
from dllmserve.config import DTYPES, KERNELS, LOAD_FORMATS, PHASES
from dllmserve.presets import PRESETS
from dllmserve.sampling_params import CONFIDENCE, REMASKING, SCHEDULES, cache_names
from dllmserve.server import config as server_config
from dllmserve.sparse.state import SCORES

#: field name -> its values, for the help text (the dataclasses do the checking)
CHOICES: dict[str, tuple[str, ...]] = {
    "remasking": REMASKING,
    "unmask": tuple(RULES),
    "confidence": CONFIDENCE,
    "schedule": SCHEDULES,
    "cache": cache_names(),
    "quality": tuple(PRESETS),
    "score": SCORES,
    "dtype": DTYPES,
    "load_format": LOAD_FORMATS,
    "attention": ("auto", *BACKENDS),
    "kernels": KERNELS,
    "phases": PHASES,
    **server_config.CHOICES,
}

SAMPLING: dict[str, str] = {
    "temperature": "0 always takes the likeliest token; more is more varied.",
    "ignore_eos": "Keep decoding after the end of the answer.",
    "gen_length": "Length of the answer in tokens, at most 8192.",
    "max_tokens": "Another name of --gen-length.",
    "steps": "Denoising steps for the whole answer; fewer are faster (with --unmask steps).",
    "cfg_scale": "Classifier-free guidance; 0 is off.",
    "remasking": "Which proposals are kept in a step (with --unmask steps).",
    "block_length": "Tokens per block; blocks are filled from left to right.",
    "unmask": "Rule that chooses the positions written in a step.",
    "threshold": "Least confidence for --unmask threshold, threshold_strict, hierarchy, credit, "
    "klass and wino.",
    "factor": "The factor of --unmask factor and factor_strict.",
    "entropy_bound": "Entropy budget, in nats, of --unmask entropy_bound.",
    "low_threshold": "Least confidence of the best position of a run, for --unmask hierarchy.",
    "kl_threshold": "Most that a distribution may move in a step, in nats, for --unmask klass.",
    "kl_history": "Steps that it must have moved so little, for --unmask klass.",
    "threshold_back": "Tokens less likely than this, seen from the rest, are masked again by "
    "--unmask wino.",
    "confidence": "How sure the model is of a token: its probability, its lead over the "
    "second best, or minus the entropy.",
    "schedule": "How --unmask steps spreads the tokens over the steps.",
    "eps": "Last time of the Dream schedule.",
    "cache": "K,V cache: none is exact, the others are faster and approximate.",
    "refresh_delay": "Whole-canvas steps of a block after its first (prefix, dual, delayed).",
    "refresh_every": "Refresh the cache after this many steps of a block, not only at its start.",
    "refresh_window": "Tokens around the block computed with it (prefix, dual).",
    "refresh_share": "Share of the other tokens that a refresh of --cache drift computes.",
    "suffix_window": "Masks behind the block that are computed and seen; all, if not given.",
    "early_end": "Decode nothing behind the first end of the answer.",
    "quality": "Preset of these options; those that are given too keep their values.",
    "top_p": "Draw from the likeliest tokens that add up to this probability; 1 is off.",
    "top_k": "Draw from the k likeliest tokens; 0 is off.",
    "logits_eos_inf": "Never propose an id that ends the text (LLaDA).",
    "confidence_eos_eot_inf": "Write proposals that end the text or the turn last (LLaDA).",
    "seed": "Make random draws repeatable.",
    "stop": "End the answer before this text; may be given several times.",
    "logit_bias": "Add a number from -100 (never) to 100 (always) to the logit of a token id; "
    "may be given several times.",
}

SPARSE: dict[str, str] = {
    "enabled": "Attend to a selected part of the context. Implied by the options below.",
    "retention_ratio": "Share of the tokens outside the block that is kept.",
    "delay_step": "Full forward passes of a block before the one that selects.",
    "default_block_len": "Scoring window, and the block length unless --block-length is given.",
    "head_select": "Select for each K,V head on its own, or one set for all.",
    "pool_kernel": "Width of the max-pooling over neighbouring scores; 1 is off.",
    "score": "Keep tokens by the block's mean query, or by the attention that they get.",
    "min_keep": "Tokens outside the block that are kept at least.",
}

ENGINE: dict[str, str] = {
    "enforce_eager": "Never use CUDA graphs.",
    "tensor_parallel_size": "Devices to spread the model over.",
    "max_model_len": "Longest prompt + answer in tokens (the model's own, if not given).",
    "trust_remote_code": "Let a tokenizer that nothing else can load run its own code "
    "(DLLMSERVE_TRUST_REMOTE_CODE=0 forbids it).",
    "dtype": "auto is float32 on a CPU, the checkpoint's dtype elsewhere.",
    "device": "auto, cpu, cuda or cuda:N.",
    "load_format": "dummy makes random weights from a bare config.json.",
    "attention": "Attention backend; auto is triton on CUDA, sdpa elsewhere.",
    "kernels": "Kernels of everything but attention; auto is triton on CUDA, torch elsewhere.",
    "max_num_seqs": "Requests that run at once (guided ones count twice).",
    "max_num_batched_tokens": "Tokens in one forward pass (sized by the model, if not given).",
    "max_refresh_tokens": "Tokens of one forward pass that may refresh a cache (no limit, if not "
    "given).",
    "max_logit_rows": "Rows of logits that may exist at once.",
    "max_history_rows": "Positions whose last distribution is kept, for --unmask klass; with 0 "
    "neither klass nor credit runs.",
    "phases": "Whether refreshes and reuse of different requests share a forward pass.",
    "steps_per_sync": "Forward passes in flight before the host waits (on CUDA, fixed schedules).",
    "max_graphs": "CUDA graphs that are kept.",
    "page_size": "Tokens per K,V page.",
    "kv_pages": "Pages of the K,V store (sized by memory, if not given).",
    "gpu_memory_utilization": "Share of the device's memory to plan with.",
    "seed": "Base of the seeds of requests without --seed.",
    "threads": "Threads of an engine on a CPU (the cores that the process may use, if not given).",
}
