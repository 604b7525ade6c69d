"""The gRPC client of `manta bench serve`, over gateway/grpc/proto/chat.proto. Keeps when each message came."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from cluster.commands.bench.serve.figures import Outcome
from cluster.commands.bench.serve.load import Load
from cluster.errors import Unavailable
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc

LIST_TIMEOUT_S = 10.0
STREAM_TIMEOUT_S = 600.0


@dataclass(slots=True)
class GrpcAnswer:
    """The messages of one stream, with the moment of each."""

    due: float
    forced_length: int
    chunks: list[tuple[float, Any]] = field(default_factory=list)
    end: float = 0.0
    error: str | None = None
    detail: str = ""

    def outcome(self) -> Outcome:
        """Tokens and times; the usage of the last message has to agree with the ids that came."""
        if self.error is not None:
            return Outcome(self.due, self.end, error=self.error, detail=self.detail)
        times = tuple(moment for moment, chunk in self.chunks if chunk.choice.token_ids)
        num_ids = sum(len(chunk.choice.token_ids) for _, chunk in self.chunks)
        usage = self.chunks[-1][1].usage if self.chunks else None
        if usage is None or usage.completion_tokens != num_ids or num_ids != self.forced_length:
            return Outcome(self.due, self.end, error="wrong length", detail=f"{num_ids} tokens, usage {usage}")
        return Outcome(self.due, self.end, times, usage.prompt_tokens, num_ids)


class GrpcClient:
    """One server, `host:port`."""

    def __init__(self, address: str, key: str | None, load: Load) -> None:
        self.model = ""
        self._address = address.removeprefix("http://").rstrip("/")
        self._load = load
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        self._channel = grpc.aio.insecure_channel(self._address)
        self._stub: Any = chat_pb2_grpc.MantaStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def first_model(self) -> str:
        """Raises Unavailable when the server does not answer, or lists none."""
        try:
            answer = await self._stub.ListModels(
                chat_pb2.ListModelsRequest(), timeout=LIST_TIMEOUT_S, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"{self._address} lists no models: {error.code().name}: {error.details()}") from error
        if not answer.models:
            raise Unavailable(f"{self._address} serves no model")
        return str(answer.models[0].name)

    async def send(self, number: int, due: float) -> GrpcAnswer:
        answer = GrpcAnswer(due, self._load.output_tokens)
        request = chat_pb2.GenerateRequest(
            model=self.model,
            token_ids=chat_pb2.TokenIds(ids=self._load.prompt(number)),
            sampling=chat_pb2.Sampling(max_tokens=self._load.output_tokens, temperature=0.0, ignore_eos=True),
        )
        try:
            async for chunk in self._stub.GenerateStream(request, timeout=STREAM_TIMEOUT_S, metadata=self._metadata):
                answer.chunks.append((time.perf_counter(), chunk))
        except grpc.aio.AioRpcError as error:
            answer.error, answer.detail = f"gRPC {error.code().name}", str(error.details())
        answer.end = time.perf_counter()
        return answer
