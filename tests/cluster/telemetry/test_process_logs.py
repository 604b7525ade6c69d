"""What a process without Serve's log writes to standard error."""

from __future__ import annotations

import re
import subprocess

from tests.programs import REPOSITORY, program


def test_each_line_has_its_time_and_ours_are_told_from_info_on() -> None:
    done = subprocess.run(
        program("cluster.say_lines"), cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    times, lines = zip(*(line.split(" ", 1) for line in done.stderr.splitlines()), strict=True)
    assert lines == ("INFO experts_service.shard.shard: ours", "WARNING library: a library's warning")
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", time) for time in times)
