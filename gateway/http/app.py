"""The HTTP door: OpenAI's routes over a Frontend. Knows paths and status codes; everything else is the Frontend's."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from importlib.metadata import version
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from cluster.messages import ModelCard
from gateway.answer.chat import ChatShape, Json, model_body, num_bytes, usage_body
from gateway.answer.choice import Delta, Usage
from gateway.answer.completions import CompletionShape
from gateway.answer.whole_calls import WholeCalls, wants_whole_calls
from gateway.embeddings import EmbeddingJob, Vector, embedding_items, embeddings_body, vectors
from gateway.frontend import Frontend
from gateway.http.authentication import READY_PATH, Authentication, CrossOrigin
from gateway.http.body import read_body
from gateway.http.errors import (
    MESSAGES,
    REASON_HEADER,
    REQUEST_ID_HEADER,
    ErrorAnswers,
    error_body,
    json_response,
    no_route,
)
from gateway.http.log import HttpLog
from gateway.http.messages import MessagesDoor
from gateway.http.openapi import openapi_document
from gateway.http.page import page_response
from gateway.http.receiving import BoundedReceiving
from gateway.http.responses import ResponsesDoor
from gateway.http.sse import DONE, EventStream, begun, event, json_bytes, unless_disconnected
from gateway.json_object import parse_object
from gateway.messages.fields import CountTokensRequest, MessagesRequest
from gateway.messages.models import model_entry, models_page
from gateway.request.protocol import (
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    SamplingFields,
    parse_body,
)
from gateway.request.validator import Generation
from gateway.responses.fields import ResponsesRequest
from gateway.tokenize import DetokenizeRequest, TokenizeRequest, detokenize, tokenize, tokenize_body

VERSION = version("manta-serve")
NUMBER_BYTES, TOKEN_BYTES = 20, 16  # about, of an embedding and of a tokenized text, as JSON
ANTHROPIC_VERSION = "anthropic-version"  # the header of its clients, whose list of models has another shape

_BodyT = TypeVar("_BodyT", bound=Body)

BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    MESSAGES: MessagesRequest,
    f"{MESSAGES}/count_tokens": CountTokensRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


def build_app(frontend: Frontend) -> Starlette:
    """The ASGI application of one gateway replica."""
    config = frontend.config
    door = HttpDoor(frontend)
    routes = [
        Route("/v1/chat/completions", door.chat_completions, methods=["POST"]),
        Route("/v1/completions", door.completions, methods=["POST"]),
        Route("/v1/responses", ResponsesDoor(frontend).create, methods=["POST"], name="responses"),
        Route(MESSAGES, MessagesDoor(frontend).create, methods=["POST"], name="messages"),
        Route(f"{MESSAGES}/count_tokens", MessagesDoor(frontend).count_tokens, methods=["POST"]),
        Route("/tokenize", door.tokenize, methods=["POST"]),
        Route("/detokenize", door.detokenize, methods=["POST"]),
        Route("/v1/embeddings", door.embeddings, methods=["POST"]),
        Route("/v1/models", door.models),
        Route("/v1/models/{name:path}", door.model),
        Route("/health", door.health),
        Route("/metrics", door.metrics),
        Route("/load", door.load),
        Route("/version", json_response({"version": VERSION}), methods=["GET"], name="version"),
    ]
    names = [name for card in frontend.cards for name in (card.name, *card.aliases)]
    document = openapi_document(VERSION, routes, () if config.accept_any_model else names, BODIES)
    routes += [
        Route("/", page_response(), methods=["GET"]),
        Route("/openapi.json", json_response(document), methods=["GET"]),
        Route(READY_PATH, door.ready, methods=["GET"]),
    ]
    middleware = [
        Middleware(ErrorAnswers),
        Middleware(Authentication, access=frontend.access, limiter=frontend.limiter),
        Middleware(BoundedReceiving, timeout_s=config.body_timeout_s, max_bytes_of_all=config.max_bytes_received),
    ]
    if config.cors_origins:
        cors = Middleware(
            CrossOrigin,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", REQUEST_ID_HEADER, REASON_HEADER, "retry-after"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=routes,
        middleware=[Middleware(HttpLog, ends=frontend.ends), *middleware],
        exception_handlers={HTTPException: _http_exception},
    )
    app.router.redirect_slashes = False
    return app


class HttpDoor:
    """The routes."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def chat_completions(self, request: HttpRequest) -> Response:
        parsed = await self._read(request, ChatCompletionRequest)
        generation = await self._frontend.chat(parsed)
        tokenizer = self._frontend.served(generation.card).tokenizer
        return await self._answer(request, parsed, generation, ChatShape(generation, tokenizer, parsed))

    async def completions(self, request: HttpRequest) -> Response:
        parsed = await self._read(request, CompletionRequest)
        generation = await self._frontend.completion(parsed)
        tokenizer = self._frontend.served(generation.card).tokenizer
        return await self._answer(request, parsed, generation, CompletionShape(generation, tokenizer, parsed))

    async def embeddings(self, request: HttpRequest) -> Response:
        parsed = await self._read(request, EmbeddingRequest)
        job = await self._frontend.embedding(parsed)
        request.state.request_id = job.id
        answer = await unless_disconnected(request, self._frontend.embed(job))
        size = NUMBER_BYTES * job.dimensions * len(answer)

        def response() -> Response:
            content = embeddings_json(job, vectors(job, answer), parsed.encoding_format)
            return Response(content, headers={REQUEST_ID_HEADER: job.id}, media_type="application/json")

        return await self._frontend.answer_worker.run(size, response)

    async def models(self, request: HttpRequest) -> Response:
        await self._frontend.health.models()
        named = [(card, name) for card in self._frontend.cards for name in (card.name, *card.aliases)]
        if ANTHROPIC_VERSION in request.headers:
            page = models_page([model_entry(card, name) for card, name in named], request.query_params)
            return json_response(page)
        return json_response({"object": "list", "data": [self._model(card, name) for card, name in named]})

    async def model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        await self._frontend.health.models()
        card = self._frontend.route(name).card
        is_anthropic = ANTHROPIC_VERSION in request.headers
        return json_response(model_entry(card, name) if is_anthropic else self._model(card, name))

    def _model(self, card: ModelCard, name: str) -> Json:
        kernels = self._frontend.kernels
        return model_body(card, name, kernels.system_fingerprint(card), kernels.of(card))

    async def health(self, _request: HttpRequest) -> Response:
        """200 when every model can answer, else 503 with how far each is."""
        models = await self._frontend.health.models()
        ready = all(state.phase == "ready" for state in models.values())
        document = {
            "status": "ok" if ready else next(s.phase for s in models.values() if s.phase != "ready"),
            "models": {
                name: {
                    "phase": state.phase,
                    "waiting_for": state.waiting_for,
                    "loaded_bytes": state.loaded_bytes,
                    "total_bytes": state.total_bytes,
                }
                for name, state in models.items()
            },
        }
        return json_response(document, 200 if ready else 503, None if ready else {"retry-after": "2"})

    async def ready(self, _request: HttpRequest) -> Response:
        """For Kubernetes: whether new requests belong to this Ray cluster. Models that load are not asked."""
        is_active = await self._frontend.active_cluster.is_this()
        return json_response({"active": is_active}, 200 if is_active else 503)

    async def metrics(self, _request: HttpRequest) -> Response:
        return await self._frontend.metrics_page.response()

    async def tokenize(self, request: HttpRequest) -> Response:
        parsed = await self._read(request, TokenizeRequest)
        model, token_ids = await tokenize(self._frontend, parsed)
        size = TOKEN_BYTES * len(token_ids)

        def response() -> Response:
            document = tokenize_body(model, token_ids, with_strings=bool(parsed.return_token_strs))
            return json_response(document, num_bytes=size)

        return await self._frontend.answer_worker.run(size, response)

    async def detokenize(self, request: HttpRequest) -> Response:
        parsed = await self._read(request, DetokenizeRequest)
        text = await detokenize(self._frontend, parsed)
        size = len(text)
        return await self._frontend.answer_worker.run(size, lambda: json_response({"prompt": text}, num_bytes=size))

    async def load(self, _request: HttpRequest) -> Response:
        """Requests that this gateway replica is answering."""
        return json_response({"server_load": self._frontend.num_ongoing})

    async def _read(self, request: HttpRequest, body_type: type[_BodyT]) -> _BodyT:
        data = await read_body(request, self._frontend.config.max_body_bytes)
        return await self._frontend.worker.run(len(data), _parsed, body_type, data)

    async def _answer(
        self, request: HttpRequest, parsed: SamplingFields, generation: Generation, shape: ChatShape | CompletionShape
    ) -> Response:
        request.state.request_id = generation.id
        if not parsed.stream:
            return await unless_disconnected(request, self._whole(parsed, generation, shape))
        events = await begun(
            request,
            self._events(parsed, generation, shape, wants_whole_calls(request.headers)),
            lambda error: event(error_body(error, generation.id)),
        )
        return EventStream(events, {REQUEST_ID_HEADER: generation.id}, self._frontend.config.keepalive_s)

    async def _whole(
        self, parsed: SamplingFields, generation: Generation, shape: ChatShape | CompletionShape
    ) -> Response:
        usage = Usage(generation.num_prompt_tokens)
        choices = await self._frontend.whole(generation, usage)
        has_prompt = shape.return_token_ids or generation.echo
        size = (parsed.num_bytes if has_prompt else 0) + sum(map(num_bytes, choices))

        def response() -> Response:
            return json_response(
                shape.whole(choices, usage), headers={REQUEST_ID_HEADER: generation.id}, num_bytes=size
            )

        return await self._frontend.answer_worker.run(size, response)

    async def _events(
        self,
        parsed: SamplingFields,
        generation: Generation,
        shape: ChatShape | CompletionShape,
        has_whole_calls: bool,
    ) -> AsyncGenerator[bytes, None]:
        """One event a delta that says something.

        The usage comes in an event of its own where that was asked for; else with the last choice's end, as Mistral's
        clients expect, who can ask for nothing. Never in both: some clients add up what they find.
        """
        usage = Usage(generation.num_prompt_tokens)
        wants_event = parsed.wants_usage or self._frontend.config.force_usage
        wants_none = parsed.stream_options is not None and parsed.stream_options.include_usage is False
        running = len(generation.requests)
        says_ids = shape.return_token_ids
        choices: set[int] = set()  # that have had an event
        whole_calls = WholeCalls() if has_whole_calls else None
        async with aclosing(self._frontend.generate(generation, usage)) as deltas:
            async for delta in deltas:
                if whole_calls is not None:
                    delta = whole_calls.push(delta)
                running -= delta.finish_reason is not None
                has_usage = parsed.wants_each_usage or not (running or wants_event or wants_none)
                if delta.says_something or says_ids:
                    has_prompt = delta.index not in choices and (says_ids or generation.echo)
                    size = num_bytes(delta) + (parsed.num_bytes if has_prompt else 0)
                    counts = usage_body(usage) if has_usage else None
                    yield await self._frontend.answer_worker.run(size, _event, shape, delta, counts, size)
                    choices.add(delta.index)
        if wants_event:
            yield event(shape.usage_chunk(usage))
        yield DONE


def embeddings_json(job: EmbeddingJob, answer: Sequence[Vector], encoding_format: str | None) -> bytes:
    """Made vector by vector: few numbers are Python's at a time, and other threads run in between."""
    data = b",".join(map(json_bytes, embedding_items(answer, encoding_format)))
    return json_bytes(embeddings_body(job))[:-1] + b',"data":[' + data + b"]}"


def _parsed(body_type: type[_BodyT], data: bytes) -> _BodyT:
    return parse_body(body_type, parse_object(data), len(data))


def _event(shape: ChatShape | CompletionShape, delta: Delta, usage: Json | None, size: int) -> bytes:
    return event(shape.chunk(delta, usage), size)


async def _http_exception(request: HttpRequest, error: Exception) -> Response:
    """An unknown route or method."""
    assert isinstance(error, HTTPException)
    return no_route(error.status_code, str(error.detail), request.url.path, error.headers)
