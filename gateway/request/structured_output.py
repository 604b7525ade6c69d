"""`response_format` becomes the schema of the answer. Knows its fields; knows nothing of tools."""

from __future__ import annotations

from typing import Any

from cluster.errors import InvalidRequest
from cluster.messages import JsonSchema
from gateway.request.structured_schema import checked_schema

_ANY_OBJECT = JsonSchema('{"type": "object"}', "response_format")


def answer_schema(response_format: Any) -> JsonSchema | None:
    """What the answer must validate against; None for text. Raises InvalidRequest."""
    if response_format is None:
        return None
    if not isinstance(response_format, dict):
        raise InvalidRequest("response_format: expected an object", param="response_format")
    match response_format.get("type"):
        case "text":
            return None
        case "json_object":
            if response_format.get("schema") is None:
                return _ANY_OBJECT
            return checked_schema(response_format["schema"], "response_format.schema")
        case "json_schema":
            path = "response_format.json_schema"
            definition = response_format.get("json_schema")
            if not isinstance(definition, dict):
                raise InvalidRequest(f"{path}: expected an object with a schema", param=path)
            return checked_schema(definition.get("schema"), f"{path}.schema")
        case _:
            raise InvalidRequest(
                "response_format.type: expected text, json_object or json_schema", param="response_format.type"
            )
