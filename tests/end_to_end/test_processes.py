"""What the server's processes are: light doors, one actor per expert group, all gone at the end."""

import subprocess
import sys

import psutil


def processes(server, title):
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if title in " ".join(child.cmdline())]


def test_the_gateway_replica_has_not_imported_torch(server):
    gateways = processes(server, "ServeReplica:gateway")
    assert gateways
    for gateway in gateways:
        assert not any("torch" in mapped.path for mapped in gateway.memory_maps())


def test_every_expert_group_has_an_actor_of_its_own(server):
    assert len(processes(server, "ExpertShard")) >= 2


def test_the_demo_starts_within_a_minute(server):
    """Ten times the promised 60 s: the figure itself is measured, not asserted."""
    assert server.start_s < 600


def test_status_shows_groups_queue_and_rows(server):
    status = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "status", "--address", server.ray_address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert status.returncode == 0, status.stderr
    for word in ("coordinator", "expert-0", "expert-1", "gateway"):
        assert word in status.stdout
