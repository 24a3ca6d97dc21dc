"""The shipped base model: what its manifest says is what lies there, and it is the Llama 4 in small that it claims."""

import hashlib
import json

import pytest

from model.tensor_map import count_parameters


@pytest.fixture(scope="module")
def shipped(repo_root):
    return repo_root / "recipes" / "tiny_base"


def test_every_file_has_the_digest_that_the_manifest_states(shipped):
    manifest = json.loads((shipped / "manifest.json").read_text())
    present = {path.name for path in shipped.iterdir()} - {"manifest.json"}
    assert present == set(manifest["outputs"])
    for name, digest in manifest["outputs"].items():
        assert hashlib.sha256((shipped / name).read_bytes()).hexdigest() == digest, name


def test_it_is_small_enough_to_ship(shipped):
    assert sum(path.stat().st_size for path in shipped.glob("*.safetensors")) <= 8 * 2**20


def test_it_is_a_llama_4_in_small(shipped):
    config = json.loads((shipped / "config.json").read_text())
    assert config["architectures"] == ["Llama4ForCausalLM"] and config["model_type"] == "llama4_text"
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 1)
    assert config["moe_layers"] == [1, 3] and config["use_qk_norm"]
    assert config["no_rope_layers"] == [1, 1, 1, 0]  # 0: no RoPE, full attention
    assert config["attention_chunk_size"] < config["max_position_embeddings"]
    assert 1e6 <= count_parameters(config) <= 4e6


def test_its_recipe_states_the_shape_it_has(shipped, repo_root):
    from pipeline.recipe import load

    stage = load(repo_root / "recipes" / "tiny_base.yaml", []).stages[0]
    config = json.loads((shipped / "config.json").read_text())
    stated = (stage.hidden_size, stage.num_layers, stage.head_dim, stage.expert_size, stage.dense_size)
    names = ("hidden_size", "num_hidden_layers", "head_dim", "intermediate_size", "intermediate_size_mlp")
    assert stated == tuple(config[name] for name in names)
