r"""Spells JSON strings as rules: of a length, of a pattern, of a format. Knows JSON's escapes; knows no schema.

A pattern becomes a regular expression of what stands between the quotes, with every escape written out, so none can be
lost: xgrammar's own patterns of strings lose theirs past 128 repetitions. Half of a surrogate pair is no character.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.ebnf import char_class, choice, literal
from cluster.json_schema.patterns import Pattern, Ranges, parse_pattern, without
from router_service.grammar.rules.regexes import class_of, pattern_rule, repeated
from router_service.grammar.rules.rules import Rules

_ESCAPED: Ranges = ((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C))
_PLAIN_RANGES = without(((0, 0x10FFFF),), (*_ESCAPED, (0xD800, 0xDFFF)))
_PLAIN = char_class(_PLAIN_RANGES)
_SHORT = {'"': 0x22, "\\": 0x5C, "b": 0x08, "f": 0x0C, "n": 0x0A, "r": 0x0D, "t": 0x09}
_HEX = "[0-9a-fA-F]"
_ESCAPE = (
    f'(["\\\\/bfnrt] | "u" ([0-9abcefABCEF] {_HEX} {_HEX} {_HEX} | [dD] [0-7] {_HEX} {_HEX}'
    f' | [dD] [89abAB] {_HEX} {_HEX} "\\\\u" [dD] [cdefCDEF] {_HEX} {_HEX}))'
)
_ESCAPE_IN_REGEX = (
    f'(["\\\\/bfnrt]|u([0-9abcefABCEF]{_HEX}{{3}}|[dD][0-7]{_HEX}{{2}}'
    f"|[dD][89abAB]{_HEX}{{2}}\\\\u[dD][cdefCDEF]{_HEX}{{2}}))"
)
_MAX_TOLD_APART = 3  # characters of a name
_AFTER_A_STRING = "[ \\n\\r\\t]? [,}\\]:]"  # lets xgrammar judge tokens that go past the end of one

_YEAR_MONTH_DAY = (
    "[12][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-[012][1-9])"
)
_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_HOURS = "T([0-9]{1,5}H([0-9]{1,5}M)?([0-9]{1,5}S)?|[0-9]{1,5}M([0-9]{1,5}S)?|[0-9]{1,5}S)"
_DAYS = "([0-9]{1,5}Y([0-9]{1,5}M)?([0-9]{1,5}D)?|[0-9]{1,5}M([0-9]{1,5}D)?|[0-9]{1,5}D)"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_GROUP = "[0-9A-Fa-f]{1,4}"
_IN_URI = "([A-Za-z0-9._~:/?@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})"
_FORMATS = {
    "date": _YEAR_MONTH_DAY,
    "time": _TIME,
    "date-time": f"{_YEAR_MONTH_DAY}T{_TIME}",
    "duration": f"P({_DAYS}({_HOURS})?|{_HOURS}|[0-9]{{1,5}}W)",
    "email": f"[A-Za-z0-9_+-]+(\\.[A-Za-z0-9_+-]+)*@({_LABEL}\\.)+[A-Za-z]{{2,63}}",
    "hostname": f"{_LABEL}(\\.{_LABEL})*",
    "ipv4": f"{_BYTE}(\\.{_BYTE}){{3}}",
    "ipv6": "|".join(
        [f"({_GROUP}:){{7}}{_GROUP}", "::"]
        + [f"({_GROUP}:){{{before}}}(:{_GROUP}){{1,{7 - before}}}" for before in range(1, 7)]
        + [f"({_GROUP}:){{1,7}}:", f":(:{_GROUP}){{1,7}}"]
    ),
    "uri": f"[A-Za-z][A-Za-z0-9+.-]*:{_IN_URI}+(#{_IN_URI}*)?",
    "uri-reference": f"{_IN_URI}+(#{_IN_URI}*)?",
    "uuid": "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
}


def any_string(rules: Rules) -> str:
    """Any string."""
    escape, rest = rules.add(_ESCAPE), rules.reserve()
    rules.set(rest, f'("\\"" | {_PLAIN} {rest} | "\\\\" {escape} {rest}) (={_AFTER_A_STRING})')
    return rules.add(f'"\\"" {rest}')


def string_of_length(rules: Rules, low: int, high: int | None) -> str:
    """`low` to `high` code points."""
    char = f"({class_of(_PLAIN_RANGES)}|\\\\{_ESCAPE_IN_REGEX})"
    return rules.add(f'"\\"" {repeated(rules, char, low, high)} "\\""')


def string_of_pattern(rules: Rules, pattern: Pattern) -> str:
    """All of it matches."""
    return rules.add(f'"\\"" {pattern_rule(rules, pattern, _char)} "\\""')


def string_of_format(rules: Rules, name: Any) -> str | None:
    """None for a format that is not known."""
    if not isinstance(name, str) or name not in _FORMATS:
        return None
    return string_of_pattern(rules, parse_pattern(_FORMATS[name]))


def key_but(rules: Rules, names: Iterable[str]) -> str:
    """Any string but these, without escapes: one could spell such a name in another way.

    Nor one that begins like a long name of these: to compile, every character that is told apart costs milliseconds.
    """
    names = set(names)
    taken = {name[:_MAX_TOLD_APART] for name in names if len(name) > _MAX_TOLD_APART}
    branches: dict[str, set[str]] = {"": set()}  # what may follow a beginning of a name
    for name in names:
        for i, char in enumerate(name[:_MAX_TOLD_APART]):
            branches.setdefault(name[:i], set()).add(char)
    rest = rules.add(f'{_PLAIN}* "\\""')
    spelled: dict[str, str] = {}
    for begin in sorted(branches, key=len, reverse=True):
        chars = tuple((ord(char), ord(char)) for char in branches[begin])
        options = [f"{char_class(without(_PLAIN_RANGES, chars))} {rest}"] + ([] if begin in names else ['"\\""'])
        for char in sorted(branches[begin]):
            if begin + char in taken or not without(((ord(char), ord(char)),), _ESCAPED):
                continue  # an escaped one is never written here
            whole = f"{_PLAIN} {rest}"  # after a name that no other begins with, one character more at least
            options.append(f"{literal(char)} {spelled.get(begin + char) or rules.add(whole)}")
        spelled[begin] = rules.add(choice(options))
    return rules.add(f'"\\"" {spelled[""]}')


def _char(ranges: Ranges) -> str:
    """One character, as JSON writes it."""
    plain = without(ranges, _ESCAPED)
    options = [class_of(plain)] if plain else []
    short = [sign for sign, code in _SHORT.items() if _has(ranges, code)]
    if short:
        options.append(f"\\\\{class_of(tuple((ord(sign), ord(sign)) for sign in short))}")
    for high in (0x00, 0x10):
        low = [code for code in range(high, high + 16) if _has(ranges, code) and code not in _SHORT.values()]
        if low:
            digits = [f"{code % 16:x}" for code in low]
            options.append(f"\\\\u00{high // 16}{class_of(tuple((ord(digit), ord(digit)) for digit in digits))}")
    return options[0] if len(options) == 1 and plain else f"({'|'.join(options)})"


def _has(ranges: Ranges, code: int) -> bool:
    return any(low <= code <= high for low, high in ranges)
