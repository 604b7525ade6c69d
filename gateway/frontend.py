"""The core behind both doors: a Generation becomes text. Knows choices, deltas and usage; knows no wire format.

    Generation ──▶ one stream per choice ──▶ TokenChunk ──▶ Choice: detokenize, stop strings ──▶ Delta ──▶ door

Leaving the iteration early, for whatever reason, closes every stream of the request, which aborts its sequences.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from cluster.config import GatewayConfig
from cluster.errors import DeadlineExceeded, InvalidRequest, ModelNotFound, Overloaded
from cluster.fairness import is_refused
from cluster.messages import Embedding, Kind, ModelCard, Request, TokenChunk
from cluster.telemetry.traces import Span, Traces
from gateway.active_cluster import ActiveCluster
from gateway.admission.access import AccessPolicy
from gateway.admission.caller import current_caller
from gateway.admission.limits import Limiter
from gateway.admission.prompt_bill import PromptBill
from gateway.admission.recent_refusals import RecentRefusals
from gateway.answer.chat import ChoiceText
from gateway.answer.choice import Choice, Delta, Usage
from gateway.answer.held_scores import HeldScores
from gateway.answer.prompt_scores import PromptScores
from gateway.coordinators import resumption
from gateway.coordinators.client import CoordinatorClient
from gateway.coordinators.health import Health
from gateway.deadline import PASSED, DeadlineTimer
from gateway.embeddings import EmbeddingJob, EmbeddingValidator
from gateway.request.protocol import Body, ChatCompletionRequest, CompletionRequest, EmbeddingRequest, has_forms
from gateway.request.validator import Generation, Validator
from gateway.telemetry.kernel_watch import KernelWatch
from gateway.telemetry.logs import RequestRecord, current_record
from gateway.telemetry.metrics import GatewayMetrics, RequestTimer
from gateway.telemetry.metrics_page import MetricsPage
from gateway.telemetry.request_ends import RequestEnds
from gateway.text.tokenizer import Tokenizer
from gateway.worker import Worker

EMBEDDINGS_PER_CALL = 64  # to a coordinator: pickling thousands would keep the event loop
MERGED_DELTAS = 32  # waiting to be merged, over all choices of a request

_T = TypeVar("_T")


@dataclass(frozen=True)
class ServedModel:
    """One model as the gateway holds it."""

    card: ModelCard
    tokenizer: Tokenizer
    validator: Validator
    embedding_validator: EmbeddingValidator
    coordinator: CoordinatorClient


class Frontend:
    """Validates, admits, generates. One per gateway replica."""

    def __init__(
        self,
        config: GatewayConfig,
        cards: tuple[ModelCard, ...],
        tokenizers: Mapping[str, Tokenizer],
        coordinators: Mapping[str, CoordinatorClient],
        health: Health,
        metrics: GatewayMetrics | None = None,
        metrics_page: MetricsPage | None = None,
        traces: Traces | None = None,
        kernels: KernelWatch | None = None,
        active_cluster: ActiveCluster | None = None,
    ) -> None:
        """`tokenizers` and `coordinators` are keyed by the card's application.

        Without `metrics_page`, /metrics shows this process only; without `traces` there are none.
        """
        self.config = config
        self.health = health
        self.access = AccessPolicy(config)
        self.worker = Worker("body")
        self.answer_worker = Worker("answer")  # no first token waits for its caller's next prompt to be read
        self.metrics = metrics or GatewayMetrics()
        self._traces = traces or Traces("manta-gateway", None)
        self.ends = RequestEnds(self.metrics, traces=self._traces)
        self.limiter = Limiter(self.metrics.registry)
        self.metrics_page = metrics_page or MetricsPage(self.metrics, cards)
        self.kernels = kernels or KernelWatch()
        self.active_cluster = active_cluster or ActiveCluster()
        self._ongoing: Counter[str] = Counter()  # requests by the caller's id
        self._refusals = RecentRefusals()
        self._versions: dict[str, list[ModelCard]] = {}  # by name and alias, in the order of the configuration
        self._served: dict[str, ServedModel] = {}  # by application
        for card in cards:
            tokenizer = tokenizers[card.application]
            self._served[card.application] = ServedModel(
                card,
                tokenizer,
                Validator(card, tokenizer, config),
                EmbeddingValidator(card, tokenizer, config),
                coordinators[card.application],
            )
            for name in (card.name, *card.aliases):
                self._versions.setdefault(name, []).append(card)

    @property
    def cards(self) -> tuple[ModelCard, ...]:
        """One per model: the version that answers now."""
        names = dict.fromkeys(served.card.name for served in self._served.values())
        return tuple(self.model(name).card for name in names)

    def model(self, name: str) -> ServedModel:
        """The version that answers to a name or alias now. Raises ModelNotFound."""
        return self.served(self.health.first_ready(self._versions_of(name)))

    def served(self, card: ModelCard) -> ServedModel:
        """The one that a card describes, even when another version answers by now."""
        return self._served[card.application]

    def _versions_of(self, name: str) -> list[ModelCard]:
        try:
            return self._versions[name]
        except KeyError:
            known = ", ".join(self._versions)
            raise ModelNotFound(f"the model {name!r} does not exist; served are: {known}") from None

    def route(self, name: str | None, kind: Kind = "chat") -> ServedModel:
        """Who answers a request that names a model, or none: the first of that kind. Raises ModelNotFound."""
        return self.model(self._name(name, kind))

    def _name(self, name: str | None, kind: Kind) -> str:
        if name is None or (name not in self._versions and self.config.accept_any_model):
            return next((card.name for card in self.cards if card.kind == kind), self.cards[0].name)
        return name

    async def chat(
        self, body: ChatCompletionRequest, timeout_s: float | None = None, *, drops_oldest: bool = False
    ) -> Generation:
        """Validates and tokenizes. Raises RequestError or ModelLoading."""
        model = await self._admit(body.model, "chat", body.priority)
        work = partial(model.validator.chat, body, timeout_s, drops_oldest=drops_oldest)
        return self._admitted(await self.read(body, work))

    async def completion(self, body: CompletionRequest, timeout_s: float | None = None) -> Generation:
        """Validates and tokenizes. Raises RequestError or ModelLoading."""
        model = await self._admit(body.model, "chat", body.priority)
        return self._admitted(await self.read(body, partial(model.validator.completion, body, timeout_s)))

    async def read(self, body: Body, work: Callable[[], _T]) -> _T:
        """What `work` makes of a body, beside the event loop if that may take long, as 8 KB of schemas do: 0.1 s."""
        run = self.worker.run_beside if has_forms(body) else self.worker.run
        return await run(body.num_bytes, work)

    async def embedding(self, body: EmbeddingRequest, timeout_s: float | None = None) -> EmbeddingJob:
        """Validates and tokenizes. Raises RequestError or ModelLoading."""
        model = await self._admit(body.model, "embedding", body.priority)
        job = await self.worker.run(body.num_bytes, model.embedding_validator.job, body, timeout_s)
        current_caller().take_prompt(job.num_prompt_tokens)
        return job

    async def embed(self, job: EmbeddingJob) -> list[Embedding]:
        """That of each input, in order. Cancelling aborts them. Raises MantaError."""
        self._refuse_when_full()
        record = current_record() or RequestRecord("http", "")
        with self._counted(job.card.name, job.requests, Usage(job.num_prompt_tokens), record) as timer:
            coordinator = self.served(job.card).coordinator
            embeddings: list[Embedding] = []
            try:
                async with asyncio.timeout(job.deadline.remaining_s):
                    for start in range(0, len(job.requests), EMBEDDINGS_PER_CALL):
                        asked = job.requests[start : start + EMBEDDINGS_PER_CALL]
                        with PromptBill(current_caller(), {job.id: _num_tokens(asked)}) as bill:
                            embeddings += await resumption.embed(
                                coordinator, asked, self.config.resume_timeout_s, has_begun=start > 0
                            )
                            bill.answered(job.id)
            except TimeoutError:
                raise DeadlineExceeded(PASSED) from None
            for choice in range(len(embeddings)):
                timer.tokens(choice, 0, "stop")
        return embeddings

    async def generate(self, generation: Generation, usage: Usage) -> AsyncGenerator[Delta, None]:
        """Deltas of all choices as they come, `usage` kept up to date. Raises MantaError.

        Close it (`aclosing`) to abort: its sequences are gone when the close returns.
        """
        self._refuse_when_full()
        record = current_record() or RequestRecord("http", "")
        caller = current_caller()
        with (
            self._traced(record, generation) as span,
            self._counted(generation.card.name, generation.requests, usage, record) as timer,
            PromptBill(caller, {r.request_id: len(r.prompt_token_ids) for r in generation.requests}) as bill,
        ):
            record.finish_reasons = timer.finish_reasons
            model = self.served(generation.card)
            requests = generation.requests
            timer.asked = (requests[-1].choice_index + 1, requests[0].sampling.max_tokens)
            if span:
                parent, layers = span.traceparent, record.traces_layers
                requests = tuple(replace(one, traceparent=parent, traces_layers=layers) for one in requests)
            choices = [Choice(i, r, generation, model.tokenizer, usage) for i, r in enumerate(requests)]
            scores = {r.request_id: PromptScores() for r in requests if r.sampling.prompt_logprobs is not None}
            streams = [
                _one(
                    choice,
                    resumption.generate(model.coordinator, choice.request, self.config.resume_timeout_s),
                    scores.get(choice.request.request_id),
                )
                for choice in choices
            ]
            merged = streams[0] if len(streams) == 1 else _merge(streams)
            with DeadlineTimer(generation.deadline) as deadline:
                async with aclosing(merged):
                    while True:
                        try:
                            delta = await deadline.next(merged)
                        except StopAsyncIteration:
                            return
                        bill.answered(requests[delta.index].request_id)
                        caller.take_output(len(delta.token_ids))
                        timer.tokens(delta.index, len(delta.token_ids), delta.finish_reason)
                        record.time_to_first_token_s = timer.time_to_first_token_s
                        yield delta

    async def whole(self, generation: Generation, usage: Usage) -> list[ChoiceText]:
        """All of the answer, choice by choice. Raises MantaError; InvalidRequest where it is more than may be held."""
        choices = [ChoiceText() for _ in generation.requests]
        held = HeldScores()
        async with aclosing(self.generate(generation, usage)) as deltas:
            async for delta in deltas:
                held.add(delta)
                choices[delta.index].add(delta)
        return choices

    @property
    def num_ongoing(self) -> int:
        """Requests that are being answered."""
        return self._ongoing.total()

    @contextmanager
    def _counted(
        self, model: str, requests: Sequence[Request], usage: Usage, record: RequestRecord
    ) -> Iterator[RequestTimer]:
        """Around the answer to an admitted request: one more is ongoing; at the end figures and record are told."""
        caller = current_caller()
        self._ongoing[caller.id] += 1
        timer = RequestTimer(self.metrics, model, len(requests))
        failure: BaseException | None = None
        try:
            yield timer
        except BaseException as error:
            failure = error
            if isinstance(error, Overloaded):
                self._refusals.note(model, caller.id, error, requests[0].priority)
            raise
        finally:
            self._ongoing -= Counter((caller.id,))
            timer.end(usage.prompt_tokens, usage.completion_tokens)
            record.model = model
            record.prompt_tokens, record.cached_tokens = usage.prompt_tokens, usage.cached_tokens
            record.completion_tokens, record.queue_s = usage.completion_tokens, usage.queue_s
            if not timer.is_complete:
                record.fail(failure)

    @contextmanager
    def _traced(self, record: RequestRecord, generation: Generation) -> Iterator[Span]:
        """A span of the request, around `_counted`: it ends with what the record was told."""
        attributes = {
            "manta.request_id": generation.id,
            "manta.door": record.door,
            "gen_ai.request.model": generation.card.name,
            "gen_ai.request.choice.count": len(generation.requests),
        }
        span = self._traces.start(
            "request", attributes, kind="server", parent=record.traceparent, started_ns=record.started_ns
        )
        record.may_be_traced = False
        try:
            yield span
        finally:
            _end_span(span, record)

    async def _admit(self, name: str | None, kind: Kind, priority: int | None) -> ServedModel:
        if not name and not self.config.accept_any_model:
            served = [card.name for card in self.cards if card.kind == kind]
            if len(served) != 1:
                raise InvalidRequest(f"model: field required; served are: {', '.join(served) or 'none'}", param="model")
        model = self.route(name or None, kind)
        if model.card.kind != kind:
            others = ", ".join(card.name for card in self.cards if card.kind == kind) or "none"
            does, wanted = ("makes embeddings", "chat") if kind == "chat" else ("chats", "embeddings")
            raise InvalidRequest(f"model: {name!r} {does} only; served for {wanted}: {others}", param="model")
        if record := current_record():
            record.model = model.card.name
        self._refuse_when_full()
        self._refusals.check(model.card.name, current_caller().id, priority or 0)
        return self.served(await self.health.require(self._versions_of(model.card.name)))

    def _admitted(self, generation: Generation) -> Generation:
        """With what will answer it; its choices and its prompt count against the caller's key. Raises RateLimited."""
        current_caller().take_choices(len(generation.requests))
        current_caller().take_prompt(generation.num_prompt_tokens)
        return replace(generation, system_fingerprint=self.kernels.system_fingerprint(generation.card))

    def _refuse_when_full(self) -> None:
        bound = self.config.max_ongoing_requests
        if is_refused(self._ongoing, current_caller().id, bound):
            raise Overloaded(
                f"the gateway is at its limit of {bound} requests (gateway.max_ongoing_requests)", reason="shed_gateway"
            )


def _end_span(span: Span, record: RequestRecord) -> None:
    if span:
        attributes: dict[str, object] = {
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.completion_tokens,
            "gen_ai.response.finish_reasons": record.finish_reasons,
            "manta.cached_tokens": record.cached_tokens,
            "manta.queue_s": record.queue_s or 0.0,
            "manta.time_to_first_token_s": record.time_to_first_token_s or 0.0,
        }
        if record.reason:
            attributes["manta.reason"] = record.reason
        span.end(attributes, record.error)


def _num_tokens(requests: Sequence[Request]) -> int:
    return sum(len(request.prompt_token_ids) for request in requests)


async def _one(
    choice: Choice, chunks: AsyncGenerator[TokenChunk, None], scores: PromptScores | None
) -> AsyncGenerator[Delta, None]:
    """The deltas of one choice until it is finished; the first with the prompt's scores, if there are to be some."""
    async with aclosing(chunks):
        async for chunk in chunks:
            delta = choice.push(chunk)
            if scores is not None:
                delta, scores = await scores.shared(delta, is_first=choice.request.choice_index == 0), None
            yield delta
            if choice.finished:
                return


async def _merge(streams: list[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """The deltas of several choices, each as it comes; the first error ends them all."""
    queue: asyncio.Queue[Delta | Exception] = asyncio.Queue(MERGED_DELTAS)

    async def run(stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    await queue.put(delta)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(run(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            running -= item.finish_reason is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
