"""Compile kernels of attention, layers, steps and constraints for a GPU that is not at hand.

``python -m tests.kernels.compiled``; Triton's interpreter takes what the compiler refuses.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dllmserve.kernels import (
    activation,
    attention,
    draw,
    experts,
    logits,
    norm,
    rotary,
    routing,
    scaled,
    stats,
)
from dllmserve.kernels.tiles import tile_for
from dllmserve.runtime.kernels import begin, constrain, finish, region_sets

TYPES = {
    "tokens": "*i64 rows cells fields best holds ints positions_ptr",
    "packed": "*i32 wide entry_of counts_ptr order_ptr ids_ptr",
    "small": "*i16",
    "sets": "*u8 allowed write left",
    "masked": "*i1",
    "z": "*bf16 heads_ptr query_ptr key_ptr x_ptr gate_ptr weight_ptr rows_ptr out_ptr",
    "first_ptr": "*bf16 second_ptr residual_ptr scalars_ptr first_weight_ptr second_weight_ptr "
    "after_weight_ptr a_weight_ptr b_weight_ptr c_weight_ptr wide_ptr factors_ptr",
    "z_ptr": "*bf16 shares_ptr",
    "cos_ptr": "*fp32 sin_ptr logits_ptr bias_ptr weights_ptr capped_ptr totals_ptr by_ptr",
    "scale_ptr": "*fp32 x_scale_ptr parts_ptr",
    "turns_ptr": "*i32",
    "eps": "fp32 cap scale a_factor b_factor c_factor",
    "confidence": "*fp64",
}
#: of kernels of a step, where some names mean something else
STEP_TYPES = {
    "masked": "*i1 open_flags open_ tempered eligible_out write",
    "tokens": "*i64 ints forwards ids positions head_rows head_uncond keys top_k token token_out "
    "current_out quota_out rule_out new eos report",
    "floats": "*fp64 temperature top_p cfg_scale prob margin entropy confidence_out entropy_out "
    "edit_out floats_out",
    "packed": "*i32 starts steps",
}
#: of kernels of statistics
STATS_TYPES = {
    "z_ptr": "*fp32 tops_ptr partial_ptr",
    "score_ptr": "*fp64 temperature_ptr prob_ptr margin_ptr entropy_ptr",
    "id_ptr": "*i32",
    "keys_ptr": "*i64 token_ptr",
    "tempered_ptr": "*u8",
}
#: sizes that a launch fixes
FIXED = {
    "LOOK": 32,
    "TILE": 1024,
    "MOST": 128,
    "ST": 16,
    "CT": 128,
    "WIDTH": 32,
    "NORM": True,
    "WIDE": True,
    "GELU": True,
    "FACTORS": True,
    "BRANCHES": True,
    "SCALED": True,
    "THEN": 3,
    "WEIGHT": True,
    "HEADS": 32,
    "HALF": 32,
    "BEHIND": 64,
    "TOKENS": 64,
    "EXPERTS": 256,
    "DEPTH": 64,
    "HELD": 512,
    "CHOICES": 8,
    "SHARED": 1,
    "SIGMOID": True,
    "BIAS": 1,
    "NORMALIZE": True,
    "GROUPS": 8,
    "SIZE": 32,
    "TOP": 4,
    "SLOTS": 16,
    "GATED": True,
    "EVEN": True,
    "PAIRS": 16,
    "MORE": 16,
    "OUTS": 64,
    "BLOCK": 128,
    "SPANS": 256,
    "MARGIN": True,
    "ENTROPY": True,
    "REPLACES": True,
    "E4M3": False,
    "SCALES": False,
    "HAS_RESIDUAL": True,
    "ROWS": 32,
    "CUT": 2,
    "SAMPLED": True,
    "DIVIDED": True,
    "FIRST": 0,
    "SPLIT": 16384,
    "SPLITS": 16,
}
SCALED = {**FIXED, "E4M3": True, "SCALES": True, "BIAS": True, "EVEN": False}
KERNELS = (
    region_sets.sweep,
    constrain.allowed_classes,
    constrain.strike,
    constrain.note_best,
    constrain.settle,
    constrain.only_ids,
    rotary._rotate_kernel,
    norm._add_rms_norm_kernel,
    norm._sandwich_kernel,
    norm._wide_rms_norm_kernel,
    activation._gated_kernel,
    routing._logits_kernel,
    routing._choose_kernel,
    experts._product_kernel,
    experts._combine_kernel,
    logits._cap_kernel,
    logits._shares_kernel,
)
#: what is in e4m3, of kernels that multiply or make such rows
READS_SCALED = {**TYPES, "x_ptr": "*fp8e4nv weight_ptr"}
WRITES_SCALED = {**TYPES, "out_ptr": "*fp8e4nv"}
#: pointers of the attention kernel, whose others are of the dtype
ATTENTION_TYPES = {
    "found": "*fp32 sums",
    "turns": "*i32 spans starts",
    "page_table": "*i64",
}
#: head size, query heads of a K,V head, and window of layers whose tiles fill the memory
WIDE_LAYERS = ((256, 2, 1024), (512, 8, 0))
#: bytes of shared memory that a block may have on sm_90
SHARED_BYTES = 227 * 1024
STATS_KERNELS = (
    draw._tops_kernel,
    draw._draw_kernel,
    stats._stats_kernel,
    stats._finish_kernel,
)
STEP_KERNELS = (begin._begin, finish._spread, finish._commit)


def main() -> None:
    """Compile each; an error names the line."""
    compile_all(KERNELS, TYPES)
    compile_all((experts._product_kernel, scaled._few_kernel), READS_SCALED, SCALED)
    rows = (norm._add_rms_norm_kernel, activation._gated_row_kernel, scaled._scale_kernel)
    compile_all(rows, WRITES_SCALED, SCALED)
    compile_all(STATS_KERNELS, STATS_TYPES)
    compile_all(STEP_KERNELS, STEP_TYPES)
    for layer in WIDE_LAYERS:
        compile_attention(torch.bfloat16, "*bf16", *layer)
        compile_attention(torch.float32, "*fp32", *layer)


def compile_all(
    kernels: Sequence[Any], types: Mapping[str, str], sizes: Mapping[str, Any] = FIXED
) -> None:
    """Compile kernels whose arguments have types by their names."""
    for kernel in kernels:
        compiled(kernel, by_name(types), sizes, {"num_warps": 8})


def compile_attention(dtype: torch.dtype, pointer: str, dim: int, group: int, window: int) -> None:
    """Compile attention with its own tiles, of the longest canvas, and see that they fit."""
    for heads in (8, 1024):
        compile_tile(dtype, pointer, dim, group, window, heads)


def compile_tile(
    dtype: torch.dtype, pointer: str, dim: int, group: int, window: int, heads: int
) -> None:
    """The tile for few heads, or for many."""
    tile = tile_for(dtype, dim, group, max_q=256, heads=heads)
    sizes = {"GROUP": group, "HEADS": 8, "DIM": dim, "D": dim, "WINDOW": window, "PAGE": 32}
    parts = {"PARTS": 1 if dtype == torch.float32 else 4, "SKIP_WHOLE": False, "BLIND": False}
    pointers = by_name({"q": f"{pointer} k v out k_cache v_cache", **ATTENTION_TYPES})
    made = compiled(
        attention._attend,
        {**pointers, "scale": "fp32"},
        {**sizes, **parts, "M": tile.block_m, "N": tile.block_n},
        tile.options(),
        aligned=[*pointers, "q_token", "k_token", "v_token"],
    )
    if made.metadata.shared > SHARED_BYTES:
        raise ValueError(f"{dtype} heads of {dim} take {made.metadata.shared} bytes of a block")


def by_name(types: Mapping[str, str]) -> dict[str, str]:
    """The type of each argument, of lines that begin with one's name."""
    kinds = dict[str, str]()
    for first, line in types.items():
        kind, *others = line.split()
        kinds |= dict.fromkeys([first, *others], kind)
    return kinds


def compiled(
    kernel: Any,
    kinds: Mapping[str, str],
    sizes: Mapping[str, Any],
    options: Mapping[str, int | None],
    aligned: Sequence[str] = (),
) -> Any:
    """A kernel for sm_90 whose arguments have these types, int32 if there is none, and sizes.

    Those that are ``aligned`` are multiples of 16, which loads in advance depend on.
    """
    parameters = kernel.params
    fixed = {(i,): sizes[p.name] for i, p in enumerate(parameters) if p.is_constexpr}
    signature = {
        p.name: "constexpr" if p.is_constexpr else kinds.get(p.name, "i32") for p in parameters
    }
    places = {
        (i,): [["tt.divisibility", 16]] for i, p in enumerate(parameters) if p.name in aligned
    }
    source = ASTSource(kernel, signature, fixed, places)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options))


if __name__ == "__main__":
    main()
