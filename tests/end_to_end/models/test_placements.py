"""In bf16 the tokens are the same however the experts are placed and reached, alone and together with others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from cluster.demo_model import DIRECTORY as DEMO
from tests.conftest import Server, running_server
from tests.steady_streams import choices_of_stream

GROUPS = {1: [[0, 1, 2, 3, 4, 5, 6, 7]], 2: [[0, 1, 2, 3], [4, 5, 6, 7]], 4: [[0, 1], [2, 3], [4, 5], [6, 7]]}
PLACES = (("local", 1), ("lane", 1), ("lane", 2), ("lane", 4), ("object_store", 1), ("object_store", 4))
PROMPTS = [f"Question {index}: what is a good cheese?" + " And why?" * (3 * index) for index in range(6)]
NUM_TOKENS = 48
MODEL = """
  - name: {transport}-{number}
    path: {directory}
    engine: {{dtype: bfloat16, batch_invariant: "on", max_model_len: 512, kv_cache_gib: 0.03, num_threads: 1{settings}}}
    experts: {{transport: {transport}, groups: {groups}, num_threads: 1}}
"""

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=["dot", "fma"])
def placed(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The demo model once for each placement, all by one kernel; the lanes' chunked, without a prefix cache."""
    from experts_service.kernels.kernel import available

    if request.param not in available():
        pytest.skip("this CPU cannot")
    models = [
        MODEL.format(
            transport=transport,
            number=number,
            directory=DEMO,
            groups=GROUPS[number],
            settings=f", kernels: {request.param}"
            + (", max_num_batched_tokens: 24, prefix_caching: false" if transport == "lane" else ""),
        )
        for transport, number in PLACES
    ]
    with running_server("models:" + "".join(models)) as server:
        yield server


async def tokens(server: Server, model: str, *, together: bool) -> list[list[int]]:
    """Of each prompt, greedy or drawn in turn."""
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:

        async def of(index: int) -> list[int]:
            sampling = {"temperature": 0} if index % 2 else {"temperature": 1.0, "seed": index}
            body = {"model": model, "prompt": PROMPTS[index], "max_tokens": NUM_TOKENS, "ignore_eos": True}
            body |= {"stream": True, "return_token_ids": True, **sampling}
            ids: list[int] = []
            async for choices in choices_of_stream(client, body):
                for choice in choices:
                    ids += choice["token_ids"]
            assert len(ids) == NUM_TOKENS
            return ids

        if together:
            return list(await asyncio.gather(*(of(index) for index in range(len(PROMPTS)))))
        return [await of(index) for index in range(len(PROMPTS))]


def test_tokens_hang_on_no_placement_and_on_no_neighbour(placed: Server) -> None:
    expected = asyncio.run(tokens(placed, "local-1", together=False))
    for transport, number in PLACES:
        for together in (False, True):
            seen = asyncio.run(tokens(placed, f"{transport}-{number}", together=together))
            assert seen == expected, f"{transport}, {number} processes, {'together' if together else 'one by one'}"
