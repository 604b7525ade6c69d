"""A prompt begins with one BOS, whoever writes it: the checkpoint, the chat template or the client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.messages import ModelCard
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import (
    CHAT_TEMPLATE,
    ScriptedCoordinator,
    build_frontend,
    http_server,
    model_card,
    tokens_script,
    write_tokenizer,
)
from tests.gateway.grpc.test_grpc import grpc_server

USER = [{"role": "user", "content": "Hello"}]
BOS, HELLO = "<s>", "Hello, my name"


RAW = [  # a prompt, what is asked for, and what is put before it
    (HELLO, None, BOS),
    (HELLO, True, BOS),
    (HELLO, False, ""),
    (BOS + HELLO, None, ""),
    (BOS + HELLO, True, ""),
    (BOS + HELLO, False, ""),
    (BOS + BOS + HELLO, None, ""),  # the client's own two
    ("[INST] " + BOS + HELLO, None, BOS),
]


def test_a_raw_prompt_that_spells_its_bos_gets_no_other(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    """A chat that a client had rendered by itself began with two, and `add_special_tokens` was passed over."""
    coordinator = ScriptedCoordinator(tokens_script([40]))
    frontend = build_frontend(card, coordinator)
    with http_server(frontend) as url, grpc_server(frontend) as channel, httpx.Client(base_url=url) as http:
        stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        for text, asked, begin in RAW:
            body = {"model": "tiny", "prompt": text, "add_special_tokens": asked}
            for prompt in (text, [text, text]):
                assert http.post("/v1/completions", json=body | {"prompt": prompt}).status_code == 200
                assert tokenizer.decode(coordinator.requests[-1].prompt_token_ids) == begin + text
            ids = coordinator.requests[-1].prompt_token_ids
            assert http.post("/tokenize", json=body).json()["tokens"] == list(ids)
            stub.Generate(chat_pb2.GenerateRequest(model="tiny", text=text, add_special_tokens=asked), timeout=30)
            assert coordinator.requests[-1].prompt_token_ids == ids
            request = chat_pb2.TokenizeRequest(model="tiny", text=text, add_special_tokens=asked)
            assert tuple(stub.Tokenize(request, timeout=30).token_ids) == ids


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE.removeprefix("{{ bos_token }}")])
def test_a_chat_gets_a_bos_only_where_its_template_makes_none(tmp_path: Path, template: str) -> None:
    write_tokenizer(tmp_path, chat_template=template)
    tokenizer, coordinator = HuggingFaceTokenizer(tmp_path), ScriptedCoordinator(tokens_script([40]))
    makes_one = template == CHAT_TEMPLATE
    frontend = build_frontend(model_card(tmp_path), coordinator)
    with http_server(frontend) as url, grpc_server(frontend) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        for asked, begin in ((None, makes_one), (False, makes_one), (True, True)):
            body = {"model": "tiny", "messages": USER, "add_special_tokens": asked}
            assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
            ids = coordinator.requests[-1].prompt_token_ids
            assert tokenizer.decode(ids) == BOS * begin + "[INST] Hello [/INST]"
            assert httpx.post(f"{url}/tokenize", json=body).json()["tokens"] == list(ids)
            messages = [chat_pb2.Message(role="user", content="Hello")]
            stub.Chat(chat_pb2.ChatRequest(model="tiny", messages=messages, add_special_tokens=asked), timeout=30)
            assert coordinator.requests[-1].prompt_token_ids == ids


def test_what_comes_after_the_text_stays(tmp_path: Path) -> None:
    """BERT's way, `<s> text </s>`: what is doubled is only the beginning."""
    from tokenizers import Tokenizer, processors

    write_tokenizer(tmp_path)
    rust: Any = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rust.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.begin_ids == (0,)
    assert tokenizer.encode(HELLO) == tokenizer.encode(BOS + HELLO)
    assert tokenizer.decode(tokenizer.encode(HELLO)) == BOS + HELLO + "</s>"
