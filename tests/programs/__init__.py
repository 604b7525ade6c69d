"""Programs that tests run in processes of their own. Files, so that linters read them and a traceback names a line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def program(name: str, *arguments: object) -> list[str]:
    """The command line of one, to be run in REPOSITORY."""
    return [sys.executable, "-m", f"{__name__}.{name}", *map(str, arguments)]


def said_by(
    name: str,
    *arguments: object,
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 300.0,
) -> str:
    """Standard output of one, which must succeed; `environment` is all that it has, where it is given."""
    done = subprocess.run(
        program(name, *arguments),
        input=stdin, env=environment, cwd=REPOSITORY, capture_output=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return done.stdout.decode()
