"""What is the same around every RPC: caller, size, request id, status and the log's line. Knows no message's fields."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from cluster.errors import PayloadTooLarge
from cluster.telemetry.layer_times import wants_layers
from gateway.admission.caller import ANONYMOUS
from gateway.frontend import Frontend
from gateway.grpc.authentication import authenticate, trace_header
from gateway.grpc.errors import RpcFailed, error_metadata, fail, status_of
from gateway.telemetry.logs import RequestRecord, open_record


class RpcCall:
    """One RPC while it is answered."""

    def __init__(self, context: Any, record: RequestRecord) -> None:
        self._context = context
        self._record = record
        self.name(f"req-{uuid.uuid4().hex}")

    def name(self, request_id: str) -> None:
        """From now on the client and the log know it by this id."""
        self.id = self._record.request_id = request_id
        self._context.set_trailing_metadata([("x-request-id", request_id)])

    @property
    def time_left_s(self) -> float | None:
        """Until the client's deadline, where the context knows it: Serve's does not."""
        time_remaining = getattr(self._context, "time_remaining", None)
        return None if time_remaining is None else time_remaining()


@asynccontextmanager
async def rpc_call(
    frontend: Frontend, request: Any, context: Any, *, suffix: str = "", is_counted: bool = True
) -> AsyncGenerator[RpcCall, None]:
    """Around the answer of one RPC, whose name is its message's and `suffix`.

    An error sets the RPC's status and leaves as RpcFailed. `is_counted`: as a request of the caller's key.
    """
    rpc = type(request).__name__.removesuffix("Request") + suffix
    traces_layers = wants_layers(trace_header(context, "tracestate"))
    parent = trace_header(context, "traceparent")
    record = open_record(RequestRecord("grpc", rpc, traceparent=parent, traces_layers=traces_layers))
    call = RpcCall(context, record)
    caller = ANONYMOUS
    try:
        caller = authenticate(frontend.access, frontend.limiter, context)
        if is_counted:
            caller.enter()
        bound = frontend.config.max_body_bytes
        if request.ByteSize() > bound:
            raise PayloadTooLarge(f"the message is over the limit of {bound} bytes")
        yield call
        record.status = "OK"
    except Exception as error:
        context.set_trailing_metadata([("x-request-id", call.id), *error_metadata(error)])
        status = status_of(error, call.id)
        record.status = status[0].name
        record.fail(error)
        await fail(context, *status)
        raise RpcFailed from None
    except BaseException as error:  # the client left, maybe before anything was done for it
        if not record.reason:
            record.fail(error)
        raise
    finally:
        caller.leave()
        record.key_id = caller.id
        frontend.ends(record)
