"""A randomly initialised Llama 4 text model small enough to train on a CPU: what `bootstrap` starts from."""

from __future__ import annotations

from transformers import Llama4TextConfig, PreTrainedTokenizerBase

from model.config import TinyShape, tiny
from model.transformer import MoeForCausalLM

__all__ = ["TinyShape", "tiny_llama4"]


def tiny_llama4(shape: TinyShape, tokenizer: PreTrainedTokenizerBase) -> MoeForCausalLM:
    """The preset `tiny` with a tokenizer's vocabulary and special tokens, initialised by `model/transformer.py`."""
    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return MoeForCausalLM(Llama4TextConfig(**tiny(shape, len(tokenizer)) | special_tokens))
