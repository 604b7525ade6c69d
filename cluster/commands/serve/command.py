"""`manta serve`: checks, starts Ray and Serve, shows progress, says how to talk to it, and stops what it started."""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.checkpoint.architecture import compute_dtype
from cluster.checkpoint.checkpoint import Checkpoint, open_checkpoint
from cluster.checkpoint.hub import resolve_model
from cluster.commands.doctor.at_start import look_at_gpus
from cluster.commands.haproxy import require_open_files
from cluster.commands.local_ray.private_files import UMASK, session_logs
from cluster.commands.local_ray.start import SERVER_OBJECT_STORE_BYTES, start_local_ray, what_died
from cluster.commands.one_at_a_time import one_at_a_time
from cluster.commands.serve.door_keys import check_nodes, with_key
from cluster.commands.serve.supervised import INTERRUPTED_S, TERMINATED_S, give_up
from cluster.commands.serve_controller import details, listens, statuses
from cluster.commands.served import made_of
from cluster.commands.signal_flag import SignalFlag
from cluster.config import GatewayConfig, MantaConfig, load_config
from cluster.deploy.app import (
    Cluster,
    ModelPlan,
    check_doors,
    check_layout,
    check_tokenizer,
    demo_config,
    describe_cluster,
    directory_config,
    plan_models,
    run_targets,
)
from cluster.errors import ConfigError, MantaError, SetupError, Unavailable
from cluster.ray_variables import doors
from gateway.admission.access import AccessPolicy, is_loopback

ASK_TIMEOUT_S = 5.0  # for Serve's controller and for the gateway, when all ends
SAME_S = 1.0  # who tells all processes tells us twice: the supervisor passes it on
LOOK_S = 1.0  # between two looks whether Ray lives

console = Console()


def run(
    model: str | None,
    revision: str | None,
    config_file: Path | None,
    address: str | None,
    gateway: Mapping[str, Any],
) -> None:
    """Serve until SIGINT or SIGTERM; `gateway` goes before the file's. Raises MantaError for what a user can mend."""
    config = _read_config(model, revision, config_file)
    with with_key(config.gateway.model_copy(update=dict(gateway))) as (doors_with_key, key):
        _serve(config.model_copy(update={"gateway": doors_with_key}), address, key)


def _serve(config: MantaConfig, address: str | None, key: str | None) -> None:
    """Until a signal; `key` is what was made for this server, to be shown."""
    check_doors(config.gateway)
    AccessPolicy(config.gateway)  # which reads the key files
    checkpoints = checked_checkpoints(config)
    if address is None and any(one.engine.device != "cpu" for one in config.models):
        look_at_gpus(console)
    stop = _Stop()
    # The deployments are made of classes that need torch, which takes seconds to import; those of Ray mostly wait.
    threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()
    with _compiling(config, checkpoints, here=address is None), _ray(config.gateway, address) as cluster:
        import ray

        stop.listen()  # again: Ray has put its own handlers there
        plans = plan_models(config.models, checkpoints, cluster)
        if address is not None:
            check_nodes(config.gateway)
        alone = one_at_a_time("manta serve", on_own_cluster=address is None)
        with alone, _serving(config, plans, stop, joined=address is not None) as serves_grpc:
            if not stop.requested.is_set():
                _announce(config, plans, ray.get_runtime_context().gcs_address, key, serves_grpc=serves_grpc)
            while not stop.requested.wait(LOOK_S):
                _require_ray()
            console.print("Stopping … (Ctrl-C again: at once)")


def checked_checkpoints(config: MantaConfig) -> list[Checkpoint]:
    """Of all models. Raises MantaError for what could not be served, before anything is started."""
    checkpoints = [
        open_checkpoint(resolve_model(one.path, one.revision), one.model_impl).rounded(one.engine.rounding)
        for one in config.models
    ]
    for checkpoint in {checkpoint.directory: checkpoint for checkpoint in checkpoints}.values():
        check_tokenizer(checkpoint)
    for one, checkpoint in zip(config.models, checkpoints, strict=True):
        check_layout(one, checkpoint)
    for index, one in enumerate(config.models):
        if checkpoints[index].model_impl == "transformers":
            from experts_service.transformers_backend.meta_model import checked  # takes seconds to import

            checkpoints[index] = checked(checkpoints[index], one.engine.max_model_len)
    return checkpoints


def _require_ray() -> None:
    """Ends the process where Ray died: nothing that dies is replaced, and soon nothing is left of it."""
    if died := what_died():
        give_up(
            Unavailable(f"Ray has died ({died}), and the server with it; start it again. Its logs: {session_logs()}")
        )


class _Stop:
    """What the user's signals ask for."""

    def __init__(self) -> None:
        self.requested = SignalFlag()
        self.at_once = SignalFlag()  # a second signal
        self.drain_s = INTERRUPTED_S
        self._requested_at = 0.0
        self.listen()

    def listen(self) -> None:
        """Take SIGINT and SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.requested.is_set():
            if time.monotonic() - self._requested_at > SAME_S:
                self.at_once.set()
            return
        self._requested_at = time.monotonic()
        if number == signal.SIGTERM:
            self.drain_s = TERMINATED_S
        self.requested.set()


def _read_config(model: str | None, revision: str | None, config_file: Path | None) -> MantaConfig:
    if revision is not None and model is None:
        raise ConfigError("--revision is of a MODEL; in a configuration say models[].revision")
    if config_file is not None:
        if model is not None:
            raise ConfigError("give either MODEL or --config, not both")
        return load_config(config_file)
    if model is None:
        return demo_config()
    return directory_config(model, resolve_model(model, revision))


def _check_doors_of_serve(gateway: GatewayConfig) -> bool:
    """Whether it has our gRPC door. Raises ConfigError where Serve ran already and listens elsewhere than we asked."""
    from gateway.service import SERVICER_FUNCTIONS

    http, grpc = listens()
    if gateway.api_keys_file is None and not is_loopback(str(http.host)):
        raise ConfigError(
            f"Serve runs on this cluster already and listens on {http.host}, where other machines reach it: "
            "give --api-keys-file"
        )
    serves_grpc = set(SERVICER_FUNCTIONS) <= set(grpc.grpc_servicer_functions)
    if http.port != gateway.http_port or (serves_grpc and grpc.port != gateway.grpc_port):
        asked = f"--port {http.port}" + (f" --grpc-port {grpc.port}" if serves_grpc else "")
        raise ConfigError(f"Serve runs on this cluster already, and its ports cannot be changed: give {asked}")
    return serves_grpc


@contextmanager
def _compiling(config: MantaConfig, checkpoints: Sequence[Checkpoint], *, here: bool) -> Iterator[None]:
    """Meanwhile a process compiles what the models will run on a CPU of this machine, if they may run `here`."""
    dtypes = {
        compute_dtype(model.engine.dtype, checkpoint.architecture)
        + ("" if model.engine.kv_cache_dtype == "auto" else f":{model.engine.kv_cache_dtype}")
        for model, checkpoint in zip(config.models, checkpoints, strict=True)
        if model.engine.device != "cuda"
    }
    if not (here and dtypes):
        yield
        return
    command = [sys.executable, "-P", "-m", "router_service.compile_kernels", *sorted(dtypes)]
    compiler = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        umask=UMASK,  # ours is set when Ray starts
    )
    threading.Thread(target=compiler.wait, daemon=True).start()  # else it is a zombie for as long as we run
    try:
        yield
    finally:
        compiler.kill()  # what it was writing is compiled again
        compiler.wait()


@contextmanager
def _ray(gateway: GatewayConfig, address: str | None) -> Iterator[Cluster]:
    """A Ray cluster: the one at `address`, or one of our own that ends with us."""
    import ray

    if address is None:
        for name, port in (("http_port", gateway.http_port), ("grpc_port", gateway.grpc_port)):
            _check_free(gateway.host, name, port)
        require_open_files()
        os.environ.update(doors(gateway))
        console.print("Starting Ray …")
        start_local_ray(SERVER_OBJECT_STORE_BYTES)
    else:
        console.print(f"Joining Ray at {address} …")
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise SetupError(f"Ray cannot be joined: {error}") from error
    try:
        yield describe_cluster(ray.nodes())
    finally:
        ray.shutdown()


def _check_free(host: str, name: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"gateway.{name}: cannot listen on {host}:{port}: {error.strerror}") from error


@contextmanager
def _serving(config: MantaConfig, plans: tuple[ModelPlan, ...], stop: _Stop, *, joined: bool) -> Iterator[bool]:
    """All applications, running, and whether there is a gRPC door; on leaving, those that we started are gone."""
    from ray import serve
    from ray.exceptions import RayError

    from gateway.service import grpc_options, http_options

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    targets = run_targets(config, plans)
    was_running = joined and bool(details()["proxies"])
    try:
        serve.start(http_options=http_options(config.gateway), grpc_options=grpc_options(config.gateway))
    except (RayError, TimeoutError) as error:
        raise did_not_start(error) from error
    serves_grpc = _check_doors_of_serve(config.gateway)
    try:
        deploy(targets, stop.requested, console)
        yield serves_grpc
    finally:
        _require_ray()
        # Serve waits for open streams. On a cluster of our own, Ray ends what is left when their time is over.
        deadline = time.monotonic() + (float("inf") if joined else stop.drain_s)
        try:
            names = {target.name for target in targets} | _applied_since() if joined else set(statuses(stop.drain_s))
            for name in names:
                serve.delete(name, _blocking=False)
            while time.monotonic() < deadline and names & set(statuses(stop.drain_s)):
                if stop.at_once.wait(0.1):
                    break
                _require_ray()
        except Unavailable as error:
            if joined:
                raise
            console.print(f"{error}. Open streams are cut.", **_PLAIN)
        if joined and not was_running:
            serve.shutdown()


def did_not_start(error: Exception) -> SetupError:
    """What is told of Serve's error. On a cluster that is joined its proxies say whether a port is taken."""
    why = str(error).strip().splitlines()[-1]
    if taken := re.search(r"Failed to bind to address '?([^' ]+)", why):
        return SetupError(
            f"cannot listen on {taken[1].rstrip('.')}: another process of a machine of this cluster does (`ss -ltnp` "
            "there), perhaps the HAProxy of a server that was killed"
        )
    return SetupError(
        f"Serve did not start: {why} Mostly the machine does too much else: look at its load, and try again"
    )


def _applied_since() -> set[str]:
    """Of the models that the gateway has by now, as `manta apply` may have started some."""
    with suppress(MantaError):
        return {card.application for card in made_of(ASK_TIMEOUT_S)[1]}
    return set()


def deploy(targets: list[Any], stop: SignalFlag, console: Console) -> None:
    """And wait until all of it runs, or for `stop`. Raises SetupError with Serve's message when it cannot."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except RayServeException as error:
        why = " ".join(str(getattr(error, "cause", error)).split())  # without the controller's stack
        raise SetupError(f"Serve takes no gateway, whose routes begin at /, beside what it runs: {why}") from error
    _wait_until_running([target.name for target in targets], stop, console)


def _wait_until_running(applications: list[str], stop: SignalFlag, console: Console) -> None:
    """Show what is being loaded until everything runs. Raises SetupError with Serve's message when it cannot."""
    from cluster.telemetry.progress import clear_progress, read_progress

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("starting processes", total=None)
        while not stop.wait(0.2):
            _require_ray()
            status = statuses()
            progress = [one for name in applications for one in read_progress(name)]
            loaded, total = sum(p.loaded_bytes for p in progress), sum(p.total_bytes for p in progress)
            waiting = [
                deployment.name
                for application in applications
                if application in status
                for deployment in status[application].deployment_statuses
                if deployment.status != "HEALTHY"
            ]
            text = "loading weights" if loaded < total else "starting " + ", ".join(waiting)
            bars.update(bar, completed=loaded, total=total or None, description=text)
            for name in applications:
                if name in status and status[name].app_status.status == "DEPLOY_FAILED":
                    raise SetupError(f"{name} cannot be started: {_failure(status[name])}")
            if all(name in status and status[name].app_status.status == "RUNNING" for name in applications):
                break
    for name in applications:
        clear_progress(name)


def _failure(application: Any) -> str:
    """The last line of what each failed deployment says: the error, without the stack above it."""
    deployments = application.deployment_statuses
    messages = [d.message.strip() for d in deployments if d.message and "FAILED" in d.status.value]
    lines = dict.fromkeys(message.splitlines()[-1] for message in messages if message)
    return " ".join(lines) or application.app_status.message


def _announce(
    config: MantaConfig, plans: tuple[ModelPlan, ...], ray_address: str, made_key: str | None, *, serves_grpc: bool
) -> None:
    gateway = config.gateway
    host = "127.0.0.1" if gateway.host in ("0.0.0.0", "::") else gateway.host  # all of them, this machine's too
    url = f"http://{host}:{gateway.http_port}"
    name = plans[0].config.name
    for plan in plans:
        where = f"{len(plan.groups)} expert groups" if plan.expert_deployments else "experts in the coordinator"
        if not plan.groups:
            where = "dense" if plan.config.kind == "chat" else "dense, embeddings"
        console.print(f"[bold]{plan.config.name}[/bold] is ready: {where}, {plan.config.engine.dtype}")
    grpc = f"{host}:{gateway.grpc_port}" if serves_grpc else "none: Serve was started without Manta's services"
    doors = {"Chat page": f"{url}/", "HTTP": f"{url}/v1", "gRPC": grpc, "Ray": ray_address}
    console.print("\n" + "".join(f"  {door:<10} {where}\n" for door, where in doors.items()), **_PLAIN)
    question = "What is the best French cheese?"
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "{question}"}}]}}'
    key, header = "none", ""
    if gateway.api_keys_file is not None:
        key = made_key or "YOUR_KEY"
        header = f" -H 'Authorization: Bearer {key}'"
    if made_key is not None:
        console.print(f"  API key, made for this start and shown only here: {made_key}\n", **_PLAIN)
    console.print(
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\\n  -d '{body}'\n", **_PLAIN
    )
    console.print(
        "from openai import OpenAI\n"
        f'client = OpenAI(base_url="{url}/v1", api_key="{key}")\n'
        f'answer = client.chat.completions.create(model="{name}", '
        f'messages=[{{"role": "user", "content": "{question}"}}])\n'
        "print(answer.choices[0].message.content)\n",
        **_PLAIN,
    )
    console.print(
        "from mistralai.client import Mistral\n"
        f'client = Mistral(server_url="{url}", api_key="{key}")\n'
        f'answer = client.chat.complete(model="{name}", messages=[{{"role": "user", "content": "{question}"}}])\n'
        "print(answer.choices[0].message.content)\n",
        **_PLAIN,
    )
    chat = (
        "manta chat"
        + ("" if url == "http://127.0.0.1:8000" else f" --url {url}")
        + (" --key-file FILE" if header else "")
    )
    console.print(f"Or: {chat}. Ctrl-C stops the server.", **_PLAIN)


_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
