"""How often a running server's experts are chosen, from its `/metrics`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from cluster.commands.gateway_page import read_page
from cluster.errors import ConfigError

SERIES = "manta_expert_rows_total"


@dataclass(frozen=True, slots=True)
class Observed:
    """One model of a server."""

    model: str
    rows: tuple[float, ...]  # of each expert


def observe(url: str, token_file: Path | None, model: str, num_experts: int) -> Observed:
    """Of the model of that name, else of the only one there is. Raises ConfigError, which says what is in the way."""
    rows = _rows(url, _page(url, token_file))
    name = model if model in rows else next(iter(rows))
    if model not in rows and len(rows) > 1:
        raise ConfigError(f"--observed: {url} serves {', '.join(map(repr, rows))}, and none is called {model!r}")
    if set(rows[name]) != set(range(num_experts)):
        raise ConfigError(
            f"--observed: {name!r} of {url} has {len(rows[name])} experts and {model!r} has {num_experts}: "
            "it is another model"
        )
    counted = tuple(rows[name][expert] for expert in range(num_experts))
    if not sum(counted):
        raise ConfigError(f"--observed: {name!r} of {url} has not sent a row to an expert yet")
    return Observed(name, counted)


def _page(url: str, token_file: Path | None) -> str:
    try:
        status, content = read_page(url, "/metrics", token_file)
    except ConfigError as error:
        raise ConfigError(f"--observed: {error}") from error
    if status in (401, 403):
        raise ConfigError(
            f"--observed: {url} answers {status}: give --observed-token-file, a file whose first line is that of "
            "gateway.metrics_token_file"
        )
    if status != 200:
        raise ConfigError(f"--observed: {url} answers {status}")
    return content.decode(errors="replace")


def _rows(url: str, page: str) -> dict[str, dict[int, float]]:
    """By model and expert, of all coordinators together."""
    rows: dict[str, dict[int, float]] = {}
    try:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == SERIES:
                    of_model = rows.setdefault(sample.labels.get("model", ""), {})
                    expert = int(sample.labels["expert"])
                    of_model[expert] = of_model.get(expert, 0.0) + sample.value
    except (ValueError, KeyError) as error:
        raise ConfigError(f"--observed: {url} is no page of metrics: {error}") from error
    if not rows:
        raise ConfigError(f"--observed: {url} has no {SERIES}: no model with experts answers there, or it is not Manta")
    return rows
