"""A child process that spells and compiles grammars on trial, so that a hostile one can be killed. Knows no engine.

    coordinator ── grammars, pickled ──────▶ this process ── fork ──▶ one process per trial
                ◀── verdicts, JSON lines ──               ◀── pipe ──

The child has read the vocabulary already when it forks, so a trial costs milliseconds besides its own work, and what it
allocates goes with it. A trial that runs past its time or memory is killed, and nothing else is. On a busy machine it
has longer, until it had a quarter of its time as CPU time: what else there is to do is no fault of a grammar. Spelling
is Python, which would keep the coordinator's other threads from theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import psutil

from cluster.errors import InvalidRequest, Overloaded, Unavailable
from cluster.messages import Grammar
from router_service.grammar.cost import walk
from router_service.grammar.grammar import param
from router_service.grammar.structural_tags.format import part_tag, parts, pattern_tags, structural_tag
from router_service.grammar.vocabulary import GrammarVocabulary, compile_tag, new_compiler

if TYPE_CHECKING:
    from xgrammar import TokenizerInfo

_START_TIMEOUT_S = 120.0  # to import xgrammar and read the vocabulary
_GRACE_S = 30.0  # beyond a trial's own time, on a busy machine
_ANSWER_S = 10.0  # and for the child to say that it took longer
_CPU_SHARE = 0.25  # of its time that a trial is to have had as CPU time, before it is ended for that
_POLL_S = 0.1
_MAX_BYTES = 2 * 2**30  # that one trial may allocate


class TrialProcess:
    """The coordinator's end: starts the child when it is first needed. Not thread-safe."""

    def __init__(self, vocabulary: GrammarVocabulary, timeout_s: float) -> None:
        self._vocabulary = vocabulary
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, grammar: Grammar) -> str:
        """The structural tag. Raises InvalidRequest, which names the part; Overloaded if the machine is too busy for a
        trial; or Unavailable if none can be held.
        """
        verdict = self._ask(grammar)
        if verdict["is_late"]:
            raise Overloaded("the machine is too busy to compile a grammar; try again later", reason="shed_grammars")
        if verdict["error"] is not None:
            at = verdict["at"]
            field = parts(grammar)[at].param if at is not None else param(grammar)
            raise InvalidRequest(f"{field}: {verdict['error']}", param=field)
        tag: str = verdict["tag"]
        return tag

    def close(self) -> None:
        """Kill the child; it is started again when needed."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # an order that was never read
                        pipe.close()

    def _ask(self, grammar: Grammar) -> dict[str, Any]:
        try:
            process = self._process or self._start()
            assert process.stdin is not None
            pickle.dump((grammar, self._timeout_s), process.stdin)
            process.stdin.flush()
            verdict: dict[str, Any] = json.loads(_read_line(process, self._timeout_s + _GRACE_S + _ANSWER_S))
        except (OSError, TimeoutError, EOFError) as error:
            self.close()
            raise Unavailable("the grammar compiler does not answer") from error
        return verdict

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "router_service.grammar.trial", json.dumps(asdict(self._vocabulary))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # xgrammar writes what clients sent there
            env=environment,
        )
        _read_line(self._process, _START_TIMEOUT_S)
        return self._process


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    """One line of the child's output. Raises TimeoutError, or EOFError when it has ended."""
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        data = os.read(process.stdout.fileno(), 65536)
        if not data:
            raise EOFError
        line += data
    return line


def _main() -> None:
    """The child: reads orders until its parent closes the pipe."""
    arguments = json.loads(sys.argv[1])
    vocabulary = GrammarVocabulary(**{**arguments, "eos_token_ids": tuple(arguments["eos_token_ids"])})
    os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's: it closes the pipe
    info = vocabulary.tokenizer_info()
    print("ready", flush=True)
    with contextlib.suppress(EOFError):
        while True:
            print(json.dumps(_trial(info, *pickle.load(sys.stdin.buffer))), flush=True)


def _trial(info: TokenizerInfo, grammar: Grammar, timeout_s: float) -> dict[str, Any]:
    """A verdict: `error`, or None and the `tag`; `at`: the index of the part it concerns, or None for the whole.

    `is_late`: the trial did not get the CPU time that it was to have.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            _hold(info, grammar, timeout_s, writer)
        finally:
            os._exit(0)
    os.close(writer)
    report = b""
    begun = time.monotonic()
    error, is_late = "it needs too much memory to compile", False  # unless the trial says how it ended
    while True:
        if select.select([reader], [], [], _POLL_S)[0]:
            data = os.read(reader, 65536)
            if not data:
                break
            report += data
            continue
        seconds = time.monotonic() - begun
        if seconds > timeout_s and _cpu_s(pid) > _CPU_SHARE * timeout_s:
            error = f"it takes longer than {timeout_s:g} s to compile"
            break
        if seconds > timeout_s + _GRACE_S:
            is_late = True
            break
    os.close(reader)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    said = [json.loads(line) for line in report.splitlines() if line.endswith(b"}")]
    last = said[-1] if said else {"at": None}
    return {"at": last["at"], "error": last.get("verdict", error), "tag": last.get("tag"), "is_late": is_late}


def _cpu_s(pid: int) -> float:
    """That our child has had, also where it has just ended."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _hold(info: TokenizerInfo, grammar: Grammar, timeout_s: float, writer: int) -> None:
    """The trial itself, in a process of its own: says what it is at, and in the end its verdict."""
    seconds = int(timeout_s) + 2  # of CPU, in case nobody is left to kill it
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(ValueError, OSError):  # not every system limits the address space
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + _MAX_BYTES, used + _MAX_BYTES))
    at: int | None = None

    def say(**report: Any) -> None:
        os.write(writer, json.dumps({"at": at, **report}).encode() + b"\n")

    try:
        compiler = new_compiler(info)
        for index, part in enumerate(parts(grammar)):
            at = index
            say()
            for tag in (part_tag(part), *pattern_tags(part)):
                walk(compile_tag(compiler, tag), info.vocab_size)
        at = None
        say()
        whole = structural_tag(grammar)
        walk(compile_tag(compiler, whole), info.vocab_size)
        say(verdict=None, tag=whole)
    except ValueError as error:
        say(verdict=str(error))
    except (MemoryError, RuntimeError):
        say(verdict="it needs too much memory to compile")


if __name__ == "__main__":
    _main()
