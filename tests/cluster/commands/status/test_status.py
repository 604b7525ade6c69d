"""`manta status`: what is drawn and printed for plain data, and what is said where no cluster runs."""

import io
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from cluster.commands.cluster_connection import _none_here, look_at_cluster
from cluster.commands.status.cluster_snapshot import ApplicationStatus, ClusterSnapshot, DeploymentStatus, NodeStatus
from cluster.commands.status.kernel_tables import draw_kernels
from cluster.commands.status.tables import BAR_WIDTH, MOST_EXPERTS, draw
from cluster.errors import SetupError, Unavailable
from cluster.messages import EngineStats
from cluster.telemetry.kernels import ModelKernels, ProcessKernels
from tests.programs import REPOSITORY, program

DEADLINE_S = 240.0  # for a subprocess on a busy machine


def stats(rows: tuple[int, ...], used: int = 25) -> EngineStats:
    return EngineStats(3, 4, 100, used, 1000, 200, 5, 0, 77, rows)


def deployment(name: str, **replicas: int) -> DeploymentStatus:
    return DeploymentStatus(name, "HEALTHY", replicas or {"RUNNING": 1})


MODEL = ApplicationStatus(
    "mixtral-8x7b-0123abcd",
    "RUNNING",
    (
        deployment("expert-10"),
        deployment("expert-2", STARTING=1, RUNNING=2),
        deployment("coordinator", RUNNING=2),
    ),
    coordinators=(stats((10, 0, 30)), stats((10, 0, 10))),
    stats_error="1 of 3 coordinators did not answer: it is busy",
)
GATEWAY = ApplicationStatus("gateway", "DEPLOYING", (deployment("Gateway"),), message="waiting for [a] node")
SNAPSHOT = ClusterSnapshot(
    "10.0.0.1:6379",
    (NodeStatus("10.0.0.1", True, 8, 0, 0.42), NodeStatus("10.0.0.2", False, 16, 4)),
    (GATEWAY, MODEL),
)


def drawn(snapshot: ClusterSnapshot) -> list[str]:
    file = io.StringIO()
    draw(snapshot, Console(file=file, width=80, highlight=False))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def rows_of(lines: list[str], *first_cells: str) -> list[list[str]]:
    return [line.split() for line in lines if line.split()[:1] and line.split()[0] in first_cells]


def test_names_say_model_and_group() -> None:
    assert MODEL.model == ("mixtral-8x7b", "0123abcd")
    assert GATEWAY.model is None
    assert MODEL.groups == (2, 10)
    tiers = replace(MODEL, deployments=(*MODEL.deployments, deployment("expert-2-tier1")))
    assert tiers.groups == (2, 10), "a group on two tiers is one"
    assert MODEL.rows_per_expert == (20, 0, 40)


def test_nodes_are_drawn() -> None:
    assert rows_of(drawn(SNAPSHOT), "10.0.0.1", "10.0.0.2") == [
        ["10.0.0.1", "alive", "8", "0", "42%"],
        ["10.0.0.2", "dead", "-", "-", "-"],
    ]


def test_deployments_are_drawn_in_the_order_of_their_groups() -> None:
    lines = drawn(SNAPSHOT)
    assert rows_of(lines, "expert-2", "expert-10") == [
        ["expert-2", "healthy", "2", "running,", "1", "starting"],
        ["expert-10", "healthy", "1", "running"],
    ]
    assert "model mixtral-8x7b · 0123abcd · 2 expert groups · running" in lines
    assert "application gateway · deploying" in lines
    assert "waiting for [a] node" in lines  # rich's markup is not read in what others wrote


def test_queue_kv_use_and_rows_are_drawn() -> None:
    lines = drawn(SNAPSHOT)
    header = next(i for i, line in enumerate(lines) if line.startswith("coordinator  running"))
    assert lines[header + 1].split() == ["0", "3", "4", "25/100", "(25", "%)", "1000/200", "5"]
    experts = next(i for i, line in enumerate(lines) if line.startswith("expert "))
    assert [line.split() for line in lines[experts + 1 : experts + 4]] == [
        ["0", "20", "33.3", "%", "█" * (BAR_WIDTH // 2)],
        ["1", "0", "0.0", "%"],
        ["2", "40", "66.7", "%", "█" * BAR_WIDTH],
    ]
    assert MODEL.stats_error in lines


def test_of_many_experts_the_busiest_are_drawn() -> None:
    """256 of them were 256 lines."""
    rows = tuple(range(256))
    many = replace(MODEL, coordinators=(stats(rows, 0),))
    lines = drawn(ClusterSnapshot("a:1", (), (many,)))
    experts = next(i for i, line in enumerate(lines) if line.startswith("expert "))
    drawn_rows = [line.split() for line in lines[experts + 1 : experts + 2 + MOST_EXPERTS]]
    assert [row[0] for row in drawn_rows[:MOST_EXPERTS]] == [str(255 - place) for place in range(MOST_EXPERTS)]
    others = sum(range(256 - MOST_EXPERTS))
    assert drawn_rows[-1] == [str(256 - MOST_EXPERTS), "others", str(others), f"{100 * others / sum(rows):.1f}", "%"]


def test_a_model_that_has_served_nothing_is_drawn() -> None:
    idle = ApplicationStatus("m-00000000", "RUNNING", (deployment("coordinator"),), coordinators=(stats((0, 0), 0),))
    lines = drawn(ClusterSnapshot("a:1", (), (idle,)))
    assert rows_of(lines, "1") == [["1", "0", "-"]]
    assert "model m · 00000000 · running" in lines


def test_a_cluster_without_applications_says_so() -> None:
    assert "Nothing is served on it yet; `manta serve` starts something." in drawn(ClusterSnapshot("a:1", (), ()))


def test_a_document_has_names_spelled_out() -> None:
    document = SNAPSHOT.document()
    assert document["address"] == "10.0.0.1:6379"
    assert document["nodes"][1] == {"address": "10.0.0.2", "alive": False, "cpus": 16, "gpus": 4, "disk": None}
    gateway, model = document["applications"]
    assert (gateway["model"], gateway["fingerprint"], gateway["rows_per_expert"]) == (None, None, [])
    assert (model["model"], model["fingerprint"], model["rows_per_expert"]) == ("mixtral-8x7b", "0123abcd", [20, 0, 40])
    assert [entry["group"] for entry in model["deployments"]] == [10, 2, None]
    assert model["coordinators"][0]["num_kv_blocks_used"] == 25


def test_the_hubs_commit_is_told() -> None:
    commit = "5c79a376139be989ef1838f360bf4f1f256d7aec"
    coordinators = tuple(replace(one, revision=commit) for one in MODEL.coordinators)
    snapshot = replace(SNAPSHOT, applications=(GATEWAY, replace(MODEL, coordinators=coordinators)))
    assert f"revision {commit} of the hub" in drawn(snapshot)
    told = [application["revision"] for application in snapshot.document()["applications"]]
    assert told == [None, commit]


def drawn_kernels(snapshot: ClusterSnapshot, width: int = 140) -> list[str]:
    file = io.StringIO()
    draw_kernels(snapshot, Console(file=file, width=width, highlight=False))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_kernels_are_drawn_by_process_with_what_was_measured_and_what_differs() -> None:
    speeds = (("dot", (0.00042, 0.0005)), ("torch", (0.0011, 0.002)))
    one = ProcessKernels("bfloat16", "dot", True, "znver4", "AVX512", "pages in place", "numba", speeds, (1, 4))
    shard = replace(one, attention="", sampling="")
    older = replace(shard, matmuls="torch", batch_invariant=False, device="znver2", vectors="AVX2", speeds=())
    told = ModelKernels({"coordinator": (one, one), "expert-2": (shard, older), "expert-10": ()})
    snapshot = replace(SNAPSHOT, applications=(GATEWAY, replace(MODEL, kernels=told)))
    lines = drawn_kernels(snapshot)
    assert "model mixtral-8x7b · 0123abcd" in lines
    assert [line.split() for line in lines if line.startswith(("coordinator ", "expert-2 "))] == [
        ["coordinator", "2", "dot", "bfloat16", "znver4", "AVX512", "yes"],
        ["expert-2", "1", "dot", "bfloat16", "znver4", "AVX512", "yes"],
        ["expert-2", "1", "torch", "bfloat16", "znver2", "AVX2", "no"],
    ]
    assert "coordinator: attention pages in place; sampling numba" in lines
    assert "znver4, ms of 1, 4 rows on one thread: dot 0.42 0.50; torch 1.10 2.00" in lines
    rounded = ModelKernels({"expert-2": (replace(shard, weights="INT8"), older)})
    of_rounded = drawn_kernels(replace(snapshot, applications=(GATEWAY, replace(MODEL, kernels=rounded))))
    assert "expert-2: weights INT8" in of_rounded
    assert any(line.startswith("expert-2: its replicas compute by different kernels") for line in lines)
    assert "expert-10: no replica answered" in lines
    gateway, model = snapshot.document()["applications"]
    assert gateway["kernels"] is None
    assert (model["kernels"]["batch_invariant"], model["kernels"]["mixed"]) == (False, ["expert-2"])
    assert model["kernels"]["deployments"]["coordinator"][0]["speeds"]["dot"] == (0.00042, 0.0005)


def test_a_terminal_of_80_columns_shows_every_kernel() -> None:
    """The others' columns were kept whole, and nothing was left for attention's."""
    attention, weights = "pages in place, numba, keys and values in 8 bits", "INT4, groups of 128"
    one = ProcessKernels("bfloat16", "dot", True, "znver4", "AVX512", attention, "numba", weights=weights)
    shard = replace(one, attention="", sampling="")
    told = ModelKernels({"coordinator": (one,), "expert-2": (shard,), "expert-2-tier1": (shard,)})
    lines = drawn_kernels(replace(SNAPSHOT, applications=(replace(MODEL, kernels=told),)), width=80)
    assert "process         replicas  matmuls  dtype     device         batch-invariant" in lines
    assert "expert-2-tier1         1  dot      bfloat16  znver4 AVX512  yes" in lines
    assert f"coordinator: attention {attention}; sampling numba; weights {weights}" in " ".join(lines)
    assert f"expert-2, expert-2-tier1: weights {weights}" in lines


@pytest.mark.parametrize("options", [[], ["--json"], ["--kernels"]])
def test_no_cluster_is_one_line(options: list[str]) -> None:
    """Left to itself, Ray tries for two minutes and ends the process with a native log."""
    started = time.monotonic()
    command = [sys.executable, "-m", "cluster.cli", "status", "--address", "127.0.0.1:1", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: no Ray cluster answers at 127.0.0.1:1 (")
    assert "`manta serve`" in done.stderr
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - started < 90


def test_an_address_from_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        look_at_cluster("auto", str)


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "localhost", "localhost:port", ":6379"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(SetupError, match="HOST:PORT"):
        look_at_cluster(address, str)


def test_a_cluster_that_never_answers_does_not_hold_the_command() -> None:
    """In a process of its own: Ray goes on trying in its thread, and must not keep the interpreter from ending."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        command = program("cluster.look_at_cluster", f"127.0.0.1:{mute.getsockname()[1]}")
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S)
    assert "did not answer within 6 s: its GCS stands still" in done.stderr


def test_a_raylet_that_died_is_told_from_none() -> None:
    """Beside a server that answered clients, no Ray cluster was running on this machine."""
    command = ["ray::Left", "-c", "print(flush=True); import time; time.sleep(600)"]
    with subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            assert _none_here().startswith("no raylet runs on this machine")
        finally:
            process.kill()


def overtaken(when: str) -> subprocess.CompletedProcess[str]:
    command = program("cluster.look_overtaken", when)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def test_what_native_code_does_after_the_answer_does_not_overtake_it() -> None:
    """A thread that hung called Ray when it had been left, and that ended the command with exit 1 and no word."""
    done = overtaken("after")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "JoinedCluster(address='a:1', logs=PosixPath('/logs'))\n",
        "",
    )


def test_a_process_that_native_code_ends_is_told_of() -> None:
    """Where Ray's GCS went meanwhile, Ray ended the command."""
    done = overtaken("before")
    assert done.returncode == 1
    assert "stopped answering: Ray ended the process that asked it" in done.stderr
    assert "native" not in done.stderr
