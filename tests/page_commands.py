"""The commands of a page of docs/, in order: fenced blocks with what they are. Runs nothing."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
_FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    kind: str  # sh, yaml, text, diff
    text: str
    line: int  # where it begins, for messages


def blocks(page: str) -> list[Block]:
    """Of `docs/<page>`."""
    content = (DOCS / page).read_text()
    return [
        Block(match[2], textwrap.dedent(match[3]), content.count("\n", 0, match.start()) + 1)
        for match in _FENCE.finditer(content)
    ]


def changed(text: str, diff: str) -> str:
    """`text` with the lines of a ```diff block replaced, which have to be there once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in "- ")
    after = "".join(line[1:] for line in lines if line[0] in "+ ")
    assert text.count(before) == 1, f"not there once:\n{before}"
    return text.replace(before, after)
