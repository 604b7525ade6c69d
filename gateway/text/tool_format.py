"""How a model writes calls of tools, by what its chat template holds. Knows templates and tokens; reads no call."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.messages import CALL_TAGS, ToolFormat, ToolParser, ToolTokens

TOOL_CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NOT_JSON = ("<function=", "<arg_key>")  # what others write in the same tags: Qwen3-Coder, GLM
_LLAMA, _PYTHON_TAG = '"parameters": dictionary', "<|python_tag|>"


def tool_tokens(parser: ToolParser, template: str, special: Mapping[str, int], *, renders_tools: bool) -> ToolTokens:
    """The format of that name; with `auto`, that which the template writes. `special`: ids of special tokens.

    A template that knows no tools tells the model of Mistral's format, in words of ours.
    """
    match _format(parser, template) if renders_tools else "mistral":
        case "hermes":
            return ToolTokens(calls=special.get(CALL_TAGS[0]), end=special.get(CALL_TAGS[1]), format="hermes")
        case "llama3_json":
            return ToolTokens(calls=special.get(_PYTHON_TAG), format="llama3_json")
        case _:
            return ToolTokens(
                calls=special.get(TOOL_CALLS),
                args=special.get(ARGS) if ARGS in template else None,
                call_id=special.get(CALL_ID) if CALL_ID in template else None,
            )


def _format(parser: ToolParser, template: str) -> ToolFormat:
    if parser != "auto":
        return parser
    if CALL_TAGS[0] in template and not any(tag in template for tag in _NOT_JSON):
        return "hermes"
    return "llama3_json" if _LLAMA in template or _PYTHON_TAG in template else "mistral"
