"""Models whose code is transformers' through our engine: the ids are those that transformers generates alone."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.configuration.any_architecture import any_architecture
from cluster.checkpoint.json_document import JsonDocument
from cluster.commands.serve import command as serve
from cluster.errors import CheckpointError, ConfigError, ExpertUnavailable
from cluster.planning.placement import ExpertGroup, kv_bytes_per_token
from experts_service.kernels.compiled.jit import AVAILABLE
from experts_service.kernels.experts import Experts
from experts_service.kernels.kernel import available
from experts_service.loaded_experts import load_experts
from experts_service.shard.shard import ExpertShard
from experts_service.transformers_backend import probe
from experts_service.transformers_backend.layer_attention import LayerAttention, Sight
from experts_service.transformers_backend.meta_model import checked
from router_service.model.transformers_backend.attention import _attend
from router_service.model.transformers_backend.decoder import FirstOfEqual, _Step
from router_service.model.transformers_backend.pages import paged_layers
from tests import families
from tests.checkpoints import write_checkpoint
from tests.experts_service.shards import shard_spec
from tests.families import CONFIGS
from tests.router_service.attention.pages import sized
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request
from tests.transformers_families import SHOWN, generated, prompt, random_model, tiny_config, write_family

NEW_TOKENS = 64
LENGTHS = (40, 5, 23)
# Sinks and windows; wide keys and narrow values; no interface, chunks; narrower experts that are normed
FAST = ("gpt_oss", "deepseek_v3", "llama4_text", "muse_spark")
QUICK = ("mixtral", "llama-3.1", "qwen2_moe", "granitemoe")  # of those that are native
SLOW = [family for family in SHOWN if family not in FAST]


def requests(count=NEW_TOKENS):
    return [
        make_request(prompt(length, length), max_tokens=count, min_tokens=count, ignore_eos=True) for length in LENGTHS
    ]


def expected(model, count=NEW_TOKENS):
    return [generated(model, prompt(length, length), count) for length in LENGTHS]


@pytest.mark.parametrize("family", [*FAST, *(pytest.param(family, marks=pytest.mark.long) for family in SLOW)])
def test_a_batch_generates_what_transformers_does(tmp_path, family):
    """Prompts of three lengths in chunks of 17 tokens, experts in two groups."""
    model = write_family(tmp_path, family)
    bench = Bench(tmp_path, num_groups=2, max_num_batched_tokens=17)
    assert bench.run(*requests()) == expected(model)
    assert not bench.errors
    assert sum(bench.engine.model_runner.decoder.dispatcher.rows_per_expert) > 0


@pytest.mark.parametrize("family", ["dots3_note", *(pytest.param(family, marks=pytest.mark.long) for family in SHOWN)])
def test_every_prompt_is_answered_in_bf16_however_long(tmp_path, family):
    """A step of a prompt's first tokens asks for no logits, and failed; so did an indexer that makes keys in fp32."""
    write_family(tmp_path, family)
    bench = Bench(tmp_path, dtype="bfloat16", num_groups=2, max_num_batched_tokens=17)
    ids = bench.one_by_one(*requests(8))
    assert not bench.errors
    assert [len(of_prompt) for of_prompt in ids] == [8] * len(LENGTHS)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in ("mixtral", "mistral", *CONFIGS)],
)
def test_a_native_family_has_the_same_ids_and_vectors_by_either_code(tmp_path, name):
    if name in CONFIGS:
        model = families.random_model(name)
        families.write_model(tmp_path, model)
    else:
        model = write_checkpoint(tmp_path, dense=name == "mistral")
    groups = 4 if open_checkpoint(tmp_path).architecture.num_experts else 1
    ids, vectors = [], []
    for model_impl in ("native", "transformers"):
        bench = Bench(tmp_path, model_impl=model_impl, num_groups=groups, max_num_batched_tokens=17)
        embed = make_request(prompt(30), pooling="last")
        ids.append(bench.run(*requests(24), embed)[:3])
        vectors.append(bench.embeddings[embed.key])
    assert ids[0] == ids[1] == expected(model, 24)
    torch.testing.assert_close(vectors[0], vectors[1], atol=1e-4, rtol=0)
    assert open_checkpoint(tmp_path).model_impl == "native"


def test_experts_read_their_own_bytes_only_and_compute_what_all_of_them_do(tmp_path):
    """Of a checkpoint whose experts are one tensor each, and of one that has them one by one."""
    for family in ("gpt_oss", "glm4_moe"):
        directory = tmp_path / family
        write_family(directory, family)
        checkpoint = open_checkpoint(directory)
        read: list[int] = []
        whole = load_experts(checkpoint, range(8), dtype=torch.float32, device=torch.device("cpu"))
        part = load_experts(checkpoint, (5, 2), dtype=torch.float32, device=torch.device("cpu"), on_bytes=read.append)
        assert sum(read) == checkpoint.expert_bytes((5, 2))
        rows = torch.randn(3, whole.hidden)
        counts = [0] * 8
        counts[2], counts[5] = 1, 2
        of_whole = whole(0, rows, counts)
        torch.testing.assert_close(
            part(0, torch.cat([rows[1:], rows[:1]]), [2, 1]), torch.cat([of_whole[1:], of_whole[:1]])
        )


def test_weights_of_a_gate_may_be_in_bf16(tmp_path):
    """As gpt-oss's are: a kernel read them as fp32, and in bf16 the model said anything, or numbers that are none."""
    model = write_family(tmp_path, "gpt_oss").bfloat16()
    decoder = Bench(tmp_path, dtype="bfloat16", num_groups=2).engine.model_runner.decoder
    rows = torch.randn(9, 32).bfloat16()
    _, weights, experts = model.model.layers[1].mlp.router(rows)
    assert weights.dtype is torch.bfloat16
    with torch.inference_mode(), decoder._of(_Step(None, None, None, None)):
        answers = decoder.ask_experts(1, rows, experts, weights)
        expected = model.model.layers[1].mlp.experts(rows, experts, weights)
    torch.testing.assert_close(answers, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("family", ["glm4_moe", "llama4_text", "gpt_oss", "beam", "hy_v4", "gemma4"])
def test_experts_in_bf16_are_those_of_the_class_whatever_multiplies(tmp_path, family):
    """SwiGLU is run by kernels of ours whole; of clamps, biases, and what is rounded later, only the products are."""
    model = random_model(tiny_config(family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts." in name and "bias" in name:
                parameter *= 100  # as large as what they are added to: a bias that was left out did not show
    model.save_pretrained(tmp_path)
    model.bfloat16()
    [experts, *_] = [module for module in model.modules() if probe.is_experts(module)]
    loaded = load_experts(open_checkpoint(tmp_path), range(8), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert isinstance(loaded, Experts) == (available()[0].is_own and family in ("glm4_moe", "llama4_text"))
    counts = [3, 0, 1, 2, 0, 4, 1, 1]
    rows = 20 * torch.randn(sum(counts), loaded.hidden).bfloat16()  # large enough for clamps
    answers, expected = loaded(0, rows, counts), by_class(experts, rows, counts)
    torch.testing.assert_close(answers, expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)


@torch.inference_mode()
def by_class(experts, rows, counts):
    """Llama 4's take a row for each expert."""
    of_rows = torch.repeat_interleave(torch.tensor(counts))
    if hasattr(experts, "is_transposed"):
        return experts(rows, of_rows[:, None], rows.new_ones(len(rows), 1))
    return torch.stack([experts(row.repeat(len(counts), 1))[expert] for row, expert in zip(rows, of_rows, strict=True)])


@pytest.mark.parametrize(
    ("family", "in_place"), [("minimax_m2", True), ("gpt_oss", True), ("deepseek_v3", False), ("llama4_text", False)]
)
def test_attention_is_computed_in_place_where_layers_are_alike(tmp_path, family, in_place):
    """Copies of the context in every step made most of what a long one took."""
    write_family(tmp_path, family)
    runner = Bench(tmp_path, num_groups=2).engine.model_runner
    assert runner.attention.gathers == (not (in_place and AVAILABLE))


@pytest.mark.skipif(not AVAILABLE, reason="needs kernels of ours")
@pytest.mark.parametrize(
    ("other", "in_place"),
    [
        ({"sight": Sight(window=24)}, True),
        ({"sight": Sight(chunk=24)}, False),
        ({"value_dim": 16}, False),
        ({"num_kv_heads": 4}, False),
        ({"index_dim": 16}, False),
    ],
)
def test_one_layer_of_another_kind_keeps_all_from_being_computed_in_place(other, in_place):
    """Of a family above keys are wider than values, and its heads are none that kernels know: that alone was seen."""
    layer = LayerAttention(
        num_heads=4,
        num_kv_heads=2,
        key_dim=32,
        value_dim=32,
        scaling=0.2,
        sight=Sight(),
        has_sinks=False,
        index_dim=0,
        index_heads=0,
    )
    sizes = {"block_size": 16, "dtype": torch.float32, "device": torch.device("cpu"), "kernel": available()[0]}
    layers = [layer, replace(layer, **other)]
    backend = paged_layers(layers, sized(num_heads=4, num_kv_heads=2, head_dim=32), **sizes)
    assert (backend is not None) == in_place


@pytest.mark.skipif(not available()[0].is_own, reason="needs kernels of ours")
def test_matrices_that_only_multiply_are_packed_and_others_are_not(tmp_path):
    """The numbers of a head that shares its weight with the embeddings, and of a gate, are still asked for."""
    config = tiny_config("glm4_moe")
    config.tie_word_embeddings = True
    model = random_model(config)
    model.save_pretrained(tmp_path)
    decoder = Bench(tmp_path, dtype="bfloat16", num_groups=2).engine.model_runner.decoder
    assert decoder.kernel.is_own
    layer = decoder.model.model.layers[1]
    assert layer.self_attn.q_proj.weight is None
    assert layer.mlp.shared_experts.down_proj.weight is None
    assert layer.mlp.gate.weight is not None
    assert decoder.model.lm_head.weight is not None
    rows = torch.randn(5, 32).bfloat16()
    with torch.inference_mode():
        answers = layer.mlp.shared_experts(rows[None])[0]
        expected = model.bfloat16().model.layers[1].mlp.shared_experts(rows)
    torch.testing.assert_close(answers, expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is made meanwhile."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(one.numel() for one in tree_leaves(made) if isinstance(one, torch.Tensor))])
        return made


@pytest.mark.parametrize("length", [1, 5])
def test_attention_with_sinks_repeats_no_key(length):
    """Memory for steps is counted with one copy of what is read: gpt-oss has 8 query heads for each key head."""
    torch.manual_seed(0)
    queries, keys, values = torch.randn(2, 16, length, 32), torch.randn(2, 2, 64, 32), torch.randn(2, 2, 64, 24)
    sinks = torch.randn(16)
    seen = torch.arange(64) <= torch.arange(64 - length, 64)[:, None]
    scores = queries @ keys.repeat_interleave(8, 1).transpose(2, 3) * 0.2
    scores = torch.cat([scores.masked_fill(~seen, -torch.inf), sinks.view(1, -1, 1, 1).expand(2, 16, length, 1)], -1)
    by_hand = scores.softmax(-1)[..., :-1] @ values.repeat_interleave(8, 1)
    with Largest() as largest:
        attended = _attend(queries, keys, values, seen, 0.2, sinks)
    torch.testing.assert_close(attended, by_hand)
    assert largest.numel <= max(keys.numel(), 2 * 16 * length * 65)


def test_a_dense_model_has_a_feed_forward_as_wide_as_its_config_says(tmp_path):
    """It was 1 wide to who counts a step's memory and costs."""
    config = {"model_type": "gemma3", "text_config": {"intermediate_size": 48, "hidden_size": 32, "vocab_size": 96}}
    config["text_config"] |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    architecture = any_architecture(JsonDocument(tmp_path / "config.json", config))
    assert [layer.dense_size for layer in architecture.layers] == [48, 48]


def outline(directory, config):
    """A checkpoint with one tensor that is of no use: what is refused is refused before weights are read."""
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    save_file({"model.none": torch.zeros(1)}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            "qwen3_next",
            r"cannot serve qwen3_next: it keeps a running state \(linear attention, a state space or a convolution\) "
            r"in layers 0, 1, 2; Manta keeps only keys and values of softmax attention",
        ),
        ("lfm2_moe", r"cannot serve lfm2_moe: it keeps a running state .* in layers 0, 2; Manta keeps"),
        ("jamba", r"cannot serve jamba: it keeps a running state .* in layers 0, 1, 2, 3; Manta keeps"),
        (
            "minimax_m3_vl",
            r"cannot serve minimax_m3_vl_text: it keeps choices of whole blocks of keys in layers 1, 2, 3",
        ),
    ],
)
def test_layers_that_keep_something_else_are_refused_by_name(tmp_path, family, message):
    """And in words: what they keep was the name of a class."""
    with pytest.raises(CheckpointError, match=message):
        Bench(outline(tmp_path, tiny_config(family)))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            "qwen4_exp",
            r"a running state .* in layers 0, 1, 2, 4, …; Manta",
        ),
        ("diffusion_gemma", "transformers has no model for it that writes text one token after the other"),
        (
            "switch_transformers",
            r"config.json: is_encoder_decoder is true; .* an encoder beside its decoder is not served",
        ),
        (
            "dbrx",
            r"config.json: hidden_size is missing, by which memory is counted: the family has nothing of the kind",
        ),
    ],
)
def test_what_cannot_be_built_or_counted_is_refused_in_words(tmp_path, family, message):
    """For three of them it was an error of torch or Python about None, and `num_attention_heads is missing`."""
    with pytest.raises(CheckpointError, match=message):
        checked(open_checkpoint(outline(tmp_path, CONFIG_MAPPING[family]()), "transformers"), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, "`num_hidden_layers` .4. must be equal to the number of `layer_types`"),
        ({"sliding_window": "x"}, "'sliding_window'.*expected int, got str"),
        ({"sliding_window": None}, "cannot serve gpt_oss: transformers makes no cache for its layers"),
        ({"num_local_experts": ["many"]}, "num_local_experts holds 'many'; expected integers"),
        ({"num_experts_per_tok": 0}, "config.json: num_experts_per_tok is 0; expected an integer from 1"),
        ({"sliding_window": 0}, "config.json: sliding_window is 0, and no token would see one"),
        ({"num_key_value_heads": 3}, r"cannot serve gpt_oss: attention of layer 0 .* has 4 heads, and keys of 3"),
        ({"model_type": ["gpt_oss"]}, r"model_type is \['gpt_oss'\], which Manta does not run"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_in_a_sentence(tmp_path, changes, message):
    """transformers raised errors of other libraries, and `manta serve` and `manta doctor` showed their stack traces."""
    directory = outline(tmp_path, tiny_config("gpt_oss"))
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        checked(open_checkpoint(directory), None)


def test_a_key_that_is_missing_is_in_a_sentence():
    """The reason was a word in quotation marks: unlimited-ocr has attention functions of its own, and not ours."""
    assert probe.first_line(KeyError("manta")) == "its code finds no 'manta'"


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    directory = outline(tmp_path, tiny_config("glm4_moe"))
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "of_its_own", "auto_map": {"AutoConfig": "configuration.Config"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "configuration.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(
        CheckpointError, match="of no model that the installed transformers can build, and Manta runs no"
    ):
        Bench(directory)


def test_llama_4_scales_queries_by_their_positions_and_not_by_their_rows(tmp_path):
    """Its layers without rotary embedding count from what a cache of theirs holds, and there is none: beyond 8192
    tokens the published models said other things. Here it is from 8 on."""
    config = tiny_config("llama4_text")
    config.floor_scale, config.attn_scale = 8, 2.0
    model = random_model(config)
    model.save_pretrained(tmp_path)
    assert Bench(tmp_path, num_groups=2, max_num_batched_tokens=17).run(*requests(24)) == expected(model, 24)


def test_a_rotary_embedding_that_changes_with_the_length_is_refused_beyond_it(tmp_path):
    """Sequences of one step would be rotated by the longest of them."""
    config = tiny_config("phimoe")
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 256,
        "short_mscale": 1.0,
        "long_mscale": 1.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    model = random_model(config)
    model.save_pretrained(tmp_path)
    assert Bench(tmp_path, max_model_len=256, num_groups=2).run(*requests(16)) == expected(model, 16)
    with pytest.raises(CheckpointError, match=r"longrope.*beyond 256 tokens; with engine.max_model_len: 256 it can be"):
        Bench(tmp_path, max_model_len=512)


@pytest.mark.parametrize("family", ["mimo_v2_flash", "deepseek_v3", "gemma4", "deepseek_v32"])
def test_a_plan_counts_the_keys_and_values_that_there_are(tmp_path, family):
    """Layers may differ in heads and widths; config.json says that in as many ways as there are families."""
    write_family(tmp_path, family)
    planned = checked(open_checkpoint(tmp_path), 64).architecture
    runner = Bench(tmp_path, num_groups=2).engine.model_runner
    memory = runner.kv_cache.keys[:, 0, 0].nbytes + runner.kv_cache.values[:, 0, 0].nbytes
    counted = kv_bytes_per_token(planned, "float32")
    heads = 2 * planned.num_layers * planned.num_kv_heads * 4
    assert memory <= counted < memory + heads, "rounded up to whole numbers for each head"


def test_an_indexer_chooses_as_transformers_does_however_the_work_is_cut(tmp_path):
    """Of 8 tokens for each; in blocks of 4, several sequences, a prefix that is in the cache, and one by one."""
    model = write_family(tmp_path, "deepseek_v32")
    assert model.config.index_topk == 8
    for cut in ({}, {"max_num_batched_tokens": 5}, {"block_size": 4, "num_kv_blocks": 256}, {"max_num_seqs": 1}):
        bench = Bench(tmp_path, num_groups=2, **cut)
        assert bench.run(*requests(32)) == expected(model, 32), cut
        assert bench.run(*requests(32)) == expected(model, 32), f"{cut}, in the cache"


def test_an_indexer_that_is_not_found_is_refused(tmp_path, monkeypatch):
    """One of another name would choose among the keys of its own step."""
    write_family(tmp_path, "deepseek_v32")
    monkeypatch.setattr(probe, "indexers", lambda _model: [])
    with pytest.raises(CheckpointError, match="keeps keys of an indexer that is asked in a way of its own"):
        checked(open_checkpoint(tmp_path), None)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    write_family(tmp_path, "glm4_moe")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of glm4_moe, 'model.layers.1.self_attn.o_proj.weight'"):
        Bench(tmp_path)


def test_what_only_models_of_ours_can_do_is_refused(tmp_path):
    write_family(tmp_path, "glm4_moe")
    with pytest.raises(ConfigError, match=r"engine.kv_cache_dtype: int8 is for native models"):
        Bench(tmp_path, kv_cache_dtype="int8")
    with pytest.raises(ConfigError, match=r"engine.quantization: the transformers backend rounds no weights"):
        Bench(tmp_path, quantization="int8")


def test_the_text_model_of_one_that_sees_is_served_from_its_checkpoint(tmp_path):
    """Llama 4 is stored with what sees: its names have a prefix, and its config.json a part for each."""
    model = write_family(tmp_path, "llama4_text")
    text = json.loads((tmp_path / "config.json").read_text())
    whole = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tensors = load_file(tmp_path / "model.safetensors")
    prefixed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(
        prefixed | {"vision_model.class_embedding": torch.zeros(4)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert Bench(tmp_path, num_groups=2).run(*requests(16)) == expected(model, 16)


def test_the_thinker_is_served_of_a_checkpoint_that_speaks(tmp_path):
    """Qwen3-Omni: a talker lies beside it, whose layers have the same names."""
    model = write_family(tmp_path, "qwen3_omni_moe")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    spoken = {
        name.replace("thinker.", "talker."): torch.full_like(tensor, torch.nan)
        for name, tensor in tensors.items()
        if name.startswith("thinker.model.")
    }
    save_file(tensors | spoken, file, metadata={"format": "pt"})
    bench = Bench(tmp_path, num_groups=2, max_num_batched_tokens=17)
    assert bench.run(*requests(16)) == expected(model, 16)
    read = sum(tensor.nbytes for name, tensor in tensors.items() if re.match(r"thinker\.(model|lm_head)\.", name))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.coordinator_bytes() + checkpoint.expert_bytes(range(8)) == read


def test_layers_may_have_the_keys_and_the_choice_of_others(tmp_path):
    """Mistral Large 4: a layer has another's keys and sees what that one chose; of what an indexer is given, positions
    scale its queries.
    """
    model = write_family(tmp_path, "mistral_large4")
    for cut in ({}, {"max_num_batched_tokens": 5}, {"block_size": 4, "num_kv_blocks": 256}):
        bench = Bench(tmp_path, num_groups=2, **cut)
        assert bench.run(*requests(32)) == expected(model, 32), cut
        assert bench.run(*requests(32)) == expected(model, 32), f"{cut}, in the cache"


def test_manta_serve_refuses_before_it_starts_anything(tmp_path, monkeypatch):
    def started(*_):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("cluster.commands.serve.command.check_tokenizer", lambda _: None)
    monkeypatch.setattr("cluster.commands.serve.command._ray", started)
    monkeypatch.setattr("cluster.commands.serve.command.look_at_gpus", started)
    with pytest.raises(CheckpointError, match="cannot serve jamba: it keeps a running state"):
        serve.run(str(outline(tmp_path, tiny_config("jamba"))), None, None, None, {})


def test_a_shard_runs_the_models_own_experts(tmp_path):
    """As its actor does, without the actor: biases and clamps of gpt-oss are in the answers."""
    write_family(tmp_path, "gpt_oss")
    checkpoint = open_checkpoint(tmp_path)
    group = ExpertGroup(0, (5, 2))
    spec = shard_spec(checkpoint, group, "alone", dtype="float32", model_impl=checkpoint.model_impl)
    shard = ExpertShard(spec)
    rows = torch.randn(3, checkpoint.architecture.hidden_size)
    answers = shard.run(checkpoint.fingerprint, 1, (1, 2), rows.numpy(), np.array([2, 0, 1]))
    here = load_experts(checkpoint, (5, 2), dtype=torch.float32, device=torch.device("cpu"))
    assert torch.equal(torch.from_numpy(answers), here(1, rows[[2, 0, 1]], [1, 2]))
    with pytest.raises(ExpertUnavailable, match="experts of two versions never mix"):
        shard.run("0123456789", 1, (1, 0), rows.numpy(), np.array([0]))


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_of_keys_with_equal_scores_an_indexer_takes_the_first_in_any_batch(tmp_path, family):
    """Scores are often zero. Which of them were taken hung on how long the other contexts of a step were."""
    model = random_model(tiny_config(family))
    with torch.no_grad():
        for indexer in probe.indexers(model):
            indexer.weights_proj.weight.zero_()
    model.save_pretrained(tmp_path)
    with FirstOfEqual():
        expected = [generated(model, prompt(length, length), 16) for length in (40, 5, 23)]
    for chunk in (17, 512):
        requests = [
            make_request(prompt(length, length), max_tokens=16, min_tokens=16, ignore_eos=True)
            for length in (40, 5, 23)
        ]
        bench = Bench(tmp_path, num_groups=2, max_num_batched_tokens=chunk)
        assert bench.run(*requests) == expected
        alone = Bench(tmp_path, num_groups=2, max_num_batched_tokens=chunk)
        assert alone.run(requests[0]) == expected[:1]
