"""GGUF files (llama.cpp's format), read with the `gguf` package: config, weights and tokenizer in Hugging Face's form.

Architectures llama (which Mistral and SmolLM2 files use as well), qwen2 and qwen3. Quantised blocks are dequantised to
float32. Byte-level BPE tokenizers (`tokenizer.ggml.model` = gpt2) are rebuilt with the pre-tokenizer that the file
names.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import numpy as np

from rljax import extras
from rljax.errors import UserError
from rljax.models.tensors import Box, Store, Stored

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies (Llama 3.1 and later)


def read_fields(path: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """The reader of a GGUF file, and its metadata as plain values."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"reading {path} needs the gguf package: {extras.install('gguf')}") from None
    try:
        reader = GGUFReader(path)
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as GGUF ({error}): it is truncated or damaged; fetch it again."
        ) from error


def open_gguf(path: pathlib.Path) -> tuple[dict[str, Any], Store]:
    """config.json and tensors of a GGUF file, under the names that the Hugging Face checkpoint would have."""
    reader, fields = read_fields(path)
    kind = fields.get("general.architecture")
    if kind not in _ARCHITECTURES:
        raise UserError(f"{path} is a GGUF file of architecture {kind!r}; supported are {', '.join(_ARCHITECTURES)}.")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        source = _source(kind, fields, tensors)
    except KeyError as error:
        raise UserError(f"{path} lacks the metadata {error} or tensor of that name; fetch it again.") from None
    heads = {"self_attn.q_proj": source["num_attention_heads"], "self_attn.k_proj": source["num_key_value_heads"]}
    store = {}
    for name, tensor in tensors.items():
        if name == _ROPE_FACTORS:
            continue  # read into rope_parameters
        full, part = _name(name, path)
        interleaved = heads.get(part, 0) if kind == "llama" else 0
        store[full] = _stored(tensor, interleaved, str(path))
    return source, store


def quantization(path: pathlib.Path) -> str:
    """The kinds of blocks of a file's weights that have fewer than 16 bits, most first: "Q4_1, Q6_K"; or ""."""
    reader, _ = read_fields(path)
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    for whole in ("F32", "F16", "BF16", "F64"):
        sizes.pop(whole, None)
    return ", ".join(sorted(sizes, key=lambda name: -sizes[name]))


def _name(name: str, path: pathlib.Path) -> tuple[str, str]:
    stem, _, suffix = name.rpartition(".")
    if stem in _ENDS:
        return f"{_ENDS[stem]}.{suffix}", _ENDS[stem]
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block and block[2] in _BLOCK:
        return f"model.layers.{block[1]}.{_BLOCK[block[2]]}.{suffix}", _BLOCK[block[2]]
    raise UserError(f"{path} holds the tensor {name!r}, which its architecture does not have here.")


def _stored(tensor: Any, heads: int, where: str) -> Stored:
    from gguf import dequantize

    shape = tuple(int(n) for n in reversed(tensor.shape))

    def read(box: Box) -> np.ndarray:
        value = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
        return (_split_halves(value, heads) if heads else value)[box]

    return Stored(shape, np.dtype(np.float32), read, where)


def _split_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """ggml rotates neighbouring pairs, Hugging Face the two halves of a head: undo the reordering of the rows."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _source(kind: str, fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    def get(name: str, default: Any = None) -> Any:
        return fields.get(f"{kind}.{name}", default)

    def need(name: str) -> Any:
        return fields[f"{kind}.{name}"]

    heads, hidden = need("attention.head_count"), need("embedding_length")
    source = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", hidden // heads),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": float(f"{need('attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5, stored in float32
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope(get, tensors),
        "dtype": "float32",
    }
    if kind == "llama":
        source["attention_bias"] = "blk.0.attn_q.bias" in tensors
    for name in ("bos", "eos"):
        source[f"{name}_token_id"] = fields.get(f"tokenizer.ggml.{name}_token_id")
    source["pad_token_id"] = fields.get("tokenizer.ggml.padding_token_id")
    return source


def _rope(get: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": get("rope.freq_base", 10_000.0)}
    scaling, length = get("rope.scaling.type", "none"), get("context_length")
    if _ROPE_FACTORS in tensors:  # any factors are LongRoPE's with one set for all lengths
        factors = [float(x) for x in tensors[_ROPE_FACTORS].data]
        same = {"short_factor": factors, "long_factor": factors, "factor": 1.0, "attention_factor": 1.0}
        return {**rope, "rope_type": "longrope", **same, "original_max_position_embeddings": length}
    if scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": get("rope.scaling.factor")}
    if scaling == "yarn":
        rope |= {"original_max_position_embeddings": get("rope.scaling.original_context_length")}
    return rope


# --- tokenizer --------------------------------------------------------------------------------------------------------

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "llama-bpe": _CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _REST,
    "qwen2": _CONTRACTIONS + _LETTERS + r"|\p{N}" + _REST,
}
_GPT2 = ("gpt-2", "olmo", "phi-2")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_CONTROL, _USER_DEFINED = 3, 4


def _pre_tokenizer(name: str) -> Any:
    """The splitting that llama.cpp means by `tokenizer.ggml.pre`."""
    from tokenizers import Regex, pre_tokenizers

    if name in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[name]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join((*_GPT2, *_DIGITS, *_SPLITS))
    raise UserError(f"the GGUF tokenizer splits text by {name!r}; known are {known}. Use the model's own tokenizer.")


def read_tokenizer(path: pathlib.Path) -> Any:
    """The tokenizer inside a GGUF file, as a `PreTrainedTokenizerFast` with its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    _, fields = read_fields(path)
    if fields.get("tokenizer.ggml.model") != "gpt2":
        raise UserError(
            f"{path} has a {fields.get('tokenizer.ggml.model')!r} tokenizer; only byte-level BPE (gpt2) is rebuilt. "
            "Use the tokenizer of the original model."
        )
    tokens, kinds, pre = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "pre"))
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    core.pre_tokenizer, core.decoder = _pre_tokenizer(pre), decoders.ByteLevel()
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            core.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {short: fields.get(f"tokenizer.ggml.{long}_token_id") for long, short in names.items()}
    special = {f"{short}_token": tokens[i] for short, i in ids.items() if i is not None}
    if fields.get("tokenizer.ggml.add_bos_token"):
        _prepend(core, special["bos_token"], vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=int(fields[f"{fields['general.architecture']}.context_length"]),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _prepend(core: Any, token: str, vocabulary: dict[str, int]) -> None:
    from tokenizers import processors

    core.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, vocabulary[token])]
    )
