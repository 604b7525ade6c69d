"""The image, built once for all tests of this folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.builder import BASE, IMAGE, NEEDED, Builder, NotPossible, build_base, build_image


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """buildah, with the image `cpu` in its store."""
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and {' and '.join(NEEDED)}")
    kept = os.environ.get("MANTA_IMAGE_STORE")
    directory = Path(kept) if kept else tmp_path_factory.mktemp("image")
    builder = Builder(directory)
    try:
        if not builder.has(BASE):
            build_base(builder, directory)
    except NotPossible as reason:
        pytest.skip(str(reason))
    if not builder.has(IMAGE):
        build_image(builder)
    yield builder
    if not kept:
        builder("rm", "--all")
        builder("rmi", "--force", IMAGE, BASE)
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def container(builder: Builder) -> Iterator[str]:
    """One made of the image. buildah gives it a bound on open files that HAProxy does not fit into, unless told."""
    name = builder("from", "--ulimit", "nofile=20000:20000", IMAGE).strip()
    yield name
    builder("rm", name)
