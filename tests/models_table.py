"""Tries every family with experts that the installed transformers has, and makes the table of docs/models.md of it.

python -m tests.models_table          prints the section, some minutes
python -m tests.models_table gpt_oss  prints the rows of these families
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.families import FAMILIES
from cluster.errors import CheckpointError
from experts_service.transformers_backend.meta_model import checked
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request
from tests.transformers_families import generated, prompt, write_family

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
MARK = "<!-- made by: python -m tests.models_table -->"
LENGTHS = (40, 5, 23)
NEW_TOKENS = 64
_EXPERTS = re.compile(r"use_experts_implementation|self\.experts\(")


def families() -> list[str]:
    """By `model_type`, those whose code has experts."""
    folder = Path(transformers.__file__).parent / "models"
    names = {file.parent.name for file in folder.glob("*/modeling_*.py") if _EXPERTS.search(file.read_text())}
    return sorted(name for name in names if name in CONFIG_MAPPING)


def told() -> dict[str, str]:
    """The rows on the page, by family."""
    lines = PAGE.read_text().split(MARK)[1].splitlines()[3:]  # without the heading
    return {match[1]: line for line in lines if (match := re.match(r"\| `(\w+)` \|", line))}


def outcome(family: str, directory: Path) -> str:
    """What happens to a tiny random model of the family: `exact`, or why not."""
    torch.set_num_threads(1)  # of so little work, threads take longer
    try:
        model = write_family(directory, family)
        expected = [generated(model, prompt(length, length), NEW_TOKENS) for length in LENGTHS]
    except Exception as error:
        refused = of_config(family, directory)
        return refused or f"not tried: no tiny model of it could be made here ({type(error).__name__})"
    requests = [
        make_request(prompt(length, length), max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=True)
        for length in LENGTHS
    ]
    try:
        bench = Bench(directory, model_impl="transformers", num_groups=2, max_num_batched_tokens=17)
        ids = bench.run(*requests)
    except CheckpointError as error:
        return reason(error)
    except Exception as error:
        return f"fails: {type(error).__name__}"
    if bench.errors:
        return f"fails: {next(iter(bench.errors.values()))}"
    return "exact" if ids == expected else "differs: other tokens than transformers generates"


def of_config(family: str, directory: Path) -> str:
    """Why the family is refused by its usual config; empty: it is not."""
    CONFIG_MAPPING[family]().save_pretrained(directory)
    save_file({"model.none": torch.zeros(1)}, directory / "model.safetensors")
    try:
        checked(open_checkpoint(directory, "transformers"), 1)
    except CheckpointError as error:
        return reason(error)
    except Exception:
        pass
    return ""


def reason(error: CheckpointError) -> str:
    """Without directory and family."""
    return str(error).split("the transformers backend cannot serve ")[-1].partition(": ")[2].removesuffix(".")


def row(family: str) -> str:
    """Of the table."""
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = outcome(family, Path(directory))
    native = "yes" if family in FAMILIES else ""
    exact = result == "exact"
    why = "" if exact else result.replace("|", "/").replace("\n", " ")
    return f"| `{family}` | {native} | {'yes' if exact else 'no'} | {why} |"


def rows(names: list[str]) -> Iterator[str]:
    for name in names:
        yield row(name)


if __name__ == "__main__":
    chosen = sys.argv[1:] or families()
    if not sys.argv[1:]:
        print("| `model_type` | native | transformers backend | why not |\n|---|---|---|---|")
    for line in rows(chosen):
        print(line, flush=True)
