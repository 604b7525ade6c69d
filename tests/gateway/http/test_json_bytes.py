"""The JSON of answers: small ones are made at once, very large ones in steps, and both say the same."""

from __future__ import annotations

import json
import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.http.sse import AT_ONCE_BYTES, event, json_bytes

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(JSON)
def test_every_size_says_the_same(document: Any) -> None:
    said = json.loads(json.dumps(document))
    assert json.loads(json_bytes(document)) == said
    assert json.loads(json_bytes(document, AT_ONCE_BYTES + 1)) == said
    assert event(document).endswith(b"\n\n")
    assert event(document).count(b"\n") == 2, "an event is one line"


def test_what_is_made_at_once_takes_a_moment() -> None:
    """The scores of twenty alternatives a token: a document of numbers and short strings. It takes 8 ms."""
    token = {"token": "é", "logprob": -0.123456, "bytes": [195, 169]}
    document = [{**token, "top_logprobs": [token] * 20}] * (AT_ONCE_BYTES // 1200)
    assert 0.8 * AT_ONCE_BYTES < len(json_bytes(document)) < AT_ONCE_BYTES
    durations = []
    for _ in range(3):
        started = time.thread_time()
        json_bytes(document, AT_ONCE_BYTES)
        durations.append(time.thread_time() - started)
    assert min(durations) < 0.1
