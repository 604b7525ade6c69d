"""Run by the interpreter of an environment that has langchain-openai and langchain-mistralai."""

import json
import sys

from langchain_mistralai import ChatMistralAI
from langchain_openai import ChatOpenAI

url, model, question = sys.argv[1:]
answers = {}
for name, chat in {
    "openai": ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0),
    "mistralai": ChatMistralAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0),
}.items():
    whole = chat.invoke(question)
    chunks = list(chat.stream(question))
    answers[name] = {
        "whole": whole.content,
        "streamed": "".join(chunk.content for chunk in chunks),
        "tokens": whole.usage_metadata["output_tokens"],
    }
print(json.dumps(answers))
