"""`manta chat`: reads lines, streams answers to the terminal. HTTP is `client`'s, the history conversation's.

Answers go to stdout and everything else to stderr, so that `echo question | manta chat > answer.txt` is useful.
"""

from __future__ import annotations

import io
import sys
import time
from contextlib import closing
from pathlib import Path

from rich.console import Console

from cluster.commands.chat.client import ChatClient
from cluster.commands.chat.conversation import Conversation
from cluster.commands.chat.slash_commands import Leave, obey
from cluster.errors import MantaError, RequestError, Unavailable

_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (0x09, 0x0A)}


def run(url: str, model: str | None, key_file: Path | None) -> int:
    """Chat until the user leaves. Returns the exit code: 1 when stdin is not a terminal and an answer failed."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with closing(ChatClient(url, _read_key(key_file))) as client:
        names = [model] if model else client.models()
        if not names:
            raise Unavailable(f"{client.url} serves no model")
        chat = Chat(client, names[0], Console(soft_wrap=True, highlight=False), Console(stderr=True, highlight=False))
        chat.notice(f"{names[0]} at {client.url} · /help lists the commands, Ctrl-D leaves")
        if names[1:]:
            chat.notice(f"also served: {', '.join(names[1:])} (choose with --model)")
        return chat.loop()


def _read_key(key_file: Path | None) -> str | None:
    if key_file is None:
        return None
    try:
        lines = key_file.read_text("utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {key_file}: {error}") from error
    if not lines:
        raise RequestError(f"{key_file} is empty; its first line has to be the API key")
    if not (lines[0].isascii() and lines[0].isprintable()):
        raise RequestError(f"{key_file}: its first line is no API key, which is of ASCII's characters")
    return lines[0]


class Chat:
    """One conversation with one model on one terminal."""

    def __init__(self, client: ChatClient, model: str, answers: Console, notices: Console) -> None:
        self.client = client
        self.model = model
        self.answers = answers
        self.notices = notices
        self.conversation = Conversation()
        self.interactive = sys.stdin.isatty()

    def notice(self, text: str, style: str = "dim") -> None:
        self.notices.print(text, style=style, markup=False, emoji=False, soft_wrap=True)

    def loop(self) -> int:
        """Read lines until the end of input, /exit, or Ctrl-C at the prompt after a Ctrl-C."""
        failed = interrupted = False
        while True:
            try:
                line = self._read_line()
                interrupted = False
                if line.startswith("/"):
                    self.notice(obey(line, self.conversation))
                elif line:
                    self._answer(line)
            except (EOFError, Leave):
                return int(failed and not self.interactive)
            except MantaError as error:
                failed = True
                self.notice(f"Error: {' '.join(_printable(str(error)).split())}", style="red")
            except KeyboardInterrupt:
                if interrupted:
                    return int(failed and not self.interactive)
                interrupted = True
                self.notice("\nstopped · Ctrl-C again, or Ctrl-D, leaves")

    def _read_line(self) -> str:
        if self.interactive:
            import readline  # noqa: F401  # gives input() arrow keys and history

            return input("> ").strip()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.strip()

    def _answer(self, prompt: str) -> None:
        """Stream one answer and its figures. Whatever ends it, what was shown is kept in the history.

        What the model thinks goes where notices go, and into no history.
        """
        shown: list[str] = []
        is_thinking = False
        started = time.monotonic()
        first = last = None
        tokens: int | None = None
        finish_reason: str | None = None
        stream = self.client.answer(self.model, self.conversation.messages(prompt), self.conversation.sampling())
        try:
            with closing(stream), self.notices.status("", spinner="dots") as waiting:
                for delta in stream:
                    if delta.text or delta.reasoning:
                        waiting.stop()
                        last = time.monotonic()
                        first = first or last
                    if delta.reasoning:
                        is_thinking = True
                        self.notices.out(_printable(delta.reasoning), end="", style="dim", highlight=False)
                    if delta.text:
                        if is_thinking:
                            is_thinking = False
                            self.notices.out("")
                        shown.append(delta.text)
                        self.answers.out(_printable(delta.text), end="", highlight=False)
                    tokens = delta.completion_tokens if delta.completion_tokens is not None else tokens
                    finish_reason = delta.finish_reason or finish_reason
        finally:
            if is_thinking:
                self.notices.out("")
            self.conversation.record(prompt, "".join(shown))
            if shown:
                self.answers.out("")
        self.notice(_figures(tokens, finish_reason, started, first, last))


def _figures(
    tokens: int | None, finish_reason: str | None, started: float, first: float | None, last: float | None
) -> str:
    """Tokens of the answer, tokens a second after the first one, and the time to the first one."""
    parts = [] if tokens is None else [f"{tokens} token{'' if tokens == 1 else 's'}"]
    if tokens and tokens > 1 and first is not None and last is not None and last > first:
        parts.append(f"{(tokens - 1) / (last - first):.1f} tokens/s")
    parts.append("empty answer" if first is None else f"first token after {first - started:.2f} s")
    if finish_reason == "length":
        parts.append("stopped at the length limit")
    return " · ".join(parts)


def _printable(text: str) -> str:
    """Without control characters: what a model writes must not steer the terminal."""
    return text.translate(_CONTROL)
