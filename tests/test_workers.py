"""A run in two workers: who shares the session's server shares a worker, and each worker begins at its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ENDS_WITH_US
from tests.programs import REPOSITORY, program
from tests.waiting import wait_for

CONFTEST = """
import os, pathlib
import pytest
from tests.conftest import pytest_collection_modifyitems, pytest_xdist_make_scheduler

@pytest.fixture(scope="session")
def server():
    pass

@pytest.fixture(autouse=True)
def _told(request):
    yield
    print_to = pathlib.Path(__file__).with_name("ran") / os.environ["PYTEST_XDIST_WORKER"]
    with print_to.open("a") as file:
        print(request.node.nodeid, file=file)
"""
OF_ITS_OWN = """
import pytest
@pytest.fixture
def server(): pass
def test_one(server): pass
"""
FIRST_FROM_BACK = "gateway/test_computes.py::test_one"
FILES = {
    "cluster/test_shares.py": "def test_one(server): pass",
    "cluster/test_computes.py": "def test_one(): pass\ndef test_two(): pass",
    "end_to_end/test_own.py": OF_ITS_OWN,
    "end_to_end/test_shares.py": "def test_one(server): pass\ndef test_two(server): pass",
    "gateway/test_computes.py": "def test_one(): pass\ndef test_dies(): import os; os.path.exists('died') or "
    "(open('died', 'w').close(), os._exit(1))",
    "test_namespaces.py": "import pytest\npytestmark = pytest.mark.root\ndef test_one(): pass",
}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    for name, text in {"conftest.py": CONFTEST, "pytest.ini": "[pytest]\nmarkers = root: of hosts", **FILES}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "ran").mkdir()
    return tmp_path


def test_groups_stay_together_and_a_worker_that_dies_is_replaced(suite: Path) -> None:
    """xdist left the one that replaced it with one test, which it did not begin: the run never ended."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "--import-mode=importlib", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "crashed while running 'gateway/test_computes.py::test_dies'" in done.stdout, done.stdout + done.stderr
    assert "1 failed, 9 passed" in done.stdout, "what was left goes on in another one, and the one that died as well"
    ran = {file.name: file.read_text().split() for file in (suite / "ran").iterdir()}
    assert {"end_to_end/test_own.py::test_one", FIRST_FROM_BACK} <= {tests[0] for tests in ran.values()}
    [sharing] = [tests for tests in ran.values() if "cluster/test_shares.py::test_one" in tests]
    assert {"end_to_end/test_shares.py::test_one", "end_to_end/test_shares.py::test_two"} < {*sharing}


@pytest.mark.skipif(not ENDS_WITH_US, reason="there is no setpriv")
def test_the_server_of_a_worker_that_dies_ends() -> None:
    worker = subprocess.Popen(
        program("end_to_end.leave_server"), cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    server = int(worker.stdout.readline())
    assert Path(f"/proc/{server}").exists()
    worker.kill()
    worker.communicate()
    wait_for(lambda: not Path(f"/proc/{server}").exists(), 10, "the end of what it started")
