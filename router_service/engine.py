"""The engine: one thread that owns scheduler, cache and model, and turns requests into token chunks, step by step.

Knows no event loop, no Serve and no door: requests and aborts come in through a thread-safe inbox, and the results of
each step leave through one call of `deliver`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable

from cluster.errors import (
    DeadlineExceeded,
    EngineDead,
    ExpertUnavailable,
    InvalidRequest,
    MantaError,
    Overloaded,
    Unavailable,
)
from cluster.fairness import is_refused
from cluster.messages import Embedding, EngineStats, Key, Request, TokenChunk, TokenLogprobs
from router_service.grammar import GrammarState
from router_service.model_runner import ModelRunner
from router_service.pooling import embedding
from router_service.sampler import NOT_FINITE, Sampler
from router_service.scheduler import Batch, Scheduler
from router_service.sequence import Sequence

logger = logging.getLogger(__name__)

Event = tuple[Key, TokenChunk | Embedding | MantaError]  # an error is the last event of its key
_Command = Callable[[], None]


class Engine:
    """Runs `step` as long as there is work. `submit`, `abort` and `stats` may be called from any thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        model_runner: ModelRunner,
        sampler: Sampler,
        deliver: Callable[[list[Event]], None],
        *,
        max_waiting: int,
        observe_step: Callable[[float, Batch], object] | None = None,
    ) -> None:
        """`deliver` is called on the engine's thread, once a step, with what every sequence got.

        `observe_step` is told the seconds and the batch of each.
        """
        self.scheduler = scheduler
        self.model_runner = model_runner
        self.sampler = sampler
        self.max_waiting = max_waiting
        self._deliver = deliver
        self._observe_step = observe_step
        self._sequences: dict[Key, Sequence] = {}
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._inbox_lock = threading.RLock()  # no request may be queued after the thread has looked for the last time
        self._inbox_closed = False
        self._arriving: Counter[str] = Counter()  # requests in the inbox, by tenant
        self._stopping = False
        self._death: BaseException | None = None
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_steps = 0

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after the current step; whoever still waits gets EngineDead."""
        self._inbox.put(self._stop)
        self._thread.join(timeout_s)

    def check_alive(self) -> None:
        """Raises EngineDead when the thread has stopped."""
        if not self._thread.is_alive():
            raise EngineDead(f"the engine has stopped: {self._death!r}")

    def check_admission(self, request: Request) -> None:
        """Raises what `submit` would now, before anybody has worked for the request."""
        self.check_alive()
        if len(request.prompt_token_ids) + len(request.output_token_ids) > self.scheduler.max_model_len:
            raise InvalidRequest(
                f"{len(request.prompt_token_ids)} prompt tokens exceed the context of {self.scheduler.max_model_len}"
            )
        with self._inbox_lock:
            if self._inbox_closed:
                raise EngineDead("the engine stopped")
            if is_refused(self._waiting_by_tenant(), request.cache_salt, self.max_waiting):
                raise Overloaded(f"{self.max_waiting} requests wait already; try again later")

    def submit(self, request: Request, grammar: GrammarState | None = None) -> None:
        """Queue a request with its grammar. Raises Overloaded, EngineDead, or InvalidRequest if it can never run."""
        with self._inbox_lock:
            self.check_admission(request)
            self._arriving[request.cache_salt] += 1
            self._inbox.put(lambda: self._arrive(Sequence(request, grammar)))

    def abort(self, key: Key) -> None:
        """Drop a sequence and free its blocks, before the next step. Unknown keys are ignored: it may have ended."""
        self._inbox.put(lambda: self._abort(key))

    @property
    def num_waiting(self) -> int:
        """Requests that are not in the running batch."""
        return self._waiting_by_tenant().total()

    def _waiting_by_tenant(self) -> Counter[str]:
        return self.scheduler.waiting.counts() + self._arriving

    def stats(self) -> EngineStats:
        """A snapshot; the numbers may be a step apart from each other."""
        scheduler = self.scheduler
        return EngineStats(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=self.num_waiting,
            num_kv_blocks=scheduler.block_manager.num_blocks,
            num_kv_blocks_used=scheduler.block_manager.num_used_blocks,
            prompt_tokens_total=self._num_prompt_tokens,
            generation_tokens_total=self._num_generated_tokens,
            preemptions_total=scheduler.num_preemptions,
            prefix_cache_hit_tokens_total=scheduler.num_prefix_cache_hit_tokens,
            steps_total=self._num_steps,
            rows_per_expert=self.model_runner.decoder.dispatcher.rows_per_expert,
            prefix_cache_query_tokens_total=scheduler.num_prefix_cache_query_tokens,
        )

    def step(self) -> None:
        """Schedule → forward → sample → update → deliver."""
        self._expire()
        batch = self.scheduler.schedule()
        if not batch:
            return
        started = time.perf_counter()
        sampled = [scheduled.sequence for scheduled in batch if scheduled.samples]
        try:
            logits = self.model_runner.forward(batch)
        except ExpertUnavailable as error:
            self._fail((scheduled.sequence, error) for scheduled in batch)
            return
        token_ids, logprobs = self.sampler(logits, sampled)
        if NOT_FINITE in token_ids:
            lost = [sequence for sequence, token_id in zip(sampled, token_ids, strict=True) if token_id == NOT_FINITE]
            self._fail_not_finite(lost)
            batch = [scheduled for scheduled in batch if scheduled.sequence not in lost]
            kept = [place for place, sequence in enumerate(sampled) if sequence not in lost]
            sampled = [sampled[place] for place in kept]
            token_ids = [token_ids[place] for place in kept]
            logprobs = [logprobs[place] for place in kept]
        self.scheduler.update(batch, token_ids)
        self._emit(batch, sampled, logprobs)
        if self._observe_step is not None:
            self._observe_step(time.perf_counter() - started, batch)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_commands()
                self.step()
        except BaseException as error:
            logger.exception("the engine died")
            self._death = error
        finally:
            with self._inbox_lock:
                self._inbox_closed = True
            self._take_pending_commands()
            self._fail((sequence, EngineDead("the engine stopped")) for sequence in list(self._sequences.values()))

    def _take_commands(self) -> None:
        """Run what came in since the last step; sleep only when there is nothing else to do."""
        if not self._sequences:
            self._inbox.get()()
        self._take_pending_commands()

    def _take_pending_commands(self) -> None:
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()

    def _stop(self) -> None:
        self._stopping = True

    def _arrive(self, sequence: Sequence) -> None:
        self._add(sequence)
        with self._inbox_lock:
            self._arriving[sequence.request.cache_salt] -= 1

    def _add(self, sequence: Sequence) -> None:
        key = sequence.request.key
        if key in self._sequences:
            raise AssertionError(f"request ids are unique, {key} came twice")
        if sequence.grammar is not None and sequence.grammar.error is not None:
            self._deliver([(key, sequence.grammar.error)])
            return
        sequence.check_finished(self.scheduler.eos_token_ids, self.scheduler.max_model_len)
        if sequence.finish_reason is not None:
            self._deliver([(key, _chunk(sequence, (), None))])
            return
        self._sequences[key] = sequence
        self.scheduler.add(sequence)

    def _abort(self, key: Key) -> None:
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    def _expire(self) -> None:
        now = time.monotonic()
        late = [sequence for sequence in self._sequences.values() if sequence.request.deadline.at < now]
        if late:
            self._fail((sequence, DeadlineExceeded("the request's deadline passed")) for sequence in late)

    def _fail(self, failures: Iterable[tuple[Sequence, MantaError]]) -> None:
        events: list[Event] = []
        for sequence, error in failures:
            self._abort(sequence.request.key)
            events.append((sequence.request.key, error))
        self._deliver(events)

    def _fail_not_finite(self, lost: list[Sequence]) -> None:
        """End sequences whose logits are not finite, and no others; nothing of their cache may reach anybody else."""
        for sequence in lost:
            self.scheduler.block_manager.doubt(sequence.block_table)
        self._fail((sequence, Unavailable("the model's output is not finite")) for sequence in lost)

    def _emit(self, batch: Batch, sampled: list[Sequence], logprobs: list[TokenLogprobs | None]) -> None:
        events: list[Event] = []
        for sequence, logprob in zip(sampled, logprobs, strict=True):
            if sequence.grammar is not None and sequence.grammar.error is not None:
                self._abort(sequence.request.key)
                events.append((sequence.request.key, sequence.grammar.error))
                continue
            events.append((sequence.request.key, _chunk(sequence, (sequence.token_ids[-1],), logprob)))
            if sequence.finish_reason is not None:
                del self._sequences[sequence.request.key]
        for scheduled in batch:
            if scheduled.embeds:
                events.append((scheduled.sequence.request.key, embedding(scheduled.sequence)))
                del self._sequences[scheduled.sequence.request.key]
        self._num_steps += 1
        self._num_generated_tokens += len(sampled)
        self._num_prompt_tokens += sum(
            min(s.start + s.num_tokens, s.sequence.num_prompt_tokens) - min(s.start, s.sequence.num_prompt_tokens)
            for s in batch
        )
        if events:
            self._deliver(events)


def _chunk(sequence: Sequence, token_ids: tuple[int, ...], logprobs: TokenLogprobs | None) -> TokenChunk:
    scores = sequence.prompt_logprobs if sequence.num_output_tokens == len(token_ids) else None
    return TokenChunk(
        request_id=sequence.request.request_id,
        choice_index=sequence.request.choice_index,
        first_position=sequence.num_output_tokens - len(token_ids),
        token_ids=token_ids,
        logprobs=None if logprobs is None else (logprobs,),
        finish_reason=sequence.finish_reason,
        stop_token_id=sequence.stop_token_id,
        num_cached_tokens=sequence.num_cached_tokens,
        prompt_logprobs=None if scores is None else tuple(scores),
        routed_experts=sequence.routed_experts if token_ids else None,
    )
