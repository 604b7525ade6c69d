"""What `manta apply` refuses, its order, what it says of each model, and what it leaves of the doors.

A server that it changes: end_to_end/deployment/test_tasks_page.
"""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.cli import app
from cluster.commands import apply, changes
from cluster.commands.apply import check_same_deployments, check_same_server, kept_doors, new_doors
from cluster.config import (
    EngineConfig,
    ExpertsConfig,
    GatewayConfig,
    GatewayScalingConfig,
    ModelConfig,
    ScalingConfig,
)
from cluster.demo_model import DIRECTORY
from cluster.deploy.app import Cluster, model_card, model_targets, plan_model
from cluster.errors import ConfigError, SetupError
from cluster.planning.placement import Node

GROUPS = ((0, 1, 2, 3), (4, 5, 6, 7))


def plan(version="v1", groups=GROUPS, experts=None, **settings):
    layout = ExpertsConfig(groups=groups, **(experts or {}))
    config = ModelConfig(name="small", path="demo", version=version, experts=layout, **settings)
    return plan_model(config, open_checkpoint(DIRECTORY), Cluster(2, (Node("n", 2**35, ()),)))


def test_a_version_that_runs_keeps_its_groups():
    """Coordinators of the old layout would ask for groups that Serve takes away."""
    cards = [model_card(plan())]
    check_same_deployments([plan()], cards)
    check_same_deployments([plan("v2", ((0, 1, 2, 3, 4, 5, 6, 7),))], cards)
    with pytest.raises(ConfigError, match="another `version`"):
        check_same_deployments([plan(groups=((0, 1, 2, 3, 4, 5, 6, 7),))], cards)


def test_a_server_that_has_nothing_of_the_file_is_not_emptied_unless_it_is_named():
    """With two servers on a machine Ray finds the newest, whoever's it is."""
    cards = [model_card(plan())]
    check_same_server([ModelConfig(name="other", path="demo"), ModelConfig(name="small", path="demo")], cards)
    check_same_server([ModelConfig(name="other", path="demo")], [])
    with pytest.raises(ConfigError, match="serves small, and the file has none of these"):
        check_same_server([ModelConfig(name="other", path="demo")], cards)


class Serve:
    """What is deployed and deleted, in order: a gateway by the applications that it knows."""

    def __init__(self, monkeypatch, fails=(), failed=()):
        self.done = []
        self.attempts = []
        gave_up = SimpleNamespace(app_status=SimpleNamespace(status="DEPLOY_FAILED"))
        monkeypatch.setattr(apply, "statuses", lambda: dict.fromkeys(failed, gave_up))
        monkeypatch.setattr(apply, "gateway_target", lambda _, cards: ("gateway", *(one.application for one in cards)))
        monkeypatch.setattr(apply, "model_targets", self.targets)
        monkeypatch.setattr(changes, "deployed", lambda _: {})
        monkeypatch.setattr(changes, "wanted", lambda _: {})
        monkeypatch.setattr(apply, "_delete", lambda names: self.done.append(("delete", *names)))

        def deploy(targets, _stop, _console):
            self.done.append(targets)
            if set(fails) & set(targets):
                raise SetupError("no such file")

        monkeypatch.setattr(apply, "deploy", deploy)

    def targets(self, _, plans):
        self.attempts += [one.attempt for one in plans]
        return [one.application for one in plans]

    def change(self, plans, before, stop=None):
        return apply._change(GatewayConfig(), tuple(plans), tuple(map(model_card, before)), stop or threading.Event())


def test_a_new_version_is_up_before_the_old_one_goes(monkeypatch):
    serve = Serve(monkeypatch)
    assert serve.change([plan("v2")], [plan("v1")])
    assert serve.done == [
        [("gateway", "small-v2", "small-v1"), "small-v2"],
        [("gateway", "small-v2")],
        ("delete", "small-v1"),
    ]


def test_a_new_version_that_fails_goes_and_the_old_one_stays(monkeypatch):
    serve = Serve(monkeypatch, fails=["small-v2"])
    with pytest.raises(SetupError, match="no such file"):
        serve.change([plan("v2")], [plan("v1")])
    assert serve.done[1:] == [[("gateway", "small-v1")], ("delete", "small-v2")]


def test_what_serve_has_given_up_is_tried_again(monkeypatch):
    """To Serve the same version is no change: what a user had mended meanwhile was never looked at."""
    serve = Serve(monkeypatch, failed=["small-v1"])
    assert serve.change([plan("v1"), plan("v2")], [plan("v1"), plan("v2")])
    assert serve.attempts[0]
    assert not serve.attempts[1]


def test_who_does_not_wait_leaves_both(monkeypatch):
    stop = threading.Event()
    stop.set()
    serve = Serve(monkeypatch)
    assert not serve.change([plan("v2")], [plan("v1")], stop)
    assert serve.done == [[("gateway", "small-v2", "small-v1"), "small-v2"]]


SETTINGS = {"engine": EngineConfig(max_num_seqs=7)}
TWO = {"group_scaling": {1: ScalingConfig(min_replicas=2, max_replicas=2)}}
BY_LOAD, BY_MORE_LOAD = ({"group_scaling": {1: ScalingConfig(max_replicas=number)}} for number in (3, 4))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {}, "stays as it is"),
        ({"experts": BY_LOAD}, {"experts": BY_LOAD}, "stays as it is"),
        ({}, {"experts": TWO}, "numbers of replicas change"),
        ({"experts": TWO}, {"experts": BY_LOAD}, "numbers of replicas change"),
        ({"experts": BY_LOAD}, {"experts": BY_MORE_LOAD}, "numbers of replicas change"),
        ({}, {"num_coordinators": 2}, "numbers of replicas change"),
        ({}, SETTINGS, "settings change: its processes are replaced, each new one first"),
        (
            {},
            {**SETTINGS, "experts": TWO},
            "settings change: its processes are replaced, each new one first; numbers of replicas change",
        ),
        (
            {"max_surge_percent": 0},
            {"max_surge_percent": 0, **SETTINGS},
            "settings change: its processes are replaced, each old one ends first",
        ),
        ({"max_surge_percent": 0}, {}, "settings change, its processes stay"),
        ({}, {"aliases": ("little",)}, "settings change, its processes stay"),
    ],
)
def test_it_says_what_becomes_of_a_model_that_stays(before, after, expected, monkeypatch):
    """It said of each that it is changed where it differs."""
    assert said(plan(**before), plan(**after), monkeypatch) == {"small-v1": expected}


def test_it_says_what_starts_and_what_serve_had_given_up_starts_as_well(monkeypatch):
    assert said(plan("v1"), plan("v2"), monkeypatch) == {"small-v2": "starts"}
    assert said(plan("v1"), plan("v1"), monkeypatch, failed={"small-v1"}) == {"small-v1": "starts"}


def said(before, after, monkeypatch, failed=frozenset()):
    """Of the one model `after`, where `before` is what Serve has, some seconds old."""
    [there], [target] = (model_targets(GatewayConfig(), [one]) for one in (before, after))
    monkeypatch.setattr(changes, "deployed", lambda _: {before.application: changes.wanted(there)})
    return apply._changes([after], [model_card(after)], [target], [replace(model_card(before), created=7)], failed)


def test_all_of_it_is_said_before_anything_is_done(monkeypatch):
    console = Console(record=True, width=200)
    monkeypatch.setattr(apply, "console", console)
    Serve(monkeypatch).change([plan("v2"), plan("v3")], [plan("v1"), plan("v2")])
    assert console.export_text().splitlines() == [
        "small-v2: stays as it is",
        "small-v3: starts",
        "small-v1: ends its streams and goes, once all else runs",
        "Done. `manta status` shows what runs.",
    ]


def test_doors_stay_as_they_were_started_but_for_their_number():
    """The file may lack what `manta serve` was told by options, keys among it: it must not open a door."""
    running = GatewayConfig(host="0.0.0.0", http_port=8001, api_keys_file="/keys.yaml")
    scaling = GatewayScalingConfig(min_replicas=1, max_replicas=3)
    wanted = GatewayConfig(http_port=8001, max_choices=7, scaling=scaling)
    assert new_doors(running, wanted) == running.model_copy(update={"scaling": scaling})
    assert kept_doors(running, wanted) == ["max_choices"]


def test_a_time_that_is_waited_for_has_a_most():
    """The system waits for 24 days at most: one of 30 ended in a stack, when the cluster had been joined."""
    result = CliRunner().invoke(app, ["apply", "--config", "manta.yaml", "--timeout", str(30 * 86400)])
    assert result.exit_code == 2, result.output  # as of wrong usage: the file is not looked for
