"""One line per request, as text or as JSON. Knows ids, counts and times; never a key, a prompt, an answer, or a name
that only the client made up.

Each door opens a RequestRecord, the frontend fills in what it learns, and the line is written when the request ends.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from gateway.telemetry.metrics import error_name, error_reason

REQUESTS = "gateway.requests"  # the logger
logger = logging.getLogger(REQUESTS)


@dataclass(slots=True)
class RequestRecord:
    """What the log says of one request; empty where it did not get that far."""

    door: Literal["http", "grpc"]
    route: str  # the route's own path or the RPC's name, not what the client wrote
    request_id: str = ""
    status: str = ""  # HTTP's number, gRPC's name; empty: the client left before there was one
    model: str = ""
    key_id: str = ""
    error: str = ""  # a class of ours, or InternalError
    reason: str = ""  # why it failed, one word; docs/logs.md lists them
    finish_reasons: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float | None = None
    time_to_first_token_s: float | None = None
    started: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)  # Unix time
    traceparent: str = ""  # the client's, not in the line; nor this:
    traces_layers: bool = False  # it asks for spans of layers
    may_be_traced: bool = True  # it had no span yet that could have told how it ends

    def fail(self, error: BaseException | None) -> None:
        """There is no complete answer, for this error, or as the client has gone."""
        self.error, self.reason = error_name(error), error_reason(error)

    def write(self) -> None:
        """The request has ended."""
        figures = {
            "door": self.door,
            "route": self.route,
            "request_id": self.request_id,
            "status": self.status,
            "model": self.model,
            "key_id": self.key_id,
            "error": self.error,
            "reason": self.reason,
            "finish_reasons": self.finish_reasons,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "queue_s": _rounded(self.queue_s),
            "time_to_first_token_s": _rounded(self.time_to_first_token_s),
            "duration_s": _rounded(time.monotonic() - self.started),
        }
        said = {name: value for name, value in figures.items() if value not in ("", [], None)}
        logger.info("request", extra={"figures": said})


_record: ContextVar[RequestRecord | None] = ContextVar("record", default=None)


def current_record() -> RequestRecord | None:
    """Of the request that this task serves."""
    return _record.get()


def open_record(record: RequestRecord) -> RequestRecord:
    """From now on it is the task's; it is a door's first step."""
    _record.set(record)
    return record


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        line |= {"message": record.getMessage(), **getattr(record, "figures", {})}
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        figures = "".join(f" {name}={_plain(value)}" for name, value in getattr(record, "figures", {}).items())
        line = f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}{figures}"
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def configure_logs(log_format: Literal["text", "json"]) -> None:
    """Send everything that the gateway logs, and what libraries warn of, to this process's standard output.

    Serve replaces `sys.stdout` and drops what is below its own level; Ray keeps the real one in `worker-….out`.
    """
    handler = logging.StreamHandler(sys.__stdout__)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("gateway").setLevel(logging.INFO)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
