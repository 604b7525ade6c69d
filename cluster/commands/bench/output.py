"""Where a benchmark writes: header, tables and at last one JSON line on stdout, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.commands.bench.machine import Machine

FILE_WIDTH = 160  # columns of a table that is written to a file or a pipe


class Output:
    """One benchmark's."""

    def __init__(self) -> None:
        self._stdout = Console(highlight=False)
        if not self._stdout.is_terminal:
            self._stdout.width = FILE_WIDTH

    def header(self, machine: Machine, lines: Iterable[str]) -> None:
        """What is measured, on what."""
        for line in (*machine.lines(), *lines):
            self.line(line)

    def line(self, text: str) -> None:
        """As it is, however long."""
        self._stdout.print(text, markup=False, emoji=False, soft_wrap=True)

    def table(self, title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
        """The first column to the left, figures to the right."""
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        self._stdout.print(table)

    def progress(self) -> Progress:
        """A bar on stderr that leaves nothing behind."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=Console(stderr=True), transient=True)

    def json(self, document: dict[str, Any]) -> None:
        """The last line."""
        print(json.dumps(document, ensure_ascii=False, allow_nan=False), flush=True)
