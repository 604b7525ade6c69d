"""Run by the interpreter of an environment that has langchain-openai and langchain-mistralai."""

import json
import operator
import sys
from functools import reduce

from langchain_mistralai import ChatMistralAI, MistralAIEmbeddings
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

url, model, question, embedding_model, tool = sys.argv[1:]
server = {"base_url": f"{url}/v1", "api_key": "none"}
chats = {
    "openai": ChatOpenAI(model=model, temperature=0, **server),
    "mistralai": ChatMistralAI(model=model, temperature=0, **server),
}
embeddings = {
    # Without this it sends the token ids of OpenAI's own models.
    "openai": OpenAIEmbeddings(model=embedding_model, check_embedding_ctx_length=False, **server),
    "mistralai": MistralAIEmbeddings(model=embedding_model, endpoint=f"{url}/v1/", api_key="none"),
}
answers = {}
for name, chat in chats.items():
    whole = chat.invoke(question)
    chunks = list(chat.stream(question))
    with_tool = chat.bind_tools([json.loads(tool)], tool_choice="any")
    streamed_calls = reduce(operator.add, with_tool.stream(question)).tool_calls
    answers[name] = {
        "whole": whole.content,
        "streamed": "".join(chunk.content for chunk in chunks),
        "tokens": whole.usage_metadata["output_tokens"],
        "calls": [(call["name"], call["args"]) for call in with_tool.invoke(question).tool_calls],
        "streamed_calls": [(call["name"], call["args"]) for call in streamed_calls],
        "embedding": embeddings[name].embed_documents([question])[0],
    }
print(json.dumps(answers))
