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

# A loop of 20 turns with a tool, through OpenAI's API and through Anthropic's.
answers["turns"] = {}
for provider, base in (("openai", f"{url}/v1"), ("anthropic", url)):
    history, calls = list(messages), []
    for turn in range(20):
        chunks = litellm.completion(
            model=f"{provider}/{model}",
            messages=history,
            tools=[json.loads(tool)],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=200,
            api_base=base,
            api_key="none",
            stream=True,
        )
        said = litellm.stream_chunk_builder(list(chunks)).choices[0].message
        [call] = said.tool_calls
        calls.append(json.loads(call.function.arguments)["city"])
        history += [said.model_dump(exclude_none=True)]
        history += [{"role": "tool", "tool_call_id": call.id, "content": f"sunny, {turn} degrees"}]
    answers["turns"][provider] = calls
print(json.dumps(answers))
