"""Run by the interpreter of an environment that has litellm."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network while it is imported
import litellm

url, model, question, embedding_model, tool = sys.argv[1:]
messages = [{"role": "user", "content": question}]
server = {"api_base": f"{url}/v1", "api_key": "none"}
answers = {}
for provider in ("openai", "hosted_vllm"):
    call = {"model": f"{provider}/{model}", "messages": messages, "temperature": 0, **server}
    whole = litellm.completion(**call)
    chunks = litellm.completion(**call, stream=True)
    forced = {"tools": [json.loads(tool)], "tool_choice": "required"}
    calls = litellm.completion(**call, **forced).choices[0].message.tool_calls
    built = litellm.stream_chunk_builder(list(litellm.completion(**call, **forced, stream=True)))
    streamed = built.choices[0].message.tool_calls
    embedding = litellm.embedding(model=f"{provider}/{embedding_model}", input=[question], **server)
    answers[provider] = {
        "whole": whole.choices[0].message.content,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "tokens": whole.usage.completion_tokens,
        "calls": [(one.function.name, json.loads(one.function.arguments)) for one in calls],
        "streamed_calls": [(one.function.name, json.loads(one.function.arguments)) for one in streamed],
        "embedding": embedding.data[0]["embedding"],
    }
print(json.dumps(answers))
