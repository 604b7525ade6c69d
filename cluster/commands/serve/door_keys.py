"""The API key of a server without a file of keys: MANTA_API_KEY, or one that it makes. Knows nothing of doors.

Gateways read the file wherever they run. So on a cluster that others started each node is asked for it first.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.commands.each_node import ask_nodes, heard
from cluster.config import GatewayConfig
from cluster.errors import ConfigError
from gateway.admission.access import is_loopback
from gateway.admission.api_keys import digest, new_key

KEY = "MANTA_API_KEY"
MAKE = "MANTA_MAKE_API_KEY"  # the image says so: a container's doors are open to other machines
SHORTEST = 16
NODES_TIMEOUT_S = 60.0  # each starts a process


@contextmanager
def with_key(gateway: GatewayConfig) -> Iterator[tuple[GatewayConfig, str | None]]:
    """The same with a file of one key's hash, if it is to have one, and the key, if it was made here.

    The file lies in a folder of this user's and goes when the server ends. Raises ConfigError for a key too short.
    """
    given = os.environ.pop(KEY, "").strip()  # Ray's processes, which inherit the rest, do not need it
    made = not given and os.environ.get(MAKE, "0") not in ("", "0") and not is_loopback(gateway.host)
    if gateway.api_keys_file is not None or not (given or made):
        yield gateway, None
        return
    if given and len(given) < SHORTEST:
        raise ConfigError(f"{KEY}: a key has {SHORTEST} characters or more, so that nobody guesses it")
    key = given or new_key()
    with tempfile.TemporaryDirectory(prefix="manta-keys-") as directory:
        file = Path(directory) / "api-keys.json"
        with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as stream:
            json.dump([{"id": "given" if given else "made-at-start", "sha256": digest(key)}], stream)
        yield gateway.model_copy(update={"api_keys_file": file}), key if made else None


def check_nodes(gateway: GatewayConfig) -> None:
    """Raises ConfigError where a node of the cluster that we have joined lacks a file that its gateways would read.

    With `gateway.label_selector` only some nodes have gateways, and a gateway says itself what it lacks.
    """
    import ray

    files = {name: getattr(gateway, name) for name in ("api_keys_file", "metrics_token_file")}
    needed = {name: str(file) for name, file in files.items() if file is not None}
    if gateway.label_selector or not needed:
        return
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    # What a node lacks that does not answer, its gateway says.
    missing = heard(ask_nodes(addresses, _missing, [*needed.values()]), NODES_TIMEOUT_S)  # by node
    for name, file in needed.items():
        if without := sorted(addresses[node] for node, lacks in missing.items() if file in lacks):
            raise ConfigError(
                f"gateway.{name}: {file} cannot be read on {', '.join(without)}: with --address it has "
                f"to be on every node, at the same path, for any may have a gateway. A key in {KEY} is in a file of "
                "this machine; gateway.label_selector says which nodes have gateways"
            )


def _missing(files: list[str]) -> list[str]:
    """Those that this process cannot read, on the node where Ray runs it."""
    return [file for file in files if not os.access(file, os.R_OK)]
