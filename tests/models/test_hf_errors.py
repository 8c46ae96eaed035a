"""Broken checkpoints: whatever is wrong with a folder is said in one paragraph that names it and the fix."""

import json

import ml_dtypes
import numpy as np
import pytest

from rljax.models import hf
from tests.models.folders import edit, rewrite, tensors_of


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def broken(folder, change):
    rewrite(folder, change(tensors_of(folder)))


DOWN = "model.layers.1.mlp.down_proj.weight"
BREAKS = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "bad JSON": (lambda f: (f / "config.json").write_text('{"a": 1,}'), r"config\.json is not valid JSON.*line 1"),
    "a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), r"config\.json cannot be read"),
    "nested": (lambda f: (f / "config.json").write_text("[" * 100_000), r"config\.json is not valid JSON"),
    **{
        method: (
            lambda f, m=method: edit(f, quantization_config={"quant_method": m}),
            rf"quantization_config \({method}",
        )
        for method in ("gptq", "awq", "bitsandbytes", "fp8")
    },
    "not an object": (lambda f: (f / "config.json").write_text("[1]"), "a JSON list"),
    "unknown architecture": (
        lambda f: edit(f, architectures=["MambaForCausalLM"]),
        "MambaForCausalLM.*reads LlamaForCausalLM",
    ),
    "an encoder": (lambda f: edit(f, architectures=["BertModel"]), r"'BertModel'.*rljax\.models\.encoder\.load"),
    "no architecture": (lambda f: edit(f, drop=("architectures", "model_type")), "unsupported architecture"),
    "unknown activation": (lambda f: edit(f, hidden_act="quick_gelu"), "quick_gelu"),
    "unknown rope": (
        lambda f: edit(f, rope_parameters={"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}),
        "dynamic",
    ),
    "wrong type in config": (lambda f: edit(f, hidden_size="wide"), "hidden_size"),
    "missing tensor": (lambda f: broken(f, without(DOWN)), f"lacks 1 of the .* tensors.*{DOWN}"),
    "more layers": (lambda f: edit(f, num_hidden_layers=3), r"lacks 9 of .*model\.layers\.2"),
    "fewer layers": (lambda f: edit(f, num_hidden_layers=1), r"holds the tensor 'model\.layers\.1"),
    "unknown tensor": (lambda f: broken(f, lambda t: {**t, "extra.weight": t[DOWN]}), r"'extra\.weight' \[32, 48\]"),
    "a bias too many": (lambda f: broken(f, lambda t: {**t, "model.norm.bias": t[DOWN]}), r"model\.norm\.bias"),
    "misshaped": (lambda f: edit(f, intermediate_size=47), r"mlp\.\w+_proj\.weight.*48.*but config\.json says.*47"),
    "transposed": (
        lambda f: broken(f, lambda t: {**t, DOWN: t[DOWN].T.copy()}),
        rf"{DOWN}.* \[48, 32\], .* \[32, 48\]",
    ),
    "wrongly tied": (lambda f: edit(f, tie_word_embeddings=True), r"lm_head\.weight.*tie_word_embeddings"),
    "quantised": (lambda f: broken(f, lambda t: {**t, DOWN: t[DOWN].astype(np.int8)}), "stored as int8"),
    "mixed types": (
        lambda f: broken(f, lambda t: {**t, DOWN: t[DOWN].astype(ml_dtypes.bfloat16)}),
        "different types.*dtype=",
    ),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        r"model\.safetensors cannot be read.*truncated",
    ),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"pickled.*pytorch_model\.bin.*save_pretrained",
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_broken_folders_say_what_is_wrong(case, copy):
    folder = copy("llama")
    change, message = BREAKS[case]
    change(folder)
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        hf.load(folder)
    assert str(folder) in str(caught.value) or case in ("mixed types",)
    assert "\n\n" not in str(caught.value)


INDEX = "model.safetensors.index.json"
INDEX_BREAKS = {
    "wrong file": (lambda m: {**m, "model.norm.weight": m["model.embed_tokens.weight"]}, r"model\.norm\.weight"),
    "unknown file": (lambda m: {**m, "a.weight": "absent.safetensors"}, r"absent\.safetensors cannot be read"),
    "tensor that is nowhere": (lambda m: {**m, "lost.weight": next(iter(m.values()))}, r"lost\.weight.*not there"),
    "tensor left out": (
        lambda m: {k: v for k, v in m.items() if k != "model.norm.weight"},
        r"model\.norm\.weight.*None",
    ),
    "another folder": (lambda m: {**m, "model.norm.weight": "../x.safetensors"}, "outside its folder"),
    "no map": (lambda m: None, "no usable weight_map"),
}


@pytest.mark.parametrize("case", INDEX_BREAKS)
def test_broken_indexes_say_what_is_wrong(case, copy):
    folder = copy("mistral")
    change, message = INDEX_BREAKS[case]
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": change(index["weight_map"])}))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        hf.load(folder)


def test_a_mask_that_is_none_is_refused(copy):
    folder = copy("gpt2")
    mask = np.ones((1, 1, 300, 300), np.float32)
    rewrite(folder, {**tensors_of(folder), "transformer.h.0.attn.bias": mask})
    with pytest.raises(ValueError, match=r"attn\.bias.*causal mask"):
        hf.load(folder)
