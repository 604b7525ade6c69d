"""docs/cards.md: each `manta plan` on it says what the page says, and each configuration is one that is served so.

What is measured anew changes what plans say: `python -m tests.test_cards_page` writes the page's answers again.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from tests.page_commands import DOCS, blocks

PAGE = DOCS / "cards.md"
_PLAN = re.compile(r"^```sh\n(manta plan [^\n]*)\n```\n\n```text\n(.*?)```$", re.MULTILINE | re.DOTALL)
_AS_PRINTED = "# The configuration, for manta serve --config"
WIDTH = 600  # columns, of the terminal that plans are drawn for


def plans() -> list[tuple[str, str]]:
    """(command, what the page says that it prints)."""
    return [(match[1], match[2]) for match in _PLAN.finditer(PAGE.read_text())]


def printed(command: str) -> list[str]:
    """The lines of a plan."""
    [name, *arguments] = shlex.split(command)
    assert name == "manta"
    result = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": str(WIDTH)})
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def said(command: str) -> str:
    """What a plan prints, as far as the page has it: without tables, and without what it is made of."""
    lines = []
    for line in printed(command):
        if line.startswith(("Measured", "Assumed", "What a day", _AS_PRINTED)):
            break
        is_table = set(line) & set("┏┃┡│├└") or line.startswith(("What fits as well", "Against ", " "))
        if line.strip() and not is_table:
            lines.append(line.rstrip())
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("command", "text"), plans(), ids=[command for command, _ in plans()])
def test_a_plan_says_what_the_page_says(command: str, text: str) -> None:
    assert said(command) == text, "python -m tests.test_cards_page writes the page again"


def test_each_configuration_fits_the_cards_of_the_plan_above_it(tmp_path: Path) -> None:
    command, checked = "", 0
    for block in blocks("cards.md"):
        if block.text.startswith("manta plan"):
            command = block.text
        if block.kind == "yaml" and not block.text.startswith(_AS_PRINTED):
            file = tmp_path / "manta.yaml"
            file.write_text(block.text)
            options = re.sub(r"manta plan \S+|--quantization \S+", "", command)
            result = CliRunner().invoke(app, ["plan", "--config", str(file), *shlex.split(options)])
            assert result.exit_code == 0, f"line {block.line}: {result.exception}"
            checked += 1
    assert checked >= 5


def test_the_configurations_that_plans_print_are_those_of_the_page() -> None:
    commands = [command for command, _ in plans() if "--ram" in command]
    shown = [block.text for block in blocks("cards.md") if block.text.startswith(_AS_PRINTED)]
    wanted = {command: config(command) for command in commands}
    assert len(shown) >= 2
    assert [one for one in shown if one not in wanted.values()] == []


def config(command: str) -> str:
    """The configuration that a plan with --ram proposes."""
    lines = printed(command)
    return "\n".join(lines[lines.index(_AS_PRINTED) :]) + "\n"


def test_the_page_has_plans_for_all_its_sections() -> None:
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    without = [section.splitlines()[0] for section in sections if not _PLAN.search(section)]
    assert without == []


def main() -> None:
    """Write what the plans say now into the page."""
    text = PAGE.read_text()
    for command, before in plans():
        head = f"```sh\n{command}\n```\n\n```text\n"
        text = text.replace(f"{head}{before}```", f"{head}{said(command)}```")
        if "--ram" in command:
            after = f"{head}{said(command)}```\n\n```yaml\n"
            text = re.sub(
                re.escape(after) + r".*?```", lambda _, c=command, a=after: f"{a}{config(c)}```", text, flags=re.DOTALL
            )
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
