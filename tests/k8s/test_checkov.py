"""checkov on every overlay. It knows no RayService, so each pod template of one is shown to it as a Pod.

What fails has to be in the list of waivers, with its reason; a waiver that nothing needs has to go.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kubernetes.check.documents import pod_templates, read_documents
from tests.environments import make_environment
from tests.k8s.overlays import OVERLAYS, needs_kubectl

VERSION = "3.3.30"
TIMEOUT_S = 300

WAIVERS = {
    # Check → why it may fail. In overlays named for it alone, where there is a name.
    ("CKV_K8S_15", "cpu-demo"): "Image Pull Policy should be Always: the demo's image is built here, and never pulled",
    ("CKV_K8S_43", "cpu-demo"): "Image should use digest: what was loaded into a machine by hand has none there",
    ("CKV_K8S_38", "Job.manta.manta-secrets"): "Tokens only where necessary: this Job makes Secrets, nothing else",
}  # fmt: skip


def _as_pods(overlay: Path) -> list[dict[str, Any]]:
    documents = read_documents([overlay])
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": template.labels["manta/role"], "namespace": "manta", "labels": template.labels},
            "spec": template.spec,
        }
        for template in pod_templates(documents)
        if template.owner.kind == "RayService"
    ]
    assert len(pods) >= 3
    return [document.body for document in documents if document.kind != "RayService"] + pods


@pytest.mark.long  # a minute on two cores that do nothing else, most of it checkov's own installation
@needs_kubectl
def test_nothing_fails_that_is_not_waived(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "environment", f"checkov=={VERSION}")
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    for overlay in OVERLAYS:
        (manifests / f"{overlay.name}.yaml").write_text(yaml.safe_dump_all(_as_pods(overlay)))
    command = [python.with_name("checkov"), "--framework", "kubernetes", "--directory", manifests]
    command += ["--skip-download", "--compact", "--quiet", "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 500
    assert report["summary"]["parsing_errors"] == 0
    used, unexpected = set(), []
    for failed in report["results"]["failed_checks"]:
        overlay, resource = Path(failed["file_path"]).stem, failed["resource"]
        waiver = next((one for one in WAIVERS if one[0] == failed["check_id"] and one[1] in (overlay, resource)), None)
        if waiver is None:
            unexpected.append(f"{overlay}: {resource}: {failed['check_id']} {failed['check_name']}")
        else:
            used.add(waiver)
    assert not unexpected, "\n".join(unexpected)
    assert used == set(WAIVERS), f"nothing needs {set(WAIVERS) - used}"
