"""The official openai package against a running server: an answer, a stream, what it cost.

dllmserve serve
python examples/server/openai_client.py [URL] [KEY]
"""

import sys

from openai import OpenAI

QUESTION = "Sort the numbers: 9 41 7"


def main() -> None:
    """Ask twice."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    key = sys.argv[2] if len(sys.argv) > 2 else "none"
    client = OpenAI(base_url=f"{url}/v1", api_key=key)
    model = client.models.list().data[0].id

    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=32,
        temperature=0,
        # what OpenAI's API does not know: how the answer is decoded
        extra_body={"block_length": 16, "unmask": "threshold", "threshold": 0.9},
    )
    print(answer.choices[0].message.content)
    usage = answer.model_dump()["usage"]
    print(f"({usage['completion_tokens']} tokens in {usage['forward_passes']} forward passes)")

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=32,
        temperature=0,
        stream=True,
        extra_body={"block_length": 4},
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
