"""Tiny matrices are fastest on one thread, and many test processes share few cores."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
