"""The engine: one thread that owns scheduler, cache and model, and turns requests into token chunks, step by step.

Knows no event loop, no Serve and no door: requests and aborts come in through a thread-safe inbox, and the results of
each step leave through one call of `deliver`.

What is raised in a step ends the sequence whose fault it is, where that can be told, else those of the step, and the
engine goes on. It stops only when its own state is in doubt: the device is gone, memory stays exhausted, or blocks and
queues do not add up.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import compress
from typing import cast

import torch

from cluster.errors import (
    DeadlineExceeded,
    EngineDead,
    InvalidRequest,
    MantaError,
    Overloaded,
)
from cluster.fairness import is_refused
from cluster.messages import Embedding, EngineStats, Key, Request, TokenChunk, TokenLogprobs
from experts_service.device import check_device, is_out_of_memory
from router_service.adjustments import Adjustments
from router_service.grammar.grammar import GrammarState
from router_service.model.model_runner import ModelRunner
from router_service.outputs.pooling import embedding
from router_service.sampling.sampler import Sampler
from router_service.sampling.tokens import NOT_FINITE, NOT_READY, Tokens
from router_service.scheduling.scheduler import Batch, Scheduler
from router_service.scheduling.sequence import Sequence
from router_service.step_failures import not_finite, told

logger = logging.getLogger(__name__)

Event = tuple[Key, TokenChunk | Embedding | MantaError]  # an error is the last event of its key
_Command = Callable[[], None]
_Sampled = tuple[int, TokenLogprobs | None]
_IDLE_S = 0.001  # between two looks at sequences that are held up


@dataclass(slots=True)
class _Step:
    """A batch that has been launched."""

    batch: Batch
    sampled: list[Sequence]  # who gets a token, in order
    land: Callable[[], list[Sequence]] = list  # of its output; returns whose values are not finite
    tokens: Tokens | None = None
    results: list[_Sampled | Exception] | None = None  # of each of `sampled`, where all together raised
    error: Exception | None = None  # of the model, when it was launched or later
    began: float = field(default_factory=time.perf_counter)

    def wait(self) -> tuple[list[_Sampled | Exception], list[Sequence]]:
        """What each of `sampled` gets, or what was raised for it; and whose values are not finite.

        What the device raised is the step's `error`.
        """
        try:
            not_finite = self.land()
            if self.results is None:
                self.results = [] if self.tokens is None else list(zip(*self.tokens.wait(), strict=True))
        except Exception as error:
            self.error = error
            return [error] * len(self.sampled), []
        return self.results, not_finite


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
        runs_ahead: bool = False,
        observe_step: Callable[[float, Batch], object] | None = None,
        on_death: Callable[[], object] | None = None,
    ) -> None:
        """`deliver` is called on the engine's thread, once a step, with what every sequence got.

        `runs_ahead`: a step that only decodes is followed by the next before its tokens are read, so that a device
        never waits for the host. What a sequence gets is the same.

        `observe_step` is told the seconds and the batch of each. `on_death` is called last on the engine's thread,
        when it has stopped by itself: only a new process can help.
        """
        self.scheduler = scheduler
        self.model_runner = model_runner
        self.sampler = sampler
        self.max_waiting = max_waiting
        self.runs_ahead = runs_ahead
        self._under_way: _Step | None = None
        self._landed_at = 0.0  # when the last step did
        self._deliver = deliver
        self._observe_step = observe_step
        self._on_death = on_death
        self._sequences: dict[Key, Sequence] = {}
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._inbox_lock = threading.RLock()  # no request may be queued after the thread has looked for the last time
        self._inbox_closed = False
        self._arriving: Counter[str] = Counter()  # requests in the inbox, by tenant
        self._stopping = False
        self._is_idle = False  # the last step had nothing to do
        self._death: BaseException | None = None
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_steps = 0
        self._num_failed_steps = 0

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
            if self._is_full(request) and self._displaced_by(request) is None:
                raise self._full()

    def submit(
        self, request: Request, grammar: GrammarState | None = None, adjustments: Adjustments | None = None
    ) -> None:
        """Queue a request with what was made for it. Raises Overloaded, EngineDead, or InvalidRequest.

        Where the queue is full, a more urgent request of one choice takes the place of one of its tenant that nothing
        was done for.
        """
        with self._inbox_lock:
            self.check_admission(request)
            _check_token_ids(request, self.model_runner.decoder.architecture.vocab_size)
            sequence = Sequence(request, grammar, adjustments)
            displaces = self._is_full(request)
            self._arriving[request.cache_salt] += 1
            self._inbox.put(lambda: self._arrive(sequence, displaces=displaces))

    def abort(self, key: Key) -> None:
        """Drop a sequence and free its blocks, before the next step. Unknown keys are ignored: it may have ended."""
        self._inbox.put(lambda: self._abort(key))

    def _is_full(self, request: Request) -> bool:
        """Whether the queue has no place left for this request's tenant."""
        return is_refused(self._waiting_by_tenant(), request.cache_salt, self.max_waiting)

    def _displaced_by(self, request: Request) -> Sequence | None:
        if request.num_siblings:  # one of them might find none to displace, and all fail: one was put out for nothing
            return None
        return self.scheduler.waiting.displaced_by(request.priority, request.cache_salt)

    def _full(self) -> Overloaded:
        return Overloaded(
            f"{self.max_waiting} requests wait already (engine.max_waiting); try again later", reason="shed_queue"
        )

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
            failed_steps_total=self._num_failed_steps,
        )

    def step(self) -> None:
        """Schedule → forward → sample → update → deliver. Raises what leaves the engine's state in doubt.

        Where the engine runs ahead, the step before is updated and delivered after the next one has been launched:

            launch 1 │ launch 2, land 1 │ launch 3, land 2 │ …
        """
        self._expire()
        self._fail_beyond_grammar()
        self._end_complete()
        batch = self._schedule()
        before, self._under_way = self._under_way, None
        step = self._launch(batch) if batch else None
        if before is not None:
            self._land(before)
        self._is_idle = step is before is None
        if step is None:
            return
        if self.runs_ahead and self._may_run_ahead(step):
            self._advance(step)
        else:
            self._land(step)

    def _schedule(self) -> Batch:
        try:
            return self.scheduler.schedule()
        except Exception as error:
            culprit, self.scheduler.looking_at = self.scheduler.looking_at, None
            if culprit is None:
                raise  # it would do so again
            self._fail_step({culprit: error})
            return []

    def _launch(self, batch: Batch) -> _Step:
        """Run and sample a batch; nothing of it is booked yet."""
        step = _Step(batch, [scheduled.sequence for scheduled in batch if scheduled.samples])
        try:
            output = self.model_runner.forward(batch)
        except Exception as error:
            step.error = error
            return step
        step.land = output.land
        try:
            step.tokens = self.sampler.launch(output.logits, step.sampled)
        except Exception as error:
            logger.warning("sampling %d rows failed (%r); now one by one", len(step.sampled), error)
            step.results = [
                self._sample_alone(output.logits[row : row + 1], sequence) for row, sequence in enumerate(step.sampled)
            ]
        return step

    def _may_run_ahead(self, step: _Step) -> bool:
        """Whether the next step can be made without what this one sampled. Prompts take long, and the host keeps up."""
        return step.tokens is not None and all(
            one.samples and one.num_tokens == 1 and not one.sequence.needs_host for one in step.batch
        )

    def _advance(self, step: _Step) -> None:
        """Leave the step under way, unless all that it computes has ended with the one before."""
        if any(map(self._is_here, step.sampled)):
            assert step.tokens is not None, "it has been launched"
            self.model_runner.pending = step.tokens.on_device
            self.scheduler.advance(step.batch)
            self._under_way = step

    def _land(self, step: _Step) -> None:
        """Book what a step made, and tell everybody, but for sequences that have ended since it was launched."""
        for scheduled in step.batch:
            if scheduled.sequence.scheduled_at is None:
                scheduled.sequence.scheduled_at = step.began
        self._book(step)
        ended = time.perf_counter()
        began, self._landed_at = max(step.began, self._landed_at), ended
        for scheduled in step.batch:
            if scheduled.sequence.first_token_at is None:
                scheduled.sequence.note_step(ended)
        self._observe(ended - began, step.batch)

    def _book(self, step: _Step) -> None:
        batch, sampled, (results, not_finite) = step.batch, step.sampled, step.wait()
        if self.runs_ahead:
            here = [self._is_here(sequence) for sequence in sampled]
            results, sampled = list(compress(results, here)), list(compress(sampled, here))
            batch = [scheduled for scheduled in batch if self._is_here(scheduled.sequence)]
        if step.error is not None:
            self._fail_forward([scheduled.sequence for scheduled in batch], step.error)
            return
        failures = self._failures(list(filter(self._is_here, not_finite)), zip(sampled, results, strict=True))
        late = {sequence for sequence, result in zip(sampled, results, strict=True) if _is_late(result)}
        if failures or late:
            batch = [
                scheduled.without_last() if scheduled.sequence in late else scheduled
                for scheduled in batch
                if scheduled.sequence not in failures
            ]
            kept = [sequence not in failures and sequence not in late for sequence in sampled]
            results, sampled = list(compress(results, kept)), list(compress(sampled, kept))
        tokens = cast("list[_Sampled]", results)  # what was raised is among the failures
        failures |= self.scheduler.update(batch, [token_id for token_id, _ in tokens])
        self._emit(batch, sampled, [logprobs for _, logprobs in tokens], failures)
        if failures:
            self._fail_step(failures)

    def _is_here(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.request.key) is sequence

    def _sample_alone(self, logits: torch.Tensor, sequence: Sequence) -> _Sampled | Exception:
        try:
            [token_id], [logprobs] = self.sampler(logits, [sequence])
        except Exception as error:
            return error
        return token_id, logprobs

    def _failures(
        self, lost: list[Sequence], results: Iterable[tuple[Sequence, _Sampled | Exception]]
    ) -> dict[Sequence, Exception]:
        """Why sequences have no token. Of those that are not finite nothing in the cache may reach anybody else."""
        failures: dict[Sequence, Exception] = {}
        for sequence, result in results:
            if isinstance(result, Exception):
                failures[sequence] = result
            elif result[0] == NOT_FINITE:
                lost.append(sequence)
        for sequence in lost:
            self.scheduler.block_manager.doubt(sequence.block_table)
            failures[sequence] = not_finite()
        return failures

    def _fail_forward(self, sequences: list[Sequence], error: Exception) -> None:
        """End all sequences of a step; where memory was short the newest, and the others run again without it.

        What the step has written to the cache does not matter: the same slots are written again before they are read.
        Where it was short so late that the next step goes on from this one's tokens, nobody can run again.
        """
        if not sequences:
            self._num_failed_steps += 1
            _log_failure(error, "nobody, as all its sequences had ended")
            check_device(self.model_runner.decoder.device)
            return
        is_advanced = any(sequence.pending_row is not None for sequence in sequences)
        if is_advanced or not is_out_of_memory(error):
            self._fail_step(dict.fromkeys(sequences, error))
            return
        newest = next(sequence for sequence in reversed(self._sequences.values()) if sequence in sequences)
        self._fail_step({newest: error}, exhausted=len(sequences) == 1)

    def _fail_step(self, failures: Mapping[Sequence, Exception], *, exhausted: bool = False) -> None:
        """End these sequences, and no others. Raises where the engine cannot go on.

        `exhausted`: memory was short, and no other sequence could be given up for it.
        """
        self._num_failed_steps += 1
        for error in set(failures.values()):
            keys = [sequence.request.key for sequence, its_error in failures.items() if its_error is error]
            _log_failure(error, str(keys))
        self._fail((sequence, told(error)) for sequence, error in failures.items())
        self.scheduler.check(self._sequences.values())
        check_device(self.model_runner.decoder.device, memory=exhausted)

    def _observe(self, seconds: float, batch: Batch) -> None:
        """Nobody's fault: a step that could not be observed has been taken all the same."""
        if self._observe_step is None:
            return
        try:
            self._observe_step(seconds, batch)
        except Exception:
            logger.exception("a step could not be observed")

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_commands()
                self.step()
        except BaseException as error:
            logger.exception("the engine died")
            self._death = error
        finally:
            self._end()

    def _end(self) -> None:
        """Nobody may wait for an engine that has stopped, whatever state it is in."""
        with self._inbox_lock:
            self._inbox_closed = True
        try:
            self._take_pending_commands()
            self._deliver([(key, EngineDead("the engine stopped")) for key in self._sequences])
        except Exception:
            logger.exception("not everybody could be told that the engine stopped")
        self._sequences.clear()
        if self._death is not None and self._on_death is not None:
            self._on_death()

    def _take_commands(self) -> None:
        """Run what came in since the last step; sleep only when there is nothing else to do."""
        if not self._sequences:
            self._do(self._inbox.get())
        elif self._is_idle:
            with suppress(queue.Empty):
                self._do(self._inbox.get(timeout=_IDLE_S))
        self._take_pending_commands()

    def _take_pending_commands(self) -> None:
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            self._do(command)

    def _do(self, command: _Command) -> None:
        """Raises where the engine cannot go on."""
        try:
            command()
        except Exception:
            logger.exception("a command failed")
            self.scheduler.check(self._sequences.values())

    def _stop(self) -> None:
        self._stopping = True

    def _arrive(self, sequence: Sequence, *, displaces: bool) -> None:
        try:
            if displaces:
                self._displace_for(sequence)
            else:
                self._add(sequence)
        finally:
            with self._inbox_lock:
                self._arriving[sequence.request.cache_salt] -= 1

    def _displace_for(self, sequence: Sequence) -> None:
        """The queue was full: unless it has room by now, it takes the place of a less urgent one, if there is one.

        Those in the inbox behind it were promised a place beside it, or take another's.
        """
        tenant = sequence.tenant
        if not is_refused(self.scheduler.waiting.counts(), tenant, self.max_waiting):
            self._add(sequence)
            return
        displaced = self._displaced_by(sequence.request)
        if displaced is None:
            self._tell([(sequence.request.key, self._full())])
            return
        self._abort(displaced.request.key)
        self._tell([(displaced.request.key, self._full())])
        self._add(sequence)

    def _add(self, sequence: Sequence) -> None:
        key = sequence.request.key
        if key in self._sequences:
            logger.error("request ids are unique, %s came twice; the first goes on", key)
            return
        if sequence.grammar is not None and sequence.grammar.error is not None:
            self._tell([(key, sequence.grammar.error)])
            return
        self._sequences[key] = sequence
        try:
            sequence.check_finished(self.scheduler.eos_token_ids, self.scheduler.max_model_len)
            if sequence.finish_reason is None and sequence.is_complete:
                sequence.finish_reason = "stop"
            if sequence.finish_reason is not None:
                self._tell([(key, _chunk(sequence, (), None))])
                del self._sequences[key]
            else:
                self.scheduler.add(sequence)
        except Exception as error:
            self._fail_step({sequence: error})

    def _abort(self, key: Key) -> None:
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self.scheduler.remove(sequence)
            if sequence.grammar is not None:
                sequence.grammar.cancel()

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
        self._tell(events)

    def _fail_beyond_grammar(self) -> None:
        """End sequences that cannot go on within their grammars."""
        stuck = [
            (sequence, told(error))
            for sequence in self._sequences.values()
            if sequence.grammar is not None and (error := _error_of(sequence.grammar)) is not None
        ]
        if stuck:
            self._fail(stuck)

    def _end_complete(self) -> None:
        """End sequences whose grammars let nothing follow, of a model that has no token to end them with."""
        for sequence in [one for one in self._sequences.values() if one.is_complete]:
            sequence.finish_reason = "stop"
            self._abort(sequence.request.key)
            self._tell([(sequence.request.key, _chunk(sequence, (), None))])

    def _emit(
        self,
        batch: Batch,
        sampled: list[Sequence],
        logprobs: list[TokenLogprobs | None],
        failures: dict[Sequence, Exception],
    ) -> None:
        """Tell every sequence of the step but the failed ones what it got; adds to `failures` for whom that raises."""
        events: list[Event] = []
        embedded = [scheduled.sequence for scheduled in batch if scheduled.embeds]
        for sequence, logprob in [*zip(sampled, logprobs, strict=True), *((sequence, None) for sequence in embedded)]:
            if sequence in failures:
                continue
            key = sequence.request.key
            try:
                events.append((key, self._result(sequence, logprob)))
            except Exception as error:
                failures[sequence] = error
                continue
            if sequence.finish_reason is not None or sequence.request.pooling is not None:
                del self._sequences[key]
        self._num_steps += 1
        self._num_generated_tokens += len(sampled)
        self._num_prompt_tokens += sum(
            min(s.start + s.num_tokens, s.sequence.num_prompt_tokens) - min(s.start, s.sequence.num_prompt_tokens)
            for s in batch
        )
        self._tell(events)

    def _result(self, sequence: Sequence, logprobs: TokenLogprobs | None) -> TokenChunk | Embedding:
        if sequence.request.pooling is not None:
            return embedding(sequence)
        return _chunk(sequence, (sequence.token_ids[-1],), logprobs)

    def _tell(self, events: list[Event]) -> None:
        """Deliver. Where that raises, whoever has missed something is ended; raises where not even that can be told."""
        if not events:
            return
        try:
            self._deliver(events)
        except Exception as error:
            logger.exception("what a step made could not be delivered")
            for key, _ in events:
                self._abort(key)
            self._deliver([(key, item if isinstance(item, MantaError) else told(error)) for key, item in events])


def _error_of(grammar: GrammarState) -> Exception | None:
    """Why its sequence cannot go on, if so."""
    try:
        return grammar.error
    except Exception as error:
        return error


def _log_failure(error: Exception, of: str) -> None:
    expected = isinstance(error, MantaError)
    logger.error("a step failed for %s: %r", of, error, exc_info=None if expected else error)
    traceback.clear_frames(error.__traceback__)  # they hold the step's tensors


def _is_late(result: _Sampled | Exception) -> bool:
    return not isinstance(result, Exception) and result[0] == NOT_READY


def _check_token_ids(request: Request, vocab_size: int) -> None:
    """An id beyond the vocabulary would fail a step, and take the device with it if that is a GPU.

    Raises InvalidRequest.
    """
    sampling = request.sampling
    fields: tuple[tuple[str | None, Seq[int]], ...] = (
        (None, request.prompt_token_ids),
        (None, request.output_token_ids),
        ("logit_bias", [token_id for token_id, _ in sampling.logit_bias]),
        ("stop_token_ids", sampling.stop_token_ids),
    )
    for param, token_ids in fields:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            raise InvalidRequest(f"{param or 'prompt'}: a token id is not in the vocabulary of {vocab_size}", param)


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
        queue_s=sequence.queue_s,
        prompt_logprobs=None if scores is None else tuple(scores),
        routed_experts=sequence.routed_experts if token_ids else None,
    )
