"""Run by the interpreter of an environment that has litellm."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network while it is imported
import litellm

url, model, question = sys.argv[1:]
messages = [{"role": "user", "content": question}]
answers = {}
for provider in ("openai", "hosted_vllm"):
    call = {
        "model": f"{provider}/{model}",
        "messages": messages,
        "api_base": f"{url}/v1",
        "api_key": "none",
        "temperature": 0,
    }
    whole = litellm.completion(**call)
    chunks = litellm.completion(**call, stream=True)
    answers[provider] = {
        "whole": whole.choices[0].message.content,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "tokens": whole.usage.completion_tokens,
    }
print(json.dumps(answers))
