"""Settings: where the options of a server come from.

The command line comes before the environment (``DLLMSERVE_PORT``), that before a file
(``--config``), that before the defaults.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from dllmserve._checks import listed_ids, true_or_false, user_path
from dllmserve._environment import KEYS_VARIABLE, SECRETS
from dllmserve.config import EngineConfig
from dllmserve.errors import ConfigError, unknown_option
from dllmserve.server.config import ServerConfig
from dllmserve.server.http.keys import ApiKeys

PREFIX = "DLLMSERVE_"
#: variables of that prefix that are no options: the keys, and the client's own
_OTHER_VARIABLES = frozenset({*SECRETS, "DLLMSERVE_CONFIG"})
#: other names of options, which the command line has too
_ALIASES = {"block_length": "default_block_length"}
_LINK = re.compile(r"(tcp|udp|sctp)://")


@dataclass(frozen=True)
class Settings:
    """Everything a server is started with.

    Attributes:
        server, engine: the options.
        keys: None lets everybody in.
        ignored: variables of the environment with our prefix that are no options.
    """

    server: ServerConfig
    engine: EngineConfig
    keys: ApiKeys | None = None
    ignored: tuple[str, ...] = ()

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        named = self.server.served_model_name
        if named is not None:
            return named
        path = Path(self.engine.model)
        return path.resolve().name if path.is_dir() else self.engine.model

    @property
    def several_keys(self) -> bool:
        """Whether there are several keys, so that each gets its share."""
        return self.keys is not None and len(self.keys) > 1

    @property
    def sequential_ids(self) -> bool:
        """Whether job ids count from 0: by default only where all clients are one owner."""
        server = self.server
        open_to_all = server.loopback and self.keys is None and not server.insecure_no_auth
        scheme = server.request_id_scheme
        return scheme == "sequential" or (scheme == "auto" and open_to_all)


def option_names() -> dict[str, tuple[type[Any], str]]:
    """Every option: its name, the dataclass it belongs to, and its field there."""
    found: dict[str, tuple[type[Any], str]] = {}
    for kind in (EngineConfig, ServerConfig):
        for item in fields(kind):
            # --seed is a request's elsewhere
            name = "engine_seed" if (kind, item.name) == (EngineConfig, "seed") else item.name
            found[name] = (kind, item.name)
    return found


def load_settings(
    given: Mapping[str, Any], environ: Mapping[str, str], file: str | None = None
) -> Settings:
    """Options from the command line, the environment and a file.

    Args:
        given: options of the command line, by name; only those that were given.
        environ: the environment.
        file: YAML mapping of option names to values, or None.

    Raises:
        ConfigError, UnknownOptionError: a name that nothing reads, or a wrong value.
    """
    known = option_names()
    file = file or environ.get("DLLMSERVE_CONFIG")
    from_environment, ignored = _from_environment(environ, known)
    values = {**_from_file(file), **from_environment, **given}
    values.setdefault("trust_remote_code", False)
    parts: dict[type[Any], dict[str, Any]] = {EngineConfig: {}, ServerConfig: {}}
    for name, value in values.items():
        if name not in known:
            raise unknown_option(file or "serve", name, known)
        kind, item = known[name]
        parts[kind][item] = value
    server = ServerConfig(**parts[ServerConfig])
    engine = EngineConfig(**parts[EngineConfig])
    keys = _keys(server, environ)
    if keys is None and not server.loopback and not server.insecure_no_auth:
        raise ConfigError(
            f"host={server.host!r} can be reached from other machines: give --api-key-file (or "
            f"{KEYS_VARIABLE}), or say --insecure-no-auth to let everybody in"
        )
    return Settings(server, engine, keys, ignored)


def _keys(server: ServerConfig, environ: Mapping[str, str]) -> ApiKeys | None:
    """The keys of the file and of the environment together."""
    from_file = None if server.api_key_file is None else ApiKeys.from_file(server.api_key_file)
    value = environ.get(KEYS_VARIABLE)
    from_env = ApiKeys.from_env(value, KEYS_VARIABLE) if value else None
    if from_file is None or from_env is None:
        return from_file or from_env
    return ApiKeys([*from_file, *from_env])


def _from_environment(
    environ: Mapping[str, str], known: Mapping[str, tuple[type[Any], str]]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Options of variables with our prefix, and those that are none; MODEL_PATH is the model."""
    found: dict[str, Any] = {}
    ignored: list[str] = []
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable in _OTHER_VARIABLES:
            continue
        name = _option_name(variable.removeprefix(PREFIX).lower())
        if name not in known or _LINK.match(text):
            # orchestrators add variables of their own for a service of our name; one of them
            # is DLLMSERVE_PORT=tcp://10.0.0.1:8000
            ignored.append(variable)
            continue
        kind, item = known[name]
        _check_once("the environment", name, found)
        found[name] = _parsed(variable, text, get_type_hints(kind)[item])
    if environ.get("MODEL_PATH"):
        found.setdefault("model", environ["MODEL_PATH"])
    return found, tuple(ignored)


def _from_file(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    import yaml

    try:
        text = user_path(file).read_text(encoding="utf-8-sig")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        strerror = error.strerror if isinstance(error, OSError) else None
        reason = strerror or " ".join(str(error).split())
        raise ConfigError(f"--config {file} cannot be read: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config {file} must hold 'option: value' lines")
    found: dict[str, Any] = {}
    for given, value in values.items():
        name = _option_name(str(given).replace("-", "_"))
        _check_once(f"--config {file}", name, found)
        found[name] = value
    return found


def _option_name(given: str) -> str:
    """The option that a name stands for."""
    return _ALIASES.get(given, given)


def _check_once(where: str, name: str, found: Mapping[str, Any]) -> None:
    """Raise ConfigError for an option that a source gives under two of its names."""
    if name in found:
        others = [name, *(alias for alias, option in _ALIASES.items() if option == name)]
        raise ConfigError(f"{where} gives {name} twice ({' and '.join(others)}): give it once")


def _parsed(variable: str, text: str, hint: Any) -> Any:
    """A variable's text as the option's type; ids are separated by commas."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    if bool in kinds:
        return true_or_false(ConfigError, variable, text)
    read: dict[Any, tuple[Callable[[str], Any], str]] = {
        int: (int, "an integer"),
        float: (float, "a number"),
        Sequence[int]: (listed_ids, "token ids, such as 2,7"),
    }
    for kind, (parse, what) in read.items():
        if kind in kinds:
            try:
                return parse(text)
            except ValueError as error:
                raise ConfigError(f"{variable} must be {what}, got {text!r}") from error
    return text


def with_port(settings: Settings, port: int) -> Settings:
    """The same settings with the port that was bound."""
    return replace(settings, server=replace(settings.server, port=port))
