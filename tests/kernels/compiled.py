"""Compile kernels of steps and constraints, and the rotation of heads, for a GPU not at hand.

``python -m tests.kernels.compiled``; Triton's interpreter takes what the compiler refuses.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dllmserve.kernels import experts, rotary, routing
from dllmserve.runtime.kernels import begin, constrain, finish, region_sets

TYPES = {
    "tokens": "*i64 rows cells fields best holds ints positions_ptr",
    "packed": "*i32 wide entry_of counts_ptr order_ptr ids_ptr",
    "small": "*i16",
    "sets": "*u8 allowed write left",
    "masked": "*i1",
    "z": "*bf16 heads_ptr query_ptr key_ptr x_ptr gate_ptr weight_ptr rows_ptr out_ptr",
    "cos_ptr": "*fp32 sin_ptr logits_ptr bias_ptr weights_ptr",
    "eps": "fp32 scale",
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
#: sizes that a launch fixes
FIXED = {
    "LOOK": 32,
    "TILE": 1024,
    "MOST": 128,
    "ST": 16,
    "CT": 128,
    "WIDTH": 32,
    "NORM": True,
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
}
KERNELS = (
    region_sets.sweep,
    constrain.allowed_classes,
    constrain.strike,
    constrain.note_best,
    constrain.settle,
    constrain.only_ids,
    rotary._rotate_kernel,
    routing._logits_kernel,
    routing._choose_kernel,
    experts._product_kernel,
    experts._combine_kernel,
)
STEP_KERNELS = (begin._begin, finish._spread, finish._commit)


def main() -> None:
    """Compile each; an error names the line."""
    compile_all(KERNELS, TYPES)
    compile_all(STEP_KERNELS, STEP_TYPES)


def compile_all(kernels: Sequence[Any], types: Mapping[str, str]) -> None:
    """Compile kernels whose arguments have types by their names."""
    kinds = dict[str, str]()
    for first, line in types.items():
        kind, *others = line.split()
        kinds |= dict.fromkeys([first, *others], kind)
    for kernel in kernels:
        parameters = kernel.params
        fixed = {(i,): FIXED[p.name] for i, p in enumerate(parameters) if p.is_constexpr}
        signature = {
            p.name: "constexpr" if p.is_constexpr else kinds.get(p.name, "i32") for p in parameters
        }
        source = ASTSource(kernel, signature, fixed)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})


if __name__ == "__main__":
    main()
