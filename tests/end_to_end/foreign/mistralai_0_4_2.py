"""Run by the interpreter of an environment that has mistralai 0.4.2: the client of 2024."""

import json
import sys

from mistralai.client import MistralClient
from mistralai.models.chat_completion import ChatMessage

url, model, question = sys.argv[1:]
client = MistralClient(api_key="none", endpoint=url)
messages = [ChatMessage(role="user", content=question)]
whole = client.chat(model=model, messages=messages, temperature=0, safe_prompt=False, random_seed=1)
chunks = list(client.chat_stream(model=model, messages=messages, temperature=0))
models = client.list_models().data
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
            "finish_reason": chunks[-1].choices[0].finish_reason.value,
            "models": [entry.id for entry in models],
        }
    )
)
