"""Tokenizers: stories260K's real one, and a small byte-level BPE with SmolLM2's chat template. pad == eos in both."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.",
    "system user assistant\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "Question: how many apples does she have? Answer: 42 apples. \n\nHuman: hello \n\nAssistant: hi there",
] * 3


def byte_level(trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens, built as SmolLM2's: eos = pad = <|im_end|>, and no bos is added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=SMOLLM2, **special)


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture
def fresh() -> PreTrainedTokenizerFast:
    """As `chatml`, to be changed by the test."""
    return byte_level()


@pytest.fixture
def plain(stories) -> PreTrainedTokenizerFast:
    """stories260K's tokenizer (a space before every text, adds no bos, has no chat template), to be changed."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
