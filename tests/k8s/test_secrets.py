"""The Secrets: fresh ones, and those that a pod makes. An API server cannot be had; this one speaks its one route."""

import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.commands.k8s.secrets import create_missing, fresh_secrets
from cluster.errors import SetupError
from gateway.admission.api_keys import ApiKeyFile


class ApiServer(ThreadingHTTPServer):
    """Makes Secrets in one namespace, for one token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ApiRequest)
        self.secrets: dict[str, dict[str, str]] = {}
        self.token = "of-the-account"

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server_port}"


class ApiRequest(BaseHTTPRequestHandler):
    server: ApiServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["metadata"]["name"]
        if self.headers["Authorization"] != f"Bearer {self.server.token}":
            return self._answer(403, {"reason": "Forbidden"})
        if self.path != "/api/v1/namespaces/manta/secrets" or body["metadata"]["namespace"] != "manta":
            return self._answer(404, {"reason": "NotFound"})
        if name in self.server.secrets:
            return self._answer(409, {"reason": "AlreadyExists"})
        self.server.secrets[name] = body["stringData"]
        return self._answer(201, body)

    def _answer(self, status: int, body: object) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


def write_certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    certificate, key = directory / "server.crt", directory / "server.key"
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on the PATH")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=test",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return certificate, key


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """What Kubernetes mounts into a pod with a service account's token."""
    (tmp_path / "token").write_text("of-the-account\n")
    (tmp_path / "namespace").write_text("manta")
    return tmp_path


@pytest.fixture
def api_server(account: Path, tmp_path: Path) -> Iterator[ApiServer]:
    certificate, key = write_certificate(tmp_path)
    (account / "ca.crt").write_bytes(certificate.read_bytes())
    server = ApiServer()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_key_opens_the_door(tmp_path: Path) -> None:
    content = next(one for one in fresh_secrets() if one["metadata"]["name"] == "manta-api-keys")["stringData"]
    file = tmp_path / "keys.yaml"
    file.write_text(content["keys.yaml"])
    found = ApiKeyFile(file).find(content["first-key"])
    assert found is not None
    assert found.id == "first"


def test_printed_ones_are_fresh_each_time() -> None:
    first, second = (list(yaml.safe_load_all(CliRunner().invoke(app, ["k8s", "secrets"]).output)) for _ in range(2))
    assert [one["kind"] for one in first] == ["Secret"] * 5
    contents = [value for one in (*first, *second) for value in one["stringData"].values()]
    assert len(set(contents)) == len(contents)
    assert min(map(len, contents)) >= 32


def test_only_the_missing_are_made(api_server: ApiServer, account: Path) -> None:
    api_server.secrets["manta-ray-token"] = {"auth_token": "from a vault"}
    assert create_missing(api_server.url, account) == [
        "manta-lane-secret",
        "manta-metrics-token",
        "manta-redis-password",
        "manta-api-keys",
    ]
    assert api_server.secrets["manta-ray-token"] == {"auth_token": "from a vault"}
    before = dict(api_server.secrets)
    assert create_missing(api_server.url, account) == []
    assert api_server.secrets == before


def test_what_is_refused_is_said(api_server: ApiServer, account: Path) -> None:
    api_server.token = "another"
    with pytest.raises(SetupError, match="does not make the Secret manta-ray-token: 403"):
        create_missing(api_server.url, account)


def test_an_api_server_with_another_certificate_is_not_asked(
    api_server: ApiServer, account: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    certificate, _ = write_certificate(tmp_path / "other")
    (account / "ca.crt").write_bytes(certificate.read_bytes())
    with pytest.raises(SetupError, match="does not answer"):
        create_missing(api_server.url, account)
    assert not api_server.secrets


def test_outside_a_pod() -> None:
    result = CliRunner().invoke(app, ["k8s", "secrets", "--create"])
    assert isinstance(result.exception, SetupError)
    assert "has no service account's token" in str(result.exception)
