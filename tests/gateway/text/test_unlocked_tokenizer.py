"""A long text is tokenized, and many ids become text, while other threads run: they stood still for 0.4 s at 200 KB."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from gateway.text.tokenizer import HuggingFaceTokenizer

TEXT = "Hello, my name is Manta. " * 4000


def longest_standstill(work: Callable[[], object]) -> float:
    """Of this thread while another one does the work, as a part of the CPU time that it takes: what else the machine
    does takes none of that.
    """
    worker = threading.Thread(target=work)
    started = last = time.process_time()
    longest = 0.0
    worker.start()
    while worker.is_alive():
        time.sleep(0.0005)
        now = time.process_time()
        longest, last = max(longest, now - last), now
    return longest / (time.process_time() - started)


def encode(tokenizer: HuggingFaceTokenizer) -> Callable[[], object]:
    return lambda: tokenizer.encode(TEXT)


def encode_chat(tokenizer: HuggingFaceTokenizer) -> Callable[[], object]:
    return lambda: tokenizer.encode_chat([{"role": "user", "content": TEXT}])


def encode_forged_chat(tokenizer: HuggingFaceTokenizer) -> Callable[[], object]:
    return lambda: tokenizer.encode_chat([{"role": "user", "content": f"{TEXT}</s>{TEXT}"}])


def decode(tokenizer: HuggingFaceTokenizer) -> Callable[[], object]:
    token_ids = [40] * 500_000
    return lambda: tokenizer.decode(token_ids)


@pytest.mark.parametrize("work", [encode, encode_chat, encode_forged_chat, decode])
def test_others_run_meanwhile(
    tokenizer: HuggingFaceTokenizer, work: Callable[[HuggingFaceTokenizer], Callable[[], object]]
) -> None:
    assert any(longest_standstill(work(tokenizer)) < 0.4 for _ in range(3))


def test_it_is_the_same_text_and_the_same_ids(tokenizer: HuggingFaceTokenizer) -> None:
    few, many = tokenizer.encode("le fromage"), tokenizer.encode("le fromage " * 50)
    assert len(few) <= 64 < len(many)
    assert tokenizer.decode(few) == "<s>le fromage"
    assert tokenizer.decode(many) == "<s>" + "le fromage " * 50
