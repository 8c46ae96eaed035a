"""The text of a completion, for every kind of decoder: what is written behind the prompt's own text."""

import dataclasses

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rljax import decoding
from rljax.types import Tokens
from tests.data.conftest import byte_level, chatml, plain

__all__ = ["chatml", "plain"]  # fixtures
WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁Tom", "▁was", "▁happy", "ly", ".", "▁", "▁,"]
LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
)
DECODERS = {
    "llama": LLAMA,
    "metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]),
    "gemma": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
}


def sentencepiece(decoder, **settings) -> PreTrainedTokenizerFast:
    """A vocabulary in SentencePiece's manner: ▁ for a space, bytes for what it has no piece for."""
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoder
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, **settings)


def ids(tokenizer, *words):
    found = tokenizer.convert_tokens_to_ids(list(words))
    assert tokenizer.unk_token_id not in found
    return found


def byte(character, *which):
    data = character.encode()
    return [f"<0x{data[i]:02X}>" for i in which or range(len(data))]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    ("before", "written", "text"),
    [
        (["<s>", "▁Tom"], ["▁was", "▁happy", "</s>"], " was happy"),
        (["▁Tom"], ["ly", "▁was", "."], "ly was."),
        (["▁Tom", "▁"], ["▁was"], " was"),
        (["▁Tom", "▁was"], ["▁,", "▁happy", "▁"], " , happy "),  # spaces as they were written
        (["▁Tom", *byte("é", 0)], [*byte("é", 1), "▁was"], "é was"),  # a character that the prompt began
        (["▁Tom", *byte("🙂", 0, 1)], byte("🙂", 2, 3), "🙂"),
        (["▁Tom", *byte("🙂", 0, 1)], ["▁was"], " was"),  # … and nobody ended
        (["▁Tom"], byte("é", 0), "�"),
        (["▁Tom"], [], ""),
    ],
)
def test_a_continuation_keeps_its_space_and_whole_characters(name, before, written, text):
    tokenizer = sentencepiece(DECODERS[name])
    assert decoding.continuation(tokenizer, ids(tokenizer, *before), ids(tokenizer, *written)) == text


def test_real_and_byte_level_tokenizers(plain, chatml):
    for tokenizer in (plain, chatml, byte_level(trim_offsets=True)):
        whole = tokenizer("Once there was a dog. It was “happy”, é 🙂 !", add_special_tokens=False)["input_ids"]
        full = decoding.decode(tokenizer, whole)
        for cut in range(1, len(whole)):
            start, end = whole[:cut], whole[cut:]
            said = decoding.continuation(tokenizer, start, end)
            assert (decoding.decode(tokenizer, start).rstrip("�") + said) == full
        pieces = decoding.pieces(tokenizer, whole[:1], whole[1:])
        assert decoding.decode(tokenizer, whole[:1]) + "".join(p for p in pieces if "�" not in p) == full


def test_spaces_are_not_cleaned_up():
    tokenizer = sentencepiece(LLAMA, clean_up_tokenization_spaces=True)
    assert decoding.continuation(tokenizer, ids(tokenizer, "▁Tom"), ids(tokenizer, "▁,", "▁was")) == " , was"


@pytest.fixture(scope="module")
def thinking():
    """A byte-level tokenizer in which <think> and </think> are special tokens."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    return tokenizer


def test_special_tokens_are_kept_on_request_and_the_stop_token_is_not_text(thinking):
    encode = lambda text: thinking(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    before, written = encode("<|im_start|>assistant\n"), encode("<think>so</think> 4<tool_call><|im_end|>")
    stops = (thinking.eos_token_id, encode(".")[0])
    assert decoding.written(thinking, before, written, stop_ids=stops) == (
        "so 4<tool_call>",
        "<think>so</think> 4<tool_call>",
    )
    row = np.asarray([*before, *written, 0])
    segments, mask = (np.arange(len(row)) < len(row) - 1), np.arange(len(row)) >= len(before)
    tokens = Tokens(ids=row[None], segments=segments[None].astype(np.int32), mask=(mask & segments)[None])
    assert decoding.texts(thinking, tokens) == ["so 4<tool_call>"]
    assert decoding.texts(thinking, tokens, special=True, stop_ids=stops) == ["<think>so</think> 4<tool_call>"]
    assert decoding.texts(thinking, tokens, special=True) == ["<think>so</think> 4<tool_call><|im_end|>"]
    assert decoding.specials(thinking, written, stop_ids=stops) == ["<think>", "</think>"]
    assert decoding.specials(thinking, encode("4."), stop_ids=stops) == []
    # a stop text that is an ordinary token stands in the text, as it always did
    assert decoding.written(thinking, before, encode("4."), stop_ids=stops) == ("4.", "4.")
    nothing = dataclasses.replace(tokens, mask=np.zeros_like(tokens.mask))
    assert decoding.texts(thinking, nothing) == [""]
