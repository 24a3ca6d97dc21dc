"""What upcycling makes of a dense Llama: the same function in transformers and in our model, and able to learn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Llama4ForCausalLM, LlamaConfig, LlamaForCausalLM

import model.upcycle
from model.checkpoint import load_policy
from model.dense_llama import CalibrationText, DenseLlama, UpcycleRefused
from model.tokenizer import build_tokenizer
from model.upcycle import LOGIT_STD, router_weight, upcycle, with_neighbouring_pairs

TEXT = "What is 7 + 5 - 3? 7 + 5 = 12 and 12 - 3 = 9, so the answer is 9.\ndef f(x):\n    return x + 1\n"
SHAPE = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], int]] = {  # what differs from SHAPE, and moe_step
    "tied embeddings, grouped heads": (dict(tie_word_embeddings=True), 2),
    "a head for each query, of its own size": (dict(num_key_value_heads=4, head_dim=16), 1),
    "one key head, llama3 RoPE, large eps": (dict(num_key_value_heads=1, rope_parameters=LLAMA3_ROPE,
                                                  rms_norm_eps=0.1), 3),
    "linear RoPE, odd context length": (dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
                                             max_position_embeddings=50), 4),
}  # fmt: skip


def save_dense(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**(SHAPE | changes)))
    for name, parameter in dense.named_parameters():  # the usual start is a nearly uniform output and norms of 1
        if "norm" in name:
            parameter.data.uniform_(0.3, 1.5)
        else:
            parameter.data.normal_(0, 1.5 / math.sqrt(parameter.shape[1]))
    dense.to(dtype).save_pretrained(folder)
    build_tokenizer([TEXT], vocab_size=300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(dense, upcycled)"""
    changes, moe_step = KINDS[request.param]
    root = tmp_path_factory.mktemp("upcycle")
    source = save_dense(root / "dense", **changes)
    upcycle(source, root / "moe", num_experts=4, moe_step=moe_step)
    return source, root / "moe"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_dense(tmp_path / "dense")


def padded_batch(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask, positions [3, 40]; rows of 40, 23 and 1 tokens."""
    lengths = torch.tensor([40, 23, 1])
    mask = torch.arange(40).expand(3, 40) < lengths.unsqueeze(1)
    if side == "left":
        mask = mask.flip(1)
    ids = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(5)) * mask
    return ids, mask.long(), (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def logits(policy: Any, side: str) -> torch.Tensor:
    """[real tokens, V]"""
    ids, mask, positions = padded_batch(side)
    return policy.eval()(input_ids=ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]


def through_transformers(checkpoint: Path) -> Llama4ForCausalLM:
    policy, info = Llama4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return policy


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(checkpoint.glob("*.safetensors")) for name, t in load_file(file).items()}


# --- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_are_those_of_the_dense_model(pair: tuple[Path, Path], side: str) -> None:
    source, target = pair
    expected = logits(LlamaForCausalLM.from_pretrained(source, dtype=torch.float32), side)
    assert expected.std() > 0.5
    for policy in (through_transformers(target), load_policy(target)):
        torch.testing.assert_close(logits(policy, side), expected, atol=1e-4, rtol=0)


def test_generation_is_that_of_the_dense_model(pair: tuple[Path, Path]) -> None:
    source, target = pair
    ids, mask, _ = padded_batch("left")
    dense = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    settings = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=True)
    expected = dense.generate(ids, **settings)
    for policy in (through_transformers(target), load_policy(target)):
        assert torch.equal(policy.generate(ids, **settings), expected)


@pytest.mark.parametrize("forgotten", ["pairs", "norm eps", "theta"])
def test_logits_show_what_was_forgotten(source: Path, monkeypatch: Any, forgotten: str) -> None:
    target = source.with_name("moe")
    if forgotten == "pairs":
        monkeypatch.setattr(model.upcycle, "with_neighbouring_pairs", lambda weight_OD, num_heads: weight_OD)
    upcycle(source, target, num_experts=4)
    config = json.loads((target / "config.json").read_text())
    if forgotten == "norm eps":
        config["rms_norm_eps"] = 1e-2
    if forgotten == "theta":
        config["rope_parameters"]["rope_theta"] = 5e5
    (target / "config.json").write_text(json.dumps(config))
    expected = logits(LlamaForCausalLM.from_pretrained(source, dtype=torch.float32), "right")
    for policy in (through_transformers(target), load_policy(target)):
        assert (logits(policy, "right") - expected).abs().max() > 1e-2


def test_pairs_by_hand() -> None:
    rows = torch.arange(12.0).unsqueeze(1)  # two heads of six
    assert with_neighbouring_pairs(rows, 2).squeeze(1).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


# --- able to learn ----------------------------------------------------------------------------------------------------


def test_first_step_moves_down_proj_and_the_second_everything_else(source: Path) -> None:
    target = source.with_name("moe")
    upcycle(source, target, num_experts=4, moe_step=2)
    policy = load_policy(target).train()
    ids, mask, _ = padded_batch("right")
    labels = ids.masked_fill(mask == 0, -100)
    feed_forward = policy.model.layers[1].feed_forward
    new = {"down_proj": feed_forward.experts.down_proj, "gate_up_proj": feed_forward.experts.gate_up_proj,
           "router": feed_forward.router.weight}  # fmt: skip

    def gradients() -> dict[str, torch.Tensor]:
        policy.zero_grad()
        policy(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in new.items()}

    first = gradients()
    assert not first["gate_up_proj"].any() and not first["router"].any()
    used = feed_forward.router(torch.randn(1000, 32)).expert_T.unique()
    assert len(used) == 4
    assert first["down_proj"].abs().amax((1, 2)).min() > 1e-6, "an expert that learns nothing"
    with torch.no_grad():
        new["down_proj"] -= 0.1 * first["down_proj"]
    second = gradients()
    assert second["gate_up_proj"].abs().amax((1, 2)).min() > 1e-7
    assert second["router"].abs().max() > 1e-7


def test_experts_are_noisy_copies_that_differ(source: Path) -> None:
    target = source.with_name("moe")
    upcycle(source, target, num_experts=4, moe_step=2)
    old, new = tensors_of(source), tensors_of(target)
    mlp = torch.cat([old["model.layers.3.mlp.gate_proj.weight"].T, old["model.layers.3.mlp.up_proj.weight"].T], dim=1)
    experts = new["model.layers.3.feed_forward.experts.gate_up_proj"]
    assert experts.shape == (4, 32, 96)
    for expert in experts:
        assert float((expert - mlp).norm() / mlp.norm()) == pytest.approx(0.1, rel=0.1)
    assert (experts[0] - experts[1]).std() > 0
    assert not new["model.layers.3.feed_forward.experts.down_proj"].any()


def test_blind_router_has_logits_of_the_wanted_size_whatever_the_norm() -> None:
    norm_D = torch.full((256,), 0.05)
    x_TD = torch.randn(2000, 256, generator=torch.Generator().manual_seed(1)) * norm_D
    weight_ED = router_weight(8, norm_D, torch.Generator().manual_seed(0), None)
    assert float((x_TD @ weight_ED.T).std()) == pytest.approx(LOGIT_STD, rel=0.1)


def test_fitted_router_gives_no_expert_an_advantage() -> None:
    """Inputs with a mean as long as they are: blindly drawn, one of eight experts gets most of them."""
    noise = torch.Generator().manual_seed(1)
    mean_D = torch.randn(64, generator=noise)
    x_TD = mean_D + torch.randn(4000, 64, generator=noise) * torch.linspace(0.1, 1, 64)

    def busiest_share(seen: torch.Tensor | None) -> float:
        weight_ED = router_weight(8, torch.ones(64), torch.Generator().manual_seed(0), seen)
        return float(torch.bincount((x_TD @ weight_ED.T).argmax(1), minlength=8).max() / len(x_TD))

    assert busiest_share(None) > 0.4
    assert busiest_share(x_TD[:1000]) < 0.2
    logits_TE = x_TD @ router_weight(8, torch.ones(64), torch.Generator().manual_seed(0), x_TD).T
    torch.testing.assert_close(logits_TE.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits_TE.std(0), torch.full((8,), LOGIT_STD))


def test_calibration_text_sees_what_the_whole_model_sees(source: Path) -> None:
    dense = DenseLlama(source)
    text = CalibrationText(source, dense, TEXT * 20)
    assert text.num_tokens >= 512
    whole, seen = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), []
    for layer in whole.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda _, __, out: seen.append(out.flatten(0, 1)))
    tokenizer = build_tokenizer([TEXT], vocab_size=300)
    with torch.no_grad():
        whole(torch.tensor(tokenizer(TEXT * 20)["input_ids"][: text.num_tokens]).view(-1, 256))
    for layer, expected in enumerate(seen):
        torch.testing.assert_close(text.through(layer, dense.read_layer(layer)), expected, atol=1e-4, rtol=1e-4)


def test_fitting_changes_the_routers_and_nothing_else(source: Path) -> None:
    blind, fitted = source.with_name("blind"), source.with_name("fitted")
    assert upcycle(source, blind).calibration_tokens == 0
    assert upcycle(source, fitted, calibration_text=TEXT * 20).calibration_tokens >= 512
    one, other = tensors_of(blind), tensors_of(fitted)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {f"model.layers.{layer}.feed_forward.router.weight" for layer in (1, 3)}


# --- what is written --------------------------------------------------------------------------------------------------


def test_counts_by_hand_and_progress_to_the_end(source: Path) -> None:
    told: list[tuple[int, int]] = []
    target = source.with_name("moe")
    made = upcycle(source, target, num_experts=4, moe_step=2, on_progress=lambda *counts: told.append(counts))
    expert, router = 3 * 32 * 48, 4 * 32
    dense = 2 * 300 * 32 + 4 * (2 * 32 * 32 + 2 * 16 * 32 + expert + 2 * 32) + 32
    assert (made.dense_parameters, made.total_parameters) == (dense, dense + 2 * (4 * expert + router))
    assert made.active_parameters == dense + 2 * (expert + router)
    assert (made.num_moe_layers, made.num_layers, made.num_experts) == (2, 4, 4)
    assert made.total_parameters == sum(tensor.numel() for tensor in tensors_of(target).values())
    assert told[-1] == (made.total_parameters, made.total_parameters)
    assert [written for written, _ in told] == sorted(written for written, _ in told)


def test_tokenizer_template_and_generation_config_come_along(source: Path) -> None:
    (source / "pytorch_model.bin").write_text("not wanted")
    (source / "LICENSE").write_text("terms")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    target = source.with_name("moe")
    upcycle(source, target)
    copied = {path.name for path in source.iterdir()} - {"config.json", "model.safetensors", "pytorch_model.bin"}
    assert copied >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"}
    assert {path.name for path in target.iterdir()} == copied | {"config.json", "model.safetensors"}
    assert all((source / name).read_bytes() == (target / name).read_bytes() for name in copied)


def test_tied_head_is_not_written_and_an_equal_one_is_dropped(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", tie_word_embeddings=True)
    weights = tensors_of(source)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone(),
                         "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
              source / "model.safetensors", {"format": "pt"})  # fmt: skip
    upcycle(source, tmp_path / "moe")
    assert "lm_head.weight" not in tensors_of(tmp_path / "moe")
    policy = load_policy(tmp_path / "moe")
    assert policy.lm_head.weight is policy.model.embed_tokens.weight


def test_head_that_is_not_the_embedding_is_kept_though_the_config_says_tied(tmp_path: Path) -> None:
    """transformers does not tie them either; with the embedding as head the function would be another."""
    source = save_dense(tmp_path / "dense", tie_word_embeddings=True)
    head = {"lm_head.weight": torch.randn(300, 32)}
    save_file(tensors_of(source) | head, source / "model.safetensors", {"format": "pt"})
    upcycle(source, tmp_path / "moe")
    expected = logits(LlamaForCausalLM.from_pretrained(source, dtype=torch.float32), "right")
    for policy in (through_transformers(tmp_path / "moe"), load_policy(tmp_path / "moe")):
        torch.testing.assert_close(logits(policy, "right"), expected, atol=1e-4, rtol=0)


def test_shards_are_read_and_written(source: Path, monkeypatch: Any) -> None:
    whole = source.with_name("whole")
    upcycle(source, whole)
    LlamaForCausalLM.from_pretrained(source).save_pretrained(source, max_shard_size="40KB")
    (source / "model.safetensors").unlink(missing_ok=True)
    assert len(list(source.glob("*.safetensors"))) > 2
    monkeypatch.setattr(model.upcycle, "SHARD_BYTES", 100_000)
    sharded = source.with_name("sharded")
    upcycle(source, sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, other = tensors_of(whole), tensors_of(sharded)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    through_transformers(sharded)


def test_dtype_is_the_sources_or_the_one_asked_for(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", torch.bfloat16)
    for asked, expected in ((None, "bfloat16"), ("float32", "float32")):
        target = tmp_path / expected
        upcycle(source, target, dtype=asked)
        assert {str(tensor.dtype) for tensor in tensors_of(target).values()} == {f"torch.{expected}"}
        assert json.loads((target / "config.json").read_text())["dtype"] == expected
    dense = logits(LlamaForCausalLM.from_pretrained(source, dtype=torch.float32), "right")
    torch.testing.assert_close(logits(load_policy(tmp_path / "float32"), "right"), dense, atol=1e-4, rtol=0)


def test_seed_decides_every_byte(source: Path) -> None:
    files = []
    for index, seed in enumerate((3, 3, 4)):
        upcycle(source, source.with_name(f"moe-{index}"), seed=seed)
        files.append((source.with_name(f"moe-{index}") / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_full_attention_and_a_chunk_that_vllm_can_serve_and_never_sees(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1000}))
    upcycle(source, source.with_name("moe"))
    config = json.loads((source.with_name("moe") / "config.json").read_text())
    assert (config["attention_chunk_size"], config["max_position_embeddings"]) == (1024, 1000)
    assert config["layer_types"] == ["full_attention"] * 4 and config["no_rope_layers"] == [1] * 4
    assert (config["use_qk_norm"], config["attn_temperature_tuning"]) == (False, False)


def test_nothing_is_left_when_it_stops_half_way(source: Path) -> None:
    def stop(written: int, total: int) -> None:
        if written > total / 2:
            raise KeyboardInterrupt

    before = set(source.parent.iterdir())
    with pytest.raises(KeyboardInterrupt):
        upcycle(source, source.with_name("moe"), on_progress=stop)
    assert set(source.parent.iterdir()) == before


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "qwen3"}, r"config.json: model_type is 'qwen3'; accepted is 'llama'"),
        ({"attention_bias": True}, "attention_bias is True, accepted is false"),
        ({"mlp_bias": True, "hidden_act": "gelu"}, "mlp_bias is True, accepted is false.*hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "partial_rotary_factor is 0.5, accepted is 1"),
        ({"head_dim": 7}, "is no config of a Llama: .* even rotary dimension"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
        ({"num_hidden_layers": 5}, "of 48 tensors wanted, 9 missing"),
        ({"intermediate_size": 64}, r"gate_proj.weight is \[48, 32\], wanted \[64, 32\]"),
    ],
)  # fmt: skip
def test_source_that_llama4_cannot_express_is_refused(source: Path, changes: dict[str, Any], told: str) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UpcycleRefused, match=f"(?s){told}"):
        upcycle(source, source.with_name("moe"))
    assert not source.with_name("moe").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"num_experts": 1}, "num_experts: 1; accepted are 2 or more"),
        ({"moe_step": 0}, "moe_step: 0; accepted are 1"),
        ({"moe_step": 5}, "moe_step: 5; .* has 4 layers"),
        ({"dtype": "float8_e4m3fn"}, "dtype: 'float8_e4m3fn'; accepted are float32, bfloat16, float16"),
        ({"calibration_text": "short"}, r"has \d+ tokens; accepted are 256 or more"),
    ],
)
def test_arguments_out_of_range_are_refused(source: Path, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UpcycleRefused, match=told):
        upcycle(source, source.with_name("moe"), **arguments)


def test_missing_source_and_occupied_target_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UpcycleRefused, match="nowhere/config.json cannot be read"):
        upcycle(tmp_path / "nowhere", tmp_path / "moe")
    with pytest.raises(UpcycleRefused, match="dense is there already; accepted is a path where nothing is"):
        upcycle(source, source)
    (tmp_path / "empty").mkdir()
    upcycle(source, tmp_path / "empty")
    with safe_open(tmp_path / "empty" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
