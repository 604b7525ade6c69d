"""`manta chat` against a real HTTP server that answers as OpenAI's API does: in-process parts and real subprocesses."""

import asyncio
import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cluster.commands.chat.client import ChatClient, Delta
from cluster.commands.chat.conversation import Conversation
from cluster.commands.chat.slash_commands import Leave, obey
from cluster.errors import RequestError, Unavailable
from tests.programs import REPOSITORY, program

DEADLINE_S = 120.0  # for a subprocess on a busy machine


class FakeServer:
    """Answers by the last user message; remembers the bodies and whether a client left mid-stream."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.disconnected = threading.Event()
        routes = [Route("/v1/models", self.models), Route("/v1/chat/completions", self.complete, methods=["POST"])]
        app = Starlette(routes=routes)
        self.server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none", lifespan="off")
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "tiny"}, {"id": "other"}]})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        prompt = body["messages"][-1]["content"]
        if prompt == "too long":
            error = {"message": "the prompt has 99 tokens,\nthe context 64", "type": "invalid_request_error"}
            return JSONResponse({"error": error}, status_code=400)
        if prompt == "secret":
            return JSONResponse({"error": {"message": "the API key is not known"}}, status_code=401)
        return StreamingResponse(self.stream(prompt), media_type="text/event-stream")

    async def stream(self, prompt: str) -> "asyncio.AsyncIterator[bytes]":
        def event(choice: dict | None, **fields: object) -> bytes:
            choices = [] if choice is None else [{"index": 0, **choice}]
            return b"data: " + json.dumps({"choices": choices, **fields}, ensure_ascii=False).encode() + b"\n\n"

        yield event({"delta": {"role": "assistant", "content": ""}})
        if prompt == "forever":
            try:
                for number in range(10_000):
                    yield event({"delta": {"content": f"{number} "}})
                    await asyncio.sleep(0.02)
            finally:
                self.disconnected.set()
        if prompt == "silent":
            try:
                await asyncio.sleep(60)
            finally:
                self.disconnected.set()
        if prompt == "parts":
            yield event({"delta": {"content": [{"type": "text", "text": "a"}]}})
        if prompt == "usage":
            yield event(None, usage={"completion_tokens": "7"})
        if prompt == "null":
            yield event(None, error=None)
        yield b": a comment\n\n"
        if prompt == "think":
            for name in ("reasoning_content", "reasoning"):
                yield event({"delta": {name: "Let me \x1b[31msee. "}})
        for piece in {"separators": ["a\u2028b", "\x85c\n", "\n  d"], "escape": ["\x1b[31mred\x07"]}.get(
            prompt, ["You said ", f"«{prompt}» ", "🎣."]
        ):
            yield event({"delta": {"content": piece}})
        if prompt == "break":
            return
        if prompt == "fail":
            yield b'data: {"error": {"message": "expert group 3 did not answer"}}\n\n'
            return
        yield event({"delta": {}, "finish_reason": "length" if prompt == "long" else "stop"})
        yield event(None, usage={"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12})
        yield b"data: [DONE]\n\n"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    fake.thread.start()
    deadline = time.monotonic() + DEADLINE_S
    while not fake.server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield fake
    fake.server.should_exit = fake.server.force_exit = True
    fake.thread.join(DEADLINE_S)


@pytest.fixture
def client(server: FakeServer) -> Iterator[ChatClient]:
    client = ChatClient(server.url)
    yield client
    client.close()


def ask(client: ChatClient, prompt: str) -> list[Delta]:
    return list(client.answer("tiny", [{"role": "user", "content": prompt}], {}))


def manta_chat(url: str, lines: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cluster.cli", "chat", "--url", url, *options]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=DEADLINE_S)


def test_a_streamed_answer(client: ChatClient) -> None:
    deltas = ask(client, "hello")
    assert "".join(delta.text for delta in deltas) == "You said «hello» 🎣."
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
    assert deltas[-1].completion_tokens == 7


def test_unicode_line_separators_do_not_split_an_event(client: ChatClient) -> None:
    """httpx's own iter_lines splits on U+2028 and U+0085, which JSON may carry raw, and breaks such an answer."""
    assert "".join(delta.text for delta in ask(client, "separators")) == "a\u2028b\x85c\n\n  d"


def test_server_errors_carry_their_message(client: ChatClient) -> None:
    with pytest.raises(RequestError, match="99 tokens"):
        ask(client, "too long")
    with pytest.raises(Unavailable, match="expert group 3 did not answer"):
        ask(client, "fail")
    with pytest.raises(Unavailable, match="before the answer was complete"):
        ask(client, "break")


@pytest.mark.parametrize("prompt", ["parts", "usage"])
def test_a_server_that_answers_in_another_shape_is_told_of(client: ChatClient, prompt: str) -> None:
    """What was no text, or no number, ended the chat with a stack."""
    with pytest.raises(Unavailable, match="does not speak OpenAI's API: TypeError"):
        ask(client, prompt)


def test_an_error_that_is_none_is_none(client: ChatClient) -> None:
    assert ask(client, "null")[-1].completion_tokens == 7


def test_a_url_may_end_in_v1(server: FakeServer) -> None:
    client = ChatClient(server.url + "/v1/")
    assert client.models() == ["tiny", "other"]
    client.close()


def test_leaving_an_answer_early_closes_the_connection(server: FakeServer, client: ChatClient) -> None:
    stream = client.answer("tiny", [{"role": "user", "content": "forever"}], {})
    next(stream)
    stream.close()
    assert server.disconnected.wait(DEADLINE_S)


def test_roles_alternate_whatever_happened() -> None:
    conversation = Conversation(system="be brief")
    conversation.record("one", "1")
    conversation.record("stopped before a word", "")
    conversation.record("three", "3, inter")
    assert [m["role"] for m in conversation.messages("four")] == ["system", *["user", "assistant"] * 2, "user"]


@pytest.mark.parametrize(
    ("line", "said", "after"),
    [
        ("/system be  brief ", "system text set", ("be  brief", 0.5, 1)),
        ("/system", "no system text", (None, 0.5, 1)),
        ("/temperature 0", "temperature 0", ("old", 0.0, 1)),
        ("/temperature", "default", ("old", None, 1)),
        ("/temperature hot", "'hot'", ("old", 0.5, 1)),
        ("/temperature nan", "'nan'", ("old", 0.5, 1)),
        ("/temperature -1", "'-1'", ("old", 0.5, 1)),
        ("/reset", "forgotten", ("old", 0.5, 0)),
        ("/help", "/temperature X", ("old", 0.5, 1)),
        ("/hepl", "unknown command /hepl", ("old", 0.5, 1)),
    ],
)
def test_slash_commands(line: str, said: str, after: tuple[str | None, float | None, int]) -> None:
    conversation = Conversation("old", 0.5, [("hello", "hi")])
    assert said in obey(line, conversation)
    assert (conversation.system, conversation.temperature, len(conversation.turns)) == after


def test_exit_leaves() -> None:
    with pytest.raises(Leave):
        obey("/exit", Conversation())


def test_piped_lines(server: FakeServer, tmp_path) -> None:
    """Answers alone on stdout; history, settings and the key in the requests."""
    (tmp_path / "key").write_text("sk-1\n")
    lines = "/system be brief\n/temperature 0.5\nhello\n\nlong\n/reset\nagain\n"
    done = manta_chat(server.url, lines, "--key-file", str(tmp_path / "key"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "You said «hello» 🎣.\nYou said «long» 🎣.\nYou said «again» 🎣.\n"
    system = {"role": "system", "content": "be brief"}
    hello = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "You said «hello» 🎣."}]
    assert [body["messages"] for body in server.bodies] == [
        [system, *hello[:1]],
        [system, *hello, {"role": "user", "content": "long"}],
        [system, {"role": "user", "content": "again"}],
    ]
    assert {(body["model"], body["temperature"]) for body in server.bodies} == {("tiny", 0.5)}
    assert set(server.keys) == {"Bearer sk-1"}
    assert re.search(r"7 tokens · [\d.]+ tokens/s · first token after [\d.]+ s", done.stderr)
    assert done.stderr.count("stopped at the length limit") == 1
    assert "also served: other" in done.stderr


def test_a_file_that_windows_wrote_has_a_key(server: FakeServer, tmp_path) -> None:
    """The mark that it begins with ended in a stack."""
    (tmp_path / "key").write_bytes(b"\xef\xbb\xbfsk-1\r\n")
    assert manta_chat(server.url, "hello\n", "--key-file", str(tmp_path / "key")).returncode == 0
    assert server.keys == ["Bearer sk-1"]


def test_what_is_no_key_is_told_and_not_shown(tmp_path) -> None:
    (tmp_path / "key").write_text("“sk-1”\n")
    done = manta_chat("http://127.0.0.1:1", "", "--key-file", str(tmp_path / "key"))
    assert (done.returncode, "its first line is no API key" in " ".join(done.stderr.split())) == (2, True)
    assert "sk-1" not in done.stderr


def test_what_the_model_thinks_is_shown_beside_the_answer(server: FakeServer) -> None:
    """It is no part of the answer, nor of the conversation; a long thought was a blank screen."""
    done = manta_chat(server.url, "think\nhello\n")
    assert done.stdout == "You said «think» 🎣.\nYou said «hello» 🎣.\n"
    assert "Let me [31msee. Let me [31msee. \n" in done.stderr
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "You said «think» 🎣."}


def test_a_server_error_is_shown_and_the_chat_goes_on(server: FakeServer) -> None:
    done = manta_chat(server.url, "too long\nhello\n", "--model", "mine")
    assert done.returncode == 1
    assert "Error: the prompt has 99 tokens, the context 64\n" in done.stderr
    assert done.stdout == "You said «hello» 🎣.\n"
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "hello"}]  # the refused turn is forgotten
    assert server.bodies[-1]["model"] == "mine"


def test_a_key_that_is_missing_is_asked_for_as_the_command_takes_it(server: FakeServer) -> None:
    """The server's message tells of headers."""
    done = manta_chat(server.url, "secret\n")
    assert "Error: the API key is not known; --key-file FILE names the file of one\n" in done.stderr


def test_an_answer_cannot_steer_the_terminal(server: FakeServer) -> None:
    assert manta_chat(server.url, "escape\n").stdout == "[31mred\n"


def test_no_server_is_one_line(server: FakeServer) -> None:
    done = manta_chat("http://127.0.0.1:1", "hello\n")
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"Error: cannot connect to http://127\.0\.0\.1:1 .*`manta serve`.*--url\n", done.stderr)


def test_chat_imports_neither_torch_nor_ray(server: FakeServer) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "cluster.cli", "chat", "--url", server.url]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "httpx" in imported
    assert not imported & {"torch", "ray", "transformers", "starlette"}


class Terminal:
    """`manta chat` on a pseudo-terminal of its own, where Ctrl-C is a key."""

    def __init__(self, url: str) -> None:
        master, slave = pty.openpty()
        self.master = master
        self.screen = ""
        self.process = subprocess.Popen(
            program("cluster.own_terminal", "chat", "--url", url),
            cwd=REPOSITORY,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(slave)

    def type(self, keys: str) -> None:
        self.screen = ""
        os.write(self.master, keys.encode())

    def expect(self, pattern: str, timeout_s: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.screen):
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} never appeared in {self.screen!r}"
            self.screen += os.read(self.master, 4096).decode(errors="replace")

    def interrupt(self) -> None:
        """Ctrl-C after a person's pause: a signal in the instant before a blocking read waits for the next one."""
        time.sleep(0.5)
        self.type("\x03")

    def interrupt_until(self, pattern: str | None) -> None:
        """Ctrl-C, again where it was missed, until the pattern appears, or the process ends."""
        for _ in range(5):
            self.interrupt()
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                if pattern is None:
                    self.process.wait(6)
                else:
                    self.expect(pattern, 6)
                return
        raise AssertionError(f"five times Ctrl-C did nothing; the screen: {self.screen!r}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        os.close(self.master)


@pytest.fixture
def terminal(server: FakeServer) -> Iterator[Terminal]:
    terminal = Terminal(server.url)
    terminal.expect("> ")
    yield terminal
    terminal.close()


@pytest.mark.parametrize(("prompt", "sign"), [("forever", "12 "), ("silent", "silent")])
def test_ctrl_c_stops_the_answer_only(server: FakeServer, terminal: Terminal, prompt: str, sign: str) -> None:
    """The server sees the disconnect; what was written stays in the history; a second Ctrl-C leaves."""
    terminal.type(f"{prompt}\n")
    terminal.expect(sign)
    deadline = time.monotonic() + DEADLINE_S
    while not server.bodies:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    terminal.interrupt()
    assert server.disconnected.wait(DEADLINE_S)
    terminal.expect(r"stopped.*\n(.|\n)*> ")
    terminal.type("hello\n")
    terminal.expect(r"7 tokens(.|\n)*> ")
    roles = [message["role"] for message in server.bodies[-1]["messages"]]
    if prompt == "forever":
        assert roles == ["user", "assistant", "user"]
        assert server.bodies[-1]["messages"][1]["content"].startswith("0 1 2 3 4 5 6 7 8 9 10 11 12 ")
    else:
        assert roles == ["user"]
    terminal.interrupt_until(r"Ctrl-C again(.|\n)*> ")
    terminal.interrupt_until(None)
    assert terminal.process.returncode == 0


def test_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.type("\x04")
    assert terminal.process.wait(DEADLINE_S) == 0
