"""Our model against transformers' Llama4ForCausalLM on the same random weights, fp32.

Chunk and floor are shrunk to 16 and 8 positions, so that masks and the growth of queries bite; weights and norms have
non-zero means, since some mistakes (a gate after the expert) hide behind zero ones.
"""

import pytest
import torch
from transformers import DynamicCache, Llama4ForCausalLM, Llama4TextConfig

import model.transformer as transformer
from model.experts import Experts
from model.logprobs import token_logprobs
from model.transformer import MoeForCausalLM

CHUNK = 16
SCOUT_ROPE = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 16.0, "low_freq_factor": 1.0,
              "high_freq_factor": 1.0, "original_max_position_embeddings": 64}  # fmt: skip


def config(kind: str) -> Llama4TextConfig:
    scout = kind == "scout"
    return Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, intermediate_size_mlp=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4,
        interleave_moe_layer_step=1 if scout else 2, use_qk_norm=scout, attention_chunk_size=CHUNK, floor_scale=8,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, router_aux_loss_coef=0.0,
        rope_parameters=SCOUT_ROPE if scout else {"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip


def pair(kind: str) -> tuple[Llama4ForCausalLM, MoeForCausalLM]:
    torch.manual_seed(0)
    theirs = Llama4ForCausalLM(config(kind)).float()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if weight.dim() < 2:
                weight.normal_(1.0, 0.2)
            else:
                fan_in = 1 if "embed" in name else weight.shape[-2] if weight.dim() == 3 else weight.shape[-1]
                weight.normal_(0.02, fan_in**-0.5)
    ours = MoeForCausalLM(config(kind))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.eval(), ours.eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(shape[-1]))


def logits(model, ids, **inputs):
    return model(ids, use_cache=False, **inputs).logits


@pytest.fixture(scope="module", params=["scout", "maverick"])
def models(request):
    return pair(request.param)


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5])
def test_logits_and_gradients(models, length):
    ids = tokens(2, length)
    for model in models:
        model.zero_grad()
    results = [logits(model, ids) for model in models]
    assert (results[0] - results[1]).abs().max() < 1e-4
    for result in results:
        result.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:].unsqueeze(2)).mean().backward()
    theirs, ours = (dict(model.named_parameters()) for model in models)
    assert all((theirs[name].grad - ours[name].grad).abs().max() < 1e-4 for name in theirs)
    assert max(float(weight.grad.abs().max()) for weight in ours.values()) > 1e-3


def test_decoding_token_by_token_is_the_prefill_at_every_position(models):
    ours, ids = models[1], tokens(2, 3 * CHUNK + 5)
    step = ours(ids[:, :3], use_cache=True)
    steps = [step.logits]
    for position in range(3, ids.shape[1]):
        step = ours(ids[:, position : position + 1], past_key_values=step.past_key_values, use_cache=True)
        steps.append(step.logits)
    assert (torch.cat(steps, 1) - logits(ours, ids)).abs().max() < 1e-4


def test_packed_and_padded_equal_separate(models):
    ours, documents = models[1], [tokens(1, 19), tokens(1, 3 * CHUNK)]
    alone = [logits(ours, ids)[0] for ids in documents]
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in documents]).unsqueeze(0)
    packed = logits(ours, torch.cat(documents, 1), position_ids=positions)[0]
    assert (packed - torch.cat(alone)).abs().max() < 1e-4
    for left in (False, True):
        ids, mask = torch.zeros(2, 3 * CHUNK, dtype=torch.long), torch.zeros(2, 3 * CHUNK, dtype=torch.long)
        places = [slice(-d.shape[1], None) if left else slice(0, d.shape[1]) for d in documents]
        for row, (document, place) in enumerate(zip(documents, places, strict=True)):
            ids[row, place], mask[row, place] = document[0], 1
        padded = logits(ours, ids, attention_mask=mask)
        for row, place in enumerate(places):
            assert (padded[row, place] - alone[row]).abs().max() < 1e-4


def test_the_same_prompt_again_in_a_batch_is_identical_bit_for_bit(models):
    for length in (CHUNK - 3, CHUNK + 3, 2 * CHUNK + 1):
        prompt, other = tokens(1, length), tokens(1, length + 40)[:, 40:]
        rows = logits(models[1], torch.cat([other, prompt, other, prompt, prompt]))
        assert torch.equal(rows[1], rows[3]) and torch.equal(rows[1], rows[4]) and torch.equal(rows[0], rows[2])
        assert not torch.equal(rows[0], rows[1])


def branched(prompts: list[torch.Tensor], answers: list[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One row: each prompt once, followed by all its answers; and the positions of its tokens."""
    ids, positions = [], []
    for prompt, own in zip(prompts, answers, strict=True):
        ids += [prompt, *own]
        positions += [torch.arange(len(prompt)), *(torch.arange(len(a)) + len(prompt) for a in own)]
    return torch.cat(ids).unsqueeze(0), torch.cat(positions).unsqueeze(0)


def test_answers_that_share_a_prompt_equal_answers_that_bring_their_own(models):
    """Prompts that end before, at and behind a chunk boundary; log-probabilities and every gradient."""
    ours = models[1]
    prompts = [tokens(size) for size in (CHUNK - 5, CHUNK, 2 * CHUNK + 3)]
    answers = [[tokens(size) for size in (3, 2 * CHUNK, 9)], [tokens(6)], [tokens(CHUNK), tokens(1)]]
    weights = iter(torch.linspace(-1, 1, 6))
    alone, gradients = [], []
    ours.zero_grad()
    for prompt, own in zip(prompts, answers, strict=True):
        for answer in own:
            ids = torch.cat([prompt, answer]).unsqueeze(0)
            wanted = (torch.arange(ids.shape[1]) >= len(prompt)).unsqueeze(0)
            alone.append(token_logprobs(ours, ids, wanted)[0].logprob_T)
            (alone[-1].sum() * next(weights)).backward()
    gradients.append({name: weight.grad.clone() for name, weight in ours.named_parameters()})
    ours.zero_grad()
    ids, positions = branched(prompts, answers)
    is_prompt = torch.cat(
        [torch.cat([torch.ones(len(p)), *(torch.zeros(len(a)) for a in own)]) for p, own in zip(prompts, answers)]
    ).bool()
    together = token_logprobs(ours, ids, ~is_prompt.unsqueeze(0), position_BS=positions)[0].logprob_T
    assert (together - torch.cat(alone)).abs().max() < 1e-5
    each = torch.linspace(-1, 1, 6).repeat_interleave(torch.tensor([len(a) for own in answers for a in own]))
    (together * each).sum().backward()
    for name, weight in ours.named_parameters():
        assert (weight.grad - gradients[0][name]).abs().max() < 1e-4, name
    # An answer that saw its neighbour instead of its prompt alone would differ.
    straight = token_logprobs(ours, ids, ~is_prompt.unsqueeze(0))[0].logprob_T
    assert (straight - torch.cat(alone)).abs().max() > 1e-2


def test_positions_that_begin_nowhere_are_refused(models):
    with pytest.raises(ValueError, match="token 4 of the batch is at position 5; expected 0, .* or at most 4"):
        logits(models[1], tokens(1, 8), position_ids=torch.tensor([[0, 1, 2, 3, 5, 6, 7, 8]]))
    with pytest.raises(ValueError, match="token 0 of the batch is at position 2; expected 0"):
        logits(models[1], tokens(1, 3), position_ids=torch.tensor([[2, 3, 4]]))


def packed(documents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of several documents, and the positions of its tokens."""
    return torch.cat(documents, 1), torch.cat([torch.arange(ids.shape[1]) for ids in documents]).unsqueeze(0)


def test_packed_equals_separate_where_the_config_allows_a_cache(models):
    """As whoever loads the model without `load_policy` calls it: in evaluation, `use_cache` left to the config."""
    ours = models[1]
    assert ours.config.use_cache and not ours.training
    documents = [tokens(1, 19), tokens(1, 3 * CHUNK), tokens(1, 1)]
    alone = torch.cat([ours(ids).logits[0] for ids in documents])
    ids, positions = packed(documents)
    together = ours(ids, position_ids=positions)
    assert (together.logits[0] - alone).abs().max() < 1e-4
    assert together.past_key_values is None  # lest someone go on from the row as if it were one document
    assert (ours(ids).logits[0] - alone).abs().max() > 1e-1  # what documents that see each other would give
    # Behind padding, and where answers branch off a prompt.
    hole = torch.zeros(1, 4, dtype=torch.long)
    mask = torch.cat([hole, torch.ones_like(ids)], 1)
    padded = ours(torch.cat([hole, ids], 1), attention_mask=mask, position_ids=torch.cat([hole, positions], 1))
    assert (padded.logits[0, 4:] - alone).abs().max() < 1e-4
    ids, positions = branched([tokens(9)], [[tokens(5), tokens(7)]])
    assert torch.equal(ours(ids, position_ids=positions).logits, logits(ours, ids, position_ids=positions))


def test_a_row_that_is_one_document_still_fills_the_cache(models):
    ours, ids = models[1], tokens(2, CHUNK)
    positions = torch.arange(CHUNK).unsqueeze(0)  # one row of positions for all, as transformers allows it
    out, plain = ours(ids, position_ids=positions), ours(ids)
    assert torch.equal(out.logits, plain.logits) and out.past_key_values.get_seq_length() == CHUNK
    mask = (torch.arange(CHUNK) >= torch.tensor([[3], [0]])).long()
    behind_holes = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # what lies at a hole is nobody's position
    out, plain = ours(ids, attention_mask=mask, position_ids=behind_holes), ours(ids, attention_mask=mask)
    assert torch.equal(out.logits, plain.logits) and out.past_key_values.get_seq_length() == CHUNK


def test_positions_that_a_cache_cannot_hold_are_refused(models):
    ours, (ids, positions) = models[1], packed([tokens(1, 5), tokens(1, 4)])
    for asked in ({"use_cache": True}, {"past_key_values": DynamicCache(config=ours.config)}):
        with pytest.raises(ValueError, match=r"position_ids\[0, 5\] is 0; .* expected 5, .* need use_cache=False"):
            ours(ids, position_ids=positions, **asked)

    def filled(**inputs):
        return ours(tokens(1, 6), use_cache=True, **inputs).past_key_values

    step = {"input_ids": tokens(1, 3), "past_key_values": filled()}
    with pytest.raises(ValueError, match=r"position_ids\[0, 2\] is 0; with 6 tokens in the cache expected 8"):
        ours(**step, position_ids=torch.tensor([[6, 7, 0]]))
    with pytest.raises(ValueError, match=r"position_ids\[0, 0\] is 4; with 6 tokens in the cache expected 6"):
        ours(**step, position_ids=torch.tensor([[4, 5, 6]]))
    assert step["past_key_values"].get_seq_length() == 6  # a refused step leaves the cache as it was
    assert torch.equal(
        ours(**step, position_ids=torch.tensor([[6, 7, 8]])).logits,
        ours(tokens(1, 3), past_key_values=filled()).logits,
    )
    # Two of the cached tokens are padding: without the mask that says so, they would count.
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    step = {"input_ids": tokens(1, 1), "position_ids": torch.tensor([[4]])}
    with pytest.raises(ValueError, match=r"position_ids\[0, 0\] is 4; .* expected 6, .* attention_mask"):
        ours(**step, past_key_values=filled(attention_mask=mask))
    ours(**step, past_key_values=filled(attention_mask=mask), attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1]]))


def test_generate_is_transformers_greedy_over_a_chunk_boundary_and_takes_left_padding(models):
    prompt = tokens(1, CHUNK - 4)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    theirs, ours = (model.generate(prompt, **settings) for model in models)
    assert torch.equal(theirs, ours)
    ids = torch.zeros(2, CHUNK, dtype=torch.long)
    ids[0, 4:], ids[1] = prompt[0], tokens(1, CHUNK)[0]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    assert torch.equal(models[1].generate(ids, attention_mask=mask, **settings)[0, CHUNK:], ours[0, CHUNK - 4 :])


def test_generate_behind_left_padding_computes_what_a_mask_alone_gives(models):
    """`generate` passes positions, and anything at a hole; they must not change a bit of what the mask says."""
    ours, length = models[1], CHUNK - 2
    mask = (torch.arange(length) >= torch.tensor([[5], [0], [1]])).long()
    ids = tokens(3, length) * mask
    made = ours.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    asked = {"use_cache": True, "logits_to_keep": 1}  # as `generate` does: a product of other rows rounds otherwise
    step = ours(ids, attention_mask=mask, **asked)
    for number, from_generate in enumerate(made.logits):
        assert torch.equal(step.logits[:, -1], from_generate)
        token = made.sequences[:, length + number : length + number + 1]
        assert torch.equal(token, step.logits[:, -1:].argmax(-1))
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        step = ours(token, attention_mask=mask, past_key_values=step.past_key_values, **asked)


def test_activation_checkpointing_changes_neither_loss_nor_gradients_nor_routes(models):
    ours, ids = models[1], tokens(2, 2 * CHUNK)
    ours.train()
    seen = []
    for switch in (ours.gradient_checkpointing_disable, ours.gradient_checkpointing_enable):
        switch()
        ours.zero_grad()
        out = ours(ids, labels=ids)
        out.loss.backward(retain_graph=True)
        ours.zero_grad()
        out.loss.backward()  # what was forgotten can be computed more than once
        gradients = {name: weight.grad.clone() for name, weight in ours.named_parameters()}
        seen.append((out.loss, gradients, [route.expert_T for route in out.routes]))
    ours.gradient_checkpointing_disable()
    ours.eval()
    (loss, gradients, routes), (again, gradients_again, routes_again) = seen
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    assert all(torch.equal(one, two) for one, two in zip(routes, routes_again, strict=True))


def test_loss_is_transformers_loss_and_builds_no_logits_while_training(models):
    theirs, ours = models
    ids = tokens(2, CHUNK)
    labels = ids.masked_fill(torch.arange(CHUNK) < 5, -100)
    assert torch.allclose(theirs(ids, labels=labels).loss, ours(ids, labels=labels).loss, atol=1e-5)
    ours.train()
    assert ours(ids, labels=labels).logits is None
    ours.eval()


# --- what parity must notice --------------------------------------------------------------------------------------


def _output_scaling(patch, ours):
    plain = Experts.forward
    patch.setattr(Experts, "forward", lambda s, x, e, gate: plain(s, x, e, torch.ones_like(gate)) * gate.unsqueeze(1))


def _w1_for_w3(patch, ours):
    for block in (layer.feed_forward for layer in ours.model.layers if hasattr(layer.feed_forward, "experts")):
        block.experts.gate_up_proj.data = torch.cat(block.experts.gate_up_proj.chunk(2, -1)[::-1], -1)


def _transposed_expert(patch, ours):
    for block in (layer.feed_forward for layer in ours.model.layers if hasattr(layer.feed_forward, "experts")):
        block.experts.down_proj.data = block.experts.down_proj.transpose(1, 2).contiguous()


def _no_temperature(patch, ours):
    patch.setattr(transformer, "temperature", lambda position_T, growth, floor: torch.ones(len(position_T), 1, 1))


@pytest.mark.parametrize("mistake", [_output_scaling, _w1_for_w3, _transposed_expert, _no_temperature])
@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_a_planted_mistake_breaks_parity(monkeypatch, kind, mistake):
    theirs, ours = pair(kind)
    mistake(monkeypatch, ours)
    ids = tokens(2, 2 * CHUNK)
    assert (logits(theirs, ids) - logits(ours, ids)).abs().max() > 1e-2


def test_norm_over_all_heads_at_once_breaks_parity(monkeypatch):
    theirs, ours = pair("scout")
    monkeypatch.setattr(
        transformer, "unit_heads", lambda x, eps: x * (x.square().mean((-1, -2), keepdim=True) + eps).rsqrt()
    )
    ids = tokens(2, 2 * CHUNK)
    assert (logits(theirs, ids) - logits(ours, ids)).abs().max() > 1e-2
