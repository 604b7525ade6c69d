"""`manta plan --ram`: what it proposes can be pasted, fits as `manta serve` counts, and knows what is asked for."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.commands.plan.command import checkpoint_of
from cluster.commands.plan.machine import parse_memory
from cluster.config import parse_config
from cluster.deploy.app import Cluster, plan_models
from cluster.errors import ConfigError, MantaError
from cluster.planning.placement import Node, plan_groups
from router_service.telemetry.engine_metrics import expert_families
from tests.programs import REPOSITORY
from tests.quantized_checkpoints import gptq, write_quantized

CARD = ("--gpu-memory", "24GB", "--ram", "64GB")


def plan(*arguments: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    [document] = json.loads(result.output)
    return document


def refusal(*arguments: str | Path) -> str:
    with pytest.raises(MantaError) as raised:
        CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=False)
    return str(raised.value)


def test_a_24_gb_card_and_64_gb_of_memory() -> None:
    """One expert fits beside attention in bf16; the others are as exact as the memory lets them be."""
    found = plan("mixtral-8x7b", *CARD)
    [model] = parse_config(found["config"]).models
    gpu, cpu = model.experts.tiers
    assert (gpu.device, gpu.quantization, model.experts.groups[0]) == ("cuda", "auto", (0,))
    assert (cpu.device, cpu.quantization, model.experts.groups[1]) == ("cpu", "int8", (1, 2, 3, 4, 5, 6, 7))
    held = {one["device"]: one["weight_bytes"] / 2**30 for one in found["shards"]}
    assert held["cuda"] == pytest.approx(10.5, rel=0.01)
    assert held["cpu"] == pytest.approx(7 * 10.5 / 2, rel=0.03)
    assert found["step_s"] > max(found["cpu_s"], found["gpu_s"])
    others = found["others"]
    assert [one["cpu"] for one in others if one["gpu"] == "none"] == ["fp8", "int4"]
    assert list(dict.fromkeys(one["gpu"] for one in others)) == ["int8", "none", "int4"], "fp8 has as many as int8"
    assert (others[-1]["gpu"], others[-1]["cpu"]) == ("int4", "int4")
    assert others[-1]["step_s"] == min(one["step_s"] for one in (found, *others))
    assert {one["measured"] for one in found["figures"]} == {True, False}


def test_of_many_experts_a_card_holds_as_many_as_fit() -> None:
    """Memory that a coordinator shares with a shard was counted once for each of 128 experts: 2 GiB stayed empty."""
    found = plan("Qwen/Qwen3-30B-A3B", *CARD)
    [on_card] = [one for one in found["shards"] if one["device"] == "cuda"]
    one_expert = on_card["weight_bytes"] / len(on_card["experts"])
    used = sum(found["coordinator"].values()) + on_card["weight_bytes"] + 16 * 2**20
    assert used <= 0.9 * 24e9 < used + one_expert


def test_a_machine_without_a_card_gets_the_best_format_that_fits() -> None:
    """`manta plan --ram` asked for a card, and said nothing of a laptop."""
    found = plan("allenai/OLMoE-1B-7B-0924", "--gpus", "0", "--ram", "16GB")
    [model] = parse_config(found["config"]).models
    assert (model.engine.device, model.engine.quantization, model.experts.transport) == ("cpu", "int8", "local")
    assert (found["gpu_s"], found["shards"], [one["cpu"] for one in found["others"]]) == (0.0, [], ["int4"])
    assert found["others"][0]["step_s"] < found["step_s"]
    larger = plan("allenai/OLMoE-1B-7B-0924", "--gpus", "0", "--ram", "32GB")
    assert parse_config(larger["config"]).models[0].engine.quantization == "none"
    dense = plan("mistralai/Mistral-7B-Instruct-v0.3", "--gpus", "0", "--ram", "16GB", "--quantization", "int4")
    assert parse_config(dense["config"]).models[0].engine.quantization == "int4"
    assert not any("GPU" in one["what"] for one in dense["figures"])
    assert "memory" in refusal("mixtral-8x7b", "--gpus", "0", "--ram", "16GB")
    assert refusal("mixtral-8x7b", "--gpus", "0") == "--gpus 0: how much memory is there? Give --ram (16GB)"
    assert "leave --gpu" in refusal("mixtral-8x7b", "--gpus", "0", "--ram", "16GB", "--gpu", "L4")


def test_rows_to_this_machines_cpus_are_counted_through_memory_where_they_travel_so(tmp_path: Path) -> None:
    def counted(*more: str, **experts: Any) -> tuple[float, bool]:
        """Seconds of rows on their way, and whether memory is among what the plan is made of."""
        experts["tiers"] = [{"groups": [0], "device": "cuda", "gpus_per_shard": 0.9}, {"groups": [1]}]
        file = tmp_path / "manta.yaml"
        model = {"name": "m", "path": "mixtral-8x7b", "experts": {"groups": [[0], [1, 2, 3, 4, 5, 6, 7]], **experts}}
        model["engine"] = {"device": "cuda", "max_model_len": 4096, "quantization": "int8"}
        file.write_text(json.dumps({"models": [model]}))
        found = plan("--config", file, "--gpu", "H100", "--ram", "128GB", "--sequences", "16", *more)
        return found["wire_s"], any("through memory" in one["what"] for one in found["figures"])

    through_memory, is_said = counted()
    over_lanes, is_said_of_lanes = counted(transport="lane")
    assert through_memory < over_lanes
    assert (is_said, is_said_of_lanes) == (True, False)
    assert not counted("--link", "12.5")[1], "whoever asks says what carries rows"


@pytest.mark.parametrize(
    "arguments",
    [
        ("mixtral-8x7b", *CARD),
        ("mixtral-8x7b", "--gpu", "L4", "--gpus", "2", "--ram", "64GiB", "--quantization", "int4"),
        ("mixtral-8x7b", "--gpu", "H200", "--ram", "64GB"),
        ("mixtral-8x7b", "--gpu", "A100-40G", "--gpus", "4", "--ram", "64GB", "--sequences", "8"),
        ("mixtral-8x22b", "--gpu-memory", "24GB", "--ram", "96GB"),
        ("TheBloke/Mixtral-8x7B-Instruct-v0.1-GPTQ", "--gpu-memory", "24GB", "--ram", "32GB"),
    ],
    ids=["card", "two-cards", "all-on-one", "all-on-four", "no-expert-on-the-card", "quantised"],
)
def test_what_is_printed_is_a_config_that_fits_that_machine_as_serve_counts(arguments: tuple[str, ...]) -> None:
    text = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False).output
    pasted = text.split("# The configuration, for manta serve --config\n")[1]
    config = parse_config(yaml.safe_load(pasted))
    found = plan(*arguments)
    assert parse_config(found["config"]) == config
    machine = found["machine"]
    nodes = (Node("a", int(0.9 * machine["ram_bytes"]), (int(0.9 * machine["card_bytes"]),) * machine["cards"]),)
    checkpoints = [checkpoint_of(model.path).rounded(model.engine.rounding) for model in config.models]
    [planned] = plan_models(config.models, checkpoints, Cluster(8, nodes))
    served = [expert for one in planned.experts for expert in one.group.experts]
    assert sorted(served) == (list(range(8)) if planned.experts else [])
    most = config.models[0].engine
    assert most.kv_cache_gib * 2**30 >= found["coordinator"]["cache_bytes"] * 0.999
    if not planned.experts:
        assert found["wire_s"] == found["cpu_s"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixtral-8x22b", *CARD), r"1 × 22.35 GiB hold 0 of 8 experts; the others need 64.97 GiB of memory in the"),
        (("mixtral-8x7b", "--gpu-memory", "4GB", "--ram", "64GB"), "the coordinator needs"),
        (("mixtral-8x7b", "--ram", "64GB"), "--ram: which card is beside it?"),
        (("mixtral-8x7b", "--gpu-memory", "24GB"), "--gpu-memory: how much memory is beside the card?"),
        (("mixtral-8x7b", "--gpu-memory", "24XB", "--ram", "64GB"), "--gpu-memory: '24XB' is no size of memory"),
        (("mixtral-8x7b", "--gpu-memory", "24GB", "--ram", "-1"), "--ram: '-1' is no size of memory"),
        (("mistralai/Mistral-7B-v0.3", *CARD), "is a dense model: it has no experts to put on tiers"),
        (("TheBloke/mixtral-8x7b-v0.1-AWQ", *CARD, "--quantization", "int8"), "is quantised already; leave it out"),
        (("mixtral-8x7b", "--observed", "http://127.0.0.1:1"), "--observed: it says which experts are on the GPU"),
        (("mixtral-8x7b", *CARD, "--observed", "http://127.0.0.1:1"), "http://127.0.0.1:1 cannot be reached"),
        (("mixtral-8x7b", *CARD, "--observed", "http://a b"), "http://a b cannot be reached"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    said = refusal(*arguments)
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24e9), ("24 GB", 24e9), ("24", 24e9), ("64GiB", 64 * 2**30), ("1.5tib", 1.5 * 2**40), ("0.5g", 5e8)],
)
def test_sizes_of_memory(text: str, size: float) -> None:
    assert parse_memory(text, "--ram") == int(size)


@pytest.mark.parametrize("text", ["", "GB", "24MB", "0GB", "1e3GB", "24GB24GB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size of memory"):
        parse_memory(text, "--ram")


class _Page:
    def __init__(self, rows: tuple[int, ...]) -> None:
        self._rows = rows

    def collect(self) -> Iterator[Any]:
        yield from expert_families(plan_groups("auto", len(self._rows), 2, 1), self._rows, {})


@contextmanager
def server(models: dict[str, tuple[int, ...]], token: str | None = None, page: bytes | None = None) -> Iterator[str]:
    """A gateway's page: the engine's own families, labelled as the gateway labels them, twice: of two coordinators."""
    text = b""
    for model, rows in models.items():
        registry = CollectorRegistry()
        registry.register(_Page(rows))
        for replica in ("a", "b"):
            labels = f'{{model="{model}",deployment="coordinator",replica="{replica}",'.encode()
            text += generate_latest(registry).replace(b"manta_expert_rows_total{", b"manta_expert_rows_total" + labels)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = token is None or self.headers.get("Authorization") == f"Bearer {token}"
            self.send_response(404 if self.path != "/metrics" else 200 if allowed else 401)
            self.end_headers()
            if allowed:
                self.wfile.write(text if page is None else page)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.shutdown()


ROWS = (10, 20, 5, 300, 40, 5, 10, 10)


def test_the_expert_that_is_asked_for_most_is_on_the_card() -> None:
    with server({"mixtral-8x7b": ROWS, "other": (1,) * 4}) as url:
        found = plan("mixtral-8x7b", *CARD, "--observed", url)
        shown = CliRunner().invoke(app, ["plan", "mixtral-8x7b", *CARD, "--observed", url]).output
    [model] = parse_config(found["config"]).models
    assert model.experts.groups[0] == (3,)
    assert found["observed"] == [2 * rows for rows in ROWS], "of both coordinators"
    assert found["cpu_s"] < plan("mixtral-8x7b", *CARD)["cpu_s"] / 1.5
    assert "as observed of 'mixtral-8x7b': 3: 75 %, 4: 10 %" in " ".join(shown.split())
    assert "No --observed: all experts are taken to be asked for alike" in " ".join(
        CliRunner().invoke(app, ["plan", "mixtral-8x7b", *CARD]).output.split()
    )


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({}, "has no manta_expert_rows_total"),
        ({"a": (1,) * 8, "b": (1,) * 8}, "serves 'a', 'b', and none is called 'mixtral-8x7b'"),
        ({"a": (1,) * 4}, "'a' of http://127.0.0.1:PORT has 4 experts and 'mixtral-8x7b' has 8: it is another model"),
        ({"a": (0,) * 8}, "has not sent a row to an expert yet"),
    ],
)
def test_a_page_that_says_nothing_of_the_model_is_one_line(models: dict[str, tuple[int, ...]], message: str) -> None:
    with server(models) as url:
        said = refusal("mixtral-8x7b", *CARD, "--observed", url)
    assert message.replace("http://127.0.0.1:PORT", url) in said
    assert "\n" not in said


def test_a_page_behind_a_token_and_pages_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret\nrest\n")
    with server({"a": ROWS}, token="secret") as url:
        assert "answers 401: give --observed-token-file" in refusal("mixtral-8x7b", *CARD, "--observed", url)
        found = plan("mixtral-8x7b", *CARD, "--observed", f"{url}/metrics", "--observed-token-file", file)
        assert found["observed"] is not None
        assert "answers 404" in refusal("mixtral-8x7b", *CARD, "--observed", f"{url}/else")
    with server({}, page=b'{"not": "metrics"}\n') as url:
        assert "is no page of metrics" in refusal("mixtral-8x7b", *CARD, "--observed", url)


TIERS = """
models:
  - name: mixtral
    path: mistralai/Mixtral-8x7B-Instruct-v0.1
    engine: {device: cuda, dtype: bfloat16, max_model_len: 8192}
    experts:
      groups: [[0], [1], [2, 3, 4], [5, 6, 7]]
      tiers:
        - {groups: [0, 1], device: cuda}
        - {device: cpu, quantization: int4}
"""


def test_a_configuration_with_tiers_is_planned_and_each_tier_is_counted_as_its_device_holds_it(tmp_path: Path) -> None:
    """It was refused: `manta plan` knew GPUs only."""
    file = tmp_path / "manta.yaml"
    file.write_text(TIERS)
    found = plan("--config", file, "--gpu", "L4")
    assert [(one["device"], one["bits"], one["experts"]) for one in found["shards"]] == [
        ("cuda", 16, [0]),
        ("cuda", 16, [1]),
        ("cpu", 4, [2, 3, 4]),
        ("cpu", 4, [5, 6, 7]),
    ]
    assert found["shards"][0]["weight_bytes"] == pytest.approx(10.5 * 2**30, rel=0.01)
    assert found["shards"][2]["weight_bytes"] == pytest.approx(3 * 10.5 * 2**30 * (0.5 + 2 / 128) / 2, rel=0.01)
    plan("--config", file, "--gpu", "L4", "--ram", "32GB")
    assert "expert group 3 needs" in refusal("--config", file, "--gpu", "L4", "--ram", "16GB")
    assert "expert group 1 needs 1 GPU" in refusal("--config", file, "--gpu", "L4", "--gpus", "1")
    many = refusal("--config", file, "--gpu", "L4", "--sequences", "64")
    assert "the coordinator needs 34.99 GiB for 64 sequences of 4096 tokens" in many
    shown = CliRunner().invoke(app, ["plan", "--config", str(file), "--gpu", "L4"]).output
    assert "INT4" in shown
    assert "# The configuration" not in shown, "it is there already"


def test_the_configuration_on_the_page_fits_the_card_and_the_memory_that_it_names(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "quantization.md").read_text()
    file = tmp_path / "manta.yaml"
    file.write_text(
        page.split("Mixtral 8x7B on one card of 24 GB and 64 GB of memory.")[1].split("```")[1].removeprefix("yaml")
    )
    found = plan("--config", file, *CARD)
    assert found["machine"]["cards"] == 1, "shard and coordinator share it"
    assert [one["device"] for one in found["shards"]].count("cuda") == 1


def test_a_cache_of_small_numbers_is_counted_as_such_where_the_coordinator_is_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "manta.yaml"
    file.write_text(TIERS.replace("device: cuda, dtype", "device: cpu, kv_cache_dtype: int8, dtype", 1))
    small = plan("--config", file, "--gpu", "L4")
    file.write_text(TIERS.replace("device: cuda, dtype", "device: cpu, dtype", 1))
    plain = plan("--config", file, "--gpu", "L4")
    assert 1.8 < plain["coordinator"]["cache_bytes"] / small["coordinator"]["cache_bytes"] < 2
    assert plain["machine"]["cards"] == 2, "the coordinator is on none"
    assert plain["attention_s"] > 5 * plan("--config", _tiers(tmp_path), "--gpu", "L4")["attention_s"]
    file.write_text(TIERS.replace("device: cuda, dtype", "device: cuda, kv_cache_dtype: int8, dtype", 1))
    assert "engine.kv_cache_dtype: int8 is for CPUs" in refusal("--config", file, "--gpu", "L4")


def _tiers(directory: Path) -> Path:
    file = directory / "tiers.yaml"
    file.write_text(TIERS)
    return file


def test_a_quantised_directory_is_planned_as_it_is_stored(tmp_path: Path) -> None:
    write_quantized(tmp_path, gptq(4), num_hidden_layers=2, hidden_size=256, intermediate_size=1024)
    found = plan(tmp_path, *CARD, "--dtype", "bfloat16", "--context", "64", "--gpu-memory", "0.6GB")
    assert {one["bits"] for one in found["shards"]} <= {4, 16}
    assert parse_config(found["config"]).models[0].engine.quantization == "none"
