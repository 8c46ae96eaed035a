"""The decoder families: for each, the names of its tensors and the rules that read its `config.json`.

A tensor is written `(layout, leaves)`. The layout names the stored axes, one word per dimension, with the letters

    v vocabulary   p positions   d hidden   f MLP width   h query heads   g key-value heads   k head width

so `"hk d"` is a matrix whose rows are heads x head width. `"3hk d"` stacks three parts (query, key, value), `"h3k d"`
interleaves them within each head, `"hk+gk+gk d"` concatenates parts of different heights; the leaves are the parts in
order. `*` in a name is the layer. A tensor that a model does not have (a bias that its config turns off) is simply not
among the leaves of its tree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rljax.errors import UserError
from rljax.models import config_rules
from rljax.models.config import ModelConfig

Layout = tuple[str, tuple[str, ...]]
Tensors = dict[str, Layout]


class Family(NamedTuple):
    architecture: str  # as in config.json
    model_type: str  # of the transformers config class
    classifier: str  # the architecture of a reward model
    tensors: Tensors  # names without prefix
    unembed: str  # the name of the output matrix, which never takes the prefix
    fields: Callable[
        [Any], dict[str, Any]
    ]  # transformers config -> fields of ModelConfig that the common rules do not give
    prefixes: tuple[str, ...] = ("model.",)  # the first is written where a checkpoint did not say
    derived: tuple[str, ...] = (
        r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"rotary_emb\.inv_freq",
    )  # buffers, not weights
    ignored: tuple[str, ...] = ()  # other modules of a composite checkpoint (patterns of whole names)


def _linear(name: str, leaf: str, out: str, into: str) -> Tensors:
    """torch's Linear stores [out, in]."""
    return {f"{name}.weight": (f"{out} {into}", (f"{leaf}/kernel",)), f"{name}.bias": (out, (f"{leaf}/bias",))}


def _conv1d(name: str, leaf: str, out: str, into: str) -> Tensors:
    """GPT-2's Conv1D stores [in, out]."""
    return {f"{name}.weight": (f"{into} {out}", (f"{leaf}/kernel",)), f"{name}.bias": (out, (f"{leaf}/bias",))}


def _norm(name: str, leaf: str, axes: str = "d") -> Tensors:
    return {f"{name}.weight": (axes, (f"{leaf}/scale",)), f"{name}.bias": (axes, (f"{leaf}/bias",))}


def _parts(leaves: tuple[str, ...], field: str) -> tuple[str, ...]:
    return tuple(f"{leaf}/{field}" for leaf in leaves)


_ATTENTION, _MLP = "layers/attention", "layers/mlp"
_QKV = tuple(f"{_ATTENTION}/{part}" for part in ("query", "key", "value"))

_ENDS: Tensors = {"embed_tokens.weight": ("v d", ("embed/tokens",)), **_norm("norm", "final_norm")}
_SPLIT_ATTENTION: Tensors = {
    **_linear("layers.*.self_attn.q_proj", _QKV[0], "hk", "d"),
    **_linear("layers.*.self_attn.k_proj", _QKV[1], "gk", "d"),
    **_linear("layers.*.self_attn.v_proj", _QKV[2], "gk", "d"),
    **_linear("layers.*.self_attn.o_proj", f"{_ATTENTION}/out", "d", "hk"),
}
_HEAD_NORMS: Tensors = {
    **_norm("layers.*.self_attn.q_norm", f"{_ATTENTION}/query_norm", "k"),
    **_norm("layers.*.self_attn.k_norm", f"{_ATTENTION}/key_norm", "k"),
}
_FULL_NORMS: Tensors = {
    **_norm("layers.*.self_attn.q_norm", f"{_ATTENTION}/query_norm", "hk"),
    **_norm("layers.*.self_attn.k_norm", f"{_ATTENTION}/key_norm", "gk"),
}
_GATED_MLP: Tensors = {
    **_linear("layers.*.mlp.gate_proj", f"{_MLP}/gate", "f", "d"),
    **_linear("layers.*.mlp.up_proj", f"{_MLP}/up", "f", "d"),
    **_linear("layers.*.mlp.down_proj", f"{_MLP}/down", "d", "f"),
}
_PRE_NORMS: Tensors = {
    **_norm("layers.*.input_layernorm", "layers/attention_norm"),
    **_norm("layers.*.post_attention_layernorm", "layers/mlp_norm"),
}
_POST_NORMS: Tensors = {
    **_norm("layers.*.post_attention_layernorm", "layers/attention_post_norm"),
    **_norm("layers.*.post_feedforward_layernorm", "layers/mlp_post_norm"),
}
_FOUR_NORMS: Tensors = {
    **_norm("layers.*.input_layernorm", "layers/attention_norm"),
    **_norm("layers.*.pre_feedforward_layernorm", "layers/mlp_norm"),
    **_POST_NORMS,
}
_LLAMA: Tensors = {**_ENDS, **_SPLIT_ATTENTION, **_GATED_MLP, **_PRE_NORMS}
_GEMMA2: Tensors = {**_ENDS, **_SPLIT_ATTENTION, **_GATED_MLP, **_FOUR_NORMS}
_OLMO2: Tensors = {**_ENDS, **_SPLIT_ATTENTION, **_FULL_NORMS, **_GATED_MLP, **_POST_NORMS}
_PHI3: Tensors = {
    **_ENDS,
    **_PRE_NORMS,
    "layers.*.self_attn.qkv_proj.weight": ("hk+gk+gk d", _parts(_QKV, "kernel")),
    **_linear("layers.*.self_attn.o_proj", f"{_ATTENTION}/out", "d", "hk"),
    "layers.*.mlp.gate_up_proj.weight": ("2f d", (f"{_MLP}/gate/kernel", f"{_MLP}/up/kernel")),
    **_linear("layers.*.mlp.down_proj", f"{_MLP}/down", "d", "f"),
}
_NEOX: Tensors = {
    "embed_in.weight": ("v d", ("embed/tokens",)),
    **_norm("final_layer_norm", "final_norm"),
    **_PRE_NORMS,
    "layers.*.attention.query_key_value.weight": ("h3k d", _parts(_QKV, "kernel")),
    "layers.*.attention.query_key_value.bias": ("h3k", _parts(_QKV, "bias")),
    **_linear("layers.*.attention.dense", f"{_ATTENTION}/out", "d", "hk"),
    **_linear("layers.*.mlp.dense_h_to_4h", f"{_MLP}/up", "f", "d"),
    **_linear("layers.*.mlp.dense_4h_to_h", f"{_MLP}/down", "d", "f"),
}
_GPT2: Tensors = {
    "wte.weight": ("v d", ("embed/tokens",)),
    "wpe.weight": ("p d", ("embed/positions",)),
    **_norm("ln_f", "final_norm"),
    **_norm("h.*.ln_1", "layers/attention_norm"),
    **_norm("h.*.ln_2", "layers/mlp_norm"),
    "h.*.attn.c_attn.weight": ("d 3hk", _parts(_QKV, "kernel")),
    "h.*.attn.c_attn.bias": ("3hk", _parts(_QKV, "bias")),
    **_conv1d("h.*.attn.c_proj", f"{_ATTENTION}/out", "d", "hk"),
    **_conv1d("h.*.mlp.c_fc", f"{_MLP}/up", "f", "d"),
    **_conv1d("h.*.mlp.c_proj", f"{_MLP}/down", "d", "f"),
}

_GEMMA3: Tensors = {**_GEMMA2, **_HEAD_NORMS}


def _family(
    name: str, model_type: str, tensors: Tensors, fields: Callable[[Any], dict[str, Any]], **more: Any
) -> Family:
    architecture = more.pop("architecture", f"{name}ForCausalLM")
    classifier = more.pop("classifier", f"{name}ForSequenceClassification")
    unembed = more.pop("unembed", "lm_head.weight")
    return Family(architecture, model_type, classifier, tensors, unembed, fields, **more)


FAMILIES: tuple[Family, ...] = (
    _family("Llama", "llama", _LLAMA, config_rules.llama),
    _family("Mistral", "mistral", _LLAMA, config_rules.mistral),
    _family("Qwen2", "qwen2", _LLAMA, config_rules.qwen2),
    _family("Qwen3", "qwen3", {**_LLAMA, **_HEAD_NORMS}, config_rules.qwen3),
    _family("Gemma", "gemma", _LLAMA, config_rules.gemma),
    _family("Gemma2", "gemma2", _GEMMA2, config_rules.gemma2),
    _family("Gemma3", "gemma3_text", _GEMMA3, config_rules.gemma3, classifier="Gemma3TextForSequenceClassification"),
    _family(
        "Gemma3",
        "gemma3_text",
        _GEMMA3,
        config_rules.gemma3,
        architecture="Gemma3ForConditionalGeneration",
        prefixes=("language_model.model.", "model.language_model.", "language_model."),
        ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..+",),
    ),
    _family("Phi3", "phi3", _PHI3, config_rules.mistral),
    _family("Olmo2", "olmo2", _OLMO2, config_rules.olmo2),
    _family(
        "GPTNeoX",
        "gpt_neox",
        _NEOX,
        config_rules.neox,
        unembed="embed_out.weight",
        prefixes=("gpt_neox.",),
        derived=(r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)", r"rotary_emb\.inv_freq"),
    ),
    _family(
        "GPT2",
        "gpt2",
        _GPT2,
        config_rules.gpt2,
        architecture="GPT2LMHeadModel",
        prefixes=("transformer.", ""),
        derived=(r"h\.\d+\.attn\.(bias|masked_bias)",),
    ),
)


def family_of(architecture: str) -> Family:
    """The family of a language model's or reward model's architecture; a UserError lists what there is."""
    for family in FAMILIES:
        if architecture in (family.architecture, family.classifier):
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    encoder = re.match("Bert|DistilBert|Roberta", architecture)
    hint = " Encoders are opened with rljax.models.encoder.load, as rewards with rewards.from_checkpoint."
    raise UserError(f"unsupported architecture {architecture!r}; rljax reads {known}.{hint if encoder else ''}")


def model_config(family: Family, source: Mapping[str, Any]) -> ModelConfig:
    """`config.json` as a ModelConfig (without `source`)."""
    from transformers import CONFIG_MAPPING

    try:
        c = CONFIG_MAPPING[family.model_type](**source)
        return ModelConfig(**config_rules.common(c) | family.fields(c))
    except Exception as error:  # transformers' own validation has its own error classes
        raise UserError(f"config.json of this {family.architecture} cannot be used: {error}") from error
