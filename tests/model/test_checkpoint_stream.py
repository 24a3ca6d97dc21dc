"""Checkpoints in and out, tensor by tensor: bit for bit, and never more in memory than the model and one shard.

Sources are written by transformers or cut by hand, and what we write is read by transformers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from model.checkpoint import architecture_digest, load_policy, save_policy, stored_weights
from model.config import TinyShape, tiny
from model.tokenizer import load_tokenizer
from model.transformer import MoeForCausalLM
from model.weight_files import WeightsMismatch

SMALL = tiny(
    TinyShape(
        hidden_size=32, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=16, expert_size=24, dense_size=40,
        num_experts=4, attention_chunk=8, max_positions=64,
    ),
    vocab_size=96,
)  # fmt: skip
EXPERT_1 = "model.layers.1.feed_forward.experts"


@pytest.fixture(scope="module")
def tokenizer(repo_root: Path) -> Any:
    return load_tokenizer(repo_root / "recipes" / "tiny_base")


def randomise(model: torch.nn.Module) -> None:
    """No parameter may be zero or one, or a mix-up would not be seen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.5)


def text_source(directory: Path, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    model = Llama4ForCausalLM(Llama4TextConfig(**SMALL))
    randomise(model)
    model.to(dtype).save_pretrained(directory, **save)
    return directory


def multimodal_source(directory: Path) -> Path:
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 8,
        "patch_size": 2, "vision_output_dim": 24, "projector_input_dim": 24, "projector_output_dim": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }  # fmt: skip
    model = Llama4ForConditionalGeneration(Llama4Config(text_config=SMALL, vision_config=vision, boi_token_index=7))
    randomise(model)
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size=40_000)
    (directory / "preprocessor_config.json").write_text('{"image_size": 8}')
    return directory


def per_expert_source(directory: Path) -> Path:
    """The slow twin of the table's cuts: every expert's matrices by hand, output-major, gate before up."""
    whole = load_file(text_source(directory) / "model.safetensors")
    cut = {}
    for name, tensor in whole.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            cut[name] = tensor
            continue
        for expert in range(4):
            if leaf == "down_proj":
                cut[f"{module}.{expert}.down_proj.weight"] = tensor[expert].T.contiguous()
            else:
                cut[f"{module}.{expert}.gate_proj.weight"] = tensor[expert, :, :24].T.contiguous()
                cut[f"{module}.{expert}.up_proj.weight"] = tensor[expert, :, 24:].T.contiguous()
    save_file(cut, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def digests(directory: Path) -> dict[str, str]:
    """Name → dtype, shape and sha256 of every tensor of a checkpoint."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_tensor(name)
                sha = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
                found[name] = f"{tensor.dtype} {tuple(tensor.shape)} {sha}"
    assert found
    return found


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same_values(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# --- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000], ids=["one file", "shards"])
def test_text_checkpoint_round_trip_is_bit_exact(tmp_path: Path, tokenizer: Any, shard_bytes: int) -> None:
    source = text_source(tmp_path / "source", max_shard_size=shard_bytes)
    policy = load_policy(source)
    assert type(policy) is MoeForCausalLM and not policy.training and not policy.config.use_cache
    reference = AutoModelForCausalLM.from_pretrained(source)
    assert_same_values(values(policy), values(reference))

    out = tmp_path / "out"
    save_policy(policy, tokenizer, out, max_shard_bytes=shard_bytes)
    assert digests(out) == digests(source)
    assert architecture_digest(out) == architecture_digest(source)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Llama4ForCausalLM"] and config["dtype"] == "float32"
    assert "use_cache" not in config
    assert (out / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)
    reread = AutoModelForCausalLM.from_pretrained(out)
    assert type(reread) is Llama4ForCausalLM
    assert_same_values(values(reread), values(reference))
    assert load_tokenizer(out).chat_template == tokenizer.chat_template


def test_no_shard_is_larger_than_asked_and_the_index_names_every_tensor(tmp_path: Path, tokenizer: Any) -> None:
    policy, out = load_policy(text_source(tmp_path / "source")), tmp_path / "out"
    save_policy(policy, tokenizer, out, max_shard_bytes=30_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 30_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {name: out / file for name, file in index["weight_map"].items()} == {
        name: file for file in files for name in load_file(file)
    }
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in policy.parameters())


def test_a_second_save_leaves_nothing_of_the_first(tmp_path: Path, tokenizer: Any) -> None:
    policy, out = load_policy(text_source(tmp_path / "source")), tmp_path / "out"
    save_policy(policy, tokenizer, out, max_shard_bytes=30_000)
    save_policy(policy, tokenizer, out)
    assert [file.name for file in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert_same_values(values(load_policy(out)), values(policy))


def test_multimodal_checkpoint_round_trip_is_bit_exact(tmp_path: Path, tokenizer: Any) -> None:
    source, out = multimodal_source(tmp_path / "source"), tmp_path / "out"
    policy = load_policy(source, "bfloat16")
    reference = Llama4ForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    assert_same_values(values(policy), values(reference.language_model))

    save_policy(policy, tokenizer, out)
    assert digests(out) == digests(source)
    assert {name.split(".")[0] for name in digests(out)} == {"language_model", "vision_model", "multi_modal_projector"}
    assert architecture_digest(out) == architecture_digest(source)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama4" and config["boi_token_index"] == 7
    assert (out / "preprocessor_config.json").read_text() == '{"image_size": 8}'
    assert_same_values(values(Llama4ForConditionalGeneration.from_pretrained(out)), values(reference))


def test_training_changes_the_text_and_never_the_vision_tensors(tmp_path: Path, tokenizer: Any) -> None:
    source, out = multimodal_source(tmp_path / "source"), tmp_path / "out"
    policy = load_policy(source)
    assert policy.dtype == torch.float32
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(2.0)  # exact, in bfloat16 too
    save_policy(policy, tokenizer, out, "bfloat16")
    before, after = digests(source), digests(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith("language_model.")}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    save_policy(load_policy(out), tokenizer, out, "bfloat16")  # over itself: the vision tensors are read from there
    assert digests(out) == after


def test_experts_stored_one_by_one_are_merged_and_split_again_bit_exact(tmp_path: Path, tokenizer: Any) -> None:
    fused = load_policy(text_source(tmp_path / "fused"))
    source, out = per_expert_source(tmp_path / "source"), tmp_path / "out"
    policy = load_policy(source)
    assert_same_values(values(policy), values(fused))
    save_policy(policy, tokenizer, out)
    assert digests(out) == digests(source)
    swapped = load_file(source / "model.safetensors")
    gate, up = f"{EXPERT_1}.2.gate_proj.weight", f"{EXPERT_1}.2.up_proj.weight"
    swapped[gate], swapped[up] = swapped[up], swapped[gate]
    save_file(swapped, source / "model.safetensors")
    mixed_up = values(load_policy(source))[f"{EXPERT_1}.gate_up_proj"]
    assert not torch.equal(mixed_up, values(fused)[f"{EXPERT_1}.gate_up_proj"])


def test_dtype_is_converted_in_the_file_and_not_in_the_model(tmp_path: Path, tokenizer: Any) -> None:
    policy, out = load_policy(text_source(tmp_path / "source")), tmp_path / "out"
    before = {name: tensor.clone() for name, tensor in values(policy).items()}
    save_policy(policy, tokenizer, out, "bfloat16")
    assert_same_values(values(policy), before)
    written = load_file(out / "model.safetensors")
    assert_same_values(written, {name: tensor.to(torch.bfloat16) for name, tensor in before.items()})
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    widened = load_policy(out, "float32")
    assert_same_values(values(widened), {name: tensor.float() for name, tensor in written.items()})


def test_what_an_engine_is_sent_is_what_is_saved(tmp_path: Path, tokenizer: Any) -> None:
    policy, out = load_policy(multimodal_source(tmp_path / "source"), "bfloat16"), tmp_path / "out"
    save_policy(policy, tokenizer, out)
    assert_same_values(dict(stored_weights(policy, torch.bfloat16)), load_file(out / "model.safetensors"))


def test_decoding_settings_are_kept(tmp_path: Path, tokenizer: Any) -> None:
    source, out = text_source(tmp_path / "source"), tmp_path / "out"
    GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[5, 9]).save_pretrained(source)
    save_policy(load_policy(source), tokenizer, out)
    kept, stated = (json.loads((folder / "generation_config.json").read_text()) for folder in (out, source))
    assert kept == stated and kept["temperature"] == 0.6


def test_a_tied_head_is_one_tensor(tmp_path: Path, tokenizer: Any) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = Llama4ForCausalLM(Llama4TextConfig(**SMALL | {"tie_word_embeddings": True}))
    model.save_pretrained(source)
    policy = load_policy(source)
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    save_policy(policy, tokenizer, out)
    assert digests(out) == digests(source) and "lm_head.weight" not in digests(out)


@pytest.mark.parametrize("tied", [True, False])
def test_any_other_model_comes_and_goes_by_transformers(tmp_path: Path, tokenizer: Any, tied: bool) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    policy = load_policy(source)
    assert type(policy) is LlamaForCausalLM and policy.dtype == torch.float32 and not policy.config.use_cache
    save_policy(policy, tokenizer, out, "bfloat16", max_shard_bytes=10_000)
    assert policy.dtype == torch.float32
    assert digests(out) == digests(source)
    assert architecture_digest(out) == architecture_digest(source)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


# --- what does not fit --------------------------------------------------------------------------------------------


def damaged(directory: Path, **changes: torch.Tensor | None) -> Path:
    """A checkpoint with tensors replaced, added, or (None) taken away."""
    text_source(directory)
    tensors = load_file(directory / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model.norm.weight": None}, r"1 missing \(model.norm.weight \[32\]\)"),
        ({"model.layers.0.bogus": torch.ones(3)}, r"1 not the model's \(model.layers.0.bogus \[3\]\)"),
        ({"vision_model.norm": torch.ones(2)}, r"1 not the model's \(vision_model.norm \[2\]\)"),
        (
            {"lm_head.weight": torch.ones(96, 31)},
            r"1 of another shape \(lm_head.weight is \[96, 31\], wanted \[96, 32\]",
        ),
        ({f"{EXPERT_1}.down_proj": torch.ones(4, 32, 24)}, r"is \[4, 32, 24\], wanted \[4, 24, 32\]"),  # transposed
        ({f"{EXPERT_1}.gate_up_proj_scale": torch.ones(4)}, "not the model's"),  # quantised
    ],
)
def test_what_does_not_fit_is_named_with_its_shape(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(WeightsMismatch, match=words):
        load_policy(damaged(tmp_path / "source", **changes))


def test_a_missing_expert_of_many_is_named(tmp_path: Path) -> None:
    source = per_expert_source(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors[f"{EXPERT_1}.3.up_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(WeightsMismatch, match=rf"1 missing \({EXPERT_1}.3.up_proj.weight \[24, 32\]\)"):
        load_policy(source)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    source = text_source(tmp_path / "source", max_shard_size=30_000)
    lost = sorted(source.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"index.json names {lost.name}"):
        load_policy(source)


def test_files_beside_those_of_the_index_are_not_read(tmp_path: Path) -> None:
    source = text_source(tmp_path / "source", max_shard_size=30_000)
    save_file({"model.norm.weight": torch.ones(32)}, source / "consolidated.safetensors")
    load_policy(source)


def test_half_a_model_is_never_written(tmp_path: Path, tokenizer: Any) -> None:
    policy, out = load_policy(text_source(tmp_path / "source")), tmp_path / "out"
    save_policy(policy, tokenizer, out)
    before = digests(out)
    head = {"lm_head.weight": policy.lm_head.weight}
    rest = {name: tensor for name, tensor in values(policy).items() if name not in head}
    for wrong, words in (
        (rest, r"1 missing \(lm_head.weight \[96, 32\]\)"),
        (rest | {"lm_head.weight": head["lm_head.weight"][:48]}, r"lm_head.weight \[48, 32\], wanted \[96, 32\]"),
        (rest | {"base_model.lm_head.weight": head["lm_head.weight"]}, "not the model's"),
    ):
        with pytest.raises(WeightsMismatch, match=words):
            save_policy(policy, tokenizer, out, max_shard_bytes=30_000, weights=wrong.items())
    assert digests(out) == before and not list(out.glob(".*"))
