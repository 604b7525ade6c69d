"""`manta quantize`: what it writes is read by Manta, transformers and compressed-tensors to the same numbers."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from typer.testing import CliRunner

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.quantization.rounding import Numbers, Parts, Rounding
from cluster.cli import app
from cluster.commands.quantize import quantize
from cluster.demo_model import DIRECTORY as DEMO
from cluster.errors import ConfigError, SetupError
from experts_service.quantization.weight import QuantizedWeight, dense
from experts_service.weights import read_tensors
from tests.checkpoints import Layout, hub_state_dict, write_checkpoint
from tests.memory import peak_bytes
from tests.programs import REPOSITORY, program
from tests.quantized_checkpoints import SIZES, gptq, write_quantized
from tests.router_service.engine.test_engine import logits_of
from tests.router_service.engines import Bench
from tests.waiting import wait_for

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.format import infer_model_format
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import is_module_quantized

FORMATS: list[tuple[Numbers, Parts]] = [
    ("int8", "layers"),
    ("int4", "layers"),
    ("int4", "experts"),
    ("int8", "attention"),
    ("fp8", "layers"),
    ("fp8", "experts"),
]
DEQUANTIZED = CompressedTensorsConfig(dequantize=True)  # experts are no Linears in transformers 5
PROMPT = [5, 17, 60, 33, 8, 71, 2]


def write(plain: Path, directory: Path, numbers: Numbers = "int4", parts: Parts = "layers", **how: Any) -> Rounding:
    rounding = Rounding.to(numbers, 32, parts)
    quantize(open_checkpoint(plain), directory, rounding, **how)
    return rounding


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # how transformers is told to dequantise
@pytest.mark.parametrize("is_dense", [False, True], ids=["mixtral", "mistral"])
@pytest.mark.parametrize(("numbers", "parts"), FORMATS)
def test_it_holds_what_is_rounded_while_loading_and_transformers_reads_it_so(
    tmp_path: Path, numbers: Numbers, parts: Parts, is_dense: bool
) -> None:
    """Codes, scales and plain tensors to the bit; and transformers computes the logits that we do."""
    plain, directory = tmp_path / "plain", tmp_path / "small"
    write_checkpoint(plain, dense=is_dense, num_hidden_layers=2, **SIZES)
    rounding = write(plain, directory, numbers, parts, shard_bytes=50_000)
    loaded = open_checkpoint(plain).rounded(rounding)
    stored = open_checkpoint(directory)
    assert len({ref.stored[0].file for ref in stored.tensors.values()}) > 1
    expected, found = (read_tensors(one, one.tensors, dtype=torch.float32) for one in (loaded, stored))
    assert list(expected) == list(found)
    for name, weight in expected.items():
        other = found[name]
        if isinstance(weight, QuantizedWeight):
            assert isinstance(other, QuantizedWeight), name
            assert torch.equal(weight.codes.view(torch.uint8), other.codes.view(torch.uint8)), name
            assert torch.equal(weight.scales, other.scales), name
            assert (weight.bits, weight.group_size) == (other.bits, other.group_size), name
        else:
            assert torch.equal(weight, dense(other)), name
    if parts == "attention" and not is_dense:
        return  # transformers takes the experts of a quantised Mixtral for quantised
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=DEQUANTIZED)
    of_theirs = hub_state_dict(theirs)
    assert all(torch.equal(dense(weight), of_theirs[name]) for name, weight in found.items())
    with torch.inference_mode():
        logits = theirs(torch.tensor([PROMPT])).logits[0, -1]
    torch.testing.assert_close(logits_of(Bench(directory), PROMPT), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["huggingface", "fused"])
def test_experts_have_the_hubs_names_whatever_they_were_called(tmp_path: Path, layout: Layout) -> None:
    write_checkpoint(tmp_path / "plain", layout=layout, **SIZES)
    write(tmp_path / "plain", tmp_path / "small")
    w1 = "model.layers.1.block_sparse_moe.experts.3.w1"
    stored = load_file(tmp_path / "small/model-00001-of-00001.safetensors")
    parts = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items() if w1 in name}
    assert parts == {
        f"{w1}.weight_packed": (torch.int32, (96, 8)),
        f"{w1}.weight_scale": (torch.float32, (96, 2)),
        f"{w1}.weight_shape": (torch.int64, (2,)),
    }
    assert stored["model.layers.1.block_sparse_moe.gate.weight"].dtype is torch.float32


@pytest.mark.parametrize("numbers", ["int8", "int4", "fp8"])
def test_names_shapes_and_config_are_those_of_the_library_that_vllm_reads_by(tmp_path: Path, numbers: Numbers) -> None:
    """A Mistral that compressed-tensors' own compressor writes, with our scales, is the same file and the same scheme;
    only activations are ours to leave out."""
    plain, directory = tmp_path / "plain", tmp_path / "small"
    model = write_checkpoint(plain, dense=True, num_hidden_layers=1, **SIZES)
    write(plain, directory, numbers)
    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    ours = load_file(directory / "model-00001-of-00001.safetensors")
    config = QuantizationConfig.model_validate(section)
    apply_quantization_config(model, config)
    for name, module in model.named_modules():
        if is_module_quantized(module):
            assert module.weight_scale.shape == ours[f"{name}.weight_scale"].shape
            module.weight_scale.data.copy_(ours[f"{name}.weight_scale"])
    ModelCompressor(config).compress_model(model)
    theirs = model.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        bits = torch.uint8 if tensor.dtype is torch.float8_e4m3fn else tensor.dtype
        assert torch.equal(tensor.view(bits), theirs[name].view(bits)), name
    assert infer_model_format(model) == section["format"] == section["config_groups"]["group_0"]["format"]


@pytest.mark.parametrize(("numbers", "most"), [("int8", 0.55), ("int4", 0.30), ("fp8", 0.55)])
def test_the_demo_model_is_smaller_and_keeps_all_its_other_files(tmp_path: Path, numbers: Numbers, most: float) -> None:
    plain, directory = tmp_path / "plain", tmp_path / "small"
    shutil.copytree(DEMO, plain, ignore=shutil.ignore_patterns("dense", "training", "*.py", "__pycache__"))
    for name in ("LICENSE", "tokenizer.model", "pytorch_model.bin", "consolidated.safetensors", ".gitattributes"):
        (plain / name).write_text(name)
    checkpoint = open_checkpoint(plain)
    small = quantize(checkpoint, directory, Rounding.to(numbers, 32, "layers"))
    kept = {file.name for file in directory.iterdir()} - {"config.json"}
    assert kept == {
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert all((directory / name).read_bytes() == (plain / name).read_bytes() for name in kept if "safe" not in name)
    config = json.loads((directory / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((plain / "config.json").read_text())
    matrices = [name for name in checkpoint.tensors if Rounding.to(numbers, 32, "layers").of(name)]
    sizes = [sum(one.tensors[name].nbytes for name in matrices) for one in (small, checkpoint)]
    assert sizes[0] / sizes[1] < most
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    with safe_open(directory / "model-00001-of-00001.safetensors", "pt") as file:
        assert set(index["weight_map"]) == set(file.keys())
        assert index["metadata"]["total_size"] == sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    plain, quantised, mistral, used = (tmp_path / name for name in ("plain", "quantised", "mistral", "used"))
    write_checkpoint(plain, **SIZES)
    write_quantized(quantised, gptq())
    write_checkpoint(mistral, layout="mistral", **SIZES)
    used.mkdir()
    (used / "notes").write_text("mine")
    for source, target, group_size, error, message in (
        (quantised, tmp_path / "new", 32, ConfigError, "is quantised already; take the original"),
        (mistral, tmp_path / "new", 32, ConfigError, "is in Mistral's layout; take the model in Hugging Face's"),
        (plain, used, 32, SetupError, "used is not empty"),
        (plain, plain, 32, SetupError, "plain is not empty"),
        (plain, used / "notes", 32, SetupError, "cannot be written: Not a directory"),
        (plain, tmp_path / "new", 40, ConfigError, "--group-size: 40 does not divide the 64 inputs of model.layers.0"),
    ):
        with pytest.raises(error, match=message):
            quantize(open_checkpoint(source), target, Rounding.to("int4", group_size, "layers"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mistral", "plain", "quantised", "used"]
    assert [path.name for path in used.iterdir()] == ["notes"]


@pytest.mark.parametrize("numbers", ["int8", "int4", "fp8"])
def test_memory_holds_one_matrix_and_not_the_model(tmp_path: Path, numbers: Numbers) -> None:
    """Twice the largest matrix as it is stored, and 16 MiB: here of 100 MB, and of Mixtral 8x7B 250 MB."""
    write_checkpoint(tmp_path / "plain", hidden_size=256, intermediate_size=4096, head_dim=16)
    checkpoint = open_checkpoint(tmp_path / "plain")
    largest = max(ref.nbytes for ref in checkpoint.tensors.values())
    assert largest == 4 * 2**20 < sum(ref.nbytes for ref in checkpoint.tensors.values()) / 20
    warm_up = Rounding.to(numbers, 32, "attention")
    quantize(checkpoint, tmp_path / "small", warm_up)
    taken = peak_bytes(lambda: quantize(checkpoint, tmp_path / "again", Rounding.to(numbers, 32, "layers")))
    assert taken < 2 * largest + 16 * 2**20


def command(*arguments: object) -> subprocess.Popen[bytes]:
    """One that stands still once its first file has to be on the disk."""
    return subprocess.Popen(program("cluster.quantize_and_stop", *arguments), cwd=REPOSITORY, stdout=subprocess.DEVNULL)


def test_a_killed_run_leaves_nothing_that_looks_complete_and_the_next_one_clears_it_away(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "plain", hidden_size=256, intermediate_size=4096, head_dim=16)
    new, partial = tmp_path / "new", tmp_path / ".new.partial"
    with command(tmp_path / "plain", new, "--to", "int4", "--group-size", 32) as process:
        try:
            wait_for(lambda: any(file.stat().st_size for file in partial.glob("*.safetensors")), 300, "some weights")
            with pytest.raises(SetupError, match=r"another process is writing .*\.new\.partial"):
                write(tmp_path / "plain", new)
        finally:
            process.kill()
    assert not new.exists()
    assert not (partial / "config.json").exists()
    write(tmp_path / "plain", new)
    assert not partial.exists()
    assert open_checkpoint(new).tensors


def test_a_disk_that_takes_no_more_is_one_line_and_nothing_is_left(tmp_path: Path) -> None:
    """Whoever checks the room before cannot know what others write meanwhile. Here files may not grow, really."""
    write_checkpoint(tmp_path / "plain", **SIZES)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(SetupError, match=r"^.*/new cannot be written: File too large$"):
            write(tmp_path / "plain", tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (("--to", "int3"), 2, "'int3' is not one of 'int8', 'int4', 'fp8'"),
        (("--to", "fp8", "--group-size", "32"), 2, "fp8 has a scale for each output"),
        (("--to", "int4", "--group-size", "20"), 2, "expected a multiple of 8"),
        (("--to", "int8", "--parts", "attention"), 0, "demo, INT8, groups of 128: "),
    ],
)
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], status: int, said: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["quantize", "demo", str(tmp_path / "new"), *options])
    assert result.exit_code == status, result.output
    assert said in result.output
    assert (tmp_path / "new").exists() is (status == 0)


def test_the_working_directory_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All was written, and then the directory that had been there was asked for its config.json."""
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    result = CliRunner().invoke(app, ["quantize", "demo", ".", "--to", "int8"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new" / "config.json").is_file()
