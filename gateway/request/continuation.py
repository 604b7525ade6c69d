"""Whether an answer goes on from the conversation's last message. Knows fields; renders nothing.

`continue_final_message` is vLLM's and transformers', `prefix` on the last message Mistral's. Answers to a prefix begin
with it; others do with `echo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cluster.errors import InvalidRequest
from gateway.request.protocol import ChatCompletionRequest, Message, TemplateFields, text_of
from gateway.text.chat_template import Rendering
from gateway.text.reasoning import effort_variables


def read_rendering(body: TemplateFields, messages: Sequence[Message], *, continues_assistants: bool) -> Rendering:
    """How the conversation is rendered. Raises InvalidRequest.

    `continues_assistants`: the chat format knows no other way to go on after an assistant.
    """
    how = Rendering(
        has_generation_prompt=body.add_generation_prompt is not False,
        variables=body.chat_template_kwargs or {},
        hints=effort_variables(body.reasoning_effort),
    )
    for i, message in enumerate(messages):
        if message.prefix and (message.role != "assistant" or i + 1 < len(messages)):
            path = f"messages[{i}].prefix"
            raise InvalidRequest(f"{path}: only the last message is continued, if it is an assistant's", param=path)
    if not messages:
        return how
    last, path = messages[-1], f"messages[{len(messages) - 1}]"
    field = "continue_final_message" if body.continue_final_message else f"{path}.prefix"
    if not (body.continue_final_message or last.prefix):
        continues = continues_assistants and last.role == "assistant" and not last.tool_calls
        if continues and not how.has_generation_prompt:
            raise InvalidRequest(
                "add_generation_prompt: an assistant's last message is always continued in this model's chat format: "
                "say continue_final_message",
                param="add_generation_prompt",
            )
        return replace(how, continues=continues)
    if body.add_generation_prompt:
        raise InvalidRequest(f"add_generation_prompt: not together with {field}", param="add_generation_prompt")
    if last.role != "assistant":
        raise InvalidRequest(f"{field}: the last message must be an assistant's", param=field)
    if last.tool_calls:
        raise InvalidRequest(f"{field}: only text can be continued, and {path} has calls of tools", param=field)
    return replace(how, continues=True, has_generation_prompt=False)


def begin_of_answer(body: ChatCompletionRequest, how: Rendering) -> str:
    """What the answer repeats of the message that it continues."""
    last: Any = body.messages[-1]
    return text_of(last, "messages[-1]") if how.continues and (last.prefix or body.echo) else ""
