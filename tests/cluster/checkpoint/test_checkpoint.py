import contextlib
import json
import os
import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig as GenerationReference

from cluster.checkpoint.architecture import GateSpec, LayerSpec, Multipliers
from cluster.checkpoint.checkpoint import fingerprint, open_checkpoint
from cluster.checkpoint.configuration.generation_config import GenerationConfig
from cluster.checkpoint.known_models import MIXTRAL_8X7B
from cluster.checkpoint.rope import LinearRope
from cluster.checkpoint.safetensors_header import read_header as checked_header
from cluster.errors import CheckpointError
from cluster.messages import SamplingDefaults
from tests.checkpoints import Layout, read_header, refusal, rewrite_header, write_checkpoint
from tests.gateway.doubles import write_tokenizer
from tests.programs import said_by

LAYOUTS: tuple[Layout, ...] = ("huggingface", "fused", "mistral", "mistral_early")
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint per layout, and one in three shards; copied before they are damaged."""
    root = tmp_path_factory.mktemp("checkpoints")
    for layout in LAYOUTS:
        write_checkpoint(root / layout, layout=layout)
    write_checkpoint(root / "sharded", shards=3)
    return root


@pytest.fixture
def copy(originals: Path, tmp_path: Path):
    def copied(name: str) -> Path:
        return Path(shutil.copytree(originals / name, tmp_path / name))

    return copied


def rewrite_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# What opens


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_architecture_and_tensors(originals: Path, layout: Layout):
    checkpoint, reference = open_checkpoint(originals / layout), open_checkpoint(originals / "huggingface")
    assert checkpoint.layout == ("mistral" if layout.startswith("mistral") else "huggingface")
    assert checkpoint.architecture == reference.architecture
    assert {n: (r.shape, r.nbytes) for n, r in checkpoint.tensors.items()} == {
        n: (r.shape, r.nbytes) for n, r in reference.tensors.items()
    }


@pytest.mark.parametrize("layout", ["huggingface", "mistral"])
def test_a_dense_model_is_read_whole_and_every_tensor_of_it_is_needed(tmp_path: Path, layout: Layout):
    write_checkpoint(tmp_path, layout=layout, dense=True)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.architecture.is_dense
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    assert len(checkpoint.tensors) == len(tensors)
    for name, tensor in tensors.items():
        save_file({n: t for n, t in tensors.items() if n != name}, file)
        assert f"has no tensor {name!r}" in refusal(tmp_path)
        save_file(tensors | {name: tensor[:-1]}, file)
        assert f"{file}: tensor {name!r} has shape" in refusal(tmp_path)


def test_the_fingerprint_is_of_the_weights_and_not_of_their_place(originals: Path, copy, tmp_path: Path):
    whole, sharded = open_checkpoint(originals / "huggingface"), open_checkpoint(originals / "sharded")
    assert open_checkpoint(copy("huggingface")).fingerprint == whole.fingerprint
    assert sharded.fingerprint == whole.fingerprint
    assert open_checkpoint(originals / "fused").fingerprint == whole.fingerprint
    assert len(whole.fingerprint) == 64
    int(whole.fingerprint, 16)
    write_checkpoint(tmp_path / "other", seed=1)
    assert open_checkpoint(tmp_path / "other").fingerprint != whole.fingerprint


def test_fields_of_other_families_change_no_fingerprint_but_their_own():
    """Each new field of a layer made a new version of every model, whose name on Kubernetes has its fingerprint."""
    assert fingerprint(MIXTRAL_8X7B, {}) == "501bccf7d788e98dad22f27e0d70101a4ec420bf2a6ba194440fa52fd0a8c3df"
    layer = MIXTRAL_8X7B.layers[0]
    others = [
        replace(MIXTRAL_8X7B, layers=31 * (layer,)),
        replace(MIXTRAL_8X7B, layers=(*31 * (layer,), LayerSpec(dense_size=8))),
        replace(MIXTRAL_8X7B, layers=(*31 * (layer,), LayerSpec(dense_size=16))),
        replace(MIXTRAL_8X7B, layers=32 * (replace(layer, qk_norm="head"),)),
        replace(MIXTRAL_8X7B, layers=32 * (replace(layer, gate=GateSpec(renormalised=False)),)),
        replace(MIXTRAL_8X7B, multipliers=Multipliers(residual=2.0)),
        replace(MIXTRAL_8X7B, rope_scaling=LinearRope(2.0)),
    ]
    assert len({fingerprint(other, {}) for other in [MIXTRAL_8X7B, *others]}) == 1 + len(others)


def test_a_fine_tune_of_one_layer_has_another_fingerprint(originals: Path, copy):
    directory = copy("huggingface")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] += 1e-3
    save_file(tensors, directory / "model.safetensors")
    assert open_checkpoint(directory).fingerprint != open_checkpoint(originals / "huggingface").fingerprint


def test_a_checkpoint_pickles_small_and_equal(originals: Path):
    checkpoint = open_checkpoint(originals / "fused")
    pickled = pickle.dumps(checkpoint)
    assert pickle.loads(pickled) == checkpoint
    assert len(pickled) < 200 * len(checkpoint.tensors)


def test_opening_imports_neither_torch_nor_ray(originals: Path):
    modules = said_by("cluster.open_checkpoint", originals / "fused").split()
    assert "cluster.checkpoint.checkpoint" in modules
    assert not {"torch", "ray"} & set(modules)


def test_hugging_face_files_are_preferred_when_both_are_there(originals: Path, copy):
    directory = copy("huggingface")
    shutil.copytree(originals / "mistral", directory, dirs_exist_ok=True)
    assert open_checkpoint(directory).layout == "huggingface"


def test_a_config_beside_mistral_weights_does_not_hide_them(originals: Path, copy):
    directory = copy("mistral")
    shutil.copy(originals / "huggingface" / "config.json", directory)
    assert open_checkpoint(directory).layout == "mistral"


def test_an_embedding_table_in_bfloat16_decides_where_the_config_names_no_dtype(copy):
    directory = copy("huggingface")
    file = directory / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file)
    assert open_checkpoint(directory).architecture.dtype == "float32"  # as config.json says
    rewrite_json(directory / "config.json", dtype=None)
    assert open_checkpoint(directory).architecture.dtype == "bfloat16"


def test_generation_config_gives_defaults_of_requests_and_more_end_ids(copy):
    """`top_k`, `min_p` and `repetition_penalty` were dropped, and all of it where `do_sample` was not said."""
    directory = copy("huggingface")
    file = directory / "generation_config.json"
    chosen = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05}
    for more in ({"do_sample": True}, {"do_sample": False}, {}):
        file.write_text(json.dumps({**chosen, **more, "eos_token_id": [2, 5], "max_new_tokens": 9, "num_beams": 1}))
        checkpoint = open_checkpoint(directory)
        assert asdict(checkpoint.generation.defaults) == chosen
        assert checkpoint.generation.not_followed == ()
        assert checkpoint.architecture.eos_token_ids == (2, 5)
    file.write_text(json.dumps({"top_k": -1, "temperature": 0, "min_p": 0, "top_p": None}))
    assert open_checkpoint(directory).generation.defaults == SamplingDefaults(temperature=0.0)
    file.unlink()
    assert open_checkpoint(directory).generation == GenerationConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("top_p", 1.5),
        ("top_p", 0),
        ("temperature", 2.5),  # no request could ask for it, and every one would have been refused
        ("temperature", False),
        ("top_k", 2.5),
        ("top_k", -2),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-40),
    ],
)
def test_a_default_that_no_request_could_have_is_refused(copy, key: str, value: Any):
    directory = copy("huggingface")
    rewrite_json(directory / "generation_config.json", **{key: value})
    assert f"generation_config.json: {key} is {value!r}" in refusal(directory)


def test_what_is_chosen_and_not_followed_is_told_by_name(copy):
    directory = copy("huggingface")
    off = {"no_repeat_ngram_size": 0, "typical_p": 1.0, "suppress_tokens": None, "num_beams": 1, "bad_words_ids": []}
    rewrite_json(directory / "generation_config.json", **off)
    assert open_checkpoint(directory).generation.not_followed == ()
    on = {"no_repeat_ngram_size": 3, "typical_p": 0.9, "suppress_tokens": [5], "num_beams": 4, "stop_strings": ["x"]}
    rewrite_json(directory / "generation_config.json", **on)
    assert set(open_checkpoint(directory).generation.not_followed) == set(on)


def test_every_key_of_generation_config_is_followed_or_told_or_says_nothing(copy):
    """Those that this version of transformers has: a new one is told by name until somebody has looked at it."""
    directory = copy("huggingface")
    keys = {key for key in GenerationReference().__dict__ if not key.startswith("_")}
    told = {}
    for key in sorted(keys - {"eos_token_id", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"}):
        (directory / "generation_config.json").write_text(json.dumps({key: 0.5}))
        told[key] = open_checkpoint(directory).generation.not_followed == (key,)
    changing = """
        bad_words_ids begin_suppress_tokens constraints dola_layers encoder_no_repeat_ngram_size
        encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids
        forced_bos_token_id forced_eos_token_id guidance_scale min_length min_new_tokens no_repeat_ngram_size
        num_beam_groups num_beams penalty_alpha sequence_bias stop_strings suppress_tokens token_healing top_h typical_p
        watermarking_config
    """
    assert {key for key, is_told in told.items() if is_told} == set(changing.split())


def test_an_inverse_frequency_table_is_ignored(copy):
    directory = copy("huggingface")
    file = directory / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, file)
    open_checkpoint(directory)


def test_fused_names_may_end_in_weight(originals: Path, copy):
    directory = copy("fused")
    file = directory / "model.safetensors"
    tensors = load_file(file)
    save_file({n + ".weight" if n.endswith("_proj") else n: t for n, t in tensors.items()}, file)
    assert open_checkpoint(directory).fingerprint == open_checkpoint(originals / "huggingface").fingerprint


# What is refused: files


def test_not_a_directory(tmp_path: Path):
    assert refusal(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'} is not a directory."


def test_an_empty_directory(tmp_path: Path):
    assert "neither config.json nor params.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "consolidated.00.pt"])
def test_weights_that_can_run_code_are_refused_and_told_why(copy, name: str):
    directory = copy("huggingface")
    (directory / "model.safetensors").rename(directory / name)
    message = refusal(directory)
    assert f"only as {name}" in message
    assert "can run code" in message


def test_remote_code_is_refused(copy):
    directory = copy("huggingface")
    rewrite_json(directory / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert "config.json: auto_map points at Python code" in refusal(directory)


def test_a_family_without_code_of_ours_is_for_transformers_or_refused_by_name(copy):
    directory = copy("huggingface")
    rewrite_json(directory / "config.json", model_type="glm4_moe", architectures=["Glm4MoeForCausalLM"])
    with pytest.raises(CheckpointError, match=r"model_type is 'glm4_moe'.*without `model_impl: native`"):
        open_checkpoint(directory, "native")
    checkpoint = open_checkpoint(directory)
    assert checkpoint.model_impl == open_checkpoint(directory, "transformers").model_impl == "transformers"
    all_bytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert checkpoint.coordinator_bytes() + checkpoint.expert_bytes(range(4)) == all_bytes
    rewrite_json(directory / "config.json", model_type="mixtral", architectures=["MixtralForCausalLM"])
    native = open_checkpoint(directory)
    assert (
        len({native.fingerprint, checkpoint.fingerprint, open_checkpoint(directory, "transformers").fingerprint}) == 3
    )
    assert checkpoint.coordinator_bytes() == native.coordinator_bytes()
    assert checkpoint.expert_bytes((3,)) == native.expert_bytes((3,))


def test_of_a_family_without_code_of_ours_a_size_that_is_missing_is_named(copy):
    directory = copy("huggingface")
    rewrite_json(directory / "config.json", model_type="glm4_moe", num_hidden_layers=None)
    assert "config.json: num_hidden_layers is missing" in refusal(directory)
    rewrite_json(directory / "config.json", num_hidden_layers=2, quantization_config={"quant_method": "fp8"})
    assert "quantization_config.quant_method is 'fp8', and no matrix is stored so" in refusal(directory)


def test_no_weights_at_all(copy):
    directory = copy("huggingface")
    (directory / "model.safetensors").unlink()
    assert "has no weights; expected model*.safetensors" in refusal(directory)


def test_mistral_weights_without_params(copy):
    directory = copy("mistral")
    (directory / "params.json").rename(directory / "config.json")
    assert "no params.json to describe them" in refusal(directory)


def test_a_missing_shard_is_named_with_a_tensor_that_it_holds(copy):
    directory = copy("sharded")
    (directory / "model-00002-of-00003.safetensors").unlink()
    message = refusal(directory)
    assert "model-00002-of-00003.safetensors is missing" in message
    assert "index.json places tensor 'model." in message


def test_a_missing_shard_without_an_index_is_noticed_by_its_tensors(copy):
    directory = copy("sharded")
    (directory / "model.safetensors.index.json").unlink()
    open_checkpoint(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "has no tensor 'model." in refusal(directory)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "model.bin", 3, None])
def test_an_index_may_only_name_safetensors_beside_it(copy, shard: Any):
    directory = copy("sharded")
    rewrite_json(directory / "model.safetensors.index.json", weight_map={NORM: shard})
    message = refusal(directory)
    assert "index.json: weight_map." in message
    assert NORM in message


def test_an_index_that_names_the_wrong_shard(copy):
    directory = copy("sharded")
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))
    other = next(shard for shard in shards if shard != weight_map[NORM])
    rewrite_json(index, weight_map=weight_map | {NORM: other})
    message = refusal(directory)
    assert NORM in message
    assert other in message


def test_a_tensor_in_two_shards(copy):
    directory = copy("sharded")
    first, second = (directory / f"model-0000{n}-of-00003.safetensors" for n in (1, 2))
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    message = refusal(directory)
    assert message.startswith(f"Tensor {name!r} is twice")
    assert first.name in message
    assert second.name in message


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1, "a": 2}', "\udcff", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_json_that_is_not_json(copy, name: str, content: str):
    directory = copy("sharded")
    (directory / name).write_text(content, errors="surrogateescape")
    assert name in refusal(directory)


# What is refused: tensors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_is_needed_in_every_layout(copy, layout: Layout):
    directory = copy(layout)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    for name in tensors:
        save_file({n: t for n, t in tensors.items() if n != name}, file)
        assert f"has no tensor {name!r}" in refusal(directory), "by the name that it has in this layout"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_is_checked_for_shape_and_dtype_in_every_layout(copy, layout: Layout):
    directory = copy(layout)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        save_file(tensors | {name: tensor[:-1]}, file)
        message = refusal(directory)
        assert f"{file}: tensor {name!r} has shape {tuple(tensor[:-1].shape)}" in message
        assert f"expected {tuple(tensor.shape)}." in message
        save_file(tensors | {name: tensor.double()}, file)
        assert f"{file}: tensor {name!r} has dtype F64; expected F32, BF16, F16." in refusal(directory)


def test_a_tensor_that_is_no_part_of_the_model_is_not_ignored(copy):
    directory = copy("huggingface")
    file = directory / "model.safetensors"
    name = "model.layers.0.self_attn.q_proj.bias"
    save_file(load_file(file) | {name: torch.ones(48)}, file)
    assert f"{file}: tensor {name!r} is no part of this architecture" in refusal(directory)


def test_more_layers_in_the_config_than_in_the_weights(copy):
    directory = copy("huggingface")
    rewrite_json(directory / "config.json", num_hidden_layers=3)
    assert "has no tensor 'model.layers.2.input_layernorm.weight'" in refusal(directory)


# What is refused: bytes


def test_a_truncated_file_is_noticed_at_any_length(copy):
    directory = copy("huggingface")
    file = directory / "model.safetensors"
    size = file.stat().st_size
    for length in (size - 1, size - 5000, size // 2, 4000, 100, 8, 7, 1, 0):
        os.truncate(file, length)
        message = refusal(directory)
        assert f"{file} is truncated" in message
        if length > size // 3:
            assert "inside tensor 'model." in message


def test_a_file_with_bytes_after_its_last_tensor(copy):
    directory = copy("huggingface")
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "where its last tensor ends" in refusal(directory)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dtype": "F31"}, "has the unknown dtype 'F31'"),
        ({"dtype": ["F32"]}, "has the unknown dtype ['F32']"),
        ({"shape": [-32]}, "has no shape"),
        ({"shape": [32.0]}, "has no shape"),
        ({"shape": 32}, "has no shape"),
        ({"shape": [10**4000, 10**4000]}, "has no shape"),
        ({"shape": [33]}, "spans 128 bytes; expected 132"),
        ({"data_offsets": [0]}, "has no pair of data_offsets"),
        ({"data_offsets": [-128, 0]}, "has no pair of data_offsets"),
        ({"data_offsets": [128, 0]}, "spans -128 bytes"),
        ({"data_offsets": [0, 10**40]}, "has no pair of data_offsets"),
        ({"data_offsets": [0, 10**18]}, "spans 1000"),
    ],
)
def test_a_malformed_entry_names_the_tensor(copy, change: dict[str, Any], expected: str):
    directory = copy("huggingface")
    file = directory / "model.safetensors"
    header = read_header(file)
    header[NORM] |= change
    rewrite_header(file, header)
    message = refusal(directory)
    assert f"{file}: the header's entry for tensor {NORM!r} {expected}" in message


def test_overlapping_tensors(copy):
    directory = copy("huggingface")
    file = directory / "model.safetensors"
    header = read_header(file)
    header[NORM]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]
    rewrite_header(file, header)
    assert "input_layernorm.weight' begins at byte" in refusal(directory)


@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    file = tmp_path_factory.mktemp("random") / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        checked_header(file)


entry_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "BF16", "U8", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
    ),
    max_leaves=8,
)


@given(
    header=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entry_like, max_size=3),
    size=st.integers(0, 64),
)
def test_random_headers_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: Any, size: int):
    file = tmp_path_factory.mktemp("random") / "x.safetensors"
    file.write_bytes(bytes(8) + bytes(size))
    rewrite_header(file, header)
    try:
        tensors = checked_header(file)
    except CheckpointError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) == size


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_flipped_header_bytes_open_or_are_refused(originals: Path, tmp_path: Path, data: st.DataObject):
    directory = tmp_path / "flipped"
    if not directory.exists():
        shutil.copytree(originals / "fused", directory)
    content = bytearray((originals / "fused" / "model.safetensors").read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    (directory / "model.safetensors").write_bytes(content)
    with contextlib.suppress(CheckpointError):  # and nothing else
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, (1,)),
        ({"eos_token": {"content": "</s>", "special": True}}, (1,)),
        ({"eos_token": "<s>"}, (0,)),
        ({"eos_token": None}, ()),
        ({"eos_token": "of no vocabulary"}, ()),
    ],
    ids=str,
)
def test_a_model_that_names_no_end_of_sequence_has_its_tokenizer_s(tmp_path, told, expected):
    """Its answers went on until max_tokens."""
    write_checkpoint(tmp_path, eos_token_id=None)
    assert open_checkpoint(tmp_path).architecture.eos_token_ids == ()
    file = write_tokenizer(tmp_path) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    assert open_checkpoint(tmp_path).architecture.eos_token_ids == expected
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert open_checkpoint(tmp_path).architecture.eos_token_ids == (5,)


@pytest.mark.parametrize(
    "broken",
    [{"added_tokens": [{"id": 1}]}, {"added_tokens": 7}, {"model": {"vocab": [[]]}}, {"model": {"vocab": 7}}],
    ids=str,
)
def test_a_tokenizer_whose_end_cannot_be_found_is_refused_by_name(tmp_path, broken):
    """It was a KeyError with a traceback."""
    write_checkpoint(tmp_path, eos_token_id=None)
    file = write_tokenizer(tmp_path) / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | broken))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer"):
        open_checkpoint(tmp_path)
