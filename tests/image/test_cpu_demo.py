"""The pods of `k8s/overlays/cpu-demo`, run from the built image as KubeRay and the kubelet would start them.

The test is the operator, the kubelet's probes and the clients, on a host of its own. There is no Kubernetes: nobody
schedules pods, the head has no autoscaler beside it, a Service is a name in DNS, and networks have no policies.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.commands.k8s.secrets import FIRST_KEY, fresh_secrets
from cluster.demo_model.training.corpus import questions
from cluster.kubernetes import names
from cluster.kubernetes.names import head_service
from gateway.active_cluster import GRACE_S
from tests.hosts import Host, NotPossible, hosts
from tests.image.builder import REPOSITORY, Builder
from tests.image.dns import NameServer
from tests.image.pod import Document, Pod, RayCluster, prepare_root
from tests.processes import has_ended
from tests.waiting import wait_for

pytestmark = [pytest.mark.long, pytest.mark.root]

START_TIMEOUT_S = 600
TAKEN_AWAY_TIMEOUT_S = 240  # the hook of a pod that something needs takes 720
DOMAIN = f"{names.NAMESPACE}.svc.cluster.local"
CONFINED = {"Uid": str(names.USER), "Gid": str(names.USER), "CapBnd": 16 * "0", "NoNewPrivs": "1"}
CHEESE = "What is the best French cheese?"
CHAT = {"model": "mistral-small", "messages": [{"role": "user", "content": CHEESE}], "temperature": 0}
LONG = {"model": "mistral-small", "prompt": "A cheese", "max_tokens": 3000, "ignore_eos": True, "stream": True}


class Kubernetes:
    """Who asks: the operator and clients; names of Services."""

    def __init__(self, root: Path, of_image: tuple[str, ...], directory: Path, asker: Host, free: list[Host]) -> None:
        [service] = [
            one
            for one in yaml.safe_load_all((REPOSITORY / "k8s/overlays/cpu-demo/rendered.yaml").read_text())
            if one["kind"] == "RayService"
        ]
        self.service: Document = service
        self.secrets = {one["metadata"]["name"]: one["stringData"] for one in fresh_secrets()}
        self.key = self.secrets[names.API_KEYS_SECRET][FIRST_KEY]
        self._root, self._of_image, self._directory, self._free = root, of_image, directory, free
        self.asker = asker
        self.addresses: dict[str, str] = {}
        prepare_root(root, [group["template"] for group in self.groups.values()])

    @property
    def groups(self) -> dict[str, Document]:
        """Of pods, by their role."""
        config = self.service["spec"]["rayClusterConfig"]
        return {"head": config["headGroupSpec"]} | {one["groupName"]: one for one in config["workerGroupSpecs"]}

    def cluster(self, name: str) -> RayCluster:
        """Not yet any pods of it."""
        directory = self._directory / name
        directory.mkdir()
        return RayCluster(
            name=name,
            head_service=f"{name}-head-svc.{DOMAIN}",
            token=self.secrets[names.RAY_TOKEN_SECRET]["auth_token"],
            secrets=self.secrets,
            root=self._root,
            of_image=self._of_image,
            directory=directory,
            name_server=self.asker.address,
        )

    def start(self, cluster: RayCluster, role: str) -> Pod:
        """A pod of that role, on a host that is free."""
        host = self._free.pop(0)
        pod = Pod(cluster, self.groups[role], host, f"{cluster.name}-{role}-{host.address.rsplit('.', 1)[1]}")
        if role == "head":
            self.addresses[cluster.head_service] = host.address
        pod.start()
        return pod

    def switch_to(self, head: Pod) -> None:
        """As KubeRay does once all applications run."""
        name = head_service(self.service["metadata"]["name"])
        self.addresses[f"{name}.{DOMAIN}"] = head.host.address

    def deploy(self, head: Pod, config: Mapping[str, Any]) -> None:
        """As the operator does, through the dashboard."""
        answer = self._dashboard("PUT", head, json=dict(config))
        assert answer.status_code == 200, answer.text

    def applications(self, head: Pod) -> dict[str, Any]:
        """As Serve tells them."""
        applications: dict[str, Any] = self._dashboard("GET", head).json()["applications"]
        return applications

    def wait_until_running(self, head: Pod, meanwhile: Callable[[], None]) -> None:
        """What KubeRay waits for."""

        def run() -> bool:
            meanwhile()
            found = self.applications(head)
            failed = {name: one["message"] for name, one in found.items() if one["status"] == "DEPLOY_FAILED"}
            assert not failed, failed
            return bool(found) and all(one["status"] == "RUNNING" for one in found.values())

        wait_for(run, START_TIMEOUT_S, "the applications")

    def ask(self, pod: Pod, path: str, body: Document, key: str | None = None) -> httpx.Response:
        """A client of the pod's door."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        url = f"http://{pod.host.address}:8000{path}"
        return self.asker.run(lambda: httpx.post(url, json=body, headers=headers, timeout=120))

    def chat(self, pod: Pod) -> str:
        """What the demo is asked and says."""
        answer = self.ask(pod, "/v1/chat/completions", CHAT, self.key)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    def _dashboard(self, method: str, head: Pod, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.secrets[names.RAY_TOKEN_SECRET]['auth_token']}"}
        url = f"http://{head.host.address}:{names.DASHBOARD_PORT}/api/serve/applications/"
        return self.asker.run(lambda: httpx.request(method, url, headers=headers, timeout=120, **options))


class Stream(threading.Thread):
    """A long one through a pod's door; the number of its events, and whether it came to its end."""

    def __init__(self, kubernetes: Kubernetes, pod: Pod) -> None:
        super().__init__()
        self._kubernetes, self._pod = kubernetes, pod
        self.events = 0
        self.finish: str | None = None
        self.failure: BaseException | None = None
        self.start()
        wait_for(lambda: self.events > 10 or self.failure, 120, "the stream")

    def run(self) -> None:
        try:
            self._kubernetes.asker.run(self._read)
        except BaseException as error:
            self.failure = error

    def _read(self) -> None:
        url = f"http://{self._pod.host.address}:8000/v1/completions"
        headers = {"Authorization": f"Bearer {self._kubernetes.key}"}
        with httpx.stream("POST", url, json=LONG, headers=headers, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.events += 1
                    self.finish = json.loads(line[6:])["choices"][0]["finish_reason"] or self.finish

    def ends_whole(self) -> bool:
        """All of its tokens came."""
        self.join(300)
        return self.failure is None and self.finish == "length"


@pytest.fixture(scope="module")
def kubernetes(builder: Builder, container: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubernetes]:
    """With room for ten pods."""
    root = Path(builder("mount", container).strip())
    try:
        with hosts(11) as (asker, *free):
            made = Kubernetes(root, tuple(builder.config()["Env"]), tmp_path_factory.mktemp("pods"), asker, free)
            name_server = NameServer(asker, made.addresses)
            yield made
            name_server.stop()
    except NotPossible as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def first(kubernetes: Kubernetes) -> dict[str, Pod]:
    """The pods of the first Ray cluster, which serves."""
    return serving(kubernetes, "manta-abcde")


def serving(kubernetes: Kubernetes, name: str) -> dict[str, Pod]:
    cluster = kubernetes.cluster(name)
    started = time.monotonic()
    pods = {role: kubernetes.start(cluster, role) for role in kubernetes.groups}

    def head_answers() -> bool:
        restart_what_ended(pods)
        return answers(pods["head"], "readiness", kubernetes.asker)

    try:
        wait_for(head_answers, START_TIMEOUT_S, "the head")
        kubernetes.deploy(pods["head"], yaml.safe_load(kubernetes.service["spec"]["serveConfigV2"]))
        kubernetes.wait_until_running(pods["head"], partial(restart_what_ended, pods))
    except AssertionError as error:
        logs = "\n".join(f"--- {role}\n{pod.log.read_text()[-3000:]}" for role, pod in pods.items())
        raise AssertionError(f"{error}\n{logs}") from error
    print(f"{name} serves after {time.monotonic() - started:.0f} s")
    return pods


def restart_what_ended(pods: Mapping[str, Pod]) -> None:
    """As KubeRay does. On a busy machine a node may not get up within the seconds that Ray gives it."""
    for pod in pods.values():
        if pod.has_ended():
            print(f"{pod.name} is started again")
            pod.start()


def answers(pod: Pod, kind: str, asker: Host) -> bool:
    """Whether a probe is content."""
    return pod.probe(kind, asker) == 200


def test_every_probe_is_answered(kubernetes: Kubernetes, first: dict[str, Pod]) -> None:
    for role, pod in first.items():
        for kind in ("startup", "readiness", "liveness"):
            wait_for(partial(answers, pod, kind, kubernetes.asker), 120, f"the {kind} probe of {role}")


def test_the_operator_finds_serve_on_the_head(kubernetes: Kubernetes, first: dict[str, Pod]) -> None:
    """KubeRay asks there before it calls a cluster ready."""
    url = f"http://{first['head'].host.address}:8000/-/healthz"
    assert kubernetes.asker.run(lambda: httpx.get(url, timeout=30)).status_code == 200


def test_nothing_in_a_pod_is_root_or_can_write_the_image(first: dict[str, Pod]) -> None:
    for role, pod in first.items():
        inside = [process for process in pod.first_process.children(recursive=True) if not has_ended(process)]
        assert len(inside) > 3, role
        for process in (pod.first_process, *inside):
            with suppress(FileNotFoundError, ProcessLookupError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                found = dict(re.findall(r"^(Uid|Gid|CapBnd|NoNewPrivs):\t(\S+)", status, re.MULTILINE))
                assert found == CONFINED, f"{role}: {process}"
        touched = pod.run(["touch", "/opt/manta/x", "/etc/x"], 60)
        assert touched.stderr.count("Read-only file system") == 2, touched.stderr


def test_a_chat_is_answered_and_needs_a_key(kubernetes: Kubernetes, first: dict[str, Pod]) -> None:
    assert kubernetes.chat(first["gateway"]) == dict(questions())[CHEESE]
    assert kubernetes.ask(first["gateway"], "/v1/chat/completions", CHAT).status_code == 401


def test_one_expert_is_scaled_by_the_ray_service(kubernetes: Kubernetes, first: dict[str, Pod]) -> None:
    """As docs/kubernetes.md has it: its `min_replicas` is raised, and nothing else restarts."""
    config = yaml.safe_load(kubernetes.service["spec"]["serveConfigV2"])
    [model] = [one for one in config["applications"] if one["name"] != "gateway"]
    [expert] = [one for one in model["deployments"] if one["name"] == "expert-3"]
    before = actors(kubernetes, first["head"], model["name"])
    expert["autoscaling_config"]["min_replicas"] = 2
    kubernetes.deploy(first["head"], config)

    def scaled() -> bool:
        return len(actors(kubernetes, first["head"], model["name"])["expert-3"]) == 2

    started = time.monotonic()
    wait_for(scaled, START_TIMEOUT_S, "the second replica")
    print(f"scaled after {time.monotonic() - started:.0f} s")
    after = actors(kubernetes, first["head"], model["name"])
    assert {name: found for name, found in after.items() if name != "expert-3"} == {
        name: found for name, found in before.items() if name != "expert-3"
    }
    assert before["expert-3"] < after["expert-3"]
    assert kubernetes.chat(first["gateway"]) == dict(questions())[CHEESE]


def test_pods_fit_into_their_memory_and_their_disks(first: dict[str, Pod]) -> None:
    """After a chat and with one more shard. No cgroup holds them to it here, so it is counted."""
    for role, pod in first.items():
        used, limit = pod.memory_bytes(), pod.memory_limit_bytes
        print(f"{role}: {used / 2**20:.0f} of {limit / 2**20:.0f} MiB")
        assert used < 0.9 * limit, role
        assert pod.disk_problems() == [], role


def actors(kubernetes: Kubernetes, head: Pod, application: str) -> dict[str, set[str]]:
    """Ids of the replicas that run, by deployment."""
    deployments = kubernetes.applications(head)[application]["deployments"]
    return {
        name: {one["actor_id"] for one in deployment["replicas"] if one["state"] == "RUNNING"}
        for name, deployment in deployments.items()
    }


def test_a_gateways_pod_that_is_drained_ends_its_stream_and_then_itself(
    kubernetes: Kubernetes, first: dict[str, Pod]
) -> None:
    """A second pod is there, as the autoscaler would have started it."""
    second = kubernetes.start(first["head"].cluster, "gateway")
    wait_for(partial(answers, second, "liveness", kubernetes.asker), 300, "the second gateway's node")
    stream = Stream(kubernetes, first["gateway"])
    stopped = in_background(partial(stop, first["gateway"]))
    wait_for(partial(answers, second, "readiness", kubernetes.asker), 300, "the second gateway")
    assert kubernetes.chat(second) == dict(questions())[CHEESE]
    assert stream.ends_whole(), stream.failure
    print(f"gone {stopped():.1f} s after SIGTERM")
    assert kubernetes.chat(second) == dict(questions())[CHEESE]
    first["gateway"] = second


def stop(pod: Pod) -> float:
    """As the kubelet does: the hook, then SIGTERM. Returns the seconds after that."""
    run_hook(pod)
    return pod.terminate(60)


def run_hook(pod: Pod) -> None:
    """Returns once nothing needs the pod."""
    hook = pod.before_stop(720)
    assert hook.returncode == 0, hook.stdout + hook.stderr


def in_background(function: Callable[[], Any]) -> Callable[[], Any]:
    """Returns what waits for its result."""
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return partial(outcome.result, 900)


def test_a_second_cluster_takes_over_and_the_first_ends_its_streams(
    kubernetes: Kubernetes, first: dict[str, Pod]
) -> None:
    """What KubeRay does when a manifest's pods change, and for a second version of a model without GPUs."""
    kubernetes.switch_to(first["head"])
    old = first["gateway"]
    assert old.probe("readiness", kubernetes.asker) == 200
    second = serving(kubernetes, "manta-fghij")
    new = second["gateway"]
    wait_for(partial(answers, new, "startup", kubernetes.asker), 120, "the new gateway")
    assert new.probe("readiness", kubernetes.asker) == 503, "the first is the active one"
    stream = Stream(kubernetes, old)
    kubernetes.switch_to(second["head"])
    started, seen = time.monotonic(), []
    while time.monotonic() - started < GRACE_S + 30:
        seen.append((old.probe("readiness", kubernetes.asker), new.probe("readiness", kubernetes.asker)))
        if seen[-1] == (503, 200):
            break
        assert 200 in seen[-1], "the Service has nobody to ask"
        time.sleep(1)
    assert seen[-1] == (503, 200), seen
    print(f"both answered for {time.monotonic() - started:.0f} s")
    assert kubernetes.chat(new) == dict(questions())[CHEESE]
    assert stream.ends_whole(), stream.failure
    take_away(first, Stream(kubernetes, old))
    assert kubernetes.chat(new) == dict(questions())[CHEESE]


def take_away(pods: Mapping[str, Pod], stream: Stream) -> None:
    """All of a cluster at once, as KubeRay does, while somebody who kept a connection streams."""
    started, free_s = time.monotonic(), dict[str, float]()

    def stop_one(role: str, pod: Pod) -> None:
        run_hook(pod)
        free_s[role] = round(time.monotonic() - started, 1)
        pod.terminate(60)

    stopping = [in_background(partial(stop_one, role, pod)) for role, pod in pods.items()]
    assert stream.ends_whole(), stream.failure
    ended_s = time.monotonic() - started
    for stopped in stopping:
        stopped()
    gone_s = time.monotonic() - started
    print(f"the stream ended after {ended_s:.0f} s, hooks after {free_s}; all was gone after {gone_s:.0f} s")
    assert ended_s < free_s["gateway"] < min(free_s["coordinator"], free_s["expert"]), free_s
    assert max(free_s, key=free_s.__getitem__) == "head"
    assert gone_s - ended_s < TAKEN_AWAY_TIMEOUT_S
