"""What a client does wrong is one line in the logs, and none of its words."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from tests.conftest import Server
from tests.processes import command_line, processes, status
from tests.waiting import wait_for

CANARY = "xylophone"  # a word of the client's, wherever it may be put
NUM_LEAVING = 20
RAY_REPORT_S = 3.0  # an agent of Ray's reports what has failed once a second
CHAT: dict[str, Any] = {"model": "manta-demo", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 4}
LONG: dict[str, Any] = {"max_tokens": 30_000, "ignore_eos": True}  # nearly the context: many seconds anywhere
FAULT = re.compile(rb"\bERROR\b|Traceback|Exception")


def schema(document: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": document}}}


# What is wrong, and where: in the gateway before the prompt is read, after it, and in the coordinator.
HTTP_MISTAKES: dict[str, tuple[str, Any, int]] = {
    "no JSON": ("/v1/chat/completions", CANARY.encode(), 400),
    "a wrong value": ("/v1/chat/completions", CHAT | {"temperature": CANARY}, 400),
    "the same, streamed": ("/v1/chat/completions", CHAT | {"temperature": CANARY, "stream": True}, 400),
    "a wrong value of responses": ("/v1/responses", {"model": "manta-demo", "input": {CANARY: 1}}, 400),
    "an unknown model": ("/v1/completions", {"model": CANARY, "prompt": CANARY}, 404),
    "an unknown route": (f"/v1/{CANARY}?{CANARY}={CANARY}", CHAT, 404),
    "a wrong method": ("/v1/models", CHAT, 405),
    "a prompt that is too long": ("/v1/completions", {"model": "manta-demo", "prompt": f"{CANARY} " * 9000}, 400),
    "no such token": ("/detokenize", {"model": "manta-demo", "tokens": [10**6]}, 400),
    "a model of another kind": ("/v1/embeddings", {"model": "manta-demo", "input": CANARY}, 400),
    "a schema that nothing satisfies": (
        "/v1/chat/completions",
        CHAT | schema({"type": "object", "properties": {CANARY: {"enum": []}}, "required": [CANARY]}),
        400,
    ),
    "a range that is empty": (
        "/v1/chat/completions",
        CHAT | schema({"type": "integer", "minimum": 5, "maximum": 4, "title": CANARY}),
        400,
    ),
    "a pattern that is none": (
        "/v1/chat/completions",
        CHAT | schema({"type": "object", "properties": {CANARY: {"type": "string", "pattern": f"({CANARY}"}}}),
        400,
    ),
}


def messages(role: str = "user") -> list[chat_pb2.Message]:
    return [chat_pb2.Message(role=role, content=CANARY)]


RPC_MISTAKES: dict[str, tuple[str, Any]] = {
    "Chat": ("Chat", chat_pb2.ChatRequest(model="manta-demo", messages=messages(CANARY))),
    "ChatStream": ("ChatStream", chat_pb2.ChatRequest(model="manta-demo", messages=messages(CANARY))),
    "an unknown model": ("ChatStream", chat_pb2.ChatRequest(model=CANARY, messages=messages())),
    "Generate": ("Generate", chat_pb2.GenerateRequest(model="manta-demo", text=f"{CANARY} " * 9000)),
    "GenerateStream": ("GenerateStream", chat_pb2.GenerateRequest(model="manta-demo", text=f"{CANARY} " * 9000)),
    "Embed": ("Embed", chat_pb2.EmbedRequest(model=CANARY)),
    "Tokenize": ("Tokenize", chat_pb2.TokenizeRequest(model=CANARY, text=CANARY)),
    "Detokenize": ("Detokenize", chat_pb2.DetokenizeRequest(model="manta-demo", token_ids=[10**6])),
}


class Logs:
    """All log files of the server's Ray session, from now on."""

    def __init__(self, server: Server) -> None:
        command_lines = (command_line(process) for process in processes(server, "/session_"))
        [session] = {found for line in command_lines for found in re.findall(r"(/\S*/session_[\w-]+)/", line)}
        self._folder = Path(session, "logs")
        self._sizes = {file: file.stat().st_size for file in self._files()}

    def _files(self) -> list[Path]:
        return [file for file in self._folder.rglob("*") if file.is_file() and not file.is_symlink()]

    def lines(self) -> list[bytes]:
        """What has come since."""
        written: list[bytes] = []
        for file in self._files():
            with file.open("rb") as content:
                content.seek(self._sizes.get(file, 0))
                written += content.read().splitlines()
        return written


@pytest.fixture
def logs(server: Any) -> Iterator[Logs]:
    """Without a fault and without a client's word at the end of the test."""
    logs = Logs(server)
    yield logs
    lines = logs.lines()
    assert not [line[:300] for line in lines if FAULT.search(line)]
    assert not [line[:300] for line in lines if CANARY.encode() in line]


def said_once(logs: Logs, request_ids: list[str]) -> Callable[[], bool]:
    """Whether each of these requests has its line, and no other."""

    def is_said() -> bool:
        lines = logs.lines()
        found = [[line for line in lines if request_id.encode() in line] for request_id in request_ids]
        assert all(len(of_one) <= 1 for of_one in found), found
        assert all(b" INFO gateway.requests: " in line for of_one in found for line in of_one)
        return all(found)

    return is_said


def test_a_clients_mistake_over_http_is_one_line(server: Any, logs: Logs) -> None:
    """What the coordinator refused was an ERROR there, with a traceback and the client's own words in it."""
    request_ids = []
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for what, (path, body, status) in HTTP_MISTAKES.items():
            content = {"content": body} if isinstance(body, bytes) else {"json": body}
            answer = client.post(path, **content, headers={"content-type": "application/json"})
            assert answer.status_code == status, (what, answer.text)
            assert answer.json()["error"]["message"]
            request_ids.append(answer.headers["x-manta-request-id"])
    assert len(set(request_ids)) == len(HTTP_MISTAKES)
    wait_for(said_once(logs, request_ids), 30, "a line for each")


def test_a_clients_mistake_over_grpc_is_one_line(server: Any, logs: Logs) -> None:
    """A stream that was refused was two ERRORs, each with a traceback and the status's details. Its trailing metadata,
    which names the request, was lost on the way."""
    request_ids = []
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        for what, (rpc, request) in RPC_MISTAKES.items():
            call = getattr(stub, rpc)
            with pytest.raises(grpc.RpcError) as refused:
                next(call(request, timeout=60)) if rpc.endswith("Stream") else call(request, timeout=60)
            code = refused.value.code()  # type: ignore[attr-defined]
            assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), what
            metadata = refused.value.trailing_metadata()  # type: ignore[attr-defined]
            request_ids += [str(value) for name, value in metadata if name == "x-request-id"]
    assert len(set(request_ids)) == len(RPC_MISTAKES)
    wait_for(said_once(logs, request_ids), 30, "a line for each")


def test_a_client_that_leaves_is_no_error(server: Any, logs: Logs, wait_until_idle: Callable[[float], float]) -> None:
    """One that left a gRPC stream while a message was being written to it was an ERROR with a traceback."""
    sampling = chat_pb2.Sampling(**LONG)
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        request = chat_pb2.ChatRequest(model="manta-demo", messages=messages(), sampling=sampling)
        for stream in [stub.ChatStream(request, timeout=60) for _ in range(NUM_LEAVING)]:
            next(stream)
            stream.cancel()
        call = stub.Chat.future(request, timeout=60)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            with client.stream("POST", "/v1/chat/completions", json=CHAT | LONG | {"stream": True}) as answer:
                next(answer.iter_bytes())
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=CHAT | LONG, timeout=0.5)
        call.cancel()
    wait_until_idle(30)


def test_who_looks_at_the_cluster_leaves_it(server: Any, logs: Logs) -> None:
    """Each `manta status` was a driver that had failed, with a traceback of Ray's."""
    status(server)
    command = [sys.executable, "-m", "cluster.cli", "status", "--watch", "--address", server.ray_address]
    terminal = os.environ | {"FORCE_COLOR": "1"}  # else only the last frame is printed
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=terminal) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        assert watching.wait(60) == 0
    time.sleep(RAY_REPORT_S)
