"""Run by the interpreter of an environment that has mistralai 0.4.2: the client of 2024."""

import json
import sys

from mistralai.client import MistralClient
from mistralai.models.chat_completion import ChatMessage, ToolChoice

url, model, question, embedding_model, tool = sys.argv[1:]
client = MistralClient(api_key="none", endpoint=url)
asked = {"model": model, "messages": [ChatMessage(role="user", content=question)], "temperature": 0}
whole = client.chat(**asked, safe_prompt=False, random_seed=1)
chunks = list(client.chat_stream(**asked))
forced = {"tools": [json.loads(tool)], "tool_choice": ToolChoice.any}
calls = client.chat(**asked, **forced).choices[0].message.tool_calls
streamed = [one for chunk in client.chat_stream(**asked, **forced) for one in chunk.choices[0].delta.tool_calls or ()]
models = client.list_models().data
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
            "tokens": whole.usage.completion_tokens,
            "finish_reason": chunks[-1].choices[0].finish_reason.value,
            "calls": [(one.function.name, json.loads(one.function.arguments)) for one in calls],
            "streamed_calls": [(one.function.name, json.loads(one.function.arguments)) for one in streamed],
            "embedding": client.embeddings(model=embedding_model, input=[question]).data[0].embedding,
            "models": [entry.id for entry in models],
        }
    )
)
