"""Bodies that are as large as may be: their errors are found at once and are short, and nobody else waits for them.

`"messages": [1, 1, …]` of 2 MB froze a gateway for 5 s, and one of 7.8 MB for 36 s with 1 GB of memory, while pydantic
listed every wrong entry on the event loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.errors import InvalidRequest, ModelNotFound
from gateway.admission.api_keys import ApiKey
from gateway.admission.caller import Caller, current_caller, set_caller
from gateway.http.app import BODIES
from gateway.request.protocol import ChatCompletionRequest, parse_body
from gateway.worker import INLINE_BYTES, LONG_BYTES, NUM_THREADS, Worker


def schemas(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within one of pydantic's, with the field that it is of."""
    if isinstance(schema, dict):
        if "type" in schema:
            yield path, schema
        for key, value in schema.items():
            if key == "fields":
                for name, field in value.items():
                    yield from schemas(field, f"{path}.{name}" if path else name)
            elif key not in ("cls", "metadata"):
                yield from schemas(value, path)
    elif isinstance(schema, list):
        for one in schema:
            yield from schemas(one, path)


@pytest.mark.parametrize("body", sorted({*BODIES.values()}, key=lambda body: body.__name__))
def test_no_body_lists_errors_that_grow_with_it(body: Any) -> None:
    """Every list stops at its first wrong entry; an object has a bound that is looked at before its contents."""
    for path, schema in schemas(body.__pydantic_core_schema__, ""):
        if schema["type"] in ("list", "set", "tuple"):
            assert schema.get("fail_fast"), path
        if schema["type"] == "dict" and schema["values_schema"]["type"] != "any":
            assert path in body.MAX_LENGTHS, path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", [1] * 16_385),
        ("stop", ["x"] * 17),
        ("stop_token_ids", [1] * 65),
        ("logit_bias", {str(i): "wrong" for i in range(1025)}),
    ],
)
def test_lengths_are_looked_at_before_contents(field: str, value: Any) -> None:
    good = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    with pytest.raises(InvalidRequest, match=f"^{field}: at most") as refused:
        parse_body(ChatCompletionRequest, good | {field: value}, 0)
    assert refused.value.param == field


def test_an_error_does_not_say_back_what_was_sent() -> None:
    long = "x" * 1_000_000
    errors = [InvalidRequest(f"logit_bias.{long}: no token id", param=f"logit_bias.{long}"), ModelNotFound(long)]
    assert all(len(str(error)) <= 2000 for error in errors)
    assert len(errors[0].param or "") <= 200


def test_a_small_body_is_worked_on_at_once_and_a_large_one_beside_the_loop() -> None:
    async def both() -> list[str]:
        worker = Worker("body")
        sizes = (INLINE_BYTES, INLINE_BYTES + 1)
        return [await worker.run(size, lambda: threading.current_thread().name) for size in sizes]

    assert asyncio.run(both()) == ["MainThread", "body_0"]


def test_nobody_waits_for_anothers_large_bodies() -> None:
    """Twenty bodies of one caller are in work or wait, and some of their clients leave: another's is next."""
    running: list[str] = []
    ended: list[str] = []
    most: list[int] = []
    all_are_there = threading.Event()

    def work() -> None:
        running.append(current_caller().id)
        most.append(running.count("alice"))
        assert all_are_there.wait(60)
        time.sleep(0.05)
        running.remove(current_caller().id)
        ended.append(current_caller().id)

    async def send(worker: Worker, who: str) -> None:
        set_caller(Caller(ApiKey(id=who, sha256="0" * 64)))
        await worker.run(INLINE_BYTES + 1, work)

    async def run() -> None:
        worker = Worker("body")
        alices = [asyncio.create_task(send(worker, "alice")) for _ in range(20)]
        await asyncio.sleep(0.01)
        for task in alices[::3]:
            task.cancel()  # the thread of one goes on
        bob = asyncio.create_task(send(worker, "bob"))
        await asyncio.sleep(0.01)
        all_are_there.set()
        await bob
        await asyncio.gather(*alices, return_exceptions=True)

    asyncio.run(run())
    assert "bob" in ended[:4], "and not after thirteen of alice's"
    assert max(most) == 1


def test_many_callers_long_work_leaves_a_thread_for_short_work() -> None:
    """As many callers as there are threads sent large bodies at once, and everybody else's waited for all of them."""
    let_go = threading.Event()

    async def send(worker: Worker, who: str, num_bytes: int, work: Any) -> Any:
        set_caller(Caller(ApiKey(id=who, sha256="0" * 64)))
        return await worker.run(num_bytes, work)

    async def run() -> None:
        worker = Worker("body")
        large = [
            asyncio.create_task(send(worker, f"{i}", LONG_BYTES + 1, lambda: let_go.wait(20)))
            for i in range(2 * NUM_THREADS)
        ]
        await asyncio.sleep(0.01)
        large.pop().cancel()  # one that waits gives back the turn that it holds
        try:
            async with asyncio.timeout(10):
                assert await asyncio.create_task(send(worker, "bob", LONG_BYTES, lambda: "read")) == "read"
        finally:
            let_go.set()
        assert await asyncio.gather(*large) == [True] * len(large), "nobody's turn is lost"
        again = [send(worker, f"{i}", LONG_BYTES + 1, let_go.is_set) for i in range(2 * NUM_THREADS)]
        async with asyncio.timeout(10):
            assert await asyncio.gather(*again)

    asyncio.run(run())
