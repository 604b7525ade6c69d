"""Which tests stay together when pytest-xdist runs them in workers, and with which a worker begins. Runs none.

Tests of a file stay together, in order. So do all that share the session's server, or there would be two of them, and
all that make hosts of network namespaces. One worker begins with what mostly computes, all others with what starts
servers and mostly waits; who is ready first goes on with the others'. Without workers all is as pytest has it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

SERVER, HOSTS = "the session's server", "hosts"


class BothEnds(LoadScopeScheduling):
    """The last worker takes groups from the back, the others from the front."""

    def schedule(self) -> None:
        if self.collection is None:
            self._groups = json.loads(_groups_file(self.config._tmp_path_factory.getbasetemp()).read_text())
        super().schedule()

    def _split_scope(self, nodeid: str) -> str:
        return str(self._groups[nodeid])

    def _assign_work_unit(self, node) -> None:
        if node is self.nodes[-1]:
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)

    def _reschedule(self, node) -> None:
        """Until it has more than two tests to do, or there are none.

        A worker begins none before it knows the next. xdist's own, which gives one group, left the worker that
        replaced a dead one with the last test of a group, and the run never ended.
        """
        while not node.shutting_down and (not self.workqueue or self._pending_of(self.assigned_work[node]) <= 2):
            super()._reschedule(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> BothEnds | None:
    """Of `--dist loadgroup`."""
    config.option.loadscopereorder = False  # which would put the groups with the most tests first
    return BothEnds(config, log) if config.getvalue("dist") == "loadgroup" else None


def sort_for_workers(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker: what starts servers comes first. Tells the scheduler of groups, which knows nothing but names."""
    groups = {item.nodeid: _group(item) for item in items}
    items.sort(key=lambda item: _turn(item, groups[item.nodeid]))
    file = _groups_file(Path(config.option.basetemp).parent)  # all workers write the same
    own = file.with_suffix(f".{os.getpid()}")
    own.write_text(json.dumps(groups))
    own.replace(file)


def _groups_file(directory: Path) -> Path:
    """In the run's directory for temporary files."""
    return directory / "groups.json"


def _group(item: pytest.Item) -> str:
    if item.get_closest_marker("root"):
        return HOSTS
    of_module = vars(item.getparent(pytest.Module).obj)  # a `server` of its own is another one
    shares = {"server", "ray_cluster"} & {*item.fixturenames}  # type: ignore[attr-defined]
    return SERVER if shares and "server" not in of_module else str(item.path)


def _turn(item: pytest.Item, group: str) -> int:
    if group == SERVER:
        return 1
    return 0 if group == HOSTS or "end_to_end" in item.path.parts else 2
