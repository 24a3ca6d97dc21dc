import pytest

from model.tokenizer import EOS, build_tokenizer, decode_answer, encode_example, encode_prompt


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["Compute 12+7.", "Answer: 19", "user", "assistant"] * 10, 300)


def test_a_prompt_is_in_llama_4s_chat_format(tokenizer):
    text = tokenizer.decode(encode_prompt(tokenizer, "Hi"))
    assert text == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHi<|eot|><|header_start|>assistant<|header_end|>\n\n"
    )


def test_numbers_are_read_digit_by_digit(tokenizer):
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("2024+7", add_special_tokens=False)]
    assert pieces == ["2", "0", "2", "4", "+", "7"]


def test_the_mask_marks_the_answer_and_the_end_of_the_turn(tokenizer):
    ids, mask = encode_example(tokenizer, "Compute 1+2.", "Answer: 3")
    assert tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]) == "Answer: 3" + EOS
    assert ids[: mask.index(True)] == encode_prompt(tokenizer, "Compute 1+2.")


def test_the_templates_own_mask_says_the_same(tokenizer):
    messages = [{"role": "user", "content": "Compute 1+2."}, {"role": "assistant", "content": "Answer: 3"}]
    out = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ids, mask = encode_example(tokenizer, "Compute 1+2.", "Answer: 3")
    assert out["input_ids"] == ids and [bool(on) for on in out["assistant_masks"]] == mask


def test_an_empty_answer_would_train_on_nothing_and_is_refused(tokenizer):
    with pytest.raises(ValueError, match="empty"):
        encode_example(tokenizer, "Compute 1+2.", "")


TEXTS = ["Answer: 19", "def f(x):\n x=x*2\n return x", "naïve — 試す\t!", "  two  spaces \n\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert decode_answer(tokenizer, tokenizer.encode(text, add_special_tokens=False)) == text
