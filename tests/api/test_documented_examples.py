"""The examples of the API reference, word for word, with the embedded model's name."""

from typing import Any

import pytest

import dllmserve
from dllmserve.models.loader import ASSETS, EMBEDDED

CONSTRUCTOR = """
from dllmserve import LLM

llm = LLM(
    "tiny",
    enforce_eager=True,
    tensor_parallel_size=1,
    max_model_len=1024,
)
"""
BASIC = """
from dllmserve import LLM, SamplingParams

llm = LLM("tiny", enforce_eager=True)
params = SamplingParams(temperature=0.6, gen_length=64, steps=64, cfg_scale=0.0, remasking="low_confidence")

outputs = llm.generate(["Hello, world!"], params)
print(outputs[0]['text'])
"""  # noqa: E501
PARAMS = """
from dllmserve import SamplingParams

# Diffusion model parameters
params = SamplingParams(
    temperature=0.6,
    gen_length=128,
    steps=128,
    cfg_scale=0.0,
    remasking="low_confidence",
)
"""
SPARSE_CONFIG = """
from dllmserve.sparse.state import SparseConfig

sparse_config = SparseConfig(
    enabled=True,
    retention_ratio=0.5,  # Use 50% of heads
    delay_step=1,
    default_block_len=32,
    head_select=True,
)
"""
BATCH = """
prompts = ["Prompt 1", "Prompt 2", "Prompt 3"]
params = SamplingParams(temperature=0.0, gen_length=32, steps=32, cfg_scale=0.0, remasking="low_confidence")
outputs = llm.generate(prompts, params)
"""  # noqa: E501
# the reference's own list has two entries; it is shown with two prompts
PER_PROMPT = """
params_list = [
    SamplingParams(temperature=0.0, gen_length=32, steps=32, cfg_scale=0.0, remasking="low_confidence"),
    SamplingParams(temperature=0.6, gen_length=64, steps=64, cfg_scale=0.0, remasking="low_confidence"),
]
outputs = llm.generate(prompts, params_list)
"""  # noqa: E501
SPARSE = """
from dllmserve.sparse.state import SparseConfig

sparse_config = SparseConfig(enabled=True, retention_ratio=0.5)
outputs = llm.generate(prompts, params, sparse_configs=sparse_config)
"""
ONE_GPU = """
llm = LLM("tiny", tensor_parallel_size=1)
"""
TWO_GPUS = """
llm = LLM("tiny", tensor_parallel_size=2)
"""
VALUE_ERROR = """
# This will raise ValueError
params = SamplingParams(gen_length=10000)  # Exceeds maximum
"""
LESS_MEMORY = """
llm = LLM(
    "tiny",
    max_model_len=512,  # Reduce sequence length
    tensor_parallel_size=1,
)
"""

Names = dict[str, Any]


def run(code: str, names: Names | None = None) -> Names:
    """The names after running an example."""
    names = {} if names is None else names
    exec(compile(code, "example", "exec"), names)
    return names


@pytest.fixture(scope="module")
def session() -> Names:
    """The names that the reference's usage examples build on each other."""
    return run("from dllmserve import LLM, SamplingParams\nllm = LLM('tiny', enforce_eager=True)")


def check(outputs: list[Names], prompts: int) -> None:
    assert len(outputs) == prompts
    for output in outputs:
        assert isinstance(output["text"], str)
        assert all(isinstance(token, int) for token in output["token_ids"])
        assert output["token_ids"]


def test_the_embedded_model_is_there() -> None:
    assert (ASSETS / EMBEDDED / "config.json").is_file()


def test_constructor() -> None:
    assert run(CONSTRUCTOR)["llm"].plan.limits.max_model_len == 1024


def test_basic(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = run(BASIC)["outputs"]
    check(outputs, 1)
    assert capsys.readouterr().out == outputs[0]["text"] + "\n"


def test_parameters() -> None:
    assert run(PARAMS)["params"].gen_length == 128
    assert run(SPARSE_CONFIG)["sparse_config"].default_block_len == 32


def test_batch(session: Names) -> None:
    check(run(BATCH, session)["outputs"], 3)


def test_per_prompt_parameters(session: Names) -> None:
    run("prompts = ['Prompt 1', 'Prompt 2']", session)
    check(run(PER_PROMPT, session)["outputs"], 2)


def test_as_many_parameters_as_prompts(session: Names) -> None:
    run("prompts = ['Prompt 1', 'Prompt 2', 'Prompt 3']", session)
    with pytest.raises(ValueError, match="sampling_params has 2 entries for 3 prompts"):
        run(PER_PROMPT, session)


def test_sparse(session: Names) -> None:
    run(BATCH, session)
    check(run(SPARSE, session)["outputs"], 3)


def test_multi_gpu(session: Names) -> None:
    assert run(ONE_GPU, session)["llm"].config.tensor_parallel_size == 1
    params = dllmserve.SamplingParams(temperature=0.0, gen_length=8, steps=4)
    one, two = session["llm"], run(TWO_GPUS, session)["llm"]
    with two:
        answers = [llm.generate(["Hello"], params, use_tqdm=False) for llm in (one, two)]
    assert answers[0] == answers[1]


def test_value_error(session: Names) -> None:
    with pytest.raises(
        ValueError, match=r"gen_length must be an integer in \[1, 8192\], got 10000"
    ):
        run(VALUE_ERROR, session)


def test_less_memory(session: Names) -> None:
    assert run(LESS_MEMORY, session)["llm"].plan.limits.max_model_len == 512
