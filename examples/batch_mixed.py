"""One batch, five ways to decode the same prompt.

python examples/batch_mixed.py
"""

from dllmserve import LLM, SamplingParams, SparseConfig

QUESTION = [{"role": "user", "content": "Compute 347 + 586 step by step."}]

WAYS: dict[str, tuple[SamplingParams, SparseConfig | None]] = {
    "greedy, one token a step": (
        SamplingParams(temperature=0.0, gen_length=48, steps=48, block_length=16),
        None,
    ),
    "dual cache, threshold 0.9": (
        SamplingParams(
            temperature=0.0,
            gen_length=48,
            block_length=16,
            cache="dual",
            unmask="threshold",
            threshold=0.9,
        ),
        None,
    ),
    "sparse attention, 70 % of the context": (
        SamplingParams(temperature=0.0, gen_length=48, steps=48),
        SparseConfig(retention_ratio=0.7),
    ),
    "guidance 0.5": (
        SamplingParams(temperature=0.0, gen_length=48, steps=48, block_length=16, cfg_scale=0.5),
        None,
    ),
    "drawn at temperature 0.7, seed 1": (
        SamplingParams(temperature=0.7, top_p=0.9, seed=1, gen_length=48, steps=48),
        None,
    ),
}


def main() -> None:
    """Run all ways at once."""
    llm = LLM("tiny")
    outputs = llm.chat(
        [QUESTION] * len(WAYS),
        [params for params, _ in WAYS.values()],
        sparse_configs=[sparse for _, sparse in WAYS.values()],
    )
    for way, output in zip(WAYS, outputs, strict=True):
        print(f"{way}: {output['text']!r} ({output['usage']['forward_passes']} forwards)")


if __name__ == "__main__":
    main()
