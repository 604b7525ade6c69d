"""Bounds how many parts a protobuf message has before it is built. Knows the wire format; no field's meaning.

A submessage of two bytes takes 140 once it is built: 32 MiB of empty ones took 2.3 GB. Packed numbers of one byte take
four, and no other thread runs while eight million are read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.errors import InvalidRequest
from gateway.json_bounds import MAX_VALUES

MAX_SUBMESSAGES = 16_384  # a chat's turns, tools and calls; pairs of a map
MAX_FIELDS = 65_536  # occurrences; packed numbers are one
MAX_NUMBERS = MAX_VALUES  # packed ones in all

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


@dataclass(slots=True)
class Parts:
    """The submessages and lists of numbers that a message of one type may have, by the number of their field."""

    name: str = ""  # of the field that holds it
    parts: dict[int, Parts] = field(default_factory=dict)
    numbers: dict[int, str] = field(default_factory=dict)  # names of packed fields


def parts_of(descriptor: Any, name: str = "") -> Parts:
    """Of a message's descriptor, and the field that holds it. A type that holds itself is none of ours."""
    return Parts(
        name,
        parts={
            one.number: parts_of(one.message_type, one.name)
            for one in descriptor.fields
            if one.message_type is not None
        },
        numbers={one.number: one.name for one in descriptor.fields if one.is_packed},
    )


def check_parts(data: bytes, top: Parts) -> None:
    """Raises InvalidRequest, which names the field.

    Also for what is cut short: a parser finds that out once it has built all that comes before. Other faults are left
    to it, and what comes before those is counted.
    """
    num_fields = num_submessages = num_numbers = 0
    waiting = [(0, len(data), top)]
    try:
        while waiting:
            at, end, known = waiting.pop()
            while at < end:
                num_fields += 1
                if num_fields > MAX_FIELDS:
                    raise InvalidRequest(f"{known.name or 'the message'}: more than {MAX_FIELDS} fields", known.name)
                tag, at = _varint(data, at)
                kind = tag & 7
                if kind == LENGTH:
                    length, at = _varint(data, at)
                    part = known.parts.get(tag >> 3)
                    if part is not None:
                        num_submessages += 1
                        if num_submessages > MAX_SUBMESSAGES:
                            raise InvalidRequest(f"{part.name}: more than {MAX_SUBMESSAGES} submessages", part.name)
                        waiting.append((at, min(at + length, end), part))
                    elif (name := known.numbers.get(tag >> 3)) is not None:
                        num_numbers += _num_varints(data, at, length)
                        if num_numbers > MAX_NUMBERS:
                            raise InvalidRequest(f"{name}: more than {MAX_NUMBERS} numbers", name)
                    at += length
                elif kind == VARINT:
                    _, at = _varint(data, at)
                elif kind == FIXED64:
                    at += 8
                elif kind == FIXED32:
                    at += 4
    except IndexError:
        raise InvalidRequest("the message cannot be decoded: it is cut short") from None


def _num_varints(data: bytes, at: int, length: int) -> int:
    """Each has one byte without the bit that says that more follow."""
    length = max(0, min(length, len(data) - at))
    return int(np.count_nonzero(np.frombuffer(data, np.uint8, length, at) < 0x80)) if length else 0


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number and where it ends. Raises IndexError."""
    byte = data[at]
    at += 1
    if byte < 0x80:
        return byte, at
    value, shift = byte & 0x7F, 7
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:  # the parser refuses it
            raise IndexError
