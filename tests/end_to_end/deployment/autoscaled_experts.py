"""Run by test_autoscaled_nodes: two replicas of a group on a cluster with room for one, which may add a node.

    python -m tests.end_to_end.deployment.autoscaled_experts CHECKPOINT
    → {"replicas": [node, node], "nodes": [node, node]}

`AutoscalingCluster` begins and ends with `ray stop --force`, so this wants a PID namespace of its own.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
from ray import serve
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_TYPE
from ray.cluster_utils import AutoscalingCluster
from ray.util import placement_group_table

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.config import ScalingConfig
from experts_service.service import expert_deployment
from experts_service.shard.shard import ShardSpec

OBJECT_STORE_BYTES = 80_000_000


class AutoscaledCluster(AutoscalingCluster):  # type: ignore[misc]
    """Ray's own, with a configuration of ours: the file that it starts from is not in the wheel."""

    def _generate_config(
        self, head_resources: dict[str, Any], worker_node_types: dict[str, Any], **_: Any
    ) -> dict[str, Any]:
        head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
        commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        return {
            "cluster_name": "autoscaled",
            "max_workers": 1,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 5,
            "provider": {
                "type": "external",  # which asks for no defaults; "fake_multinode" has its in that file
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "use_node_id_as_ip": True,  # its nodes are processes of one host
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "available_node_types": {FAKE_HEAD_NODE_TYPE: head, **worker_node_types},
            "head_node_type": FAKE_HEAD_NODE_TYPE,
            **{f"{name}_commands": [] for name in commands},
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
            "file_mounts_sync_continuously": False,
        }


def main(directory: str) -> None:
    room = {"CPU": 1, "GPU": 1, "object_store_memory": OBJECT_STORE_BYTES}
    worker = {"resources": room, "node_config": {}, "min_workers": 0, "max_workers": 1}
    AutoscaledCluster(head_resources=dict(room), worker_node_types={"worker": worker}).start()
    ray.init("auto", log_to_driver=False, logging_level="error")
    assert len(ray.nodes()) == 1
    checkpoint = open_checkpoint(directory)
    spec = ShardSpec(
        application="elastic",
        directory=directory,
        fingerprint=checkpoint.fingerprint,
        group=0,
        experts=(0, 1),
        num_groups=2,
        dtype="float32",
        num_threads=1,
        gpus=1.0,  # of which a node has one; the maths runs on the CPU
    )
    scaling = ScalingConfig(min_replicas=2, max_replicas=2)
    serve.run(expert_deployment(spec, scaling), name="elastic", route_prefix=None)  # until both replicas serve
    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    replicas = [node for group in groups for node in set(group["bundles_to_node_id"].values())]
    print(json.dumps({"replicas": replicas, "nodes": [node["NodeID"] for node in ray.nodes() if node["Alive"]]}))


if __name__ == "__main__":
    main(sys.argv[1])
