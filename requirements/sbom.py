"""Prints what an image holds, with licences, as CycloneDX 1.5: Python's packages and Debian's. Needs Python alone.

    docker run --rm --entrypoint cat localhost/manta:cpu /usr/local/share/manta/sbom.json

The licence of a Python package is what its metadata says, that of a Debian package what its copyright file names.
"""

from __future__ import annotations

import json
import re
import subprocess
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

DOCUMENTS = Path("/usr/share/doc")
SILENT = {"mistralai": "Apache-2.0"}  # their metadata says nothing; their repositories do
FIRST_LINE_CHARS = 100  # some metadata has the whole text there


def main() -> None:
    """Print the document."""
    components = [*map(_of_python, sorted(distributions(), key=_name)), *_of_debian()]
    print(
        json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}, indent=1)
    )


def _name(package: Distribution) -> str:
    return re.sub(r"[-_.]+", "-", str(package.metadata["Name"])).lower()


def _of_python(package: Distribution) -> dict[str, Any]:
    name = _name(package)
    return _component(name, package.version, f"pkg:pypi/{name}@{quote(package.version)}", _licences(package))


def _licences(package: Distribution) -> list[str]:
    """The expression, else the classifiers, else the first line of the text."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return [str(expression)]
    classifiers = [text.rsplit(" :: ", 1)[-1] for text in metadata.get_all("Classifier", []) if "License ::" in text]
    text = str(metadata.get("License") or SILENT.get(_name(package), ""))
    return classifiers or [line[:FIRST_LINE_CHARS] for line in text.strip().splitlines()[:1]]


def _of_debian() -> list[dict[str, Any]]:
    if not Path("/var/lib/dpkg/status").exists():
        return []
    command = ["dpkg-query", "--show", "--showformat", "${Package}\t${Version}\n"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = []
    for name, version in (line.split("\t") for line in lines):
        file = DOCUMENTS / name / "copyright"
        text = file.read_text(errors="replace") if file.exists() else ""
        named = sorted(set(re.findall(r"^License: *(\S.*)$", text, re.MULTILINE)))
        where = [f"see {file}"] if text else []
        found.append(_component(name, version, f"pkg:deb/debian/{name}@{quote(version)}", named or where))
    return found


def _component(name: str, version: str, purl: str, licences: list[str]) -> dict[str, Any]:
    return {
        "type": "library",
        "name": name,
        "version": version,
        "purl": purl,
        "licenses": [{"license": {"name": licence}} for licence in licences],
    }


if __name__ == "__main__":
    main()
