"""Every field of the dataclasses has an option, and every option arrives."""

from __future__ import annotations

import os
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dllmserve.cli import bench_serve, generate
from dllmserve.cli import eval as evaluate
from dllmserve.cli import serve as serve_command
from dllmserve.cli.app import run
from dllmserve.cli.options import (
    DEFAULT_GEN_LENGTH,
    ENGINE,
    SAMPLING,
    SPARSE,
    Group,
    chosen_quality,
    engine_config,
    sampling_params,
    with_options,
    with_quality,
)
from dllmserve.config import EngineConfig
from dllmserve.errors import InvalidParameterError
from dllmserve.knobs import knobs
from dllmserve.presets import BLOCK_LENGTH
from dllmserve.sampling_params import SamplingParams
from dllmserve.server import serve as server_module
from dllmserve.server.config import ServerConfig
from dllmserve.server.settings import Settings
from dllmserve.sparse.state import SparseConfig

#: a valid value for every field, different from the default, as typed and as parsed
VALUES: dict[str, tuple[list[str], Any]] = {
    "temperature": (["--temperature", "0.5"], 0.5),
    "ignore_eos": (["--ignore-eos"], True),
    "gen_length": (["--gen-length", "48"], 48),
    "steps": (["--steps", "7"], 7),
    "cfg_scale": (["--cfg-scale", "1.5"], 1.5),
    "remasking": (["--remasking", "random"], "random"),
    "block_length": (["--block-length", "16"], 16),
    "max_tokens": (["--max-tokens", "12"], 12),
    "logits_eos_inf": (["--logits-eos-inf"], True),
    "confidence_eos_eot_inf": (["--confidence-eos-eot-inf"], True),
    "unmask": (["--unmask", "threshold"], "threshold"),
    "threshold": (["--threshold", "0.7"], 0.7),
    "low_threshold": (["--low-threshold", "0.3"], 0.3),
    "kl_threshold": (["--kl-threshold", "0.02"], 0.02),
    "kl_history": (["--kl-history", "3"], 3),
    "threshold_back": (["--threshold-back", "0.8"], 0.8),
    "edit_threshold": (["--edit-threshold", "0.4", "--unmask", "dynamic"], 0.4),
    "max_edit_steps": (["--max-edit-steps", "3", "--unmask", "joint"], 3),
    "min_tokens_per_step": (["--min-tokens-per-step", "2", "--unmask", "dynamic"], 2),
    "penalty_lambda": (["--penalty-lambda", "1.5", "--unmask", "joint"], 1.5),
    "max_denoising_steps": (["--max-denoising-steps", "5", "--unmask", "renoise"], 5),
    "t_min": (["--t-min", "0.1"], 0.1),
    "t_max": (["--t-max", "1.5"], 1.5),
    "stability_threshold": (["--stability-threshold", "0"], 0),
    "confidence_threshold": (["--confidence-threshold", "0.1"], 0.1),
    "refresh_delay": (["--refresh-delay", "1", "--cache", "dual"], 1),
    "refresh_every": (["--refresh-every", "4", "--cache", "drift"], 4),
    "refresh_window": (["--refresh-window", "8", "--cache", "dual"], 8),
    "refresh_share": (["--refresh-share", "0.1"], 0.1),
    "suffix_window": (["--suffix-window", "16"], 16),
    "early_end": (["--early-end"], True),
    "end_padding": (["--end-padding", "--early-end"], True),
    "quality": (["--quality", "balanced"], "balanced"),
    "factor": (["--factor", "2"], 2.0),
    "entropy_bound": (["--entropy-bound", "0.3"], 0.3),
    "confidence": (["--confidence", "margin"], "margin"),
    "schedule": (["--schedule", "dream"], "dream"),
    "eps": (["--eps", "0.01"], 0.01),
    "cache": (["--cache", "dual"], "dual"),
    "top_p": (["--top-p", "0.9"], 0.9),
    "top_k": (["--top-k", "20"], 20),
    "seed": (["--seed", "3"], 3),
    "stop": (["--stop", "a", "--stop", "b c"], ("a", "b c")),
    "stop_token_ids": (["--stop-token-ids", "5", "--stop-token-ids", "7"], (5, 7)),
    "regex": (["--regex", "[0-9]+"], "[0-9]+"),
    "json_schema": (["--json-schema", '{"type": "null"}'], '{"type": "null"}'),
    "choice": (["--choice", "yes", "--choice", "no"], ("yes", "no")),
    "logprobs": (["--logprobs", "3"], 3),
    "steps_per_block": (["--steps-per-block", "3"], 3),
    "sub_block_length": (["--sub-block-length", "4"], 4),
    "logit_bias": (["--logit-bias", "7=-100", "--logit-bias", "3=1.5"], {3: 1.5, 7: -100.0}),
    "sparse.enabled": (["--sparse"], True),
    "sparse.retention_ratio": (["--retention-ratio", "0.25"], 0.25),
    "sparse.delay_step": (["--delay-step", "3"], 3),
    "sparse.default_block_len": (["--default-block-len", "8"], 8),
    "sparse.head_select": (["--no-head-select"], False),
    "sparse.pool_kernel": (["--pool-kernel", "5"], 5),
    "sparse.score": (["--score", "attention"], "attention"),
    "sparse.min_keep": (["--min-keep", "16"], 16),
    "engine.enforce_eager": (["--enforce-eager"], True),
    "engine.tensor_parallel_size": (["--tensor-parallel-size", "1"], 1),
    "engine.max_model_len": (["--max-model-len", "100"], 100),
    "engine.trust_remote_code": (["--trust-remote-code"], True),
    "engine.dtype": (["--dtype", "bfloat16"], "bfloat16"),
    "engine.warmup": (["--warmup", "quick"], "quick"),
    "engine.quantization": (["--quantization", "fp8"], "fp8"),
    "engine.device": (["--device", "cpu"], "cpu"),
    "engine.load_format": (["--load-format", "dummy"], "dummy"),
    "engine.attention": (["--attention", "sdpa"], "sdpa"),
    "engine.max_num_seqs": (["--max-num-seqs", "4"], 4),
    "engine.max_num_batched_tokens": (["--max-num-batched-tokens", "512"], 512),
    "engine.max_logit_rows": (["--max-logit-rows", "64"], 64),
    "engine.max_history_rows": (["--max-history-rows", "64"], 64),
    "engine.kernels": (["--kernels", "torch"], "torch"),
    "engine.max_refresh_tokens": (["--max-refresh-tokens", "640"], 640),
    "engine.phases": (["--phases", "separate"], "separate"),
    "engine.steps_per_sync": (["--steps-per-sync", "2"], 2),
    "engine.max_graphs": (["--max-graphs", "7"], 7),
    "engine.page_size": (["--page-size", "16"], 16),
    "engine.kv_pages": (["--kv-pages", "9"], 9),
    "engine.gpu_memory_utilization": (["--gpu-memory-utilization", "0.5"], 0.5),
    "engine.seed": (["--engine-seed", "11"], 11),
    "engine.threads": (["--threads", "3"], 3),
    "engine.prefix_caching": (["--no-prefix-caching"], False),
    "engine.prefix_isolation": (["--prefix-isolation"], True),
    "engine.expert_parallel": (["--expert-parallel", "--tensor-parallel-size", "2"], True),
    "engine.layers": (["--layers", "2", "--load-format", "dummy"], 2),
    "engine.mask_id": (["--mask-id", "7"], 7),
    "engine.eos_ids": (["--eos-ids", "5", "--eos-ids", "7,9"], (5, 7, 9)),
    "engine.default_block_length": (["--default-block-length", "16"], 16),
}

#: the same for the fields of ServerConfig
SERVER_VALUES: dict[str, tuple[list[str], Any]] = {
    "host": (["--host", "::1"], "::1"),
    "port": (["--port", "9000"], 9000),
    "ssl_certfile": (["--ssl-certfile", "a.pem", "--ssl-keyfile", "b.pem"], "a.pem"),
    "ssl_keyfile": (["--ssl-certfile", "a.pem", "--ssl-keyfile", "b.pem"], "b.pem"),
    "ssl_ca_certs": (["--ssl-ca-certs", "c.pem"], "c.pem"),
    "address_file": (["--address-file", "a"], "a"),
    "cors_origins": (["--cors-origins", "https://a.example"], "https://a.example"),
    "max_connections": (["--max-connections", "5"], 5),
    "max_connections_per_address": (["--max-connections-per-address", "6"], 6),
    "header_timeout": (["--header-timeout", "2"], 2.0),
    "body_timeout": (["--body-timeout", "2.5"], 2.5),
    "write_timeout": (["--write-timeout", "3"], 3.0),
    "keep_alive_timeout": (["--keep-alive-timeout", "4"], 4.0),
    "max_body_bytes": (["--max-body-bytes", "1000"], 1000),
    "api_key_file": (["--api-key-file", "keys.txt"], "keys.txt"),
    "insecure_no_auth": (["--insecure-no-auth"], True),
    "open_metrics": (["--open-metrics"], True),
    "requests_per_minute": (["--requests-per-minute", "60"], 60),
    "max_parallel_per_key": (["--max-parallel-per-key", "3"], 3),
    "data_parallel_size": (["--data-parallel-size", "2"], 2),
    "max_requests": (["--max-requests", "8"], 8),
    "max_outstanding_work": (["--max-outstanding-work", "123456"], 123456),
    "queue_timeout": (["--queue-timeout", "5"], 5.0),
    "request_timeout": (["--request-timeout", "60"], 60.0),
    "watchdog_timeout": (["--watchdog-timeout", "20"], 20.0),
    "load_timeout": (["--load-timeout", "90"], 90.0),
    "restart": (["--no-restart"], False),
    "job_store": (["--job-store", "memory"], "memory"),
    "request_id_scheme": (["--request-id-scheme", "random"], "random"),
    "result_ttl": (["--result-ttl", "30"], 30.0),
    "max_results": (["--max-results", "10"], 10),
    "max_result_bytes": (["--max-result-bytes", "4096"], 4096),
    "served_model_name": (["--served-model-name", "mine"], "mine"),
    "default_max_tokens": (["--default-max-tokens", "64"], 64),
    "default_quality": (["--default-quality", "exact"], "exact"),
    "max_prompts": (["--max-prompts", "4"], 4),
    "max_n": (["--max-n", "2"], 2),
    "sse_keep_alive": (["--sse-keep-alive", "1.5"], 1.5),
    "shutdown_timeout": (["--shutdown-timeout", "0"], 0.0),
    "log_format": (["--log-format", "json"], "json"),
    "log_level": (["--log-level", "debug"], "debug"),
    "log_prompts": (["--log-prompts"], True),
    "metrics_compat": (["--metrics-compat", "vllm"], "vllm"),
}


def parse(*args: str) -> dict[str, Any]:
    """The options of a command line as a command receives them."""
    app = typer.Typer()
    seen: dict[str, Any] = {}

    @app.command()
    @with_options(SAMPLING, SPARSE, ENGINE)
    def command(**options: Any) -> None:
        seen.update(options)

    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen


@pytest.mark.parametrize("group", [SAMPLING, SPARSE, ENGINE], ids=lambda g: g.kind.__name__)
def test_every_field_is_an_option(group: Group) -> None:
    names = {f.name for f in fields(group.kind)}
    declared = {group.option(n) for n in names - group.skipped}
    assert declared <= set(parse())
    assert knobs(group.kind).keys() == names
    assert all(it.help for it in knobs(group.kind).values())
    assert group.skipped <= names and set(group.names) <= names and group.flags <= names


@pytest.mark.parametrize("module", [generate, bench_serve, evaluate], ids=lambda m: m.__name__)
def test_every_field_of_a_command_is_an_option(module: Any) -> None:
    group: Group = module.OPTIONS
    names = {f.name for f in fields(group.kind)}
    assert knobs(group.kind).keys() == names and not group.skipped
    assert all(it.help for it in knobs(group.kind).values())
    assert {*group.names, *group.metavars, *group.lists, *group.shown, *group.flags} <= names
    declared = [p.name for p in group.parameters()]
    assert len(set(declared)) == len(names)


def test_what_has_no_option_is_known() -> None:
    assert SAMPLING.skipped == {"sparse"}  # the options of SPARSE make it
    assert SPARSE.skipped == frozenset()
    assert ENGINE.skipped == {"model"}  # declared by the commands, as --model and -m


def test_the_table_above_is_complete() -> None:
    expected = {f.name for f in fields(SamplingParams)} - SAMPLING.skipped
    expected |= {f"sparse.{f.name}" for f in fields(SparseConfig)}
    expected |= {f"engine.{f.name}" for f in fields(EngineConfig)} - {"engine.model"}
    assert set(VALUES) == expected


@pytest.mark.parametrize("field", VALUES)
def test_option_arrives(field: str) -> None:
    args, value = VALUES[field]
    options = parse(*args)
    group, _, name = field.rpartition(".")
    if group == "sparse":
        made: Any = sampling_params(options).sparse
    elif group == "engine":
        made = engine_config("tiny", options)
    else:
        made = sampling_params(options)
    assert getattr(made, name) == value


def settings_of(monkeypatch: pytest.MonkeyPatch, *args: str) -> Settings:
    """What ``dllmserve serve`` would run with."""
    for name in [n for n in os.environ if n.startswith("DLLMSERVE_")]:
        monkeypatch.delenv(name)
    seen: list[Settings] = []

    def run(settings: Settings, began: float) -> int:
        assert began <= time.monotonic()
        seen.append(settings)
        return 0

    monkeypatch.setattr(server_module, "serve", run)
    app = typer.Typer()
    app.command()(serve_command.serve)
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_keys_are_not_left_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have been read, and no process that the server starts has a use for them."""
    monkeypatch.setattr(
        server_module, "serve", lambda settings, began: int(len(settings.keys) != 1)
    )
    app = typer.Typer()
    app.command()(serve_command.serve)
    monkeypatch.setenv("DLLMSERVE_API_KEYS", "alice=0123456789abcdef")
    assert CliRunner().invoke(app, [], catch_exceptions=False).exit_code == 0
    assert "DLLMSERVE_API_KEYS" not in os.environ


def test_the_table_of_server_options_is_complete() -> None:
    assert set(SERVER_VALUES) == {f.name for f in fields(ServerConfig)}
    assert all(value != getattr(ServerConfig(), n) for n, (_, value) in SERVER_VALUES.items())


@pytest.mark.parametrize("field", SERVER_VALUES)
def test_server_option_arrives(field: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args, value = SERVER_VALUES[field]
    monkeypatch.chdir(tmp_path)
    Path("keys.txt").touch(mode=0o600)
    Path("keys.txt").write_text("0123456789abcdef")
    assert getattr(settings_of(monkeypatch, *args).server, field) == value


@pytest.mark.parametrize("field", [n for n in VALUES if n.startswith("engine.")])
def test_engine_option_arrives_in_the_server(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, value = VALUES[field]
    settings = settings_of(monkeypatch, "some/model", *args)
    assert getattr(settings.engine, field.removeprefix("engine.")) == value
    assert settings.engine.model == settings.model_name == "some/model"


def test_a_server_has_another_name_for_its_block_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where requests have options, --block-length is theirs."""
    assert settings_of(monkeypatch, "--block-length", "16").engine.default_block_length == 16
    options = parse("--block-length", "16")
    assert sampling_params(options).block_length == 16
    assert engine_config("tiny", options).default_block_length is None


def test_the_model_of_the_server_is_an_argument_or_an_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settings_of(monkeypatch, "--model", "some/model").engine.model == "some/model"
    assert run(["serve", "some/model", "-m", "some/other"]) == 1
    assert "give MODEL or --model, not both" in capsys.readouterr().err


def test_defaults_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(monkeypatch)
    assert settings.server == ServerConfig()
    assert settings.engine == EngineConfig(trust_remote_code=False)
    assert settings.keys is None and settings.sequential_ids


def test_defaults() -> None:
    options = parse()
    assert sampling_params(options) == SamplingParams(
        temperature=0.0,
        gen_length=DEFAULT_GEN_LENGTH,
        steps=DEFAULT_GEN_LENGTH,
        block_length=BLOCK_LENGTH,
    )
    assert engine_config("tiny", options) == EngineConfig(trust_remote_code=False)


@pytest.mark.parametrize(
    ("args", "steps"),
    [
        (["--gen-length", "96"], 96),
        (["--gen-length", "20"], 20),
        (["--gen-length", "40"], 64),  # blocks of 32 and 8, with 32 steps each
        (["--gen-length", "8192", "--block-length", "8191"], 8192),
        (["--gen-length", "40", "--default-block-len", "16"], 48),
        (["--gen-length", "200", "--steps", "9"], 9),
    ],
)
def test_one_step_per_token_unless_told(args: list[str], steps: int) -> None:
    assert sampling_params(parse(*args)).steps == steps


@pytest.mark.parametrize(
    ("args", "quality"),
    [
        ([], "balanced"),
        (["--quality", "exact"], "exact"),
        (["--quality", "fast", "--steps", "8"], "fast"),
        # what is given wins over the preset
        (["--gen-length", "512", "--temperature", "0.7", "--ignore-eos"], "balanced"),
        (["--unmask", "factor", "--cache", "none", "--threshold", "0.8"], "balanced"),
        (["--unmask", "threshold", "--confidence", "margin"], "balanced"),
        (["--no-sparse"], "balanced"),
        # other ways to decode
        (["--steps", "16"], None),
        (["--unmask", "steps"], None),
        (["--remasking", "random"], None),
        (["--schedule", "dream"], None),
        (["--confidence", "neg_entropy"], None),
        (["--sparse"], None),
        (["--retention-ratio", "0.5"], None),
    ],
)
def test_quality_that_nobody_gave(args: list[str], quality: str | None) -> None:
    options = parse(*args)
    options["quality"] = chosen_quality(options, "balanced")
    assert options["quality"] == quality
    params = sampling_params(options)
    for name, value in sampling_params(parse(*args)).__dict__.items():
        option = "--" + name.replace("_", "-")
        if quality is None or option in args:
            assert getattr(params, name) == value


def test_help_shows_the_defaults_of_the_quality() -> None:
    shown = with_quality(SAMPLING, "balanced").shown
    used = SamplingParams(quality="balanced")
    assert shown["quality"] == "balanced"
    for name in ("unmask", "cache", "threshold", "block_length", "suffix_window"):
        value, _, models = shown[name].partition(" ")
        assert value == str(getattr(used, name))
        # the others leave these out of a preset
        assert (models[:19] == "with full attention") == (
            name in ("cache", "block_length", "suffix_window")
        )
    assert shown["temperature"] == "0"


def test_shown_defaults_are_the_used_ones() -> None:
    used = sampling_params(parse())
    for name in ("temperature", "gen_length", "block_length"):
        assert SAMPLING.shown[name].partition(" ")[0] == f"{getattr(used, name):g}"


@pytest.mark.parametrize("field", [n for n in VALUES if n.startswith("sparse.")])
def test_a_sparse_option_implies_sparse(field: str) -> None:
    params = sampling_params(parse(*VALUES[field][0]))
    assert params.sparse is not None
    # the SparseConfig's own block length counts
    assert params.block_length is None


def test_sparse_can_be_refused() -> None:
    params = sampling_params(parse("--retention-ratio", "0.3", "--no-sparse"))
    assert params.sparse is None
    assert params.block_length == BLOCK_LENGTH


def test_block_length_with_sparse() -> None:
    assert sampling_params(parse("--sparse", "--block-length", "8")).block_length == 8


def test_negative_values_are_values() -> None:
    params = sampling_params(
        parse("--unmask", "threshold", "--confidence", "neg_entropy", "--threshold", "-0.1")
    )
    assert params.threshold == -0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["5"], "takes ID=VALUE, for example 198=-100, got '5'"),
        (["=1"], "got '=1'"),
        (["5="], "got '5='"),
        (["a=1"], "got 'a=1'"),
        (["5=1=2"], "got '5=1=2'"),
        (["5=1", "5=1"], "gives token id 5 twice"),
        (["5=101"], r"logit_bias\[5\] must be a number in \[-100, 100\], got 101"),
        (["-1=3"], "must be an integer >= 0, got -1"),
    ],
)
def test_wrong_logit_bias(given: list[str], message: str) -> None:
    options = parse(*(part for pair in given for part in ("--logit-bias", pair)))
    with pytest.raises(InvalidParameterError, match=message):
        sampling_params(options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--max-tokens", "abc", "x"), "--max-tokens must be an integer, got 'abc'"),
        (("generate", "--threads", "many", "x"), "--threads must be an integer, got 'many'"),
        (("serve", "--port", "abc"), "--port must be an integer, got 'abc'"),
        (("serve", "--result-ttl", "soon"), "--result-ttl must be a number, got 'soon'"),
        (("eval", "--limit", "1.5"), "--limit must be an integer, got '1.5'"),
    ],
)
def test_values_of_a_wrong_kind(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run(arguments) == 2
    err = capsys.readouterr().err
    # older versions of typer have words of their own
    assert message in err or "is not a valid" in err
