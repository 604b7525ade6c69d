"""Every error that Manta raises on purpose. Knows nothing of HTTP or gRPC: each door maps classes to its own codes.

    MantaError
    ├── RequestError                the client can mend it, or try again
    │   ├── InvalidRequest          a field is wrong; `param` names it
    │   │   ├── ContextTooLong      prompt plus output exceed the model's context
    │   │   └── UnsupportedEncoding the body is compressed
    │   ├── Unauthorized            no key, or a wrong one
    │   ├── ModelNotFound           no model of that name is served
    │   ├── PayloadTooLarge         the body is over the limit
    │   ├── Overloaded              a bound is reached; try again after `retry_after_s`
    │   │   └── RateLimited         a limit of the caller's own key
    │   ├── RequestCancelled        the client left, or asked to stop
    │   └── DeadlineExceeded        the request's own deadline passed
    │       └── BodyTimeout         the client took too long to send it
    ├── Unavailable                 the server cannot answer now
    │   ├── ModelLoading            weights are still being read
    │   ├── ExpertUnavailable       no replica of an expert group answered in time
    │   ├── CoordinatorLost         the coordinator went away while it answered; another one can go on
    │   └── EngineDead              the coordinator's engine stopped; Serve replaces it
    ├── StepFailed                  a step of the engine failed by a fault of ours; resumed twice at most
    └── SetupError                  nothing was started
        ├── ConfigError             a key or value of the configuration is wrong
        ├── CheckpointError         a model directory cannot be served; names file and tensor
        └── DoesNotFit              the model needs more memory or GPUs than the cluster has

Errors cross process boundaries, so each keeps all its state in keyword attributes and survives pickling.

Each class has a `reason`, one word that figures, logs and answers tell (docs/logs.md lists them); an Overloaded's says
which bound was reached.
"""

from __future__ import annotations

from typing import Any, Literal

MAX_MESSAGE_CHARS = 2000
MAX_PARAM_CHARS = 200
NO_GATEWAY = "no gateway can be reached now; try again"  # of HAProxy and of Serve's proxies, at both doors


class MantaError(Exception):
    """Root of the tree. `message` is a full sentence for a person; extra keyword attributes are kept."""

    reason = "internal"

    def __init__(self, message: str = "", **attributes: Any) -> None:
        super().__init__(message)
        self.message = message
        for name, value in attributes.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, {k: v for k, v in self.__dict__.items() if k != "message"}))


def _clipped(text: str, num_chars: int) -> str:
    return text if len(text) <= num_chars else text[: num_chars - 1] + "…"


def _rebuild(cls: type[MantaError], message: str, attributes: dict[str, Any]) -> MantaError:
    error = cls(message)
    error.__dict__.update(attributes)
    return error


class RequestError(MantaError):
    """The client can mend the request, or send it again later.

    What it sent is not said back at length: a name or a value in the message may be as long as its body.
    """

    def __init__(self, message: str = "", **attributes: Any) -> None:
        super().__init__(_clipped(message, MAX_MESSAGE_CHARS), **attributes)


class InvalidRequest(RequestError):
    """A field of the request is wrong. `param` is its path as the client wrote it, `messages[0].role` for example."""

    reason = "bad_request"

    def __init__(self, message: str = "", param: str | None = None, **attributes: Any) -> None:
        super().__init__(message, **attributes)
        self.param = None if param is None else _clipped(param, MAX_PARAM_CHARS)


class ContextTooLong(InvalidRequest):
    """The prompt, or prompt plus requested output, exceeds the model's context length."""

    reason = "context_too_long"


class UnsupportedEncoding(InvalidRequest):
    """The body is compressed, or coded in another way that is not read."""


class Unauthorized(RequestError):
    """No API key, or one that is not known."""

    reason = "unauthorized"


class ModelNotFound(RequestError):
    """No model of that name is served; the message lists those that are."""

    reason = "unknown_model"


class PayloadTooLarge(RequestError):
    """The request body is over the configured limit."""

    reason = "too_large"


Shed = Literal["shed_gateway", "shed_bodies", "shed_messages", "shed_watches", "shed_queue", "shed_grammars", "shed"]


class Overloaded(RequestError):
    """A bound is reached; `reason` says which. `retry_after_s` says when another try is worth it."""

    reason: str = "shed"

    def __init__(self, message: str = "", retry_after_s: float = 1.0, reason: Shed = "shed", **attributes: Any) -> None:
        super().__init__(message, **attributes)
        self.retry_after_s = retry_after_s
        self.reason = reason


KEY_LIMITS = {  # of a key, and the reason where it is reached
    "requests per minute": "key_requests",
    "tokens per minute": "key_tokens",
    "choices at once": "key_choices",
}


class RateLimited(Overloaded):
    """A limit of the caller's own key is reached; `limit`, of KEY_LIMITS, names it."""

    def __init__(self, message: str = "", retry_after_s: float = 1.0, limit: str = "", **attributes: Any) -> None:
        super().__init__(message, retry_after_s, **attributes)
        self.limit = limit
        self.reason = KEY_LIMITS.get(limit, "key_limit")


class RequestCancelled(RequestError):
    """The client left, or asked to stop."""

    reason = "client_gone"


class DeadlineExceeded(RequestError):
    """The deadline of the request passed before it was complete."""

    reason = "deadline"


class BodyTimeout(DeadlineExceeded):
    """The client did not send all of its request in time."""

    reason = "body_timeout"


class Unavailable(MantaError):
    """The server cannot answer now; the same request may succeed later."""

    reason = "unavailable"

    def __init__(self, message: str = "", retry_after_s: float = 1.0, **attributes: Any) -> None:
        super().__init__(message, **attributes)
        self.retry_after_s = retry_after_s


class ModelLoading(Unavailable):
    """The model's weights are still being read."""

    reason = "loading"


class ExpertUnavailable(Unavailable):
    """No replica of an expert group answered before the deadline. Never answered by dropping the expert.

    `coordinator` is who was not answered: the fault may be in its own network. `elsewhere`: there is another to ask.
    """

    coordinator = ""
    elsewhere = False

    reason = "experts_missing"


class CoordinatorLost(Unavailable):
    """The coordinator went away while it answered. Another one can go on from the tokens that arrived."""

    reason = "coordinator_lost"


class EngineDead(Unavailable):
    """The engine thread of a coordinator stopped; the replica fails its health check and Serve replaces it."""

    reason = "engine_failed"


class StepFailed(MantaError):
    """A step of the engine failed with the request in it, and nobody designed how; the coordinator's log says more.

    `coordinator` is whose engine it was. Another one can go on, but what a request breaks once it may break again.
    """

    reason = "engine_failed"

    def __init__(self, message: str = "", coordinator: str = "", **attributes: Any) -> None:
        super().__init__(message, **attributes)
        self.coordinator = coordinator


class SetupError(MantaError):
    """Found before anything was started."""


class ConfigError(SetupError):
    """A key or value of the configuration is wrong; the message names the key."""


class CheckpointError(SetupError):
    """A model directory cannot be served; the message names the file and, where there is one, the tensor."""


class DoesNotFit(SetupError):
    """The model needs more memory or more GPUs than there are; the message has both numbers."""
