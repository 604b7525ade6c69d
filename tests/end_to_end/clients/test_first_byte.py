"""What a stream says before its first token reaches the client, through HAProxy and Serve."""

from __future__ import annotations

import signal
import time

import httpx

from tests.processes import processes


def test_headers_come_while_the_first_token_does_not(server):
    """The experts stand still: a prefill that takes as long looks the same from outside."""
    shards = processes(server, "ExpertShard")
    assert shards
    body = {"model": "mistral-small", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    for shard in shards:
        shard.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    try:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as stream:
            assert stream.status_code == 200
            assert stream.headers["content-type"].startswith("text/event-stream")
            headers_s = time.monotonic() - started
            for shard in shards:
                shard.send_signal(signal.SIGCONT)
            text = "".join(stream.iter_text())
    finally:
        for shard in shards:
            shard.send_signal(signal.SIGCONT)
    assert 0.9 < headers_s < 10, "an error in the first second would have had its status"
    assert text.endswith("data: [DONE]\n\n")
    assert '"error":{' not in text
