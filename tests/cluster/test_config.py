"""The configuration refuses what it does not know, and says which key."""

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.commands.config import reference
from cluster.config import GatewayConfig, GatewayScalingConfig, ModelConfig, load_config
from cluster.errors import ConfigError
from cluster.yaml_document import parse_yaml
from tests.programs import REPOSITORY


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [{name: a, path: b, experts: {group: auto}}]", "models.0.experts.group: .* did you mean 'groups'"),
        ("models: [{name: a, path: b}, {name: a, path: c}]", "used twice"),
        ("models: [{name: a, path: b}, {name: b, path: c, aliases: [a]}]", "used twice"),
        ("models: [{name: a, path: b, engine: {block_size: 0}}]", "models.0.engine.block_size: .* greater than"),
        ("models: [{name: a, path: b}]\ngateway: {http_port: 99999}", "gateway.http_port"),
        ("models: [{name: a, path: b, pooling: last}]", "models.0: .* only a model of `kind: embedding` pools"),
        ("models: [{name: a, path: b, kind: image}]", "models.0.kind"),
        (
            "models: [{name: a, path: b, coordinator_scaling: {target_used: 1}}]",
            "models.0.coordinator_scaling.target_used: .* did you mean 'target_used_fraction'",
        ),
        (
            "models: [{name: a, path: b, num_coordinators: 2, coordinator_scaling: {max_replicas: 3}}]",
            "models.0: .* num_coordinators: coordinator_scaling says it already",
        ),
        (
            "models: [{name: a, path: b}]\ngateway: {num_replicas: 2, scaling: {max_replicas: 3}}",
            "gateway: .* num_replicas: scaling says it already",
        ),
        (
            "models: [{name: a, path: b}]\ngateway: {scaling: {min_replicas: 2}}",
            r"gateway.scaling: .* max_replicas: must be at least min_replicas \(2\)",
        ),
        ("models: [{name: a, path: b, revision: ''}]", "models.0.revision"),
        (
            "models: [{name: a, path: b, engine: {kv_cache_dtype: fp8_e4m3}}]",
            "models.0.engine.kv_cache_dtype: .*no kernel here takes keys and values in fp8_e4m3; on a CPU int8",
        ),
        ("models: [{name: a, path: b, engine: {kv_cache_dtype: int4}}]", "models.0.engine.kv_cache_dtype: .*int8"),
        (
            "models: [{name: a, path: b, engine: {kv_cache_gib: .inf}}]",
            "models.0.engine.kv_cache_gib: .* finite number",
        ),
        ("models: [{name: a, path: b}]\ngateway: {num_cpus: .inf}", "gateway.num_cpus: .* finite number"),
        (
            "models: [{name: a, path: b}]\ngateway: {api_keys_file: ~no-such-user/k}",
            "api_keys_file: .* ~no-such-user/k: there is no",
        ),
        (
            "models: [{name: a, path: b, experts: {lane_secret_file: ~no-such-user/k}}]",
            "models.0.experts.lane_secret_file: .* ~no-such-user/k: there is no",
        ),
        ("models: []", "models"),
        ("models: 7", "models"),
        ("- a", "expected a mapping"),
        ("a: [", "line 1: not YAML"),
        ("models: [{name: a, path: b}]\ngateway: {}\ngateway: {}", "line 3: a key for the second time"),
        ("models:\n- {name: a, path: !!int b}", "line 2: a value that is not what its tag says"),
        ("models: " + "[" * 5000, "line 1: nested more than"),
        ("models: [{name: \xff, path: b}]".encode("latin-1"), "line 1: not UTF-8"),
        ("models:\n- {name: a, path: b}\n- {name: \x01}", "line 3: a character that YAML does not allow"),
        ("gateway: {}\nmodels: [{<<: {name: a}, path: b, path: c}]", "line 2: a key for the second time"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, words):
    file = tmp_path / "manta.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=words):
        load_config(file)


def test_on_and_off_need_no_quotes(tmp_path):
    """They are YAML's words for true and false, so what the documentation says was refused, and asked for 'on'."""
    file = tmp_path / "manta.yaml"
    file.write_text(
        "models: [{name: a, path: b, engine: {batch_invariant: on, cuda_graphs: off, async_scheduling: on}}]"
    )
    engine = load_config(file).models[0].engine
    assert (engine.batch_invariant, engine.cuda_graphs, engine.async_scheduling) == ("on", "off", "on")


def test_aliases_are_yamls_and_taken(tmp_path):
    file = tmp_path / "manta.yaml"
    file.write_text("models:\n- {name: a, path: b, engine: &e {max_num_seqs: 3}}\n- {name: c, path: d, engine: *e}")
    assert [model.engine.max_num_seqs for model in load_config(file).models] == [3, 3]


MERGED = """
few: &few {max_num_seqs: 3, block_size: 8}
models:
- engine: &more {<<: *few, max_num_seqs: 5}
again: {<<: *more, block_size: 16}
"""


def test_a_merged_key_gives_way_to_ones_own_and_is_merged_again():
    """Who merged a mapping that merges itself was told of a key that stands there twice."""
    document = parse_yaml(MERGED, "manta.yaml").value
    assert document["models"] == [{"engine": {"max_num_seqs": 5, "block_size": 8}}]
    assert document["again"] == {"max_num_seqs": 5, "block_size": 16}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"manta\.yaml"):
        load_config(tmp_path / "manta.yaml")


def test_the_page_of_the_documentation_is_what_the_command_prints():
    result = CliRunner().invoke(app, ["config"])
    assert result.output == (REPOSITORY / "docs" / "configuration.md").read_text()


def test_every_key_says_what_it_is():
    silent = [line for line in reference().splitlines() if line.endswith("|  |")]
    assert silent == []


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_example_of_a_page_is_accepted(tmp_path, page):
    text = (REPOSITORY / page).read_text()
    file = tmp_path / "manta.yaml"
    file.write_text(text.split("```yaml")[1].split("```")[0])
    assert load_config(file).models[0].experts.groups == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_a_number_of_replicas_is_both_bounds():
    model = ModelConfig(name="a", path="b", num_coordinators=2)
    assert (model.coordinators.min_replicas, model.coordinators.max_replicas) == (2, 2)
    gateway = GatewayConfig(scaling=GatewayScalingConfig(min_replicas=1, max_replicas=3))
    assert (gateway.replicas.min_replicas, gateway.replicas.max_replicas) == (1, 3)
