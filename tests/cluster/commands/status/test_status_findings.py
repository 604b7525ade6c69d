"""What `manta status` says is wrong, and what to do first: one snapshot for each way in which things go wrong."""

import io
from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError
from rich.console import Console

from cluster.commands.status.cluster_inspection import _silent
from cluster.commands.status.cluster_snapshot import (
    ApplicationStatus,
    ClusterSnapshot,
    DeploymentStatus,
    NodeStatus,
    ProxyStatus,
)
from cluster.commands.status.findings import findings
from cluster.commands.status.tables import draw
from cluster.messages import EngineStats
from cluster.telemetry.metrics import ProcessFigures

STATS = EngineStats(3, 0, 100, 25, 1000, 200, 5, 0, 77, (1, 2))
NO_ROOM = (
    "Deployment 'expert-1' has 1 replicas that have taken more than 30s to be scheduled. This may be due to waiting "
    "for the cluster to auto-scale. Resources required for each replica: {'GPU': 1}"
)


def up(name: str, running: int = 1) -> DeploymentStatus:
    return DeploymentStatus(name, "HEALTHY", {"RUNNING": running})


def cluster(**changes) -> ClusterSnapshot:
    """A gateway and a model of two groups, all well but for what is changed of the model."""
    deployments = (up("coordinator"), up("expert-0"), up("expert-1"))
    model = ApplicationStatus("mixtral-0123abcd", "RUNNING", deployments, coordinators=(STATS,))
    gateway = ApplicationStatus("gateway", "RUNNING", (up("gateway"),))
    return ClusterSnapshot("a:1", (NodeStatus("n1", True, 8, 1),), (gateway, replace(model, **changes)))


def with_group(deployment: DeploymentStatus, *more: DeploymentStatus) -> ClusterSnapshot:
    return cluster(status="DEPLOYING", deployments=(up("coordinator"), up("expert-0"), deployment, *more))


def only(snapshot: ClusterSnapshot) -> tuple[str, str]:
    [finding] = findings(snapshot)
    return finding.wrong, finding.first


def test_where_all_is_well_that_is_said() -> None:
    assert findings(cluster()) == ()
    file = io.StringIO()
    draw(cluster(), Console(file=file, width=80))
    assert "All is well." in file.getvalue()


@pytest.mark.parametrize(
    ("deployment", "first"),
    [
        (DeploymentStatus("expert-1", "UPDATING", {"STARTING": 1}, NO_ROOM), "No node has room for it: add one"),
        (DeploymentStatus("expert-1", "UPDATING", {"STARTING": 1}), "It starts, or stops: wait"),
        (DeploymentStatus("expert-1", "UNHEALTHY", {"STARTING": 1}), "One that ran is gone, and Serve starts another"),
        (DeploymentStatus("expert-1", "UNHEALTHY", {}), "Look in the log of Serve's controller"),
    ],
)
def test_a_group_without_a_replica(deployment: DeploymentStatus, first: str) -> None:
    wrong, do = only(with_group(deployment))
    assert wrong == "mixtral has no replica of expert-1: its streams wait, new requests get 503."
    assert do.startswith(first)


def test_of_two_versions_only_one_has_to_answer() -> None:
    """While a model was rolled, its new version and then its old one were told to be down, and requests to get 503."""
    running = cluster()
    new = ApplicationStatus("mixtral-v2", "DEPLOYING", (DeploymentStatus("coordinator", "UPDATING", {"STARTING": 1}),))
    both = replace(running, applications=(*running.applications, new))
    assert findings(both) == ()
    assert findings(replace(running, applications=(running.applications[0], new))), "alone it is missed"
    failed = replace(new, status="DEPLOY_FAILED", message="no such file")
    assert "could not be deployed: no such file" in only(replace(both, applications=(*running.applications, failed)))[0]
    old = replace(running.applications[1], name="mixtral-v0", status="DELETING", deployments=new.deployments)
    assert findings(replace(running, applications=(*running.applications, old))) == ()


def test_a_roll_without_room_for_the_new_version_is_no_good_end() -> None:
    """All was well for as long as the new version waited for GPUs that were not there."""
    running = cluster()
    waits = DeploymentStatus("coordinator", "UPDATING", {"STARTING": 1}, NO_ROOM)
    new = ApplicationStatus("mixtral-v2", "DEPLOYING", (waits,))
    wrong, do = only(replace(running, applications=(*running.applications, new)))
    assert wrong == "A version of mixtral finds no room to start; another one answers meanwhile."
    assert do.startswith("No node has room for it: add one")


def test_what_is_wrong_with_a_model_that_answers_is_told_also_while_it_is_deployed() -> None:
    """Its own replicas were the version that answers beside it, so it was not looked at while it was scaled."""
    cut_off = replace(STATS, missing_experts=("expert-1",))
    assert only(cluster(status="DEPLOYING", coordinators=(cut_off,)))[0].startswith("expert-1 of mixtral runs")
    waits = replace(STATS, num_requests_waiting=4)
    assert only(cluster(status="DEPLOYING", coordinators=(waits,)))[0].startswith("4 requests for mixtral wait")


def test_a_group_that_runs_on_its_other_tier_is_not_missing() -> None:
    assert findings(with_group(DeploymentStatus("expert-1", "HEALTHY", {}), up("expert-1-tier1"))) == ()


def test_a_node_that_is_gone_is_named_where_something_is_missing() -> None:
    lost = NodeStatus("n2", False, 8, 1)
    assert findings(replace(cluster(), nodes=(lost,))) == (), "it may have been given back"
    snapshot = with_group(DeploymentStatus("expert-1", "UPDATING", {"STARTING": 1}))
    assert only(replace(snapshot, nodes=(lost,)))[1].endswith("Nodes that are gone: n2.")


def test_no_coordinator_and_no_gateway() -> None:
    wrong, _ = only(cluster(deployments=(DeploymentStatus("coordinator", "UPDATING", {}), up("expert-0"))))
    assert wrong == "mixtral has no coordinator: requests get 503."
    snapshot = cluster()
    assert only(replace(snapshot, applications=snapshot.applications[1:]))[0].startswith("No gateway runs")
    foreign = ApplicationStatus("somebody-elses", "RUNNING", (up("web"),))
    assert findings(replace(snapshot, applications=(foreign,))) == (), "a cluster that serves something else"


def test_a_group_that_runs_and_does_not_answer() -> None:
    """Serve sees it well; only who needs it can tell."""
    wrong, do = only(cluster(coordinators=(STATS, replace(STATS, missing_experts=("expert-1",)))))
    assert wrong == "expert-1 of mixtral runs, and a coordinator gets no answer from it: its streams wait."
    assert "MantaExpertDown" in do


def test_a_deployment_that_failed_says_the_last_line_of_why() -> None:
    wrong, _ = only(cluster(status="DEPLOY_FAILED", message="Traceback\n  …\nCheckpointError: it is truncated\n"))
    assert wrong == "mixtral could not be deployed: CheckpointError: it is truncated"


def test_what_is_only_slow_comes_after_what_is_down() -> None:
    full = replace(STATS, num_requests_waiting=4, num_kv_blocks_used=99, failed_steps_total=2)
    found = findings(
        cluster(deployments=(up("coordinator"), DeploymentStatus("expert-0", "UPDATING", {})), coordinators=(full,))
    )
    assert [finding.wrong for finding in found] == [
        "mixtral has no replica of expert-0: its streams wait, new requests get 503.",
        "4 requests for mixtral wait: the cache of 1 of 1 coordinators is full.",
        "2 steps of mixtral have ended sequences with an error since its coordinators started.",
    ]


def test_the_only_coordinator_that_stands_still_is_told():
    """After a SIGSTOP clients waited half a minute, and all was well."""
    silent = cluster(coordinators=(), stats_error="no coordinator answered within 5 s")
    [finding] = findings(silent)
    assert finding.wrong == (
        "A coordinator of mixtral does not say how it is: no coordinator answered within 5 s. "
        "Its streams stand still, and new requests wait."
    )


@pytest.mark.parametrize(
    ("running", "wrong"),
    [
        (1, "1 of 1 gateways stand still: the requests that they have wait, and so do all new ones."),
        (2, "1 of 2 gateways stand still: the requests that they have wait, and some of the new ones."),
    ],
)
def test_a_gateway_that_stands_still_is_told(running: int, wrong: str) -> None:
    """After a SIGSTOP of the only gateway no client was answered, and all was well."""
    gateway, model = cluster().applications
    silent = replace(gateway, deployments=(up("gateway", running),), silent=1)
    assert only(replace(cluster(), applications=(silent, model)))[0] == wrong


def test_a_full_disk_is_told_and_one_that_is_not_known_is_not() -> None:
    """Ray spills nothing from 95 % on, and all was well."""
    nodes = [NodeStatus(f"n{number}", True, 8, 1, disk) for number, disk in enumerate((None, 0.949, 0.951))]
    dead = NodeStatus("n3", False, 8, 1, 1.0)
    wrong, do = only(replace(cluster(), nodes=(*nodes, dead)))
    assert wrong.startswith("Node n2: 95% of the disk with Ray's session is used.")
    assert do.startswith("Make room there")


class Answers:
    """Serve's handle, before replicas of which one has been stopped and one has died."""

    def __init__(self, *answers: object) -> None:
        self.answers = answers

    def broadcast(self, method: str) -> "Answers":
        assert method == "metrics"
        return self

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[object]:
        assert timeout_s <= 5.0
        assert return_exceptions
        if not self.answers:
            raise TimeoutError
        return list(self.answers)


@pytest.mark.parametrize(
    ("answers", "silent"),
    [
        ((ProcessFigures("a", ()), ProcessFigures("b", ())), 0),
        ((ProcessFigures("a", ()), GetTimeoutError("late")), 1),
        ((ProcessFigures("a", ()), ActorDiedError()), 0),
        ((), 2),
    ],
)
def test_gateways_that_do_not_answer_are_counted(answers, silent, monkeypatch) -> None:
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *_, **__: Answers(*answers))
    assert _silent(ApplicationStatus("gateway", "RUNNING", (up("gateway", 2),))) == silent
    assert _silent(ApplicationStatus("gateway", "DEPLOYING", (DeploymentStatus("gateway", "UPDATING", {}),))) == 0


def test_shards_that_stand_still_and_shards_that_are_restarted() -> None:
    """All was well while one stood still, until somebody's rows had waited for it."""
    cut_off = (replace(STATS, missing_experts=("expert-1",)),)

    def shards(running: int, **changes: int) -> ClusterSnapshot:
        changed = replace(up("expert-1", running), **changes)
        return cluster(deployments=(up("coordinator"), up("expert-0"), changed), coordinators=cut_off)

    wrong, do = only(shards(1, silent=1))
    assert wrong == (
        "1 of 1 replicas of expert-1 of mixtral do not answer. If it is the shard, what has rows there ends in 503 "
        "after experts.expert_timeout_s, and new requests get 503 from then."
    )
    assert "ExpertShard" in do
    assert only(shards(2, silent=1))[0].endswith("others of the group answer.")
    assert "1 of 2 shards of expert-1 of mixtral are being restarted" in only(shards(2, restarting=1))[0]


def test_without_serves_controller_nothing_else_is_guessed() -> None:
    """It was waited for in silence; there seemed to be no gateway, and nothing served."""
    snapshot = ClusterSnapshot("a:1", (NodeStatus("n1", True, 8, 1),), (), controller_answers=False)
    wrong, do = only(snapshot)
    assert wrong.startswith("Serve's controller does not answer")
    assert "ServeController" in do
    file = io.StringIO()
    draw(snapshot, Console(file=file, width=80))
    assert "Nothing is served" not in file.getvalue()
    nodes = (NodeStatus("n1", True, 8, 1, disk=1.0), NodeStatus("n2", False, 8, 1))
    _, full = findings(ClusterSnapshot("a:1", nodes, (), controller_answers=False))
    assert "n1" in full.wrong, "what others say is told all the same"


def test_a_proxy_that_stands_still() -> None:
    """No client was heard, and all was well: it was not asked."""

    def proxy(status: str, answers: bool | None) -> ClusterSnapshot:
        return replace(cluster(), proxies=(ProxyStatus("n1", status, answers),))

    assert findings(proxy("HEALTHY", True)) == findings(proxy("HEALTHY", None)) == ()
    assert only(proxy("HEALTHY", False))[0].startswith("The proxy of node n1 does not answer")
    assert only(proxy("UNHEALTHY", None))[0].startswith("Serve's controller gets no answer from the proxy of node n1")


def test_a_command_is_not_cut_by_the_end_of_a_line() -> None:
    """It was broken in two at 80 columns, and could not be copied."""
    changed = replace(up("expert-1"), silent=1)
    console = Console(record=True, width=80)
    draw(cluster(deployments=(up("coordinator"), up("expert-0"), changed)), console)
    assert "`ps -eo pid,stat,args | grep -E 'ExpertShard|:expert-'`" in console.export_text()


def test_a_dense_model_has_no_table_of_experts() -> None:
    """It had the table's head alone."""
    console = Console(record=True, width=80)
    draw(cluster(coordinators=(replace(STATS, rows_per_expert=()),)), console)
    assert "share" not in console.export_text()


def test_a_lost_replica_is_told_where_others_answer() -> None:
    """A machine had died, its replicas were started elsewhere, and above both it said that all was well."""
    lost = DeploymentStatus("expert-1", "UNHEALTHY", {"RUNNING": 1, "STARTING": 1})
    snapshot = with_group(lost)
    nodes = (*snapshot.nodes, NodeStatus("n2", False, 0, 0))
    wrong, do = only(replace(snapshot, nodes=nodes))
    assert wrong == "mixtral has lost replicas of expert-1; those that are left answer."
    assert do.startswith("One that ran is gone, and Serve starts another: wait")
    assert do.endswith("Nodes that are gone: n2.")
    on_a_tier = with_group(replace(lost, replicas={"STARTING": 1}), up("expert-1-tier1"))
    assert only(on_a_tier)[0] == wrong
    more = DeploymentStatus("expert-1", "UPSCALING", {"RUNNING": 1, "STARTING": 1})
    assert findings(with_group(more)) == (), "it grows"


def test_a_node_that_came_back_is_not_told_to_be_gone() -> None:
    """Ray lists the dead one beside the new one, and `manta status` did for ever."""
    dead, back = (NodeStatus("n2", alive, 8, 1) for alive in (False, True))
    snapshot = replace(with_group(DeploymentStatus("expert-1", "UPDATING", {"STARTING": 1})), nodes=(dead, back, dead))
    assert "gone" not in only(snapshot)[1]
    for nodes, rows in (((dead, back, dead), ["alive"]), ((dead, dead), ["dead"])):
        console = Console(record=True, width=80)
        draw(replace(snapshot, nodes=nodes), console)
        assert [line.split()[1] for line in console.export_text().splitlines() if line.startswith("n2")] == rows
