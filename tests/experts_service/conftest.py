"""The checkpoint of which real shard actors are."""

from __future__ import annotations

import pytest

from cluster.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random tiny Mixtral."""
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory)
    return open_checkpoint(directory)
