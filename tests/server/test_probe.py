"""The file with the server's address, and the health check of containers that reads it."""

import http.server
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dllmserve.errors import ConfigError
from dllmserve.server.config import ServerConfig
from dllmserve.server.probe import main, probe
from dllmserve.server.serve import _address_file, address
from tests.server.clients.started import started

TLS = {"ssl_certfile": "c", "ssl_keyfile": "k"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ServerConfig(), "http://127.0.0.1:8000"),
        (ServerConfig(host="0.0.0.0", port=9000), "http://127.0.0.1:9000"),
        (ServerConfig(host="::", port=9000), "http://[::1]:9000"),
        (ServerConfig(host="::1", **TLS), "https://[::1]:8000"),
        (ServerConfig(host="10.0.0.7", **TLS), "https://10.0.0.7:8000"),
        (ServerConfig(host="localhost"), "http://localhost:8000"),
    ],
)
def test_addresses(config: ServerConfig, expected: str) -> None:
    assert address(config) == expected


def test_the_file_is_there_while_the_server_is(tmp_path: Path) -> None:
    file = tmp_path / "address"
    with _address_file(ServerConfig(address_file=str(file), port=9000)):
        assert file.read_text() == "http://127.0.0.1:9000\n"
    assert not file.exists()
    missing = ServerConfig(address_file=str(tmp_path / "no" / "address"))
    with pytest.raises(ConfigError, match=r"--address-file .* cannot be written"):
        with _address_file(missing):
            raise AssertionError


def test_a_server_on_any_port_is_found(
    tmp_path: Path, byte_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "address"
    options = [str(byte_checkpoint), "--job-store", "memory", "--address-file", str(file)]
    with started(tmp_path, *options) as server:
        assert file.read_text() == f"{server.url}\n"
        assert main([str(file)]) == 0
        copy = Path(shutil.copy(file, tmp_path / "copy"))
    assert not file.exists()
    for gone in (file, copy):
        assert main([str(gone)]) == 1
        assert capsys.readouterr().err.strip()


class _Handler(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def listening(context: ssl.SSLContext | None, status: int = 200) -> Iterator[int]:
    handler = type("Handler", (_Handler,), {"status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_no_proxy_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    file = tmp_path / "address"
    with listening(None, 200) as port:
        file.write_text(f"http://127.0.0.1:{port}\n")
        assert main([str(file)]) == 0


def test_a_server_that_is_not_well(tmp_path: Path) -> None:
    file = tmp_path / "address"
    with listening(None, 503) as port:
        file.write_text(f"http://127.0.0.1:{port}\n")
        assert "503" in probe(str(file))
    file.write_text("nonsense")
    assert probe(str(file))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
@pytest.mark.parametrize("clients", [False, True])
def test_tls(clients: bool, tmp_path: Path) -> None:
    """Certificates that nobody has signed are as good here, and none of a client is needed."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=a.example"]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    if clients:
        context.load_verify_locations(certificate)
        context.verify_mode = ssl.CERT_REQUIRED
    file = tmp_path / "address"
    with listening(context) as port:
        file.write_text(f"https://127.0.0.1:{port}\n")
        assert probe(str(file)) == ""


def test_it_imports_little() -> None:
    code = "import sys, dllmserve.server.probe; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"'torch'", "'fastapi'", "'pydantic'", "'uvicorn'"} & set(done.stdout.split(", "))


def test_the_image_checks_the_file_that_it_names() -> None:
    text = (Path(__file__).parents[2] / "deploy" / "Dockerfile").read_text()
    assert "DLLMSERVE_ADDRESS_FILE=/tmp/dllmserve.address" in text
    assert '"dllmserve.server.probe", "/tmp/dllmserve.address"]' in text
