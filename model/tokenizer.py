"""Text to token ids and back, the same way everywhere: SFT, RL, DPO and evaluation all come through here.

A prompt is encoded once, through the checkpoint's chat template; from then on only ids travel. `build_tokenizer` makes
the tiny model's own: byte-level BPE, digits one by one, in Llama 4's chat format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|begin_of_text|>", "<|eot|>", "<|finetune_right_pad|>"
SPECIAL_TOKENS = [BOS, "<|end_of_text|>", PAD, "<|header_start|>", "<|header_end|>", EOS]

# Llama 4's chat format. `generation` marks what an assistant turn is trained on: its words and the end of the turn.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|header_start|>{{ message.role }}<|header_end|>\n\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|eot|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|eot|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`. Words merge; digits, punctuation and line breaks never do, so that numbers are
    read digit by digit and a program's symbols keep their places. Any text can be encoded: bytes are the fallback."""
    tokenizer = Tokenizer(models.BPE())
    words_or_symbols = Regex(r" ?[A-Za-z]+|\n+|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words_or_symbols, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        additional_special_tokens=["<|header_start|>", "<|header_end|>"],
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(checkpoint: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; one without a padding token pads with its end-of-turn token."""
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    if tokenizer.chat_template is None:
        raise ValueError(f"{checkpoint}: the tokenizer has no chat template; use an instruct checkpoint or add one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of one user turn, up to where the assistant begins to speak."""
    return encode_messages(tokenizer, [{"role": "user", "content": prompt}])


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation, up to where the assistant begins to speak."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_example(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
    """(ids, mask) of a prompt and its answer; True marks what is trained on: the answer and the end of the turn.

    Raises ValueError where nothing or everything would be trained on."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    answer_ids = list(tokenizer.encode(answer, add_special_tokens=False)) + [tokenizer.eos_token_id]
    if len(answer_ids) < 2 or not prompt_ids:
        kind = "full" if not prompt_ids else "empty"
        raise ValueError(f"the mask would be {kind}: prompt {prompt!r}, answer {answer!r}")
    return prompt_ids + answer_ids, [False] * len(prompt_ids) + [True] * len(answer_ids)


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The words of an answer, special tokens dropped."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, checkpoint: str | Path) -> list[int]:
    """Every id that ends a turn: the tokenizer's, and those the checkpoint's generation config lists."""
    stops = {tokenizer.eos_token_id}
    path = Path(checkpoint) / "generation_config.json"
    if path.exists():
        listed = json.loads(path.read_text()).get("eos_token_id")
        stops.update(listed if isinstance(listed, list) else [] if listed is None else [listed])
    return sorted(stops)
