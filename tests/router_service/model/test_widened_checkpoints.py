"""Quantised checkpoints of families that transformers' code computes: each number is what transformers makes of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.commands.verify import command as verify
from cluster.errors import CheckpointError
from cluster.planning.weights import held_weights
from experts_service.kernels.kernel import Kernel
from experts_service.loaded_experts import load_experts
from experts_service.quantization.microscaled import widen_mxfp4
from experts_service.weights import read_widened
from tests.families import random_model
from tests.quantized_checkpoints import awq, compressed_tensors, fine_grained_fp8, gptq, write_quantized_family
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request
from tests.transformers_families import generated, prompt
from tests.widened_checkpoints import by_transformers, to_fp8, write_fp8, write_mxfp4

NEW_TOKENS = 24
LENGTHS = (40, 5, 23)
WRITERS = {"mxfp4": write_mxfp4, "fp8": write_fp8}
CPU = torch.device("cpu")
by_format = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def requests() -> list[Any]:
    return [
        make_request(prompt(length, length), max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=True)
        for length in LENGTHS
    ]


@by_format
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_number_is_what_transformers_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], dtype: str
) -> None:
    """Bit for bit, in the coordinator's layers and in the experts of two shards."""
    write(tmp_path)
    expected = by_transformers(tmp_path, getattr(torch, dtype), monkeypatch).state_dict()
    bench = Bench(tmp_path, dtype=dtype, kernels="torch")  # which packs nothing
    own = bench.engine.model_runner.decoder.model.state_dict()
    experts_of = sorted(name for name in expected if name not in own)
    assert own
    assert experts_of
    for name, tensor in own.items():
        assert torch.equal(tensor.float(), expected[name].float()), name
    checkpoint = open_checkpoint(tmp_path)
    for experts in ((0, 1, 2, 3), (7, 5, 4, 6)):
        read: list[int] = []
        loaded: Any = load_experts(
            checkpoint,
            experts,
            dtype=getattr(torch, dtype),
            device=CPU,
            kernel=Kernel.TORCH,
            on_bytes=read.append,
        )
        assert sum(read) == checkpoint.expert_bytes(experts)
        parts = [part for layer in loaded._layers for _, part in sorted(layer._module.named_parameters())]
        for name, part in zip(experts_of, parts, strict=True):
            assert part.dtype is getattr(torch, dtype)
            assert torch.equal(part, expected[name][list(experts)]), name


@by_format
def test_greedy_tokens_are_those_of_what_the_numbers_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    """In fp32 those that transformers generates; in bf16 those of the checkpoint as transformers would store it."""
    write(tmp_path)
    model = by_transformers(tmp_path, torch.float32, monkeypatch).float()
    bench = Bench(tmp_path, dtype="float32", num_groups=2, max_num_batched_tokens=17)
    expected = [generated(model, prompt(length, length), NEW_TOKENS) for length in LENGTHS]
    assert bench.run(*requests()) == expected
    widened = by_transformers(tmp_path, torch.bfloat16, monkeypatch)
    plain = AutoModelForCausalLM.from_config(widened.config, dtype=torch.bfloat16)
    plain.load_state_dict(widened.state_dict())
    plain.save_pretrained(tmp_path / "plain")
    assert not open_checkpoint(tmp_path / "plain").widened
    both = [Bench(directory, num_groups=2).run(*requests()) for directory in (tmp_path, tmp_path / "plain")]
    assert both[0] == both[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_of_every_byte_and_scale_is_what_transformers_makes_of_it(dtype: torch.dtype) -> None:
    """Also where bf16 has fewer bits left, and where there is no such number."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)
    out = torch.empty(512, 255, dtype=dtype)
    widen_mxfp4("of a test", codes, scales, out)
    bits = torch.int16 if dtype is torch.bfloat16 else torch.int32
    expected = convert_moe_packed_tensors(codes[None], scales[None], dtype=dtype)[0]
    assert torch.equal(out.view(bits), expected.view(bits))
    with pytest.raises(CheckpointError, match="'of a test': one of its scales is not a finite number"):
        widen_mxfp4("of a test", codes[:1], torch.full((1, 16), 255, dtype=torch.uint8), out[:, :1])


def test_blocks_at_the_edge_have_fewer_rows(tmp_path: Path) -> None:
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 rows in blocks of 128, which transformers' own code refuses."""
    write_fp8(tmp_path)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    matrix = torch.randn(tensors[name].shape)  # 24 rows of 32
    tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(matrix, (16, 12))
    by_hand = tensors[name].float()
    for (row, column), scale in [((r, c), tensors[f"{name}_scale_inv"][r, c]) for r in range(2) for c in range(3)]:
        by_hand[row * 16 : row * 16 + 16, column * 12 : column * 12 + 12] *= scale
    kept = {other: tensor for other, tensor in tensors.items() if not other.endswith("_scale_inv")}
    kept |= {other: tensor for other, tensor in tensors.items() if other.startswith(name)}
    plain = {
        other: tensor.bfloat16() if other != name and tensor.itemsize == 1 else tensor for other, tensor in kept.items()
    }
    save_file(plain, tmp_path / "model.safetensors")
    change(tmp_path, weight_block_size=[16, 12])
    ref: Any = open_checkpoint(tmp_path).tensors[name]
    assert torch.equal(read_widened(ref, torch.float32), by_hand)
    assert torch.equal(read_widened(ref, torch.bfloat16), by_hand.bfloat16())


FORMATS = {
    "awq": awq(),
    "compressed-tensors": compressed_tensors(
        "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    ),
    "fp8-channels": compressed_tensors("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-blocks": fine_grained_fp8((32, 32)),
    "gptq": gptq(desc_act=True),
}


@pytest.mark.parametrize("form", FORMATS)
def test_other_formats_are_widened_as_well(tmp_path: Path, form: str) -> None:
    """Of a family that both can compute: a native one keeps the small numbers."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = random_model("qwen3_moe", **sizes, moe_intermediate_size=32, head_dim=16, mlp_only_layers=[])
    model = write_quantized_family(tmp_path, FORMATS[form], model)
    expected = [generated(model, prompt(length, length), NEW_TOKENS) for length in LENGTHS]
    bench = Bench(tmp_path, model_impl="transformers", dtype="float32", num_groups=2)
    assert bench.run(*requests()) == expected
    assert open_checkpoint(tmp_path, "transformers").widened
    assert not open_checkpoint(tmp_path).widened


@by_format
def test_what_is_held_and_what_is_read_are_counted(
    tmp_path: Path, write: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    a = checkpoint.architecture
    held, loaded = (
        held_weights(checkpoint, "bfloat16", "cpu"),
        load_experts(checkpoint, (3,), dtype=torch.bfloat16, device=CPU, kernel=Kernel.TORCH),
    )
    layers: Any = loaded._layers  # type: ignore[attr-defined]
    assert held.expert == sum(part.nbytes for layer in layers for part in layer._module.parameters())
    with caplog.at_level(logging.INFO):
        own = Bench(tmp_path, kernels="torch").engine.model_runner.decoder.model
    assert abs(held.coordinator - sum(tensor.nbytes for tensor in own.state_dict().values())) < 2 * a.num_experts * 4
    assert f"weights in {checkpoint.widened[0]} are widened to bfloat16 while they are read" in caplog.text
    assert checkpoint.expert_bytes(range(8)) + checkpoint.coordinator_bytes() == sum(
        tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values()
    )


def test_layers_that_predict_further_tokens_are_not_counted(tmp_path: Path) -> None:
    """DeepSeek-V3 has one after its last, with experts; no process holds it."""
    write_fp8(tmp_path)
    before = held_weights(open_checkpoint(tmp_path), "bfloat16", "cpu")
    tensors = load_file(tmp_path / "model.safetensors")
    more = {name.replace("layers.3.", "layers.4."): tensor for name, tensor in tensors.items() if "layers.3." in name}
    save_file(tensors | {name: tensor.clone() for name, tensor in more.items()}, tmp_path / "model.safetensors")
    assert held_weights(open_checkpoint(tmp_path), "bfloat16", "cpu") == before
    assert Bench(tmp_path, num_groups=2).run(*requests()[:1])


def change(directory: Path, **keys: Any) -> None:
    """What quantization_config says; a key that is None goes."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    said = config["quantization_config"] | keys
    config["quantization_config"] = {key: value for key, value in said.items() if value is not None}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("bitsandbytes", r"quantization_config.quant_method is 'bitsandbytes', which is made for"),
        ("nvfp4", r"quantization_config.quant_method is 'nvfp4', which is a 4-bit float"),
        ("fp8", r"is not known to Manta and may change|and no matrix is stored so|is U8; expected plain numbers"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path: Path, method: str, message: str) -> None:
    write_mxfp4(tmp_path)
    change(tmp_path, quant_method=method)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_key_that_is_not_known_is_refused(tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    change(tmp_path, rotated=True)
    with pytest.raises(CheckpointError, match=r"quantization_config.rotated is not known to Manta and may change"):
        open_checkpoint(tmp_path)


def test_a_part_that_is_missing_or_has_another_shape_is_named(tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.experts.down_proj"
    tensors = load_file(file)
    scales = tensors.pop(f"{name}_scales")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"has '{name}_blocks' and no file has '{name}_scales'"):
        open_checkpoint(tmp_path)
    save_file(tensors | {f"{name}_scales": scales[:, :-1].contiguous()}, file)
    with pytest.raises(CheckpointError, match=rf"{name}_scales' is U8 \(8, 63, 1\); expected U8 \(8, 64, 1\)"):
        open_checkpoint(tmp_path)


def test_small_numbers_that_no_config_tells_of_are_refused(tmp_path: Path) -> None:
    write_fp8(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"_proj.weight' is F8_E4M3; expected plain numbers"):
        open_checkpoint(tmp_path)


def test_manta_verify_compares_with_what_transformers_dequantises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mxfp4(tmp_path)
    assert verify.run(str(tmp_path), None, "auto", "float32", 8, as_json=True)
    assert json.loads(capsys.readouterr().out)["good"]
