"""The hub itself cannot be reached from a test, so a small server speaks the four routes that a download needs."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.hub import resolve_model
from cluster.errors import ConfigError
from tests.checkpoints import write_checkpoint
from tests.programs import said_by

SHA = "5c79a376139be989ef1838f360bf4f1f256d7aec"
OLDER = "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567"
NOWHERE = "http://127.0.0.1:1"


class Hub(ThreadingHTTPServer):
    """Serves the folders `<root>/<organization>/<model>`; remembers which files were fetched.

    `refs` says which commit a branch or a tag is. Commits other than SHA have folders of their own.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.root = root
        self.fetched: list[str] = []
        self.gated = False
        self.refs = {"main": SHA}

    def folder(self, model: str, commit: str) -> Path:
        """The model's files at a commit."""
        return self.root / model if commit == SHA else self.root / commit / model

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubRequest(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) > 4:
            self.describe("/".join(parts[2:4]), parts[4], unquote(parts[5]))
        elif len(parts) > 4 and parts[2] == "resolve":
            self.give(self.server.folder("/".join(parts[:2]), parts[3]).joinpath(*parts[4:]), parts[3])
        else:
            self.answer(404)

    do_HEAD = do_GET  # noqa: N815

    def describe(self, model: str, route: str, revision: str) -> None:
        commit = self.server.refs.get(revision, revision)
        folder = self.server.folder(model, commit)
        if self.server.gated:
            self.answer(403, **{"X-Error-Code": "GatedRepo"})
        elif not (self.server.root / model).is_dir():
            self.answer(404, **{"X-Error-Code": "RepoNotFound"})
        elif not folder.is_dir():
            self.answer(404, **{"X-Error-Code": "RevisionNotFound"})
        elif route == "revision":
            self.answer(200, json.dumps({"id": model, "sha": commit, "siblings": []}).encode())
        else:
            files = [file for file in folder.rglob("*") if file.is_file()]
            entries = [
                {
                    "type": "file",
                    "path": str(file.relative_to(folder)),
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                }
                for file in files
            ]
            self.answer(200, json.dumps(entries).encode())

    def give(self, file: Path, commit: str) -> None:
        if not file.is_file():
            self.answer(404, **{"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.server.fetched.append(file.name)
        content = file.read_bytes()
        self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **{"X-Repo-Commit": commit})

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def resolve(tmp_path: Path):
    """resolve_model in a process of its own, since the client reads its settings at import: (kind, message or path)."""

    def resolved(
        model: str, endpoint: str = NOWHERE, revision: str | None = None, **environment: str
    ) -> tuple[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        clean |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, **environment}
        said = said_by("cluster.resolve_model", model, *([] if revision is None else [revision]), environment=clean)
        kind, text = json.loads(said.splitlines()[-1])
        return kind, text

    return resolved


def cache(home: Path, model: str) -> Path:
    """An empty snapshot in the local cache, as older clients leave it."""
    folder = home / "hub" / f"models--{model.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(SHA)
    (folder / "snapshots" / SHA).mkdir(parents=True)
    return folder / "snapshots" / SHA


def test_an_existing_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve_model("org/model") == tmp_path / "org" / "model"
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "model",
    [
        "",
        "no/such/directory",
        "/no/such",
        "./none",
        "mixtral",
        "a b/c",
        "org/mödel",
        "-x/y",
        "~no-such-user/x",
        "x" * 300,
    ],
)
def test_what_is_neither_a_directory_nor_a_hub_id(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="neither a directory nor a hub id"):
        resolve_model(model)


def test_a_file_is_not_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "weights.safetensors").touch()
    with pytest.raises(ConfigError, match="neither a directory"):
        resolve_model("org/weights.safetensors")


def test_a_complete_cache_is_used_without_the_hub(tmp_path: Path, resolve):
    snapshot = cache(tmp_path / "home", "org/model")
    write_checkpoint(snapshot)
    assert resolve("org/model") == ("path", str(snapshot))
    assert resolve("org/model", HF_HUB_OFFLINE="1") == ("path", str(snapshot))


def test_an_incomplete_cache_without_the_hub_says_both(tmp_path: Path, resolve):
    snapshot = cache(tmp_path / "home", "org/model")
    write_checkpoint(snapshot)
    (snapshot / "model.safetensors").unlink()
    kind, message = resolve("org/model")
    assert kind == "ConfigError"
    assert "cannot be fetched from the hub" in message
    assert "has no weights; expected model*.safetensors" in message


def test_an_unknown_model_offline_and_online(hub: Hub, resolve):
    kind, message = resolve("org/model")
    assert (kind, "cannot be fetched from the hub" in message) == ("ConfigError", True)
    kind, message = resolve("org/model", HF_HUB_OFFLINE="1")
    assert (kind, "offline" in message) == ("ConfigError", True)
    kind, message = resolve("org/model", hub.url)
    assert (kind, "the hub knows no such model" in message) == ("ConfigError", True)


def test_a_gated_model(hub: Hub, resolve):
    hub.gated = True
    kind, message = resolve("org/model", hub.url)
    assert (kind, "is gated" in message) == ("ConfigError", True)


def test_a_download_takes_what_is_served_and_nothing_else(hub: Hub, resolve):
    model = hub.root / "org" / "model"
    write_checkpoint(model, shards=2)
    write_checkpoint(model, layout="mistral")
    wanted = {file.name for file in model.iterdir() if not file.name.startswith("consolidated")}
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer.model.v3"):
        (model / name).write_text(f"of {name}")  # the client fetches equal files once
        wanted.add(name)
    for name in ("pytorch_model.bin", "modeling_x.py", "consolidated.00.pth", "README.md", "original/params.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(f"of {name}")
    kind, path = resolve("org/model", hub.url)
    assert kind == "path"
    assert {file.name for file in Path(path).iterdir()} == wanted
    assert sorted(hub.fetched) == sorted(wanted)
    assert open_checkpoint(path).fingerprint == open_checkpoint(model).fingerprint
    assert resolve("org/model") == ("path", path)  # and from then on without the hub


def test_an_interrupted_download_is_completed(hub: Hub, resolve):
    write_checkpoint(hub.root / "org" / "model", shards=2)
    _, path = resolve("org/model", hub.url)
    lost = Path(path) / "model-00002-of-00002.safetensors"
    lost.resolve().unlink()
    lost.unlink(missing_ok=True)
    hub.fetched.clear()
    assert resolve("org/model", hub.url) == ("path", path)
    open_checkpoint(path)
    assert hub.fetched == [lost.name]


def test_mistrals_layout_is_downloaded_where_there_is_no_other(hub: Hub, resolve):
    write_checkpoint(hub.root / "org" / "model", layout="mistral")
    (hub.root / "org" / "model" / "tekken.json").write_text("{}")
    kind, path = resolve("org/model", hub.url)
    assert kind == "path"
    assert {file.name for file in Path(path).iterdir()} == {"params.json", "tekken.json", "consolidated.safetensors"}
    assert open_checkpoint(path).layout == "mistral"


def test_unsafe_weights_are_not_downloaded(hub: Hub, resolve):
    model = hub.root / "org" / "model"
    write_checkpoint(model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    kind, message = resolve("org/model", hub.url)
    assert (kind, "reads safetensors only" in message) == ("CheckpointError", True)
    assert hub.fetched == []


def test_another_architecture_is_refused_before_its_weights_are_downloaded(hub: Hub, resolve):
    model = hub.root / "org" / "model"
    write_checkpoint(model)
    config = json.loads((model / "config.json").read_text())
    del config["num_attention_heads"]
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    kind, message = resolve("org/model", hub.url)
    assert (kind, "num_attention_heads is missing" in message) == ("CheckpointError", True)
    assert "model.safetensors" not in hub.fetched


@pytest.fixture
def two_commits(hub: Hub) -> tuple[Path, Path]:
    """What the hub has of org/model on main, and at the tag v1: other weights."""
    newest, tagged = hub.root / "org" / "model", hub.root / OLDER / "org" / "model"
    write_checkpoint(newest)
    write_checkpoint(tagged, shards=2, seed=1)
    hub.refs |= {"v1": OLDER, "refs/pr/7": OLDER}
    return newest, tagged


def test_a_revision_is_what_is_served_and_is_known_by_its_commit(hub: Hub, resolve, two_commits):
    """Whatever somebody put on main since the server was last started was served, and nothing told."""
    _, main = resolve("org/model", hub.url)
    found = {resolve("org/model", hub.url, revision) for revision in ("v1", "refs/pr/7", OLDER)}
    [(kind, path)] = found
    assert kind == "path", path
    checkpoints = [open_checkpoint(one) for one in (main, path)]
    assert [one.fingerprint for one in checkpoints] == [open_checkpoint(one).fingerprint for one in two_commits]
    assert [one.revision for one in checkpoints] == [SHA, OLDER]
    assert resolve("org/model", NOWHERE, "refs/pr/7") == ("path", path), "from then on without the hub"
    assert resolve("org/model") == ("path", main)


def test_an_unknown_revision_is_named(hub: Hub, resolve, two_commits):
    assert resolve("org/model", hub.url, "v9") == ("ConfigError", "revision: the hub's org/model has no 'v9'.")


def test_a_directory_has_no_revision(tmp_path: Path):
    for model in (str(tmp_path), "demo"):
        with pytest.raises(ConfigError, match="only a model of the hub has revisions"):
            resolve_model(model, "v1")
    write_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path).revision is None
