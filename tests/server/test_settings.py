"""Options of the server: where they come from, in which order, and what is refused."""

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from dllmserve.config import EngineConfig
from dllmserve.errors import ConfigError, DllmServeError, UnknownOptionError
from dllmserve.server import app
from dllmserve.server.app import create_app
from dllmserve.server.config import ServerConfig
from dllmserve.server.settings import load_settings, option_names, with_port

_log = logging.getLogger("dllmserve.server")
KEY, OTHER = "0123456789abcdef", "fedcba9876543210"
ROOT = Path(__file__).parent.parent.parent


def write(folder: Path, text: str, name: str = "options.yaml") -> str:
    path = folder / name
    path.touch(mode=0o600)
    path.write_text(text)
    return str(path)


def test_the_command_line_comes_first_then_environment_file_default(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 1\nmax-requests: 2\nmax_n: 3\nmodel: from-file\n")
    environ = {"DLLMSERVE_PORT": "4", "DLLMSERVE_MAX_REQUESTS": "5", "DLLMSERVE_MODEL": "from-env"}
    settings = load_settings({"port": 6, "model": "given"}, environ, file)
    assert (settings.server.port, settings.server.max_requests, settings.server.max_n) == (6, 5, 3)
    assert settings.server.max_prompts == ServerConfig().max_prompts
    assert settings.engine.model == "given"
    assert load_settings({}, environ, file).engine.model == "from-env"
    assert load_settings({}, {}, file).engine.model == "from-file"
    assert load_settings({}, {}).engine.model == "tiny"


def test_the_environment_names_a_file(tmp_path: Path) -> None:
    environ = {"DLLMSERVE_CONFIG": write(tmp_path, "port: 1")}
    assert load_settings({}, environ).server.port == 1
    given = write(tmp_path, "port: 2", "given.yaml")
    assert load_settings({}, environ, given).server.port == 2


def test_model_path_is_another_name_for_the_model() -> None:
    assert load_settings({}, {"MODEL_PATH": "a"}).engine.model == "a"
    assert load_settings({}, {"MODEL_PATH": "a", "DLLMSERVE_MODEL": "b"}).engine.model == "b"
    assert load_settings({}, {"MODEL_PATH": ""}).engine.model == "tiny"


def test_an_option_with_two_names_has_both_everywhere(tmp_path: Path) -> None:
    environ = {"DLLMSERVE_BLOCK_LENGTH": "16"}
    settings = load_settings({}, environ)
    assert (settings.engine.default_block_length, settings.ignored) == (16, ())
    for name in ("block_length", "block-length", "default_block_length"):
        file = write(tmp_path, f"{name}: 8\n")
        assert load_settings({}, {}, file).engine.default_block_length == 8
        assert load_settings({}, environ, file).engine.default_block_length == 16
    both = "gives default_block_length twice \\(default_block_length and block_length\\)"
    with pytest.raises(ConfigError, match=both):
        load_settings({}, {**environ, "DLLMSERVE_DEFAULT_BLOCK_LENGTH": "16"})
    with pytest.raises(ConfigError, match=both):
        load_settings({}, {}, write(tmp_path, "block_length: 8\ndefault-block-length: 8\n"))


def test_remote_code_is_off_unless_asked_for(tmp_path: Path) -> None:
    assert EngineConfig().trust_remote_code
    assert not load_settings({}, {}).engine.trust_remote_code
    assert load_settings({"trust_remote_code": True}, {}).engine.trust_remote_code
    assert load_settings({}, {"DLLMSERVE_TRUST_REMOTE_CODE": "1"}).engine.trust_remote_code


def as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("name", option_names())
def test_every_option_may_be_a_variable(name: str) -> None:
    """Written as text, a value arrives as the same value of the same type."""
    kind, field = option_names()[name]
    default = getattr(kind(), field)
    others: dict[Any, Any] = {bool: not default, int: 7, float: 0.5, str: default}
    value = others[type(default)] if default is not None else None
    if value is None:
        hint = next(f.type for f in fields(kind) if f.name == field)
        value = {
            "int | None": 9,
            "float | None": 1.5,
            "str | None": "x",
            "Sequence[int] | None": (5, 7),
        }[str(hint)]
    value = {"tensor_parallel_size": 1, "quantization": "fp8"}.get(name, value)
    given = {f"DLLMSERVE_{name.upper()}": as_text(value)}
    others_too = {
        "expert_parallel": {"DLLMSERVE_TENSOR_PARALLEL_SIZE": "2"},
        "layers": {"DLLMSERVE_LOAD_FORMAT": "dummy"},
    }
    given |= others_too.get(name, {})
    if name == "ssl_certfile":
        given["DLLMSERVE_SSL_KEYFILE"] = "x"
    if name == "ssl_keyfile":
        given["DLLMSERVE_SSL_CERTFILE"] = "x"
    if name == "api_key_file":
        with pytest.raises(ConfigError, match="cannot read API key file x"):
            load_settings({}, given)
        return
    settings = load_settings({}, given)
    found = getattr(settings.engine if kind is EngineConfig else settings.server, field)
    assert found == value and type(found) is type(value)


def test_booleans_have_several_spellings() -> None:
    for text, value in (("1", True), ("YES", True), ("on", True), ("0", False), ("False", False)):
        found = load_settings({}, {"DLLMSERVE_RESTART": text}).server.restart
        assert found is value, text


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"DLLMSERVE_PORT": "http"}, "DLLMSERVE_PORT must be an integer, got 'http'"),
        ({"DLLMSERVE_PORT": "8e3"}, "DLLMSERVE_PORT must be an integer, got '8e3'"),
        ({"DLLMSERVE_PORT": "70000"}, r"port must be an integer in \[0, 65535\], got 70000"),
        ({"DLLMSERVE_RESULT_TTL": "soon"}, "DLLMSERVE_RESULT_TTL must be a number, got 'soon'"),
        ({"DLLMSERVE_EOS_IDS": "5;7"}, "DLLMSERVE_EOS_IDS must be token ids, such as 2,7"),
        ({"DLLMSERVE_RESULT_TTL": "nan"}, "result_ttl must be"),
        ({"DLLMSERVE_RESTART": "maybe"}, "DLLMSERVE_RESTART must be true or false, got 'maybe'"),
        ({"DLLMSERVE_LOG_FORMAT": "xml"}, "log_format must be one of"),
        ({"DLLMSERVE_DTYPE": "int3"}, "dtype must be one of"),
        ({"DLLMSERVE_SSL_KEYFILE": "x"}, "TLS needs both ssl_certfile and ssl_keyfile"),
        ({"DLLMSERVE_CORS_ORIGINS": "https://a.example, *"}, "name the origins"),
        ({"DLLMSERVE_CONFIG": "/no/such/file"}, "--config /no/such/file cannot be read"),
    ],
)
def test_wrong_values_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings({}, environ)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 9000", "'prot'; did you mean 'port'"),
        ("seed: 3", "'seed'"),
        ("port: '9000'", "port must be an integer"),
        ("port: yes", "port must be an integer"),
        ("host: 8000", "host must be a string"),
        ("restart: 'no'", "restart must be True or False"),
        ("- port", "must hold 'option: value' lines"),
        ("just text", "must hold 'option: value' lines"),
        ("port: [", "cannot be read"),
        ("port: !!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_wrong_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    with pytest.raises(DllmServeError, match=message):
        load_settings({}, {}, file)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_settings({}, {}, write(tmp_path, "# nothing\n")).server == ServerConfig()


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("port: 7\n", encoding="utf-8-sig")
    assert load_settings({}, {}, str(tmp_path / "options.yaml")).server.port == 7


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings({}, {}, str(tmp_path / "binary.yaml"))


def test_unknown_options_given_by_a_caller() -> None:
    with pytest.raises(UnknownOptionError, match="did you mean 'max_requests'"):
        load_settings({"max_request": 3}, {})


def test_variables_of_an_orchestrator_are_no_options(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Kubernetes service called "dllmserve" brings these."""
    environ = {
        "DLLMSERVE_SERVICE_HOST": "10.0.0.1",
        "DLLMSERVE_SERVICE_PORT": "8000",
        "DLLMSERVE_PORT": "tcp://10.0.0.1:8000",
        "DLLMSERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "DLLMSERVE_PORT_8000_TCP_PROTO": "tcp",
        "DLLMSERVE_PORT_8000_TCP_PORT": "8000",
        "DLLMSERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    settings = load_settings({}, environ)
    assert settings.server == ServerConfig()
    assert not caplog.records, "said before the log has its form"
    monkeypatch.setattr(app, "configure_logging", lambda form, level: _log.warning(form))
    # configured logging does not propagate to where caplog listens
    monkeypatch.setattr(logging.getLogger("dllmserve"), "propagate", True)
    with caplog.at_level(logging.WARNING, "dllmserve.server"):
        app.start_logging(replace(settings, server=ServerConfig(log_format="json")))
    first, *lines = caplog.messages
    assert first == "json"
    for name, line in zip(environ, lines, strict=True):
        assert line == f"the environment variable {name} is no option and is ignored"


def test_other_variables_are_left_alone() -> None:
    environ = {"PORT": "1", "DLLMSERVE_API_KEY": "of a client", "MAX_REQUESTS": "1"}
    settings = load_settings({}, environ)
    assert settings.server == ServerConfig() and not settings.ignored


def test_a_user_without_a_home_is_told_what_to_give(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a container that runs as a number that no name belongs to."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(ConfigError, match=r"no home directory.*--job-store, or set XDG_STATE_HOME"):
        create_app(load_settings({"job_store": "auto"}, {}))
    with pytest.raises(ConfigError, match=r"the ~ in '~/jobs.db' leads nowhere"):
        create_app(load_settings({"job_store": "~/jobs.db"}, {}))
    with pytest.raises(ConfigError, match=r"the ~ in '~/options.yaml' leads nowhere"):
        load_settings({}, {}, "~/options.yaml")
    create_app(load_settings({"job_store": str(tmp_path / "jobs.db")}, {}))


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path, f"# comment\nalice={KEY}\n", "keys")
    from_file = load_settings({"api_key_file": file}, {}).keys
    assert from_file is not None and from_file.names == ("alice",)
    from_env = load_settings({}, {"DLLMSERVE_API_KEYS": f"bob={OTHER}"}).keys
    assert from_env is not None and from_env.names == ("bob",)
    both = load_settings({"api_key_file": file}, {"DLLMSERVE_API_KEYS": f"bob={OTHER}"}).keys
    assert both is not None and both.names == ("alice", "bob")
    assert both.match(KEY) and both.match(OTHER) and not both.match("0" * 16)
    assert load_settings({}, {"DLLMSERVE_API_KEYS": ""}).keys is None


def test_one_key_in_both_places_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, KEY, "keys")
    with pytest.raises(ConfigError, match="the same"):
        load_settings({"api_key_file": file}, {"DLLMSERVE_API_KEYS": KEY})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_other_machines_are_not_let_in_without_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match=r"give --api-key-file .* or say --insecure-no-auth"):
        load_settings({"host": host}, {})
    assert load_settings({"host": host}, {"DLLMSERVE_API_KEYS": KEY}).keys
    insecure = load_settings({"host": host, "insecure_no_auth": True}, {})
    assert insecure.keys is None and not insecure.sequential_ids


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_no_key(host: str) -> None:
    settings = load_settings({"host": host}, {})
    assert settings.keys is None and settings.sequential_ids


@pytest.mark.parametrize(
    ("given", "environ", "sequential"),
    [
        ({}, {}, True),
        ({}, {"DLLMSERVE_API_KEYS": KEY}, False),
        ({"insecure_no_auth": True}, {}, False),
        ({"request_id_scheme": "random"}, {}, False),
        ({"request_id_scheme": "sequential"}, {"DLLMSERVE_API_KEYS": KEY}, True),
    ],
)
def test_ids_count_only_where_everybody_may_read_everything(
    given: dict[str, Any], environ: dict[str, str], sequential: bool
) -> None:
    assert load_settings(given, environ).sequential_ids is sequential


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "LLaDA-8B").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_settings({}, {}).model_name == "tiny"
    assert load_settings({"model": "org/name"}, {}).model_name == "org/name"
    assert load_settings({"model": "./LLaDA-8B"}, {}).model_name == "LLaDA-8B"
    assert load_settings({"served_model_name": "x"}, {}).model_name == "x"


def test_a_port_that_was_found_is_kept() -> None:
    settings = load_settings({"port": 0}, {"DLLMSERVE_API_KEYS": KEY})
    assert with_port(settings, 4711).server.port == 4711
    assert with_port(settings, 4711).keys is settings.keys


def test_the_example_file_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "dllmserve.yaml").read_text()
    file = write(tmp_path, text.replace("/etc/dllmserve/api-keys", write(tmp_path, KEY, "keys")))
    settings = load_settings({}, {}, file)
    assert settings.keys is not None
    assert settings.engine.dtype == "bfloat16"
