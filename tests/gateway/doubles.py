"""A tokenizer of our own making, a scripted coordinator, and both doors over real sockets around them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from cluster.config import GatewayConfig
from cluster.messages import Embedding, EngineStats, ModelCard, Request, TokenChunk, TokenLogprobs
from cluster.telemetry.traces import Traces
from gateway.coordinators.client import CoordinatorClient
from gateway.coordinators.health import Health, ModelHealth, Probe
from gateway.frontend import Frontend
from gateway.http.app import build_app
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.openai_answers import CheckedAnswers

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
    "{% elif loop.first %}{{ m['content'] }}{% else %}{{ raise_exception('system comes first') }}{% endif %}"
    "{% endfor %}"
)
CORPUS = ["Hello, my name is Manta.", "le fromage français", "def add(a, b): return a + b", "STOP here, please"] * 4


def write_tokenizer(
    directory: Path,
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    special: Sequence[str] = (),
    added: Sequence[str] = (),
) -> Path:
    """A byte-level BPE tokenizer in Hugging Face's layout: <s> 0, </s> 1, then bytes and merges, then `special`.

    `added` are more tokens that are words, as the tags of Qwen3 are.
    """
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    rust.add_special_tokens(list(special))
    rust.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    fast.save_pretrained(str(directory))
    return directory


def model_card(directory: Path, **changes: Any) -> ModelCard:
    card: dict[str, Any] = {
        "name": "tiny",
        "aliases": ("tiny-latest",),
        "application": "tiny-00000000",
        "directory": str(directory),
        "layout": "huggingface",
        "fingerprint": "0123456789abcdef",
        "max_model_len": 256,
        "vocab_size": 320,
        "eos_token_ids": (1,),
        "created": 1_700_000_000,
    }
    return ModelCard(**(card | changes))


class ScriptedCoordinator:
    """Answers every request with what `script` makes of it, and remembers what became of its streams."""

    def __init__(self, script: Callable[[Request], AsyncIterator[TokenChunk]]) -> None:
        self._script = script
        self.requests: list[Request] = []
        self.running = 0
        self.num_taken = 0  # chunks that a reader has taken, and asked for the next
        self.closed_at: list[float] = []

    async def generate(self, request: Request) -> AsyncIterator[TokenChunk]:
        self.requests.append(request)
        self.running += 1
        try:
            async for chunk in self._script(request):
                yield chunk
                self.num_taken += 1
        finally:
            self.running -= 1
            self.closed_at.append(time.monotonic())

    async def embed(self, requests: tuple[Request, ...]) -> tuple[Embedding, ...]:
        raise AssertionError("no embedding was scripted")

    async def stats(self) -> EngineStats:
        return EngineStats(self.running, 0, 8, 0, 0, 0, 0, 0, 0, ())


def tokens_script(
    tokens: Sequence[int], *, chunk: int = 1, pause_s: float = 0.0, eos: int | None = 1, queue_s: float = 0.0
) -> Callable[[Request], AsyncIterator[TokenChunk]]:
    """These tokens, `chunk` at a time, then an end-of-sequence token, as far as max_tokens allows."""

    async def script(request: Request) -> AsyncIterator[TokenChunk]:
        ids = [*tokens, *([] if eos is None else [eos])][: request.sampling.max_tokens]
        for at in range(0, len(ids), chunk):
            await asyncio.sleep(pause_s)
            piece = tuple(ids[at : at + chunk])
            last = at + chunk >= len(ids)
            ended = last and eos is not None and piece[-1] == eos
            logprobs = None
            if request.sampling.logprobs is not None:
                top = tuple((i, -0.5 - i) for i in range(request.sampling.logprobs))
                logprobs = tuple(TokenLogprobs(-0.25, top) for _ in piece)
            yield TokenChunk(
                request.request_id,
                request.choice_index,
                at,
                piece,
                logprobs,
                ("stop" if ended else "length") if last else None,
                eos if ended else None,
                prompt_logprobs=None if at else _prompt_logprobs(request),
                queue_s=queue_s,
            )

    return script


def held_script(may_answer: threading.Event) -> Callable[[Request], AsyncIterator[TokenChunk]]:
    """One token, once the event is set."""

    async def script(request: Request) -> AsyncIterator[TokenChunk]:
        await asyncio.to_thread(may_answer.wait, 60)
        yield TokenChunk(request.request_id, request.choice_index, 0, (40,), finish_reason="length")

    return script


def _prompt_logprobs(request: Request) -> tuple[TokenLogprobs | None, ...] | None:
    """Each token's place as its score."""
    if request.sampling.prompt_logprobs is None:
        return None
    scores = [TokenLogprobs(-float(place), ((5, -0.125),)) for place in range(1, len(request.prompt_token_ids))]
    return (None, *scores)


def failing_script(tokens: Sequence[int], error: BaseException) -> Callable[[Request], AsyncIterator[TokenChunk]]:
    """These tokens, as far as the client has not got them, then this error."""

    async def script(request: Request) -> AsyncIterator[TokenChunk]:
        for at, token_id in list(enumerate(tokens))[len(request.output_token_ids) :]:
            yield TokenChunk(request.request_id, request.choice_index, at, (token_id,))
        raise error

    return script


def ready(cards: Sequence[ModelCard]) -> dict[str, ModelHealth]:
    return {card.application: ModelHealth("ready") for card in cards}


def build_frontend(
    card: ModelCard,
    coordinator: CoordinatorClient,
    config: GatewayConfig | None = None,
    probe: Probe = ready,
    traces: Traces | None = None,
) -> Frontend:
    return Frontend(
        config or GatewayConfig(),
        (card,),
        {card.application: _tokenizer(card.directory)},
        {card.application: coordinator},
        Health((card,), probe),
        traces=traces,
    )


@functools.lru_cache(maxsize=4)
def _tokenizer(directory: str) -> HuggingFaceTokenizer:
    """Loaded once: its files are written once, and nothing changes it."""
    return HuggingFaceTokenizer(Path(directory))


@contextlib.contextmanager
def http_server(frontend: Frontend) -> Iterator[str]:
    """The HTTP door on a real socket; yields its base URL. Its answers have been OpenAI's when it ends."""
    app = CheckedAnswers(build_app(frontend))
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        sock.close()
    app.check()
