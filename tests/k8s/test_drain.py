"""`manta k8s drain` on a real cluster of several nodes: work goes elsewhere first, and streams end by themselves."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cluster.commands.k8s.drain import streams_of_haproxy
from tests.programs import said_by

TIMEOUT_S = 240


def test_a_stream_ends_by_itself_and_the_next_one_is_elsewhere(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_SERVE_THROUGHPUT_OPTIMIZED"}
    environment |= {"RAY_TMPDIR": "/tmp/manta-drain", "RAY_ADDRESS": ""}
    said = said_by("cluster.drain_streams", tmp_path, environment=environment, timeout_s=TIMEOUT_S)
    seen = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))  # Ray talks, too
    assert seen["still_waiting"], "the pod is kept while its stream goes on, though the replacement is up"
    assert seen["drained"] == "True"
    assert set(seen["nodes"]) == {seen["nodes"][0]}
    assert seen["second"] != seen["nodes"][0]
    assert seen["too_short"] is False
    assert seen["of_head"] is True


@contextmanager
def haproxy_statistics(rows: list[str]) -> Iterator[str]:
    """A page as HAProxy writes it."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = "\n".join(["# pxname,svname,qcur,qmax,scur,smax", *rows]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/stats;csv"
        server.shutdown()
        thread.join()


def test_streams_that_haproxy_carries_are_counted_once() -> None:
    rows = ["http,FRONTEND,,,7,9", "default,replica-1,0,0,2,3", "default,replica-2,0,0,1,3", "default,BACKEND,0,0,3,3"]
    with haproxy_statistics(rows) as url:
        assert streams_of_haproxy(url) == 3
    assert streams_of_haproxy(url) == 0, "where no HAProxy runs there are none"
