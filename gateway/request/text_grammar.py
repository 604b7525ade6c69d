"""Which expressions, lists of texts and rules are taken to hold an answer to: their size and their words.

Whatever one of them asks for is enforced: what a grammar cannot hold an answer to is refused. Compiles nothing.
"""

from __future__ import annotations

import json
from typing import Any

from cluster.errors import InvalidRequest
from cluster.json_schema.patterns import parse_pattern
from cluster.messages import TextGrammar
from gateway.request.ebnf import read_rules

MAX_REGEX_CHARS = 4096
MAX_CHOICES = 2000
MAX_BYTES = 65_536  # of all choices, or of rules


def checked_regex(regex: Any, param: str) -> TextGrammar:
    """All of the answer matches. Raises InvalidRequest with `param`."""
    text = _text(regex, param, "a regular expression")
    if len(text) > MAX_REGEX_CHARS:
        raise InvalidRequest(f"{param}: at most {MAX_REGEX_CHARS} characters, got {len(text)}", param=param)
    try:
        parse_pattern(text)
    except ValueError as error:
        raise InvalidRequest(f"{param}: {error}", param=param) from None
    return TextGrammar("regex", text, param)


def checked_choice(choices: Any, param: str) -> TextGrammar:
    """The answer is one of the texts. Raises InvalidRequest with `param`."""
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) for one in choices):
        raise InvalidRequest(f"{param}: expected a list of texts, one at least", param=param)
    if len(choices) > MAX_CHOICES:
        raise InvalidRequest(f"{param}: at most {MAX_CHOICES} entries, got {len(choices)}", param=param)
    _check_size(sum(map(_num_bytes, choices)), param)
    return TextGrammar("choice", json.dumps(list(dict.fromkeys(choices)), ensure_ascii=False), param)


def checked_rules(rules: Any, param: str) -> TextGrammar:
    """The answer is what the rule `root` stands for. Raises InvalidRequest with `param`."""
    text = _text(rules, param, "rules in GBNF or EBNF")
    _check_size(_num_bytes(text), param)
    try:
        return TextGrammar("ebnf", read_rules(text), param)
    except ValueError as error:
        raise InvalidRequest(f"{param}: {error}", param=param) from None


def _text(value: Any, param: str, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{param}: expected {what}, a string", param=param)
    return value


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _check_size(num_bytes: int, param: str) -> None:
    if num_bytes > MAX_BYTES:
        raise InvalidRequest(f"{param}: at most {MAX_BYTES} bytes, got {num_bytes}", param=param)
