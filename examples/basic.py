"""Ask the embedded model three questions.

python examples/basic.py
"""

from dllmserve import LLM, SamplingParams

QUESTIONS = [
    "Sort the numbers: 9 41 7",
    "Compute 347 + 586 step by step.",
    "Solve this 4x4 sudoku:\n1200\n0001\n2014\n0102",
]


def main() -> None:
    """Answer all questions in one batch."""
    llm = LLM("tiny")
    params = SamplingParams(temperature=0.0, gen_length=48, steps=48, block_length=16)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    for question, output in zip(QUESTIONS, llm.chat(conversations, params), strict=True):
        print(f"\n> {question}\n{output['text']}")
        print(f"({output['usage']['forward_passes']} forwards, {output['finish_reason']})")


if __name__ == "__main__":
    main()
