"""The gRPC server that Serve makes is ours, in a process of its own, as in Serve's proxies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cluster.config import GatewayConfig
from cluster.ray_variables import DOORS, doors
from gateway.admission.api_keys import digest
from tests.programs import said_by


@pytest.mark.parametrize("is_readable", [True, pytest.param(False, marks=pytest.mark.long)])
def test_serves_server_is_ours_in_a_proxy_too(tmp_path: Path, is_readable: bool) -> None:
    """It listened on every interface, read messages of any size before a key was asked for, and obeyed `application`.

    Where a proxy cannot read the keys, the replica asks for them. A proxy that had no gateway to ask said NOT_FOUND."""
    keys = tmp_path / "keys.json"
    config = GatewayConfig(api_keys_file=keys, max_choices=3)
    assert json.loads(doors(config)[DOORS]) == {"api_keys_file": str(keys)}
    if is_readable:
        keys.write_text(json.dumps([{"id": "alice", "sha256": digest("right")}]))
        keys.chmod(0o600)
    lines = said_by("gateway.serves_grpc_server", environment={**os.environ, **doors(config)}).splitlines()
    assert lines == [
        "127.0.0.1",
        "StatusCode.UNAUTHENTICATED False" if is_readable else "StatusCode.OK False",
        "StatusCode.OK False",
        *2 * ["StatusCode.UNAVAILABLE 1 no gateway can be reached now; try again"],
    ]
