"""Streams that are left early, end, or fail: whether the call was cancelled, and the error of who read it."""

import asyncio
from contextlib import aclosing

from ray.serve.exceptions import BackPressureError

from cluster.messages import Request, SamplingParams, TokenChunk
from gateway.coordinators import client as coordinator_client
from gateway.coordinators.serve_client import ServeCoordinatorClient

coordinator_client.LAST_TOKENS_S = 0.1


class Response:
    cancelled = False

    def __init__(self, client, tokens, error, returns):
        self.client, self.tokens, self.error, self.returns = client, tokens, error, returns

    def __await__(self):
        return self.answer().__await__()

    async def answer(self):
        for position in range(self.tokens):
            reason = "length" if position == 2 else None
            self.client.inbox.deliver((TokenChunk("r", 0, position, (7,), finish_reason=reason),))
            await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        await asyncio.sleep(0 if self.returns else 60)

    def cancel(self):
        self.cancelled = True


class Generate:
    def remote(self, request, gateway):
        return self.response


async def run(take, tokens, error=None, returns=True):
    client = ServeCoordinatorClient(None)
    client._handle = client._generate = Generate()
    client._generate.response = Response(client, tokens, error, returns)
    try:
        async with aclosing(client.generate(Request("r", (1,), SamplingParams(3), 0))) as stream:
            async for _chunk in stream:
                take -= 1
                if not take:
                    break
        error = None
    except Exception as raised:
        error = type(raised).__name__
    print(client._generate.response.cancelled, error)


asyncio.run(run(take=1, tokens=1, returns=False))
asyncio.run(run(take=9, tokens=3))
asyncio.run(run(take=9, tokens=3, returns=False))
asyncio.run(run(take=9, tokens=1, error=BackPressureError(1, 1)))
asyncio.run(run(take=9, tokens=1))
