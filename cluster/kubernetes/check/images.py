"""Images are named by their digest, so that what was tested is what runs. A placeholder is none."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from cluster.kubernetes.check.documents import PodTemplate

_BY_DIGEST = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")
LOCAL = "localhost/"  # a machine that has no such image cannot pull it from anywhere


def image_problems(templates: Sequence[PodTemplate]) -> Iterator[str]:
    """Images without a digest, other than those that were loaded into the machines."""
    seen = set()
    for template in templates:
        for container in template.containers:
            image = str(container.get("image", ""))
            if _BY_DIGEST.fullmatch(image) or image.startswith(LOCAL) or image in seen:
                continue
            seen.add(image)
            yield (
                f"{template}: container {container.get('name')!r}: the image {image!r} has no digest; set it under "
                "`images` in kustomization.yaml, or in kubernetes.image: name@sha256:…"
            )
