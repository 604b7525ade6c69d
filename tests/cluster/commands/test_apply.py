"""What `manta apply` refuses, its order, and what it leaves of the doors.

A server that it changes: end_to_end/deployment/test_tasks_page.
"""

import threading
from types import SimpleNamespace

import pytest

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.commands import apply
from cluster.commands.apply import check_same_deployments, check_same_server, kept_doors, new_doors
from cluster.config import ExpertsConfig, GatewayConfig, GatewayScalingConfig, ModelConfig
from cluster.demo_model import DIRECTORY
from cluster.deploy.app import Cluster, model_card, plan_model
from cluster.errors import ConfigError, SetupError
from cluster.planning.placement import Node

GROUPS = ((0, 1, 2, 3), (4, 5, 6, 7))


def plan(version="v1", groups=GROUPS):
    config = ModelConfig(name="small", path="demo", version=version, experts=ExpertsConfig(groups=groups))
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
        monkeypatch.setattr(apply, "_delete", lambda names: self.done.append(("delete", *names)))

        def deploy(targets, _stop):
            self.done.append(targets)
            if set(fails) & set(targets):
                raise SetupError("no such file")

        monkeypatch.setattr(apply, "_deploy", deploy)

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


def test_doors_stay_as_they_were_started_but_for_their_number():
    """The file may lack what `manta serve` was told by options, keys among it: it must not open a door."""
    running = GatewayConfig(host="0.0.0.0", http_port=8001, api_keys_file="/keys.yaml")
    scaling = GatewayScalingConfig(min_replicas=1, max_replicas=3)
    wanted = GatewayConfig(http_port=8001, max_choices=7, scaling=scaling)
    assert new_doors(running, wanted) == running.model_copy(update={"scaling": scaling})
    assert kept_doors(running, wanted) == ["max_choices"]
