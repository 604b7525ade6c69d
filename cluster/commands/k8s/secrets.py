"""The Secrets of a Manta on Kubernetes: fresh ones as text, or made by the API server where they are missing.

Inside a pod the API server is asked with the pod's own account, which needs the right to create Secrets and no other.
One that exists is left alone, whoever made it.
"""

from __future__ import annotations

import secrets
import ssl
from pathlib import Path
from typing import Any

import httpx
import yaml

from cluster.errors import SetupError
from cluster.kubernetes import names

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
API_SERVER = "https://kubernetes.default.svc"
FIRST_KEY = "first-key"  # beside the hashes in the Secret of the API keys; no pod mounts it
TIMEOUT_S = 30.0


def fresh_secrets(namespace: str = names.NAMESPACE) -> list[dict[str, Any]]:
    """Kubernetes documents, different at every call."""
    from gateway.admission.api_keys import digest, new_key

    key = new_key()
    contents = {
        names.RAY_TOKEN_SECRET: {"auth_token": secrets.token_hex(32)},
        names.LANE_SECRET: {Path(names.LANE_SECRET_FILE).name: secrets.token_hex(32)},
        names.METRICS_TOKEN_SECRET: {Path(names.METRICS_TOKEN_FILE).name: secrets.token_hex(32)},
        names.REDIS_PASSWORD_SECRET: {"password": secrets.token_hex(32)},
        names.API_KEYS_SECRET: {
            Path(names.API_KEYS_FILE).name: yaml.safe_dump([{"id": "first", "sha256": digest(key)}], sort_keys=False),
            FIRST_KEY: key,
        },
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/part-of": "manta"}},
            "type": "Opaque",
            "stringData": content,
        }
        for name, content in contents.items()
    ]


def create_missing(api_server: str = API_SERVER, account: Path = ACCOUNT) -> list[str]:
    """Names of the Secrets that were missing. Raises SetupError for what the API server refuses."""
    try:
        token, namespace = ((account / name).read_text().strip() for name in ("token", "namespace"))
        trust = ssl.create_default_context(cafile=str(account / "ca.crt"))
    except OSError as error:
        raise SetupError(f"{account} has no service account's token: {error.strerror}") from error
    made = []
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=api_server, headers=headers, verify=trust, timeout=TIMEOUT_S) as client:
        for secret in fresh_secrets(namespace):
            name = secret["metadata"]["name"]
            try:
                answer = client.post(f"/api/v1/namespaces/{namespace}/secrets", json=secret)
            except httpx.HTTPError as error:
                raise SetupError(f"{api_server} does not answer: {error}") from error
            if answer.status_code == httpx.codes.CREATED:
                made.append(name)
            elif answer.status_code != httpx.codes.CONFLICT:  # it exists
                raise SetupError(f"the API server does not make the Secret {name}: {answer.status_code} {answer.text}")
    return made
