"""The volume with the models, and the Job that fetches and verifies them into it.

One volume that the Job writes and every pod reads: the storage class has to offer ReadWriteMany and ReadOnlyMany.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

from cluster.config import MantaConfig
from cluster.errors import ConfigError
from cluster.kubernetes import names
from cluster.kubernetes.containers import POD_SECURITY, SECURITY
from cluster.kubernetes.ray_service import fetched_name, is_fetched, models_to_fetch
from cluster.kubernetes.sizes import model_size

Document = dict[str, Any]

# `kubectl apply -k … -l app.kubernetes.io/component=models` fetches before anything is served.
LABELS = {"app.kubernetes.io/part-of": "manta", "app.kubernetes.io/component": "models"}
ROOM = 1.25  # of the weights: tokenizers, and a download that was interrupted


def model_volume(config: MantaConfig) -> list[Document]:
    """Nothing where every model is in the image. Raises ConfigError for one that is too small."""
    models = models_to_fetch(config)
    if not models:
        return []
    sizes = {fetched_name(model): model_size(model).weight_bytes for model in config.models if is_fetched(model.path)}
    gib = math.ceil(ROOM * sum(sizes.values()) / 2**30)
    if (wanted := config.kubernetes.model_volume_gib) is not None:
        least = math.ceil(sum(sizes.values()) / 2**30)
        if wanted < least:
            raise ConfigError(f"kubernetes.model_volume_gib: {wanted}, and the models take {least}")
        gib = wanted
    claim: Document = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": names.MODEL_CLAIM, "labels": dict(LABELS)},
        "spec": {
            "accessModes": ["ReadOnlyMany", "ReadWriteMany"],
            "resources": {"requests": {"storage": f"{gib}Gi"}},
        },
    }
    if config.kubernetes.storage_class is not None:
        claim["spec"]["storageClassName"] = config.kubernetes.storage_class
    return [claim, _job(config.kubernetes.image, models)]


def _job(image: str, models: tuple[str, ...]) -> Document:
    limits = {"cpu": "2", "memory": "4Gi", "ephemeral-storage": "2Gi"}
    mounts = {"models": names.MODELS, "tmp": "/tmp", "home": names.CONTAINER_USER_HOME}
    environment = {
        "HF_HOME": names.MODELS,
        "HF_TOKEN_PATH": names.HUB_TOKEN_FILE,  # for gated models; the Secret may be missing
        "HF_XET_CACHE": "/tmp/xet",
        "HF_XET_CHUNK_CACHE_SIZE_BYTES": "0",  # what is fetched goes to the volume at once
        "HOME": names.CONTAINER_USER_HOME,
    }
    pod: Document = {
        "serviceAccountName": names.SERVICE_ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "OnFailure",
        "securityContext": dict(POD_SECURITY),
        "containers": [
            {
                "name": "fetch",
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "command": ["manta", "fetch", *models],
                "securityContext": SECURITY,
                "env": [{"name": name, "value": value} for name, value in environment.items()],
                "resources": {"requests": dict(limits), "limits": dict(limits)},
                "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()]
                + [{"name": "hub-token", "mountPath": names.HUB_TOKEN_FILE.rsplit("/", 1)[0], "readOnly": True}],
            }
        ],
        "volumes": [
            {"name": "models", "persistentVolumeClaim": {"claimName": names.MODEL_CLAIM}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
            {"name": "home", "emptyDir": {"sizeLimit": "64Mi"}},
            {
                "name": "hub-token",
                "secret": {"secretName": names.HUB_TOKEN_SECRET, "defaultMode": 0o440, "optional": True},
            },
        ],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        # Other models are another Job: what a Job does cannot be changed.
        "metadata": {
            "name": f"manta-fetch-{hashlib.sha256(' '.join(models).encode()).hexdigest()[:8]}",
            "labels": dict(LABELS),
        },
        "spec": {
            "backoffLimit": 10,  # a download goes on where it was interrupted
            "ttlSecondsAfterFinished": 3600,
            "template": {
                "metadata": {"labels": {names.JOB: "model", "app.kubernetes.io/part-of": "manta"}},
                "spec": pod,
            },
        },
    }
