"""A pytest plugin for suites that others wrote: failures that are known, with reasons, in waivers.toml.

A test that is waived has to fail, and in the way that is written there. Knows nothing of Manta; it runs in the
environment of each suite.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("waivers.toml")


@dataclass(frozen=True)
class Waiver:
    """Tests of one suite that fail alike."""

    suite: str
    tests: str  # a pattern of their ids, without the folders of their files
    error: str | list[str]  # what the failure says, or what it may say
    reason: str

    def matches(self, test_id: str) -> bool:
        return re.fullmatch(f"(.*/)?({self.tests})", test_id) is not None

    def explains(self, failure: str) -> bool:
        return any(error in failure for error in ([self.error] if isinstance(self.error, str) else self.error))


WAIVER = pytest.StashKey[Waiver]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", required=True, help="whose waivers are meant")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    suite = config.getoption("--suite")
    waivers = [
        waiver for table in tomllib.loads(FILE.read_text())["waiver"] if (waiver := Waiver(**table)).suite == suite
    ]
    for waiver in waivers:
        waived = [item for item in items if waiver.matches(item.nodeid)]
        if not waived:
            raise pytest.UsageError(f"no test of {suite} is called {waiver.tests}")
        for item in waived:
            if WAIVER in item.stash:
                raise pytest.UsageError(f"{item.nodeid} is waived twice")
            item.stash[WAIVER] = waiver


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    waiver = item.stash.get(WAIVER, None)
    if waiver is None or report.when != "call":
        return report
    if not report.failed:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} is waived and does not fail: {waiver.reason}"
    elif waiver.explains(report.longreprtext):
        report.outcome = "skipped"
        report.wasxfail = waiver.reason
    return report
