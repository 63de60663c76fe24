"""Print the answer after every forward pass: _ is masked, . a special token, * just written.

python examples/watch_canvas.py "Sort the numbers: 9 41 7"
"""

import sys

from dllmserve import LLM, SamplingParams


def main() -> None:
    """Watch one answer."""
    question = " ".join(sys.argv[1:]) or "Sort the numbers: 9 41 7"
    llm = LLM("tiny")
    assert llm.tokenizer is not None
    params = SamplingParams(temperature=0.0, gen_length=32, steps=32)
    prompt = llm.chat_ids([{"role": "user", "content": question}])
    before = [False] * params.gen_length
    for canvas in llm.stream(prompt, params):
        cells = []
        for token, done, was in zip(canvas.token_ids, canvas.committed, before, strict=True):
            text = "_"
            if done and token is not None:
                text = llm.tokenizer.decode([token]) or "."  # end ids have no text
            cells.append(f"{text}*" if done and not was else text)
        print(f"{canvas.forward_passes:3d}  {' '.join(cells)!r}")
        before = canvas.committed
        if canvas.output is not None:
            print(f"\n{canvas.output.text}")


if __name__ == "__main__":
    main()
