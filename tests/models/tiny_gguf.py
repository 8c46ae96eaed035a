"""A tiny GGUF file, written as llama.cpp's converter writes it, with a byte-level BPE tokenizer."""

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, quants
from tokenizers import pre_tokenizers

from rljax.models.gguf import _BLOCK, _ENDS
from rljax.models.hf_read import whole
from rljax.models.tensors import open_safetensors

TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|start|>", "<|end|>"]
MERGES = ["t h", "th e", "Ġ the", "Ġ 1", "1 2"]


def permuted(weight, heads):
    """Rows of q and k as ggml wants them (`LlamaModel.permute` of convert_hf_to_gguf.py)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def vocabulary():
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    return SPECIAL + pieces + [merge.replace(" ", "") for merge in MERGES]


def write(
    path, checkpoint, config, *, kind="llama", pre="smollm", quantised=(), factors=None, tokenizer="gpt2", bos=False
):
    """The GGUF file of a Hugging Face folder; `quantised` maps parts of names to a quantisation."""
    writer = GGUFWriter(path, kind)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(pre)
    tokens = vocabulary()
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(bos)
    writer.add_chat_template(TEMPLATE)
    names = {there: here for here, there in {**_ENDS, **_BLOCK}.items()}
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    for name, tensor in open_safetensors(checkpoint).items():
        stem, _, suffix = name.rpartition(".")
        value = whole(tensor).astype(np.float32)
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            value = permuted(value, heads[part]) if kind == "llama" and part in heads else value
            stem = f"blk.{layer}.{names[part]}"
        else:
            stem = names[stem]
        quantisation = next((q for piece, q in dict(quantised).items() if piece in stem), Kind.F32)
        data = value if quantisation == Kind.F32 else quants.quantize(value, quantisation)
        writer.add_tensor(f"{stem}.{suffix}", data, raw_dtype=quantisation)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
