"""The wire format: what is packed is read, replies echo what they answer, and anything else is refused."""

from __future__ import annotations

import pytest
import torch

from experts_service.wire.frame import (
    ANSWER,
    DRAINING,
    ERROR,
    FAILED,
    HEAD_BYTES,
    MAX_MESSAGE_BYTES,
    FrameError,
    LaneShape,
    RowsFormat,
    answer_head,
    read_reply,
    refusal_head,
)

SHAPE = LaneShape(num_layers=4, num_experts=2, hidden=8, dtype=torch.bfloat16)
FORM = RowsFormat(2)


def pack(**changes: int) -> bytearray:
    fields = {
        "request_id": 2**40 + 7, "epoch": 9, "layer": 3, "attempt": 2, "rows": 5, "hidden": 8, "deadline_ms": 1500
    }  # fmt: skip
    fields |= changes
    return bytearray(FORM.pack(SHAPE.dtype, **fields, counts=(2, 3)))


def test_a_head_of_rows_is_read_as_it_was_packed() -> None:
    head = FORM.read(pack(), SHAPE)
    assert (head.request_id, head.epoch, head.layer, head.attempt) == (2**40 + 7, 9, 3, 2)
    assert (head.rows, head.hidden, head.counts) == (5, 8, (2, 3))
    assert (head.deadline_ms, head.payload_bytes) == (1500, 5 * 8 * 2)


def test_the_epoch_wraps() -> None:
    assert FORM.read(pack(epoch=2**32 + 3), SHAPE).epoch == 3


@pytest.mark.parametrize(
    ("offset", "value", "complaint"),
    [
        (0, 0x80, "not a frame"),
        (4, 2, "version 2"),
        (5, ANSWER, "kind 2"),
        (6, 1, "dtype 1"),
        (7, 1, "flags 1"),
        (20, 4, "layer 4 of 4"),
        (24, 6, "6 rows"),
        (28, 9, "of 9"),
        (32, 3, "3 experts"),
        (34, 1, "do not fit"),
        (40, 81, "81 bytes"),
        (44, 3, "counts give 6"),
    ],
)
def test_every_field_is_checked(offset: int, value: int, complaint: str) -> None:
    head = pack()
    head[offset] = value
    with pytest.raises(FrameError, match=complaint):
        FORM.read(head, SHAPE)


def test_a_frame_without_rows_is_refused() -> None:
    with pytest.raises(FrameError):
        FORM.read(bytearray(FORM.pack(SHAPE.dtype, 1, 1, 1, 1, 0, 8, 1, (0, 0))), SHAPE)


def test_rows_beyond_the_limit_are_never_sent() -> None:
    with pytest.raises(FrameError, match="limit"):
        FORM.pack(SHAPE.dtype, 1, 1, 1, 1, 2**20, 2**10, 1, (2**20, 0))


def test_an_answer_echoes_the_head_it_answers() -> None:
    asked = pack()
    answer = answer_head(asked)
    assert len(answer) == HEAD_BYTES
    assert answer[:5] + answer[6:] == bytes(asked[:5] + asked[6:HEAD_BYTES])
    assert read_reply(answer) == (ANSWER, 0, 2**40 + 7, 80)


def test_refusals_name_their_kind_and_their_size() -> None:
    assert read_reply(refusal_head(pack(), ERROR, FAILED, 11)) == (ERROR, FAILED, 2**40 + 7, 11)
    assert read_reply(refusal_head(pack(), DRAINING, 0, 0)) == (DRAINING, 0, 2**40 + 7, 0)


@pytest.mark.parametrize(
    "head",
    [
        bytes(HEAD_BYTES),
        bytes(pack()[:HEAD_BYTES]),  # rows come from coordinators only
        refusal_head(pack(), ERROR, FAILED, MAX_MESSAGE_BYTES + 1),
        refusal_head(pack(), DRAINING, 0, 1),
        refusal_head(pack(), ANSWER, 0, 81),
    ],
)
def test_a_coordinator_refuses_what_is_no_reply(head: bytes) -> None:
    with pytest.raises(FrameError):
        read_reply(head)
