r"""Reads a client's rules and writes them as a coordinator takes them. Knows GBNF; compiles nothing.

    root ::= "Hello, " name "!"     →     root ::= r0
    name ::= [A-Z] [a-z]{1,8}             r0 ::= "Hello\u002c " r1 "\u0021"
                                          r1 ::= [A-Z] [a-z]{1,8}

It is what llama.cpp's grammars and xgrammar's EBNF have in common, and both mean the same by. xgrammar's own additions
are hints that it does not enforce, or pieces of its insides: they are refused like anything else that is no rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from cluster.ebnf import char_class, choice, literal, repeat
from cluster.json_schema.patterns import Ranges, without

MAX_RULES = 2000
_MAX_GROUPS = 40  # within one another
_MAX_COUNT = 100_000
_SURROGATES: Ranges = ((0xD800, 0xDFFF),)
_ANY: Ranges = ((0, 0x10FFFF),)
_TOKEN = re.compile(
    r"""(?P<blank> (?: \s | \#[^\n]* )+ )
    | (?P<name> [A-Za-z0-9_-]+ (?: \. [A-Za-z0-9_-]+ )* )
    | (?P<is> ::= )
    | " (?P<text> (?: [^"\\] | \\. )* ) "
    | \[ (?P<chars> (?: [^\]\\] | \\. )* ) \]
    | (?P<times> [*+?] | \{ [0-9]{1,6} (?: , [0-9]{0,6} )? \} )
    | (?P<sign> [()|.] )
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_CHAR = re.compile(
    r"\\x(?P<x>[0-9a-fA-F]{2})(?![0-9a-fA-F])|\\u(?P<u>[0-9a-fA-F]{4})|\\U(?P<U>[0-9a-fA-F]{8})|\\(?P<escaped>.)|(?P<plain>.)",
    re.DOTALL,
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", **{sign: sign for sign in "\\\"[]-^'"}}


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    at: int


@dataclass(frozen=True, slots=True)
class _Written:
    """Characters, spelled already."""

    text: str


@dataclass(frozen=True, slots=True)
class _Reference:
    name: str


@dataclass(frozen=True, slots=True)
class _All:
    """One after the other."""

    parts: tuple[_Expression, ...]


@dataclass(frozen=True, slots=True)
class _Any:
    """One of them."""

    options: tuple[_Expression, ...]


@dataclass(frozen=True, slots=True)
class _Times:
    body: _Expression
    low: int
    high: int | None


_Expression = _Written | _Reference | _All | _Any | _Times


def read_rules(text: str) -> str:
    """The same rules, one a line, but those that nothing refers to. Raises ValueError with what is wrong."""
    rules = _Parser(text).rules()
    if "root" not in rules:
        raise ValueError("there is no rule 'root', with which it begins")
    reached = {"root": "r0"}  # and what each is called
    waiting = ["root"]
    while waiting:
        name = waiting.pop()
        for other in _names(rules[name]):
            if other not in rules:
                raise ValueError(f"there is no rule {other[:64]!r}, to which {name[:64]!r} refers")
            if other not in reached:
                reached[other] = f"r{len(reached)}"
                waiting.append(other)
    endless = reached.keys() - _ending({name: rules[name] for name in reached})
    if endless:
        raise ValueError(f"the rule {min(endless)[:64]!r} never ends: it always needs itself, or another one like it")
    lines = (f"{own} ::= {_spelled(rules[name], reached)}" for name, own in reached.items())
    return "\n".join(["root ::= r0", *lines])


def _names(expression: _Expression) -> Iterator[str]:
    match expression:
        case _Reference(name):
            yield name
        case _All(inner) | _Any(inner):
            for one in inner:
                yield from _names(one)
        case _Times(body):
            yield from _names(body)


def _ending(rules: Mapping[str, _Expression]) -> set[str]:
    """Those that some text ends. Each expression is looked at once, however the rules refer to each other."""
    users: dict[str, list[_Waiting | str]] = {}
    done: list[_Waiting | str] = []
    for name, expression in rules.items():
        _wait(expression, name, users, done)
    ending: set[str] = set()
    while done:
        one = done.pop()
        if isinstance(one, _Waiting):
            one.missing -= 1
            if one.missing == 0:
                done.append(one.outer)
        elif one not in ending:
            ending.add(one)
            done += users.get(one, ())
    return ending


@dataclass(slots=True)
class _Waiting:
    """An expression that ends once so many of those in it do; then what it stands in goes on, a rule by its name."""

    missing: int
    outer: _Waiting | str


def _wait(
    expression: _Expression,
    outer: _Waiting | str,
    users: dict[str, list[_Waiting | str]],
    done: list[_Waiting | str],
) -> None:
    """Enter `outer` with the rules that an expression in it needs, or as done where it needs none."""
    match expression:
        case _Written() | _Times(low=0) | _All(()):
            done.append(outer)
        case _Reference(name):
            users.setdefault(name, []).append(outer)
        case _Times(body):
            _wait(body, outer, users, done)
        case _All(inner) | _Any(inner):
            own = _Waiting(len(inner) if isinstance(expression, _All) else 1, outer)
            for one in inner:
                _wait(one, own, users, done)


def _spelled(expression: _Expression, own: Mapping[str, str]) -> str:
    match expression:
        case _Written(text):
            return text
        case _Reference(name):
            return own[name]
        case _All(parts):
            return " ".join(_spelled(part, own) for part in parts) or '""'
        case _Any(options):
            return choice(_spelled(option, own) for option in options)
        case _Times(body, low, high):
            one = _spelled(body, own)
            return repeat(one if isinstance(body, _Written | _Reference | _Any) else f"({one})", low, high)


class _Parser:
    """One pass over the tokens. A rule goes on until the next name with `::=`, whatever lines it has."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(self._read())
        self._at = 0

    def rules(self) -> dict[str, _Expression]:
        rules: dict[str, _Expression] = {}
        while self._at < len(self._tokens):
            name = self._tokens[self._at]
            if not self._begins_rule():
                self._refuse("expected a rule, 'name ::= …'", name.at)
            if name.text in rules:
                self._refuse(f"a second rule {name.text[:64]!r}", name.at)
            if len(rules) == MAX_RULES:
                self._refuse(f"at most {MAX_RULES} rules", name.at)
            self._at += 2
            rules[name.text] = self._options(0)
        return rules

    def _options(self, depth: int) -> _Expression:
        options = [self._sequence(depth)]
        while self._take("sign", "|"):
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else _Any(tuple(options))

    def _sequence(self, depth: int) -> _Expression:
        parts: list[_Expression] = []
        while (atom := self._atom(depth)) is not None:
            while self._is("times"):
                atom = _Times(atom, *self._counts())
                if self._is("times"):
                    self._refuse("a repetition of a repetition needs a group", self._tokens[self._at].at)
            parts.append(atom)
        return _All(tuple(parts))

    def _atom(self, depth: int) -> _Expression | None:
        """None where the sequence ends."""
        if self._at == len(self._tokens) or self._begins_rule():
            return None
        token = self._tokens[self._at]
        if token.text in ("|", ")") and token.kind == "sign":
            if token.text == ")" and depth == 0:
                self._refuse("a ')' that closes nothing", token.at)
            return None
        self._at += 1
        match token.kind:
            case "name":
                return _Reference(token.text)
            case "text":
                return _Written(literal("".join(chr(code) for code, _ in self._chars(token))))
            case "chars":
                return _Written(char_class(self._ranges(token)))
            case "sign" if token.text == ".":
                return _Written(char_class(without(_ANY, _SURROGATES)))
            case "sign":
                if depth == _MAX_GROUPS:
                    self._refuse(f"groups deeper than {_MAX_GROUPS} are not supported", token.at)
                inside = self._options(depth + 1)
                if not self._take("sign", ")"):
                    self._refuse("a group without its ')'", token.at)
                return inside
        what = f"a {token.text!r} that repeats nothing" if token.kind == "times" else "a '::=' without a name"
        return self._refuse(what, token.at)

    def _counts(self) -> tuple[int, int | None]:
        token = self._tokens[self._at]
        self._at += 1
        if token.text in ("*", "+", "?"):
            return (int(token.text == "+"), 1 if token.text == "?" else None)
        first, comma, last = token.text[1:-1].partition(",")
        low, high = int(first), int(last) if last else None if comma else int(first)
        if max(low, high or 0) > _MAX_COUNT:
            self._refuse(f"at most {_MAX_COUNT} repetitions are supported", token.at)
        if high is not None and high < low:
            self._refuse("a repetition of more than its most", token.at)
        return low, high

    def _ranges(self, token: _Token) -> Ranges:
        """What `[…]` stands for."""
        negated = token.text.startswith("^")
        chars = self._chars(_Token(token.kind, token.text[negated:], token.at))
        ranges, i = [], 0
        while i < len(chars):
            low = high = chars[i][0]
            if i + 2 < len(chars) and chars[i + 1] == (0x2D, False):
                high = chars[i + 2][0]
                i += 2
            if high < low:
                self._refuse("a range of characters that is none", token.at)
            ranges.append((low, high))
            i += 1
        found = without(without(_ANY, tuple(ranges)) if negated else tuple(ranges), _SURROGATES)
        if not found or not ranges:
            self._refuse("a set of characters that is empty", token.at)
        return found

    def _chars(self, token: _Token) -> list[tuple[int, bool]]:
        """Code points, and whether each was written as an escape."""
        chars, at = [], 0
        while at < len(token.text):
            match = _CHAR.match(token.text, at)
            if match is None or (match["escaped"] and match["escaped"] not in _ESCAPES):
                self._refuse(f"the escape {token.text[at : at + 2]!r} is not supported there", token.at)
            digits = match["x"] or match["u"] or match["U"]
            code = int(digits, 16) if digits else ord(_ESCAPES.get(match["escaped"]) or match["plain"])
            if code > 0x10FFFF or (digits and 0xD800 <= code <= 0xDFFF):
                self._refuse(f"{match[0]!r} is no character", token.at)
            chars.append((code, match["plain"] is None))
            at = match.end()
        return chars

    def _read(self) -> Iterator[_Token]:
        at = 0
        while at < len(self._text):
            match = _TOKEN.match(self._text, at)
            if match is None:
                self._refuse(f"{self._text[at : at + 20]!r} is not supported", at)
            kind = str(match.lastgroup)
            if kind != "blank":
                yield _Token(kind, match[kind], at)
            at = match.end()

    def _begins_rule(self) -> bool:
        return [token.kind for token in self._tokens[self._at : self._at + 2]] == ["name", "is"]

    def _is(self, kind: str) -> bool:
        return self._at < len(self._tokens) and self._tokens[self._at].kind == kind

    def _take(self, kind: str, text: str) -> bool:
        found = self._is(kind) and self._tokens[self._at].text == text
        self._at += found
        return found

    def _refuse(self, message: str, at: int) -> NoReturn:
        line = self._text.count("\n", 0, at) + 1
        raise ValueError(f"line {line}: {message}")
