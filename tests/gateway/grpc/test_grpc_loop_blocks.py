"""The same over gRPC: messages as large as may be keep the event loop for no longer than 50 ms.

Numbers are packed there: 8 MB hold eight million ids.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from gateway.grpc.door import GrpcDoor
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.grpc.server.gate import Gate
from gateway.grpc.server.options import server_options
from tests.gateway.http.test_loop_blocks import MAX_BYTES, TEXT, Blocks, frozen, large_frontend

SIZE = MAX_BYTES - 1000
SERVICE = chat_pb2.DESCRIPTOR.services_by_name["Manta"]
USER = chat_pb2.Message(role="user", content="Hi")
OK, REFUSED, TOO_MUCH = (getattr(grpc.StatusCode, name) for name in ("OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"))


def chat(**fields: Any) -> chat_pb2.ChatRequest:
    return chat_pb2.ChatRequest(**{"model": "tiny", "messages": [USER]} | fields)


def sampling(**fields: Any) -> chat_pb2.ChatRequest:
    return chat(sampling=chat_pb2.Sampling(**{"max_tokens": 3} | fields))


def ids(count: int) -> chat_pb2.TokenIds:
    return chat_pb2.TokenIds(ids=[40] * count)


def cases() -> list[tuple[str, str, Any, Any]]:
    call = chat_pb2.ToolCall(name="f", arguments="{}")
    tool = chat_pb2.Tool(name="f", parameters='{"enum": [' + "[]," * 60_000 + "[]]}")
    millions = ids(SIZE)
    inputs = [chat_pb2.EmbedInput(text="Hi")] * 16_000
    return [
        ("many messages", "Chat", chat(messages=[chat_pb2.Message()] * 16_000), REFUSED),
        ("a long message", "ChatStream", chat(messages=[chat_pb2.Message(role="user", content="x" * SIZE)]), REFUSED),
        ("many calls", "Chat", chat(messages=[chat_pb2.Message(role="assistant", tool_calls=[call] * 1000)]), OK),
        ("a tool's schema", "Chat", chat(tools=[tool]), REFUSED),
        ("stop ids", "Chat", sampling(stop_token_ids=millions.ids), REFUSED),
        ("stop strings", "Chat", sampling(stop=["x"] * 60_000), REFUSED),
        ("biases", "Chat", sampling(logit_bias=dict.fromkeys(range(16_000), 1.0)), REFUSED),
        ("eight million ids", "Generate", chat_pb2.GenerateRequest(model="tiny", token_ids=millions), REFUSED),
        ("many ids", "Generate", chat_pb2.GenerateRequest(model="tiny", token_ids=ids(500_000)), REFUSED),
        ("a long text", "Generate", chat_pb2.GenerateRequest(model="tiny", text="x" * SIZE), REFUSED),
        ("many inputs", "Embed", chat_pb2.EmbedRequest(model="vectors", inputs=inputs), REFUSED),
        (
            "ids of an input",
            "Embed",
            chat_pb2.EmbedRequest(model="vectors", inputs=[{"token_ids": millions}]),
            REFUSED,
        ),
        ("ids to text", "Detokenize", chat_pb2.DetokenizeRequest(model="tiny", token_ids=millions.ids), REFUSED),
        ("text to ids", "Tokenize", chat_pb2.TokenizeRequest(model="tiny", text=TEXT), OK),
        ("too large", "Chat", chat(messages=[chat_pb2.Message(role="user", content="x" * (MAX_BYTES + 10))]), TOO_MUCH),
        # What is taken.
        (
            "a context of ids",
            "Generate",
            chat_pb2.GenerateRequest(model="tiny", token_ids=ids(130_000), sampling=chat_pb2.Sampling(max_tokens=3)),
            OK,
        ),
        ("sixteen choices", "Chat", sampling(n=16, logprobs=20, max_tokens=50), OK),
        (
            "a prompt that is echoed in every choice",
            "Generate",
            chat_pb2.GenerateRequest(
                model="tiny", token_ids=ids(100_000), echo=True, sampling=chat_pb2.Sampling(max_tokens=1, n=32)
            ),
            OK,
        ),
        (
            "a prompt's log-probabilities",
            "GenerateStream",
            chat_pb2.GenerateRequest(
                model="tiny", token_ids=ids(8000), sampling=chat_pb2.Sampling(max_tokens=1, prompt_logprobs=20)
            ),
            OK,
        ),
        ("vectors", "Embed", chat_pb2.EmbedRequest(model="vectors", inputs=[{"token_ids": ids(2000)}] * 64), OK),
    ]


def test_large_messages_keep_nobody_waiting(tokenizer_directory: Path) -> None:
    async def run() -> Blocks:
        frontend = large_frontend(tokenizer_directory)
        server = grpc.aio.server(
            interceptors=(Gate(frontend.config, frontend.access),), options=server_options(frontend.config)
        )
        chat_pb2_grpc.add_MantaServicer_to_server(GrpcDoor(frontend), server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        options = [("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:

            async def call(rpc: str, data: bytes) -> Any:
                """Its message was written and its answer will not be parsed: that is the client's work."""
                make = channel.unary_stream if rpc.endswith("Stream") else channel.unary_unary
                answer = make(f"/{SERVICE.full_name}/{rpc}")(data, timeout=60)
                if rpc.endswith("Stream"):
                    with suppress(grpc.RpcError):
                        async for _ in answer:
                            pass
                return await answer.code()

            await call("Chat", chat().SerializeToString())
            blocks = Blocks()
            for name, rpc, message, code in cases():
                await blocks.ask(f"{rpc}: {name}", partial(call, rpc, message.SerializeToString()))
                assert blocks.found[f"{rpc}: {name}"][2] == code, name
        await server.stop(0)
        return blocks

    with frozen():
        asyncio.run(run()).check()
