"""`manta apply`: changes what a running server serves to what a configuration says, without a lost request.

A model version that is new starts beside those that are there, and requests go to it once it is up. Those that the
configuration lacks end their streams and go then. Of one that stays, Serve changes the numbers of replicas; where its
settings are others, it replaces the processes, each new one before its old one ends. The doors stay as they were
started.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import typer
from rich.console import Console

from cluster.commands import changes
from cluster.commands.cluster_connection import DEADLINE_S, JoinedCluster, look_at_cluster
from cluster.commands.one_at_a_time import one_at_a_time
from cluster.commands.serve.command import checked_checkpoints, deploy
from cluster.commands.serve_controller import statuses
from cluster.commands.served import made_of
from cluster.commands.signal_flag import SignalFlag
from cluster.config import GatewayConfig, ModelConfig, load_config
from cluster.deploy.app import (
    ModelPlan,
    describe_cluster,
    gateway_target,
    model_card,
    model_targets,
    plan_models,
)
from cluster.errors import ConfigError, SetupError
from cluster.messages import ModelCard

ASK_TIMEOUT_S = 20.0
NUMBERS = {"num_replicas", "scaling"}  # of gateways, which may change

console = Console()


def run(config_file: Path, address: str, timeout_s: float) -> None:
    """Until all of it runs. Ctrl-C and `timeout_s` end the waiting, not the change; then the exit code is 1.

    Raises MantaError for what a user can mend.
    """
    config = load_config(config_file)
    checkpoints = checked_checkpoints(config)

    @one_at_a_time("manta apply")
    def change(_cluster: JoinedCluster) -> bool:
        import ray

        gateway, cards = made_of(ASK_TIMEOUT_S)
        if address == "auto" and "RAY_ADDRESS" not in os.environ:
            check_same_server(config.models, cards)
        plans = plan_models(config.models, checkpoints, describe_cluster(ray.nodes()))
        check_same_deployments(plans, cards)
        doors = new_doors(gateway, config.gateway)
        for key in kept_doors(gateway, config.gateway):
            console.print(f"gateway.{key} stays as the server was started; restart it to change that.")
        return _change(doors, plans, cards, stop)

    with _interrupts(timeout_s) as stop:
        if not look_at_cluster(address, change, look_s=timeout_s + DEADLINE_S):
            raise typer.Exit(1)


def check_same_server(models: Sequence[ModelConfig], cards: Sequence[ModelCard]) -> None:
    """Raises ConfigError where all models would go: the server that Ray found is another than the file's."""
    running = sorted({card.name for card in cards})
    if running and not {one.name for one in models} & set(running):
        raise ConfigError(
            f"the server that was found here serves {', '.join(running)}, and the file has none of these; if it is the "
            "one that you mean, say --address, with what `manta serve` printed after Ray"
        )


def check_same_deployments(plans: Sequence[ModelPlan], cards: Sequence[ModelCard]) -> None:
    """Raises ConfigError where a version that runs would get other groups: its steps would miss those that went."""
    running = {card.application: card.deployments for card in cards}
    for plan in plans:
        deployments = running.get(plan.application)
        if deployments is not None and set(deployments) != {"coordinator", *plan.expert_deployments}:
            raise ConfigError(
                f"models: {plan.config.name!r}: experts: other groups or tiers than {plan.application} runs with; "
                "give it another `version`, and it starts beside the old one"
            )


def new_doors(running: GatewayConfig, wanted: GatewayConfig) -> GatewayConfig:
    """As they run, but for how many gateways there are."""
    return running.model_copy(update={key: getattr(wanted, key) for key in NUMBERS})


def kept_doors(running: GatewayConfig, wanted: GatewayConfig) -> list[str]:
    """Keys that the configuration says and that do not change."""
    return sorted(key for key in wanted.model_fields_set - NUMBERS if getattr(wanted, key) != getattr(running, key))


def _change(
    gateway: GatewayConfig, plans: tuple[ModelPlan, ...], before: tuple[ModelCard, ...], stop: SignalFlag
) -> bool:
    """Returns whether it was waited for."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    wanted = tuple(model_card(plan) for plan in plans)
    names, known = {card.application for card in wanted}, {card.application for card in before}
    going = tuple(card for card in before if card.application not in names)
    failed = {name for name, one in statuses().items() if one.app_status.status == "DEPLOY_FAILED"}
    plans = tuple(replace(plan, attempt=uuid4().hex) if plan.application in failed else plan for plan in plans)
    models = model_targets(gateway, plans)
    for application, what in _changes(plans, wanted, models, before, failed).items():
        console.print(f"{application}: {what}", soft_wrap=True)
    for card in going:
        console.print(f"{card.application}: {changes.GOES}")
    # Requests for a name go to the first version that is up: until the new ones are, to those that go.
    targets = [gateway_target(gateway, (*wanted, *going)), *models]
    try:
        deploy(targets, stop, console)
    except SetupError:
        new = [card.application for card in wanted if card.application not in known]
        if not new:
            raise
        deploy([gateway_target(gateway, _without(new, (*wanted, *going)))], stop, console)
        _delete(new)
        raise
    if stop.is_set():
        console.print("It goes on, and is not waited for. What is to go stays until `manta apply` is run again.")
        return False
    if going:
        deploy([gateway_target(gateway, wanted)], stop, console)
        _delete([card.application for card in going])
    console.print("Done. `manta status` shows what runs.")
    return True


def _changes(
    plans: Sequence[ModelPlan],
    wanted: Sequence[ModelCard],
    targets: Sequence[Any],
    before: Sequence[ModelCard],
    failed: Set[str],
) -> dict[str, str]:
    """What becomes of each model of `plans`, by its application; `failed`: those that Serve has given up."""
    known = {card.application: card for card in before if card.application not in failed}
    deployed = changes.deployed(ASK_TIMEOUT_S) if known else {}
    found = {}
    for plan, card, target in zip(plans, wanted, targets, strict=True):
        found[card.application] = changes.STARTS
        if (old := known.get(card.application)) is not None:
            surges = plan.config.max_surge_percent > 0
            what = changes.change(deployed.get(card.application, {}), changes.wanted(target), surges=surges)
            if what == changes.STAYS and replace(card, created=0) != replace(old, created=0):
                what = changes.IN_PLACE  # in the gateways
            found[card.application] = what
    return found


def _without(applications: Sequence[str], cards: Sequence[ModelCard]) -> tuple[ModelCard, ...]:
    return tuple(card for card in cards if card.application not in applications)


def _delete(applications: Sequence[str]) -> None:
    from ray import serve

    for name in applications:
        serve.delete(name, _blocking=False)


@contextmanager
def _interrupts(timeout_s: float) -> Iterator[SignalFlag]:
    """Set by Ctrl-C, and after `timeout_s`, for the process that changes as well. A second Ctrl-C ends this one."""
    stop = SignalFlag()

    def on_signal(number: int, _frame: object) -> None:
        signal.signal(number, before)
        stop.set()

    before = signal.signal(signal.SIGINT, on_signal)
    timer = threading.Timer(timeout_s, stop.set)
    timer.daemon = True
    timer.start()
    try:
        yield stop
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
