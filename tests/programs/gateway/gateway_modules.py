"""Loads the tokenizer of its argument as a gateway does and names what of torch and of ours came with it."""

import sys
from pathlib import Path

import mistral_common.tokens.tokenizers.mistral  # noqa: F401

import gateway.service  # noqa: F401
from gateway.text.tokenizer import HuggingFaceTokenizer

tokenizer = HuggingFaceTokenizer(Path(sys.argv[1]))
tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
print(sorted({"torch", "router_service", "experts_service"} & set(sys.modules)))
