"""The table of docs/models.md says what happens: every family of the installed transformers is tried."""

from __future__ import annotations

import re

import pytest
import transformers

from tests.models_table import PAGE, families, row, told
from tests.transformers_families import SHOWN


@pytest.mark.long
def test_what_the_page_says_of_every_family_is_what_happens() -> None:
    version = re.search(r"tested with (5\.\d+)", PAGE.read_text())
    assert version is not None
    if not transformers.__version__.startswith(f"{version[1]}."):
        pytest.skip(f"the page is of transformers {version[1]}, and {transformers.__version__} is installed")
    on_page = told()
    assert sorted(on_page) == families()
    assert {family: row(family) for family in on_page} == on_page


def test_families_that_are_shown_are_on_the_page() -> None:
    """It was not made anew after they were added."""
    on_page = told()
    assert on_page
    names = [family.removesuffix("_text") for family in SHOWN]
    assert [name for name in names if not on_page[name].endswith("| yes |  |")] == []
