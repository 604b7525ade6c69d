"""The gRPC door behind the HAProxy that `manta-haproxy` becomes, with a configuration like Serve's."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import threading
import time
from pathlib import Path

import grpc

from cluster.messages import ModelCard
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.grpc.watches import MAX_OF_CALLER
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, held_script, tokens_script
from tests.gateway.grpc.test_grpc import grpc_address
from tests.haproxy import running, write_config
from tests.ports import free_port
from tests.raw_http2 import Sender
from tests.waiting import wait_for

CONFIG = """
frontend grpc_frontend
    bind 127.0.0.1:{port} proto h2
    default_backend grpc-gateway
backend grpc-gateway
    mode http
    http-reuse always
    server one {address} proto h2 check
"""


def test_a_silent_stream_is_not_cut_and_its_connection_is_kept_alive(tmp_path: Path, card: ModelCard) -> None:
    """A silent client, which HAProxy gives up, is none that waits for an answer."""
    port, may_answer = free_port(), threading.Event()
    coordinator = ScriptedCoordinator(held_script(may_answer))
    request = chat_pb2.GenerateRequest(model="tiny", text="Hello", sampling=chat_pb2.Sampling(max_tokens=1))
    with grpc_address(build_frontend(card, coordinator)) as address:
        config = write_config(tmp_path, CONFIG.format(port=port, address=address), client_timeout="400ms")
        with running(config), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stream = chat_pb2_grpc.MantaStub(channel).GenerateStream(request, timeout=30, wait_for_ready=True)
            wait_for(lambda: "keepalive" in sockets_at(port), 10, "a connection that is kept alive")
            time.sleep(1)  # more than twice the client's timeout
            may_answer.set()
            assert len(list(stream)) == 1


def test_a_client_is_one_caller_however_many_connections_haproxy_has_for_it(
    tmp_path: Path, card: ModelCard, tokenizer: HuggingFaceTokenizer
) -> None:
    """Streams that begin at the same time get a connection each there, and each would have watches of its own."""
    port = free_port()
    senders = [Sender(), Sender()]

    async def watch(frontend_port: int) -> None:
        def is_settled() -> bool:
            return all(sender.num_open <= MAX_OF_CALLER for sender in senders)

        address, path = f"127.0.0.1:{frontend_port}", "/grpc.health.v1.Health/Watch"
        watching = (sender.send(address, path, 20, b"", until=is_settled) for sender in senders)
        await asyncio.wait_for(asyncio.gather(*watching), 20)

    with grpc_address(build_frontend(card, ScriptedCoordinator(tokens_script(tokenizer.encode("Hi"))))) as address:
        config = write_config(tmp_path, CONFIG.format(port=port, address=address), client_timeout="20s")
        with running(config), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(timeout=20)
            asyncio.run(watch(port))
    assert [sender.num_open for sender in senders] == [MAX_OF_CALLER] * 2


def test_a_process_that_gave_its_place_up_closes_what_carries_nothing_and_no_stream(
    tmp_path: Path, card: ModelCard
) -> None:
    """gRPC's C core waits for ever on a connection that tells it to go with its first words, as HAProxy's does then."""
    port, may_answer = free_port(), threading.Event()
    coordinator = ScriptedCoordinator(held_script(may_answer))
    request = chat_pb2.GenerateRequest(model="tiny", text="Hello", sampling=chat_pb2.Sampling(max_tokens=1))
    idle = Sender(stays=True)

    async def give_up_its_place(haproxy: subprocess.Popen[bytes]) -> None:
        sending = idle.send(f"127.0.0.1:{port}", "", num_streams=0, message=b"", until=lambda: idle.is_closed)
        connection = asyncio.create_task(asyncio.wait_for(sending, 20))
        await asyncio.sleep(1)
        assert not idle.is_closed, "before it is told to go"
        haproxy.send_signal(signal.SIGUSR1)  # as the process does that takes over
        await connection

    with grpc_address(build_frontend(card, coordinator)) as address:
        config = write_config(tmp_path, CONFIG.format(port=port, address=address), client_timeout="60s")
        with running(config) as haproxy, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stream = chat_pb2_grpc.MantaStub(channel).GenerateStream(request, timeout=60, wait_for_ready=True)
            wait_for(lambda: coordinator.requests, 20, "the request")
            asyncio.run(give_up_its_place(haproxy))
            time.sleep(2)  # twice as long as a connection without a stream is kept
            may_answer.set()
            assert len(list(stream)) == 1
    assert idle.was_told_to_go


def sockets_at(port: int) -> str:
    """HAProxy's connections of clients, with their timers."""
    command = ["ss", "--no-header", "--tcp", "--numeric", "--options", "state", "established", "sport", f"= :{port}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
