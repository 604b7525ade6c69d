"""The OpenAPI document: bodies as the doors parse them, and errors as they answer. Knows shapes; decides nothing.

Fields have their types here; their bounds, which depend on the model, are in the answers of the validator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from gateway.http.errors import MESSAGES, STATUS

Json = dict[str, Any]
REF = "#/components/schemas/"
ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
MESSAGES_ERROR: Json = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}
# One server-sent event. The last of a completion's stream is [DONE].
EVENT: Json = {
    "type": "object",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "pattern": r"^(\{.*\}|\[DONE\])$"}},
}
MEANINGS = {
    400: "A field, the body or a header is wrong; `param` names it",
    401: "No API key, or a wrong one",
    404: "No such model",
    405: "No such method here",
    408: "The body took too long",
    413: "The body is over the limit",
    429: "A limit is reached; try again after Retry-After",
    499: "The client left",
    500: "An error of ours",
    503: "The model cannot answer now; try again after Retry-After",
    504: "The request's deadline passed",
}
ALWAYS_THERE: dict[str, tuple[str, ...]] = {  # keys of an answer with 200
    "/v1/chat/completions": ("id", "object", "created", "model", "choices", "usage"),
    "/v1/completions": ("id", "object", "created", "model", "choices", "usage"),
    "/v1/responses": ("id", "object", "created_at", "model", "status", "output", "usage"),
    "/v1/messages": ("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"),
    "/v1/messages/count_tokens": ("input_tokens",),
    "/v1/embeddings": ("id", "object", "model", "data", "usage"),
    "/v1/models": ("object", "data"),
    "/v1/models/{name}": ("id", "object", "created", "owned_by", "permission", "type", "capabilities"),
    "/tokenize": ("count", "max_model_len", "tokens"),
    "/detokenize": ("prompt",),
    "/health": ("status", "models"),
    "/load": ("server_load",),
    "/version": ("version",),
}
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
STATUSES = sorted({status for status, _, _ in STATUS.values()} | {405, 408, 500})


def openapi_document(
    version: str, routes: Sequence[Route], model_names: Sequence[str], bodies: Mapping[str, type[BaseModel]]
) -> Json:
    """What /openapi.json answers.

    `bodies` are those of POST, by path. `model_names` are the only ones that are answered; none: any is.
    """
    references, definitions = models_json_schema(
        [(body, "validation") for body in dict.fromkeys(bodies.values())], ref_template=f"{REF}{{model}}"
    )
    schemas = {
        **definitions["$defs"],
        "Error": ERROR,
        "MessagesError": MESSAGES_ERROR,
        "ModelName": _model_name(model_names),
    }
    for body in set(bodies.values()):
        name = references[body, "validation"]["$ref"].removeprefix(REF)
        schemas[name]["properties"]["model"] = {"anyOf": [{"$ref": f"{REF}ModelName"}, {"type": "null"}]}
    paths: Json = {}
    for route in routes:
        path = route.path_format
        operation: Json = {"operationId": route.name, "responses": _responses(path)}
        if route.param_convertors:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in route.param_convertors
            ]
        if path in bodies:
            schema = references[bodies[path], "validation"]
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post" if path in bodies else "get": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Manta", "version": version},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],  # a key where keys are configured
    }


def _responses(path: str) -> Json:
    schema = "MessagesError" if path.startswith(MESSAGES) else "Error"
    errors = {str(status): _error(status, schema) for status in STATUSES}
    if path == "/health":
        errors["503"] = {**_answer(path), "description": "A model is still loading, or cannot answer"}
    return {"200": _answer(path), **errors}


def _answer(path: str) -> Json:
    content: Json = {"application/json": {"schema": {"type": "object", "required": list(ALWAYS_THERE.get(path, ()))}}}
    if path in STREAMED:
        content["text/event-stream"] = {"itemSchema": EVENT}
    if path == "/metrics":
        content = {"text/plain": {"schema": {"type": "string"}}}
    return {"description": "The answer", "content": content}


def _error(status: int, schema: str) -> Json:
    content = {"application/json": {"schema": {"$ref": f"{REF}{schema}"}}}
    return {"description": MEANINGS.get(status, "Refused"), "content": content}


def _model_name(model_names: Sequence[str]) -> Json:
    return {"type": "string", **({"enum": list(model_names)} if model_names else {})}
