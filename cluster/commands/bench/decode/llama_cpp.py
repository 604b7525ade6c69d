"""llama.cpp, another half of `manta bench decode --compare`: its C API through llama-cpp-python, timed per token.

It has the same weights as GGUF, without mmap, and as many threads. Sequences have a part of its cache each.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.commands.bench.decode.figures import Run, Workload
from cluster.commands.bench.decode.gguf_file import GgufType, write_gguf
from cluster.commands.bench.decode.rival_process import RivalProcess, serve_tasks
from cluster.commands.bench.memory import resident_memory
from cluster.errors import SetupError

BATCH_TOKENS = 2048  # of one call; llama.cpp cuts it again into 512
PAD = 256  # llama.cpp's contexts are multiples of it


@dataclass(frozen=True, slots=True)
class Way:
    """How it attends."""

    flash_attention: bool

    def __str__(self) -> str:
        return "flash attention" if self.flash_attention else "plain attention"


@dataclass(frozen=True, slots=True)
class _Task:
    way: Way
    workload: Workload


class LlamaCpp(RivalProcess[Way]):
    """The process."""

    def __init__(self, file: Path, kind: GgufType, vocab_size: int) -> None:
        super().__init__(_serve, str(file), vocab_size)
        self.name = f"llama.cpp {kind}"

    def run(self, workload: Workload, way: Way) -> Run:
        return self._ask(_Task(way, workload))

    def ways(self, workload: Workload) -> list[Way]:  # noqa: ARG002
        return [Way(flash_attention=True), Way(flash_attention=False)]


@contextmanager
def llama_cpp(checkpoint: Checkpoint, kind: GgufType) -> Iterator[LlamaCpp]:
    """The process, with a file that lasts as long. Raises SetupError where llama-cpp-python is not installed."""
    with TemporaryDirectory(prefix="manta-gguf-") as directory:
        file = Path(directory) / f"{kind}.gguf"
        write_gguf(checkpoint, file, kind)
        with LlamaCpp(file, kind, checkpoint.architecture.vocab_size) as rival:
            yield rival


class LlamaModel:
    """A model in this process, and one context at a time. Raises SetupError for what llama.cpp refuses."""

    def __init__(self, file: str, vocab_size: int, num_threads: int) -> None:
        try:
            import llama_cpp as api
        except ImportError as error:
            raise SetupError("--compare llama.cpp needs `pip install manta-serve[bench]`, which compiles it") from error
        self._api: Any = api
        self._vocab_size, self._num_threads = vocab_size, num_threads
        self._silence = api.llama_log_callback(lambda _level, _text, _data: None)  # it is called as long as it lives
        api.llama_log_set(self._silence, ctypes.c_void_p(0))
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.use_mmap = False
        parameters.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(file.encode(), parameters)
        if not self._model:
            raise SetupError(f"llama.cpp cannot load {file}")
        self._context: Any = None
        self._shape: tuple[Way, int, int] | None = None
        self._held: list[list[int]] | None = None  # the prompts whose contexts are in the cache

    def open(self, way: Way, num_sequences: int, num_tokens: int) -> None:
        """A cache for so many sequences of so many tokens; the one before, if that will do."""
        shape = (way, num_sequences, -(-num_tokens // PAD) * PAD)
        if shape == self._shape:
            return
        self.close()
        api = self._api
        parameters = api.llama_context_default_params()
        parameters.n_ctx = shape[1] * shape[2]
        parameters.n_seq_max = num_sequences
        parameters.n_batch = max(BATCH_TOKENS, num_sequences)
        parameters.n_threads = parameters.n_threads_batch = self._num_threads
        enabled, disabled = api.LLAMA_FLASH_ATTN_TYPE_ENABLED, api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.flash_attn_type = enabled if way.flash_attention else disabled
        parameters.kv_unified = False
        parameters.offload_kqv = False
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise SetupError(f"llama.cpp opens no context of {num_sequences} × {num_tokens} tokens with {way}")
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(max(BATCH_TOKENS, num_sequences), 0, 1)
        self._shape = shape

    def close(self) -> None:
        """Give the context back."""
        if self._context is not None:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)
        self._context = self._shape = self._held = None

    def clear(self) -> None:
        """Forget all sequences."""
        self._api.llama_memory_clear(self._memory, True)
        self._held = None

    def compute(self, tokens: Sequence[tuple[int, int, int, bool]]) -> npt.NDArray[np.float32]:
        """Run (token id, position, sequence, whether logits are wanted) of each. Returns the logits, [wanted, V]."""
        logits = []
        for first in range(0, len(tokens), BATCH_TOKENS):
            part = tokens[first : first + BATCH_TOKENS]
            batch = self._batch
            batch.n_tokens = len(part)
            for index, (token_id, position, sequence, wanted) in enumerate(part):
                batch.token[index], batch.pos[index] = token_id, position
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = wanted
            if code := self._api.llama_decode(self._context, batch):
                raise SetupError(f"llama_decode failed with {code}")
            if num_wanted := sum(wanted for *_, wanted in part):
                pointer = self._api.llama_get_logits(self._context)
                logits.append(np.ctypeslib.as_array(pointer, shape=(num_wanted, self._vocab_size)).copy())
        return np.concatenate(logits)

    def hold(self, prompts: list[list[int]], context: int) -> None:
        """Have the first tokens of every sequence in the cache, and nothing else: those of the first, for all.

        Computing them for each would take minutes and change no time.
        """
        if self._held == prompts:
            for sequence in range(len(prompts)):
                self._api.llama_memory_seq_rm(self._memory, sequence, context, -1)
            return
        self.clear()
        self.compute([(prompts[0][i], i, 0, i == context - 1) for i in range(context)])
        for sequence in range(1, len(prompts)):
            self._api.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        self._held = prompts


def _serve(connection: Connection, file: str, vocab_size: int) -> None:
    """In the new process."""
    num_threads = len(os.sched_getaffinity(0))
    try:
        model = LlamaModel(file, vocab_size, num_threads)
    except Exception as error:
        connection.send(error if isinstance(error, SetupError) else SetupError(f"llama.cpp: {error}"))
        return
    serve_tasks(connection, num_threads, lambda task: _generate(model, task.workload, task.way, vocab_size))


def _generate(model: LlamaModel, workload: Workload, way: Way, vocab_size: int) -> Run:
    prompts = workload.prompts(vocab_size)
    first = workload.context
    model.open(way, len(prompts), workload.num_tokens)
    if first:
        model.hold(prompts, first)
    else:
        model.clear()
    last = workload.prompt_tokens - 1
    with resident_memory() as memory:
        started = time.perf_counter()
        logits = model.compute(
            [(prompt[i], i, n, i == last) for n, prompt in enumerate(prompts) for i in range(first, last + 1)]
        )
        times = [time.perf_counter()]
        token_ids = [[int(chosen)] for chosen in logits.argmax(-1)]
        for position in range(last + 1, last + workload.output_tokens):
            logits = model.compute([(ids[-1], position, n, True) for n, ids in enumerate(token_ids)])
            for ids, chosen in zip(token_ids, logits.argmax(-1), strict=True):
                ids.append(int(chosen))
            times.append(time.perf_counter())
    return Run(
        prefill_s=times[0] - started,
        decode_s=times[-1] - times[0],
        decode_steps=len(times) - 1,
        token_ids=token_ids,
        peak_bytes=memory.peak,
        grown_bytes=memory.grown,
    )
