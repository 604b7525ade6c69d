"""How full the disk with Ray's session is: of a small file system, and as processes of a cluster see it."""

import os
import subprocess

import pytest
import ray

from cluster.commands.status.findings import FULL_DISK
from cluster.commands.status.node_disks import _session_disk, ask_disks, disks, used_share


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_the_used_share_of_a_small_disk(tmp_path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "manta", tmp_path], check=False)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        assert used_share(str(tmp_path)) < 0.1
        (tmp_path / "spilled").write_bytes(bytes(999 * 1024))
        assert used_share(str(tmp_path)) >= FULL_DISK
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_task_and_who_looks_see_the_same_disk(ray_cluster) -> None:
    asked = {ray.remote(num_cpus=0)(_session_disk).remote(): "another"}
    told = disks(asked, timeout_s=60.0)
    assert told.keys() == {"another", ray.get_runtime_context().get_node_id()}
    assert all(0.0 < share <= 1.0 for share in told.values())
    assert max(told.values()) - min(told.values()) < 0.05
    assert ask_disks() == {}, "nothing is started on the node that looks"
