"""GGUF files: the parameters of the checkpoint they were made from, and a tokenizer that splits text as it should."""

import dataclasses
import json

import jax
import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from rljax.models import hf  # noqa: E402
from rljax.models.gguf import read_tokenizer  # noqa: E402
from rljax.models.resolve import cache_folder, generation_stop_ids, load_tokenizer, resolve  # noqa: E402
from tests.models.make_fixtures import FOLDER  # noqa: E402
from tests.models.tiny_gguf import write  # noqa: E402

Kind = gguf.GGMLQuantizationType


def config_of(name, **changes):
    config = json.loads((FOLDER / name / "config.json").read_text())
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return {**config, **changes}


def same(a, b, atol=0.0):
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y, np.float32), atol=atol, rtol=0, err_msg=str(path))


@pytest.mark.parametrize(("name", "kind"), [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_parameters_are_those_of_the_checkpoint(name, kind, tmp_path):
    model, params = hf.load(FOLDER / name)
    read, found = hf.load(write(tmp_path / "m.gguf", FOLDER / name, config_of(name), kind=kind))
    same(found, params)
    plain = dataclasses.replace(model.config, source="", windows=())  # GGUF has no windows for these
    assert dataclasses.replace(read.config, source="") == plain


def test_quantised_blocks_are_dequantised(tmp_path):
    kinds = {"ffn_up": Kind.Q8_0, "attn_q.": Kind.Q4_1, "attn_q": Kind.Q4_1}
    file = write(tmp_path / "m.gguf", FOLDER / "llama", config_of("llama"), quantised=kinds)
    params, found = hf.load(FOLDER / "llama")[1], hf.load(file)[1]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}
    same(found, params, atol=0.1)
    np.testing.assert_array_equal(found["layers"]["mlp"]["down"]["kernel"], params["layers"]["mlp"]["down"]["kernel"])
    for part, worst in ((("mlp", "up"), 0.005), (("attention", "query"), 0.09)):
        error = np.abs(found["layers"][part[0]][part[1]]["kernel"] - params["layers"][part[0]][part[1]]["kernel"]).max()
        assert 0 < error < worst


def test_rope_factors_divide_the_frequencies(tmp_path):
    file = write(tmp_path / "m.gguf", FOLDER / "llama", config_of("llama"), factors=[1, 1, 2, 4, 8, 8])
    (rope,) = hf.load(file)[0].config.ropes
    assert rope.short_factor == rope.long_factor == (1, 1, 2, 4, 8, 8)
    assert rope.attention_factor == 1


def test_what_a_gguf_becomes_opens_as_a_folder(tmp_path):
    file = write(tmp_path / "m.gguf", FOLDER / "llama", config_of("llama"))
    model, params = hf.load(file)
    hf.save(tmp_path / "out", model, params, tokenizer=load_tokenizer(file))
    same(hf.load(tmp_path / "out")[1], params)
    text = "the 1234 cafés"
    assert load_tokenizer(tmp_path / "out")(text) == load_tokenizer(file)(text)
    assert generation_stop_ids(file) == generation_stop_ids(tmp_path / "out") == (2,)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["the", "Ġthe", "Ġ", "1", "2", "1"]),
        ("gpt-2", ["the", "Ġthe", "Ġ1", "2", "1"]),
        ("llama-bpe", ["the", "Ġthe", "Ġ", "12", "1"]),
        ("qwen2", ["the", "Ġthe", "Ġ", "1", "2", "1"]),
    ],
)
def test_text_is_split_as_the_file_says(pre, pieces, tmp_path):
    tokenizer = read_tokenizer(write(tmp_path / "m.gguf", FOLDER / "llama", config_of("llama"), pre=pre))
    assert tokenizer.tokenize("the the 121") == pieces
    assert tokenizer.decode(tokenizer("the the 121 é")["input_ids"]) == "the the 121 é"


def test_special_tokens_and_template(tmp_path):
    tokenizer = read_tokenizer(write(tmp_path / "m.gguf", FOLDER / "llama", config_of("llama"), bos=True))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("<|end|>the")["input_ids"][:2] == [1, 2]
    assert tokenizer.decode(tokenizer("the")["input_ids"], skip_special_tokens=True) == "the"
    assert tokenizer.apply_chat_template([{"content": "the"}], tokenize=False) == "<|start|>the<|end|>"


def test_what_is_not_supported_is_said(tmp_path):
    config = config_of("llama")
    with pytest.raises(ValueError, match="architecture 'mamba'"):
        hf.load(write(tmp_path / "a.gguf", FOLDER / "llama", {**config}, kind="mamba"))
    with pytest.raises(ValueError, match="'deepseek-llm'"):
        read_tokenizer(write(tmp_path / "b.gguf", FOLDER / "llama", config, pre="deepseek-llm"))
    with pytest.raises(ValueError, match="byte-level BPE"):
        read_tokenizer(write(tmp_path / "c.gguf", FOLDER / "llama", config, tokenizer="llama"))
    whole = write(tmp_path / "d.gguf", FOLDER / "llama", config).read_bytes()
    (tmp_path / "e.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"e\.gguf.*truncated"):
        hf.load(tmp_path / "e.gguf")
    (tmp_path / "f.gguf").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"f\.gguf.*damaged"):
        hf.load(tmp_path / "f.gguf")


@pytest.fixture(scope="module")
def smollm2():
    folder = cache_folder() / "HuggingFaceTB--SmolLM2-135M-Instruct"
    if not folder.is_dir():
        pytest.skip('needs rljax.models.resolve("smollm2-135m-instruct") to have run once')
    return resolve("smollm2-135m-instruct")


def test_smollm2_tokenizes_as_documented(smollm2):
    """Digits one by one, ChatML, and <|im_end|> as both end and padding."""
    tokenizer = load_tokenizer(smollm2)
    assert len(tokenizer) == 49152
    assert tokenizer.tokenize("In 2024 it isn't") == ["In", "Ġ", "2", "0", "2", "4", "Ġit", "Ġisn", "'t"]
    ids = tokenizer("<|im_start|>user\nHi<|im_end|>")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert generation_stop_ids(smollm2, tokenizer) == (2,)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_smollm2_answers(smollm2):
    model, params = hf.load(smollm2)
    tokenizer = load_tokenizer(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = np.asarray(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])[None]
    tail = np.asarray(tokenizer("The capital of France is Paris")["input_ids"])[None]
    both = np.concatenate([ids, tail], axis=1)
    hidden = jax.jit(model.apply)(params, both, np.ones_like(both)).hidden
    best = np.asarray(model.unembed(params, hidden)).argmax(-1)[0]
    np.testing.assert_array_equal(best[ids.shape[1] - 1 : -1], tail[0])
