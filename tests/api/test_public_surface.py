"""The public names: present, documented, and cheap to import."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest

import dllmserve
from dllmserve import LLM, AsyncLLM, SamplingParams, SparseConfig, catalog, errors

DOCUMENTED = (
    *("LLM", "AsyncLLM", "SamplingParams", "SparseConfig", "Hole"),
    *("CanvasStep", "RequestOutput"),
)


def run(code: str) -> str:
    """Output of a fresh interpreter."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_all_is_what_can_be_imported() -> None:
    assert {*dllmserve.__all__} == {*DOCUMENTED, "__version__"}
    assert dir(dllmserve) == sorted(dllmserve.__all__)
    namespace: dict[str, object] = {}
    exec("from dllmserve import *", namespace)
    assert {*dllmserve.__all__} <= set(namespace)
    for name in dllmserve.__all__:
        assert getattr(dllmserve, name) is namespace[name]


def test_an_absent_name() -> None:
    with pytest.raises(AttributeError, match="'dllmserve' has no attribute 'Llm'"):
        dllmserve.Llm  # noqa: B018
    with pytest.raises(ImportError):
        exec("from dllmserve import Llm")


def test_importing_loads_no_torch() -> None:
    code = "import dllmserve, sys; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    assert run(code) == "set()"
    code = (
        "from dllmserve import SamplingParams, SparseConfig; import dllmserve.errors, sys;"
        "SamplingParams(); SparseConfig(); print('torch' in sys.modules)"
    )
    assert run(code) == "False"


def test_the_servers_process_loads_no_torch() -> None:
    """The engine lives in another one."""
    code = "import dllmserve.server.serve, sys; print({'torch', 'numpy'} & set(sys.modules))"
    assert run(code) == "set()"


#: what a plain generation has no use for, and what does
NOT_FOR_ALL = {
    "other people's names for options": "foreign",
    "presets of quality": "presets",
    "other packages": "_plugins",
    "secrets and children": "_environment",
    "chats": "messages engine.marked",
    "streams of text": "engine.text",
    "other tokenizers": "engine.other_tokenizers",
    "other checkpoints": "models.foreign models.llada",
    "random weights": "models.random",
    "several ranks": "parallel.torch_group engine.ranks process",
    "GPUs": "engine.profile layers.triton kernels.activation",
    "too little memory": "engine.advice",
    "top-p and top-k": "decoding.transforms",
    "sparse attention": "attention.select",
    "caches that measure drift": "runtime.drift",
}


def test_a_plain_generation_loads_what_it_uses() -> None:
    code = """if True:
        import sys
        from dllmserve import LLM, SamplingParams
        params = SamplingParams(temperature=0.0, gen_length=8, steps=8)
        LLM("tiny", device="cpu").generate(["The president"], params, use_tqdm=False)
        print(*(name for name in sys.modules if name.startswith("dllmserve.")))
    """
    loaded = set(run(code).replace("dllmserve.", "").split())
    assert "models.dream" in loaded
    for what, names in NOT_FOR_ALL.items():
        assert not loaded.intersection(names.split()), what
        for name in names.split():
            assert importlib.util.find_spec(f"dllmserve.{name}") is not None


def test_documented_import_paths() -> None:
    from dllmserve.sparse.state import SparseConfig as documented

    assert documented is SparseConfig
    assert LLM.__module__ == "dllmserve.llm"
    assert dllmserve.__version__.count(".") >= 1


def signature(kind: type) -> dict[str, object]:
    parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    return {name: p.default for name, p in parameters.items() if name != "self"}


def test_documented_signatures() -> None:
    """Names, order and defaults of the API reference."""
    params = {
        "temperature": 1.0,
        "max_tokens": 64,
        "ignore_eos": False,
        "gen_length": 128,
        "steps": 128,
        "cfg_scale": 0.0,
        "remasking": "low_confidence",
    }
    assert list(signature(SamplingParams).items())[:7] == list(params.items())
    sparse = {
        "enabled": True,
        "retention_ratio": 0.5,
        "delay_step": 1,
        "default_block_len": 32,
        "head_select": True,
    }
    assert list(signature(SparseConfig).items())[:5] == list(sparse.items())
    llm = {
        "enforce_eager": False,
        "tensor_parallel_size": 1,
        "max_model_len": None,
        "trust_remote_code": True,
    }
    assert list(signature(LLM))[:5] == ["model", *llm]
    assert {**signature(LLM), **llm} == signature(LLM)
    generate = inspect.signature(LLM.generate).parameters
    assert list(generate) == [
        *("self", "prompts", "sampling_params", "sparse_configs", "use_tqdm", "history")
    ]
    assert generate["use_tqdm"].default is True
    assert generate["sparse_configs"].default is None


def test_parameters_are_values() -> None:
    assert SamplingParams() == SamplingParams(temperature=1.0)
    assert hash(SparseConfig()) == hash(SparseConfig())
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams().stop_strings == ()
    with pytest.raises(AttributeError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]


def test_every_public_name_is_documented() -> None:
    for name in DOCUMENTED:
        kind = getattr(dllmserve, name)
        assert inspect.getdoc(kind)
        for field in fields(kind) if is_dataclass(kind) else ():
            assert field.name in inspect.getdoc(kind), f"{name}.{field.name}"  # type: ignore[operator]
    for kind in (LLM, AsyncLLM):
        members = [m for n, m in vars(kind).items() if not n.startswith("_")]
        assert all(inspect.getdoc(member) for member in members)
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.DllmServeError):
            assert inspect.getdoc(kind)
            assert name in (errors.__doc__ or "")


def test_registered_names_resolve() -> None:
    tables = ("MODELS", "RULES", "CACHES", "BACKENDS")
    for table in tables:
        for number, (name, entry) in enumerate(getattr(catalog, table).items()):
            assert entry.load() is not None
            assert getattr(catalog, table).index(name) == number
            assert getattr(catalog, table).at(number) is entry
    with pytest.raises(KeyError):
        catalog.MODELS["absent"]


def test_every_module_imports_alone_and_is_documented() -> None:
    import pkgutil

    # of the extra lm-eval, which tests do without
    absent = importlib.util.find_spec("lm_eval") is None
    for module in pkgutil.walk_packages(dllmserve.__path__, "dllmserve."):
        optional = absent and module.name.endswith("lm_eval.model")
        if not module.name.endswith("__main__") and not optional:
            assert importlib.import_module(module.name).__doc__, module.name


def test_documented_names_of_tools_are_the_tools() -> None:
    from dllmserve import evaluation
    from dllmserve.bench import roofline
    from dllmserve.evaluation import settings
    from dllmserve.tools import bench
    from dllmserve.tools import evaluation as real

    assert roofline.Ceilings is bench.roofline.Ceilings
    assert settings.SUITES is evaluation.SUITES is real.SUITES
    assert all(getattr(evaluation, name) is getattr(real, name) for name in real.__all__)
