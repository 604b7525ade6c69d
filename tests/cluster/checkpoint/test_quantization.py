"""What a quantised checkpoint says of itself, and what is said of one that contradicts itself before it loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.hub import resolve_model
from cluster.checkpoint.json_document import JsonDocument
from cluster.checkpoint.quantization.config import read_quantization
from cluster.checkpoint.quantization.quantized_ref import QuantizedRef
from cluster.checkpoint.quantization.scheme import Awq, Gptq, Packed, Values
from cluster.errors import CheckpointError, ConfigError
from experts_service.quantization.weight import QuantizedWeight, dense
from experts_service.weights import read_tensors
from tests.checkpoints import hub_state_dict, refusal
from tests.programs import said_by
from tests.quantized_checkpoints import (
    Format,
    auto_fp8,
    awq,
    compressed_tensors,
    fine_grained_fp8,
    fp8,
    gptq,
    write_quantized,
)

W1 = "model.layers.0.block_sparse_moe.experts.1.w1"
Q = "model.layers.0.self_attn.q_proj"

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False}
FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}


def packed(**weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": INT4 | weights}
    return compressed_tensors("pack-quantized", INT4).config | {"config_groups": {"group_0": group}}


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | changes}))


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def scheme_of(config: dict[str, Any], module: str = Q) -> Any:
    document = JsonDocument(Path("config.json"), {"quantization_config": json.loads(json.dumps(config))})
    quantization = read_quantization(document)
    assert quantization is not None
    schemes = quantization.schemes_of([module], {"Linear"})
    return schemes[0] if schemes else None


# What is recognised


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (packed(), Packed(4, (1, 32), zero_points=False, act_order=False)),
        (packed(symmetric=False, actorder="group"), Packed(4, (1, 32), zero_points=True, act_order=True)),
        (packed(actorder=True), Packed(4, (1, 32), zero_points=False, act_order=True)),
        (packed(strategy=None), Packed(4, (1, 32), zero_points=False, act_order=False)),
        (packed(strategy=None, group_size=-1), Packed(4, (1, None), zero_points=False, act_order=False)),
        (packed(strategy=None, group_size=None), Packed(4, (None, None), zero_points=False, act_order=False)),
        (compressed_tensors("float-quantized", FLOAT).config, Values(8, True, (1, None))),
        (
            compressed_tensors(
                "float-quantized", FLOAT | {"strategy": "block", "block_structure": [128, 64], "observer": "minmax"}
            ).config,
            Values(8, True, (128, 64)),
        ),
        (fine_grained_fp8((128, 128)).config, Values(8, True, (128, 128), scale_suffix="weight_scale_inv")),
        ({"quant_method": "fp8"}, Values(8, True, (128, 128), scale_suffix="weight_scale_inv")),
        ({"quant_method": "fp8", "weight_block_size": None}, Values(8, True, (None, None), False, "weight_scale_inv")),
        (gptq().config, Gptq(4, 32, act_order=False, symmetric=True, stored_less_one=True)),
        (gptq(8, -1, desc_act=True, sym=False, layout="gptq_v2").config, Gptq(8, None, True, False, False)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, Gptq(4, 128, False, False, True)),
        (awq().config, Awq(32)),
        (awq(symmetric=True).config | {"sym": False}, Awq(32, symmetric=True)),
        (awq().config | {"sym": True}, Awq(32)),  # zero_point is what counts
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True}, Awq(128)),
    ],
)
def test_each_method_says_how_matrices_are_stored(config: dict[str, Any], scheme: Any):
    assert scheme_of(config) == scheme


@pytest.mark.parametrize(
    ("ignore", "ignored"),
    [
        ([Q], {Q}),
        (["re:.*w[13]$"], {W1}),
        (["re:model.layers.0"], {Q, W1}),
        (["Linear"], {Q, W1}),
        (["q_proj", "re:w1"], set()),  # a name is a whole one, and an expression begins where the name does
        ([], set()),
    ],
)
def test_ignored_modules_are_named_by_name_expression_or_class(ignore: list[str], ignored: set[str]):
    config = packed() | {"ignore": ignore}
    assert {module for module in (Q, W1) if scheme_of(config, module) is None} == ignored


def test_of_several_groups_a_name_goes_before_an_expression_and_that_before_a_class():
    groups = {
        "all": {"targets": ["Linear"], "weights": INT4},
        "experts": {"targets": ["re:.*experts.*"], "weights": INT4 | {"num_bits": 8}},
        "one": {"targets": [W1], "weights": FLOAT, "format": "float-quantized"},
        "none": {"targets": [Q], "weights": None, "input_activations": FLOAT},
    }
    config = packed() | {"config_groups": groups, "format": "mixed-precision"}
    for group in ("all", "experts"):
        groups[group]["format"] = "pack-quantized"
    assert scheme_of(config, W1) == Values(8, True, (1, None))
    assert scheme_of(config, W1.replace("w1", "w2")).bits == 8
    assert scheme_of(config, Q.replace("q_proj", "o_proj")).bits == 4
    assert scheme_of(config, Q) is None


def test_opening_imports_no_torch(tmp_path: Path):
    write_quantized(tmp_path, gptq(desc_act=True), num_hidden_layers=1)
    modules = said_by("cluster.open_checkpoint", tmp_path).split()
    assert "cluster.checkpoint.quantization.contents" in modules
    assert not {"torch", "ray", "numpy"} & set(modules)


def test_the_fingerprint_is_of_the_quantisation_too(tmp_path: Path):
    """Zero points of the same bits mean something else in gptq_v2: nobody may go on with the other's tokens."""
    write_quantized(tmp_path, gptq(sym=False), num_hidden_layers=1)
    fingerprint = open_checkpoint(tmp_path).fingerprint
    assert open_checkpoint(tmp_path).fingerprint == fingerprint
    change_config(tmp_path, checkpoint_format="gptq_v2")
    assert open_checkpoint(tmp_path).fingerprint != fingerprint
    change_config(tmp_path, checkpoint_format="gptq")

    def scale_one(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.scales"][0, 0] *= 2

    change_tensors(tmp_path, scale_one)
    assert open_checkpoint(tmp_path).fingerprint != fingerprint


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("block_sparse_moe", "mlp"),
        lambda name: (
            name.replace("block_sparse_moe", "mlp")
            .replace(".w1.", ".gate_proj.")
            .replace(".w2.", ".down_proj.")
            .replace(".w3.", ".up_proj.")
        ),
    ],
    ids=["mlp", "projections"],
)
@pytest.mark.parametrize("of", [gptq(), compressed_tensors("pack-quantized", INT4)], ids=["gptq", "packed"])
def test_experts_may_have_the_names_that_transformers_5_gives_their_parts(tmp_path: Path, of: Format, rename: Any):
    model = write_quantized(tmp_path, of, rename=rename, num_hidden_layers=1)
    checkpoint = open_checkpoint(tmp_path)
    tensors = read_tensors(checkpoint, checkpoint.tensors, dtype=torch.float32)
    assert all(torch.equal(dense(tensors[name]), wide) for name, wide in hub_state_dict(model).items())


@pytest.mark.parametrize("block", [(32, 32), (48, 64), None])
def test_fp8_experts_of_a_layer_may_be_one_tensor_with_one_of_scales(tmp_path: Path, block: Any):
    """As transformers 5 has them in memory."""
    model = write_quantized(tmp_path, fine_grained_fp8(block), num_hidden_layers=1)

    def stack(tensors: dict[str, Tensor]) -> None:
        layer = "model.layers.0.block_sparse_moe.experts"

        def taken(suffix: str, *matrices: str) -> Tensor:
            of_experts = [[tensors.pop(f"{layer}.{e}.{m}.{suffix}") for m in matrices] for e in range(4)]
            as_rows = [[part if part.dim() == 2 else part.view(1, 1) for part in parts] for parts in of_experts]
            # torch concatenates no fp8
            return torch.stack([torch.cat([part.float() for part in parts]) for parts in as_rows])

        for fused, matrices in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
            name = f"model.layers.0.mlp.experts.{fused}"
            tensors[name] = taken("weight", *matrices).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = taken("weight_scale_inv", *matrices)

    change_tensors(tmp_path, stack)
    checkpoint = open_checkpoint(tmp_path)
    tensors = read_tensors(checkpoint, checkpoint.tensors, dtype=torch.float32)
    assert all(torch.equal(dense(tensors[name]), wide) for name, wide in hub_state_dict(model).items())


def test_a_block_that_lies_in_two_experts_matrices_is_refused(tmp_path: Path):
    """Of 96 rows each, blocks of 64 end in the middle of w3: there are three, and two of each would be four."""
    write_quantized(tmp_path, fine_grained_fp8((64, 32)), num_hidden_layers=1, intermediate_size=96)

    def stack(tensors: dict[str, Tensor]) -> None:
        layer = "model.layers.0.block_sparse_moe.experts"
        for suffix, rows in (("weight", 192), ("weight_scale_inv", 3)):
            parts = [tensors.pop(f"{layer}.{e}.{m}.{suffix}") for e in range(4) for m in ("w1", "w3")]
            name = "model.layers.0.mlp.experts.gate_up_proj" + ("" if suffix == "weight" else "_scale_inv")
            tensors[name] = torch.zeros(4, rows, parts[0].shape[1]).to(parts[0].dtype)

    change_tensors(tmp_path, stack)
    assert "matrices of 96 rows one below the other, and blocks of 64 would lie in two of them" in refusal(tmp_path)


def test_scales_that_are_powers_of_two_are_read(tmp_path: Path):
    of = fine_grained_fp8((32, 32), scale_fmt="ue8m0")
    pack = fp8((32, 32), "weight_scale_inv", torch.float8_e8m0fnu)
    model = write_quantized(tmp_path, Format(of.config, pack), dense=True, num_hidden_layers=1)
    checkpoint = open_checkpoint(tmp_path)
    tensors = read_tensors(checkpoint, checkpoint.tensors, dtype=torch.float32)
    assert all(torch.equal(dense(tensors[name]), wide) for name, wide in hub_state_dict(model).items())


def test_a_gate_that_nobody_lists_stays_as_it_is_and_a_head_that_is_quantised_is_read(tmp_path: Path):
    of = compressed_tensors("pack-quantized", INT4)
    of = Format(of.config | {"ignore": []}, of.pack, packs=lambda module: not module.endswith(".gate"))
    model = write_quantized(tmp_path, of, num_hidden_layers=1)
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint.tensors["lm_head.weight"], QuantizedRef)
    tensors = read_tensors(checkpoint, checkpoint.tensors, dtype=torch.float32)
    assert all(torch.equal(dense(tensors[name]), wide) for name, wide in hub_state_dict(model).items())


def test_biases_of_zeros_that_autogptq_wrote_are_no_biases(tmp_path: Path):
    of = gptq()
    write_quantized(tmp_path, of, num_hidden_layers=1)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.bias"] = torch.zeros(64, dtype=torch.float16)

    change_tensors(tmp_path, add)
    open_checkpoint(tmp_path)

    def set_one(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.bias"][3] = 1

    change_tensors(tmp_path, set_one)
    assert f"{tmp_path / 'model.safetensors'}: tensor '{Q}.bias' is not zero" in refusal(tmp_path)


# What is refused by its name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method is 'bitsandbytes', which is made for bitsandbytes' CUDA kernels",
        ),
        ({"load_in_4bit": True}, "which is made for bitsandbytes' CUDA kernels"),
        (
            {"quant_method": "aqlm"},
            "'aqlm', which is none that Manta reads: compressed-tensors, fp8, gptq, awq; take a",
        ),
        ({"quant_method": "mxfp4"}, "'mxfp4', which is a 4-bit float"),
        ({"quant_method": "marlin"}, "'marlin', which is packed in the order of a CUDA kernel's threads"),
        ({"quant_method": "gguf"}, "'gguf', which is llama.cpp's format"),
        ({}, "quant_method is None, which is none that Manta reads"),
        (gptq().config | {"bits": 3}, "bits is 3; Manta reads 4 and 8"),
        (gptq().config | {"bits": 2}, "bits is 2; Manta reads 4 and 8"),
        (
            gptq().config | {"checkpoint_format": "marlin"},
            "checkpoint_format is 'marlin', which is packed in the order",
        ),
        (gptq().config | {"is_marlin_format": True}, "checkpoint_format is 'marlin'"),
        (gptq().config | {"group_size": 0}, "group_size is 0; expected -1"),
        (gptq().config | {"dynamic": {"+:.*w2": {"bits": 8}}}, "quantization_config.dynamic is not known to Manta"),
        (gptq().config | {"pack_dtype": "int16"}, "pack_dtype is 'int16'; expected 'int32'"),
        (awq(version="gemv").config, "version is 'gemv', which is packed in the order of a CUDA kernel's threads"),
        (awq(bits=3).config, "bits is 3; Manta reads 4"),
        (fine_grained_fp8((128, 128), fmt="e5m2").config, "fmt is 'e5m2'; expected 'e4m3'"),
        (fine_grained_fp8((128, 128), expert_dtype="fp4").config, "expert_dtype is 'fp4'; expected 'fp8'"),
        (fine_grained_fp8((0, 128)).config, "weight_block_size is [0, 128]; expected two positive integers"),
        (
            packed() | {"format": "marlin-24"},
            "format is 'marlin-24', which Manta does not read; save the model as one of",
        ),
        (packed() | {"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized', which Manta does not read"),
        (packed() | {"format": "mixed-precision"}, "there each group names its own format"),
        (packed(num_bits=3), "config_groups.group_0.weights.num_bits is 3 of type 'int'; Manta reads int of 4 and 8"),
        (packed(num_bits=4, type="float"), "num_bits is 4 of type 'float'; Manta reads int of 4 and 8"),
        (
            packed(strategy="tensor_group"),
            "strategy is 'tensor_group'; expected 'tensor', 'channel', 'group' or 'block'",
        ),
        (packed(group_size=-1), "group_size is -1; expected a positive integer for strategy 'group'"),
        (packed(dynamic=True), "dynamic is true: weights without scales of their own"),
        (packed(actorder="rows"), "actorder is 'rows'; expected 'group' or 'weight'"),
        (packed(outliers=3), "weights.outliers is not known to Manta"),
        (packed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "without the sparse compressor"),
        (packed() | {"transform_config": {"config_groups": {"R1": {}}}}, "its rotations of activations"),
        (packed() | {"ignore": ["re:("]}, "ignore holds 're:(', which is no expression"),
        (packed() | {"ignore": "lm_head"}, "ignore is 'lm_head'; expected a list of names"),
        (packed() | {"config_groups": {}}, "config_groups is missing, which says what is quantised"),
    ],
)
def test_what_is_not_read_is_refused_by_its_key(config: dict[str, Any], message: str):
    with pytest.raises(CheckpointError) as caught:
        scheme_of(config)
    assert message in caught.value.message
    assert caught.value.message.startswith("config.json: quantization_config")


def test_what_says_that_there_is_nothing_is_not_refused():
    nothing = {
        "sparsity_config": {"format": "dense"},
        "transform_config": {},
        "version": "0.9",
        "moe_sparsity_config": None,
    }
    assert scheme_of(packed() | nothing) is not None
    assert scheme_of(packed(scale_dtype=None, block_structure=None, observer_kwargs={})) is not None
    assert scheme_of(gptq().config | {"dynamic": None, "adapter": {}, "rotation": False}) is not None


# What contradicts itself


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def put(name: str, new: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = new(tensors[name])

    return change


def out_of_range(g_idx: Tensor) -> Tensor:
    g_idx[5] = 2
    return g_idx


PACKED_ASYMMETRIC = compressed_tensors("pack-quantized", INT4 | {"symmetric": False})
PACKED_ORDERED = compressed_tensors("pack-quantized", INT4 | {"actorder": "group"})
INT8_CHANNEL = INT4 | {"num_bits": 8, "strategy": "channel", "group_size": None}
INT8 = compressed_tensors("int-quantized", INT8_CHANNEL)


@pytest.mark.parametrize(
    ("of", "change", "message"),
    [
        (gptq(), drop(f"{W1}.scales"), f"has '{W1}.qweight' and no file has '{W1}.scales'; expected one of dtype F32"),
        (gptq(), drop(f"{W1}.qzeros"), f"no file has '{W1}.qzeros'; expected one of dtype I32 and shape (2, 12)"),
        (gptq(), drop(f"{W1}.qweight"), f"has no tensor '{W1}.weight'; expected one of shape (96, 64)"),
        (gptq(desc_act=True), drop(f"{W1}.g_idx"), f"no file has '{W1}.g_idx'; expected one of dtype I32 or I64"),
        (gptq(), put(f"{W1}.scales", lambda t: t[:1]), f"'{W1}.scales' has shape (1, 96); expected (2, 96) (GPTQ of 4"),
        (gptq(), put(f"{W1}.qzeros", lambda t: t.t()), f"'{W1}.qzeros' has shape (12, 2); expected (2, 12) (GPTQ of 4"),
        (gptq(), put(f"{W1}.scales", lambda t: t.int()), f"'{W1}.scales' has dtype I32; expected F32 or BF16 or F16"),
        (gptq(), put(f"{W1}.qweight", lambda t: t.float()), f"'{W1}.qweight' has dtype F32; expected I32"),
        (
            gptq(desc_act=True),
            put(f"{W1}.g_idx", out_of_range),
            f"'{W1}.g_idx' says of input 5 that its group is 2; there are groups 0 to 1 (GPTQ of 4 bits",
        ),
        (awq(), put(f"{Q}.qzeros", lambda t: t.t()), f"'{Q}.qzeros' has shape (8, 2); expected (2, 8) (AWQ of 4 bits"),
        (awq(), drop(f"{Q}.scales"), f"no file has '{Q}.scales'"),
        (
            PACKED_ASYMMETRIC,
            drop(f"{Q}.weight_zero_point"),
            f"no file has '{Q}.weight_zero_point'; expected one of dtype I32",
        ),
        (
            PACKED_ASYMMETRIC,
            put(f"{Q}.weight_zero_point", lambda t: t.t()),
            f"'{Q}.weight_zero_point' has shape (2, 8); expected (8, 2) (4 bits packed, a scale for each group of 32",
        ),
        (PACKED_ORDERED, drop(f"{Q}.weight_g_idx"), f"no file has '{Q}.weight_g_idx'"),
        (
            PACKED_ORDERED,
            put(f"{Q}.weight_shape", lambda t: t + 8),
            f"'{Q}.weight_shape' says (72, 72); expected (64, 64), the shape of '{Q}.weight'",
        ),
        (
            PACKED_ORDERED,
            put(f"{Q}.weight_g_idx", lambda t: t - 1),
            f"'{Q}.weight_g_idx' says of input",
        ),
        (
            INT8,
            drop(f"{Q}.weight_scale"),
            f"has '{Q}.weight' and no file has '{Q}.weight_scale'; expected one of dtype",
        ),
        (
            INT8,
            put(f"{Q}.weight", lambda t: t.bfloat16()),
            f"'{Q}.weight' is stored in BF16; quantization_config says that it is INT8, a scale for each output, in",
        ),
        (
            auto_fp8(),
            drop(f"{Q}.weight_scale"),
            f"has '{Q}.weight' and no file has '{Q}.weight_scale_inv'; expected one of dtype F32",
        ),
        (
            fine_grained_fp8((32, 32)),
            put(f"{Q}.weight_scale_inv", lambda t: t[:1]),
            f"'{Q}.weight_scale_inv' has shape (1, 2); expected (2, 2) (FP8, a scale for each block of 32 outputs",
        ),
        (
            fine_grained_fp8((32, 32)),
            put(f"{Q}.weight", lambda t: t.view(torch.float8_e5m2)),
            f"'{Q}.weight' has dtype F8_E5M2; expected F32, BF16, F16",
        ),
    ],
)
def test_damaged_and_mislabelled_files_are_told_by_file_and_tensor(
    tmp_path: Path, of: Format, change: Callable[[dict[str, Tensor]], None], message: str
):
    write_quantized(tmp_path, of, num_hidden_layers=1)
    open_checkpoint(tmp_path)
    change_tensors(tmp_path, change)
    said = refusal(tmp_path)
    assert message in said
    assert str(tmp_path) in said


@pytest.mark.parametrize(
    ("of", "changes", "message"),
    [
        (gptq(), {"group_size": 64}, "has shape (2, 64); expected (1, 64)"),
        (gptq(), {"bits": 8}, "has shape (8, 64); expected (16, 64) (GPTQ of 8 bits"),
        (awq(), {"group_size": -1}, "expected (1, 64) (AWQ of 4 bits, a scale for each output)"),
        (PACKED_ORDERED, {"ignore": [Q]}, f"has no tensor '{Q}.weight'; expected one of shape (64, 64)"),
        (INT8, {"ignore": [Q, "lm_head"]}, f"tensor '{Q}.weight' has dtype I8; expected F32, BF16, F16"),
        (fine_grained_fp8((32, 32)), {"weight_block_size": [64, 32]}, "expected"),
        (gptq(), {"quant_method": "fp8", **dict.fromkeys(gptq().config.keys() - {"quant_method"})}, "has no tensor"),
    ],
)
def test_a_config_that_says_otherwise_than_the_files(tmp_path: Path, of: Format, changes: dict[str, Any], message: str):
    write_quantized(tmp_path, of, num_hidden_layers=1)
    change_config(tmp_path, **changes)
    said = refusal(tmp_path)
    assert message in said
    assert str(tmp_path) in said


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_zero_points_where_there_are_said_to_be_none_are_told_before_anything_is_read(
    tmp_path: Path, bits: int, layout: str
):
    write_quantized(tmp_path, gptq(bits, sym=False, layout=layout), num_hidden_layers=1)
    change_config(tmp_path, sym=True)
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path}/model.safetensors: tensor '{Q}.qzeros' has zero points other than ")
    assert "sym: true" in said


def test_awqs_zero_points_where_there_are_said_to_be_none_are_told_before_anything_is_read(tmp_path: Path):
    """`zero_point: false` was read past. AutoAWQ's writer knows no such files, so people wrote them by hand, with zero
    points of 0 for all: their models talked nonsense.
    """
    write_quantized(tmp_path, awq(symmetric=True), num_hidden_layers=1)

    def forget(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.qzeros"].zero_()

    change_tensors(tmp_path, forget)
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path}/model.safetensors: tensor '{Q}.qzeros' has zero points other than 8; ")
    assert "zero_point: false" in said


def test_zero_points_of_integers_that_are_said_to_be_symmetric_are_told(tmp_path: Path):
    """vLLM reads no zero points of such a matrix, and we did. Zeros, which older writers store, change nothing."""
    asymmetric = compressed_tensors("int-quantized", INT8_CHANNEL | {"symmetric": False})
    write_quantized(tmp_path, asymmetric, num_hidden_layers=1)
    change_config(tmp_path, config_groups=INT8.config["config_groups"])
    assert ".weight_zero_point' has zero points other than 0; quantization_config says symmetric" in refusal(tmp_path)

    def clear(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(".weight_zero_point"):
                tensor.zero_()

    change_tensors(tmp_path, clear)
    checkpoint = open_checkpoint(tmp_path)
    [weight] = read_tensors(checkpoint, [f"{Q}.weight"], dtype=torch.float32).values()
    assert isinstance(weight, QuantizedWeight)
    assert weight.zero_points is None


@pytest.mark.parametrize(
    ("of", "says"), [(gptq(), "sym: true"), (awq(symmetric=True), "zero_point: false")], ids=["gptq", "awq"]
)
def test_zero_points_of_a_later_group_are_told_when_they_are_read(tmp_path: Path, of: Format, says: str):
    """Of large files only the first group's are looked at before."""
    write_quantized(tmp_path, of, num_hidden_layers=1)

    def shift_one(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.qzeros"][1, 0] += 1

    change_tensors(tmp_path, shift_one)
    with pytest.raises(CheckpointError, match=f"are not 8 throughout, as quantization_config says with {says}"):
        read_tensors(open_checkpoint(tmp_path), [f"{Q}.weight"], dtype=torch.float32)


@pytest.mark.parametrize(
    ("of", "scales"),
    [
        (gptq(), "scales"),
        (awq(), "scales"),
        (fine_grained_fp8((32, 32)), "weight_scale_inv"),
        (PACKED_ORDERED, "weight_scale"),
    ],
    ids=["gptq", "awq", "fp8", "packed"],
)
def test_a_scale_that_is_no_number_is_told_when_it_is_read(tmp_path: Path, of: Format, scales: str):
    """It would make every token of every answer one and the same."""
    write_quantized(tmp_path, of, num_hidden_layers=1)

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.{scales}"][1, 0] = float("inf")

    change_tensors(tmp_path, damage)
    with pytest.raises(CheckpointError, match=f"'{Q}.weight': one of its scales is not a finite number"):
        read_tensors(open_checkpoint(tmp_path), [f"{Q}.weight"], dtype=torch.float32)


def test_a_checkpoint_that_is_quantised_and_does_not_say_so(tmp_path: Path):
    """As AutoGPTQ wrote them, with a quantize_config.json of their own."""
    write_quantized(tmp_path, gptq(), num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps(quantization))
    assert "a GPTQ or AWQ checkpoint whose config.json has no quantization_config" in refusal(tmp_path)


@pytest.mark.parametrize("of", [gptq(), fine_grained_fp8((32, 32))], ids=["gptq", "fp8"])
def test_a_checkpoint_that_says_so_and_is_not_quantised(tmp_path: Path, of: Format):
    write_quantized(tmp_path, Format(of.config, of.pack, packs=lambda _: False), num_hidden_layers=1)
    assert f"quantization_config says {of.config['quant_method']}, and no matrix is stored so" in refusal(tmp_path)


def test_a_gguf_file_is_refused_by_its_name(tmp_path: Path):
    """Beside a config.json, without one, and named itself."""
    write_quantized(tmp_path, gptq(), num_hidden_layers=1)
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "mixtral.Q4_K_M.gguf"
    file.touch()
    assert f"has its weights only as {file.name}, which is llama.cpp's format" in refusal(tmp_path)
    (tmp_path / "config.json").unlink()
    assert f"has its weights only as {file.name}, which is llama.cpp's format" in refusal(tmp_path)
    with pytest.raises(ConfigError, match=r"is a GGUF file, which is llama\.cpp's format"):
        resolve_model(str(file))


def test_a_weight_file_of_another_name_is_told(tmp_path: Path):
    """As AutoGPTQ named it where it was not told otherwise."""
    write_quantized(tmp_path, gptq(), num_hidden_layers=1)
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    assert "expected model*.safetensors; gptq_model-4bit-32g.safetensors is not of that name" in refusal(tmp_path)
