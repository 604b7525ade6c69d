"""Checks of a whole model: the embedded one runs in an engine of this process, beside transformers in fp32 on the CPU.

What the engine says is read once more by transformers: after the same tokens, its likeliest token has to be the one
that the engine chose, and as likely. In bf16 two tokens that are nearly as likely may change places.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from cluster.checkpoint.checkpoint import Checkpoint, open_checkpoint
from cluster.commands.doctor.checks import Check, Finding, failed, good
from cluster.config import EngineConfig
from cluster.demo_model import DIRECTORY as DEMO
from cluster.errors import MantaError
from cluster.messages import Key, Request, SamplingParams, TokenChunk
from cluster.planning.placement import plan_groups
from experts_service.carriers.local import ANSWERED, LocalTransport
from experts_service.device import pinned
from experts_service.loaded_experts import LoadedExperts, load_experts
from experts_service.transport import Flight, GroupRows
from router_service.assembly import build_engine, resolve_device, select_kernel
from router_service.dispatcher import Dispatcher
from router_service.engine import Engine, Event
from router_service.scheduling.scheduler import Batch

QUESTIONS = ("What is the best French cheese?", "Hi", "How many days are there in a leap year, and why is that so?")
OUTPUT_TOKENS = 16
TIMEOUT_S = 120.0
# Of a token's log-probability. The demo model's weights are bf16: in fp32 only the order of sums differs. A CPU with
# AVX512-BF16 was 3e-7 and 0.006 off.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}


def checks(device: torch.device) -> tuple[Check, ...]:
    """In bf16, which is served, and in fp32, where nothing but the order of sums differs."""
    return tuple(
        Check(
            f"model, {_name(dtype)} on {device}",
            "The embedded model, whole, says what transformers says in fp32 on the CPU.",
            lambda dtype=dtype: compare(device, dtype),  # type: ignore[misc]
        )
        for dtype in (torch.float32, torch.bfloat16)
    )


def compare(device: torch.device, dtype: torch.dtype) -> Finding:
    """Ids and the largest difference."""
    checkpoint = open_checkpoint(DEMO)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    prompts = [tokenizer.encode(f"[INST] {question} [/INST]").ids for question in QUESTIONS]
    answers = generate(checkpoint, device, dtype, prompts)
    reference = _reference()
    differences, other, num_tokens = [0.0], 0, 0
    for prompt, chunks in zip(prompts, answers, strict=True):
        ours = [token for chunk in chunks for token in chunk.token_ids]
        likely = [one.token_logprob for chunk in chunks for one in chunk.logprobs or ()]
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]  # [T, V]
        logprobs = logits.log_softmax(-1)
        best = logprobs.max(-1)
        num_tokens += len(ours)
        for position, (token, logprob) in enumerate(zip(ours, likely, strict=True)):
            expected = float(logprobs[position, token])
            differences.append(abs(expected - logprob))
            if int(best.indices[position]) != token and float(best.values[position]) - expected > TOLERANCE[dtype]:
                other += 1
    largest = max(differences)
    found = f"{num_tokens - other} of {num_tokens} tokens; log-probabilities differ by {largest:.2g} at most"
    if other or not num_tokens or not largest <= TOLERANCE[dtype]:
        return failed(
            f"{found}, and {TOLERANCE[dtype]:g} may be",
            "serve nothing on this machine: kernels there do not compute what they should. Other checks say which",
        )
    return good(found)


def generate(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    prompts: Sequence[Sequence[int]],
    observe_step: Callable[[float, Batch], object] | None = None,
    prepare: Callable[[Engine], object] = lambda _: None,
    look: Callable[[Engine], object] = lambda _: None,
    cuda_graphs: Literal["auto", "off"] = "auto",
    *,
    elsewhere: bool = False,
    output_tokens: int = OUTPUT_TOKENS,
) -> list[list[TokenChunk]]:
    """The greedy answers to prompts that are decoded together, by an engine that `prepare` has seen before it starts.

    `look` sees it afterwards, when it has nothing to do, whatever was raised in its steps.
    `elsewhere`: its experts are on the CPU, and rows travel.

    Raises what the engine raises.
    """
    config = EngineConfig(
        dtype=_name(dtype),
        device=device.type,
        max_model_len=256,
        num_kv_blocks=64,
        prefix_caching=False,
        max_num_seqs=len(prompts),
        cuda_graphs=cuda_graphs,
    )
    requests = [
        Request(str(number), tuple(prompt), SamplingParams(max_tokens=output_tokens, temperature=0.0, logprobs=1), 0)
        for number, prompt in enumerate(prompts)
    ]
    answers: dict[Key, list[TokenChunk]] = {request.key: [] for request in requests}
    unfinished, done = set(answers), threading.Event()
    errors: list[MantaError] = []

    def deliver(events: list[Event]) -> None:
        for key, item in events:
            if isinstance(item, TokenChunk):
                answers[key].append(item)
            if isinstance(item, MantaError):
                errors.append(item)
            if isinstance(item, MantaError) or (isinstance(item, TokenChunk) and item.finish_reason is not None):
                unfinished.discard(key)
        if not unfinished:
            done.set()

    engine = build_engine(
        checkpoint,
        config,
        _experts(checkpoint, config, dtype, elsewhere=elsewhere),
        deliver,
        local_experts=not elsewhere,
        observe_step=observe_step,
        on_death=done.set,
    )
    prepare(engine)
    engine.start()
    try:
        for request in requests:
            engine.submit(request)
        if not done.wait(TIMEOUT_S):
            raise TimeoutError(f"no answer in {TIMEOUT_S:g} s")
        if unfinished:
            engine.stop()
            engine.check_alive()
        look(engine)
        if errors:
            raise errors[0]
    finally:
        engine.stop()
    return list(answers.values())


def _experts(checkpoint: Checkpoint, config: EngineConfig, dtype: torch.dtype, *, elsewhere: bool) -> Dispatcher:
    """All of them, in this process."""
    device = torch.device("cpu") if elsewhere else resolve_device(config)
    groups = plan_groups("auto", checkpoint.architecture.num_experts, 1, 1)
    kernel = select_kernel(config, dtype, device).kernel
    loaded = {
        group.index: load_experts(checkpoint, group.experts, dtype=dtype, device=device, kernel=kernel)
        for group in groups
    }
    return Dispatcher(groups, _OnHost(loaded) if elsewhere else LocalTransport(loaded))


class _OnHost:
    """A transport to experts of this process that works on the host, as those to other processes do."""

    takes_device_rows = False

    def __init__(self, experts: dict[int, LoadedExperts]) -> None:
        self._here = LocalTransport(experts)

    def send(self, layer: int, rows: torch.Tensor, parts: Sequence[GroupRows]) -> Flight:
        """Computes at once. What a GPU waits for is copied there, and nobody waits for that."""
        if parts:
            answers = parts[0].answers
            received = answers if answers.is_cpu else pinned(answers.shape, answers.dtype)
            self._here.send(layer, rows, [part._replace(answers=received) for part in parts])
            if received is not answers:
                answers.copy_(received, non_blocking=True)
        return ANSWERED

    def close(self) -> None:
        self._here.close()


def _reference() -> Any:
    from transformers import MixtralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return MixtralForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
