"""Times the parts of an engine's steps from outside: wraps methods of its classes while it is measured.

A part's time is its own: what another part takes within it counts for that one. So the parts of a step add up to the
step. Other threads that happen to run the same methods are not timed. Attention is a call of its own, which it is not
where the layers of a step are one.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from cluster.commands.bench.decode.engine import EngineUnderTest
from router_service.attention.backend import AttentionPlan
from router_service.engine import Engine
from router_service.model.decoder import Decoder
from router_service.model.model_runner import ModelRunner
from router_service.sampling.sampler import Sampler
from router_service.scheduling.scheduler import Scheduler

BENCHMARK = "the benchmark itself"
METHODS: tuple[tuple[type, str, str], ...] = (
    (Scheduler, "schedule", "schedule"),
    (ModelRunner, "forward", "metadata"),  # all of it that is in no other part: tensors and plans before the decoder
    (Decoder, "forward", "the rest of the layers"),  # experts as well: a step may do them in one call with others
    (AttentionPlan, "attend", "attention"),
    (Decoder, "hidden_states", "head"),
    (Decoder, "logits", "head"),
    (Sampler, "launch", "sample"),
    (Scheduler, "update", "update"),
    (Engine, "_emit", "deliver"),
    (EngineUnderTest, "_deliver", BENCHMARK),
    (Engine, "step", "the rest"),
)
NAMES = tuple(part for part in dict.fromkeys(part for _, _, part in METHODS) if part != BENCHMARK)


@dataclass(slots=True)
class Step:
    """One step of the engine."""

    num_decoding: int = 0  # sequences that have a token already and get another one
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # of each part


class Parts:
    """The steps that were taken while `timed`."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._step = Step()
        self._stack: list[str] = []
        self._since = 0.0
        self._thread = 0  # the engine's

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Wrap the methods for the time of the block. What a model has put together before does not count."""
        with ExitStack() as stack:
            stack.callback(setattr, Decoder, "chains_attention", Decoder.chains_attention)
            Decoder.chains_attention = False
            for owner, name, part in METHODS:
                original = getattr(owner, name)
                setattr(owner, name, self._wrapped(original, owner, part))
                stack.callback(setattr, owner, name, original)
            yield

    def _wrapped(self, original: Callable[..., Any], owner: type, part: str) -> Callable[..., Any]:
        if owner is Decoder and original.__name__ == "forward":
            return self._resumed(original, part)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if owner is Engine and not self._stack:
                self._thread = threading.get_ident()
            if threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            self._enter(part)
            try:
                result = original(*args, **kwargs)
            finally:
                self._leave()
            if part == "schedule":
                self._step.num_decoding = sum(one.start >= one.sequence.num_prompt_tokens for one in result)
            return result

        return timed

    def _resumed(self, original: Callable[..., Generator[Any, None, Any]], part: str) -> Callable[..., Any]:
        """A generator runs only while somebody resumes it."""

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Generator[Any, None, Any]:
            generator = original(*args, **kwargs)
            try:
                while True:
                    self._enter(part)
                    try:
                        reached = next(generator)
                    except StopIteration as finished:
                        return finished.value
                    finally:
                        self._leave()
                    yield reached
            finally:
                generator.close()

        return timed

    def _enter(self, part: str) -> None:
        now = time.perf_counter()
        if self._stack:
            self._step.seconds[self._stack[-1]] += now - self._since
        self._stack.append(part)
        self._since = now

    def _leave(self) -> None:
        now = time.perf_counter()
        self._step.seconds[self._stack.pop()] += now - self._since
        self._since = now
        if not self._stack:
            self.steps.append(self._step)
            self._step = Step()
