"""Hugging Face checkpoints of encoders: the names of their tensors, their config.json, and reading both.

`rljax.models.encoder.load` is the way in. Layouts are those of `rljax.models.families`, with y token types, n labels
and e the output of the dense layer before the classifier.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import PartitionSpec as P

from rljax.errors import UserError
from rljax.models import hf_read, rules
from rljax.models.config_rules import _activation
from rljax.models.encoder import Encoder, EncoderConfig, block_config, build
from rljax.models.families import Tensors, _linear, _norm
from rljax.models.hf_read import Target
from rljax.models.tensors import Box, Store, axes_of, open_safetensors, read_json, read_part, stored_shape
from rljax.types import Params

RULES = (*rules.RULES, (r"types$", P()), (r"(dense|classifier)/(kernel|bias)$", P()))
_AXES = {"dense/kernel": "de", "classifier/kernel": "dn"}  # torch stores them the other way round


class Family(NamedTuple):
    name: str  # of its classes in transformers, as in BertModel
    model_type: str
    prefix: str  # of the encoder's tensors in a model with a head; a bare encoder has none
    tensors: Tensors  # names without prefix
    classifier: Tensors  # whole names
    fields: Callable[[Any], dict[str, Any]]  # transformers config -> fields of EncoderConfig
    unused: tuple[str, ...]  # what is no weight of ours (patterns, without prefix)
    heads: tuple[str, ...]  # those of masked language models (patterns of whole names), left out of bare encoders


# --- the families -----------------------------------------------------------------------------------------------------


def _bert_fields(c: Any) -> dict[str, Any]:
    if c.is_decoder or c.add_cross_attention:
        raise UserError("it is used as a decoder (is_decoder or add_cross_attention), which the encoder is not")
    if getattr(c, "position_embedding_type", "absolute") != "absolute":
        raise UserError(f"position_embedding_type={c.position_embedding_type!r}; only 'absolute' is read")
    return {
        "intermediate_size": c.intermediate_size,
        "max_positions": c.max_position_embeddings,
        "num_types": c.type_vocab_size,
        "norm_eps": c.layer_norm_eps,
        "activation": _activation(c.hidden_act),
    }


def _roberta_fields(c: Any) -> dict[str, Any]:
    """Rows of the position table up to the pad id are not used: fairseq counts from pad id + 1."""
    first = c.pad_token_id + 1
    return {**_bert_fields(c), "position_offset": first, "max_positions": c.max_position_embeddings - first}


def _distilbert_fields(c: Any) -> dict[str, Any]:
    return {
        "intermediate_size": c.hidden_dim,
        "max_positions": c.max_position_embeddings,
        "num_types": 0,
        "norm_eps": 1e-12,  # not in its config
        "activation": _activation(c.activation),
        "classifier_activation": "relu",
    }


_EMBED: Tensors = {
    "embeddings.word_embeddings.weight": ("v d", ("embed/tokens",)),
    "embeddings.position_embeddings.weight": ("p d", ("embed/positions",)),
    **_norm("embeddings.LayerNorm", "embed_norm"),
}
_BERT: Tensors = {
    **_EMBED,
    "embeddings.token_type_embeddings.weight": ("y d", ("types",)),
    **_linear("encoder.layer.*.attention.self.query", "layers/attention/query", "hk", "d"),
    **_linear("encoder.layer.*.attention.self.key", "layers/attention/key", "gk", "d"),
    **_linear("encoder.layer.*.attention.self.value", "layers/attention/value", "gk", "d"),
    **_linear("encoder.layer.*.attention.output.dense", "layers/attention/out", "d", "hk"),
    **_norm("encoder.layer.*.attention.output.LayerNorm", "layers/attention_norm"),
    **_linear("encoder.layer.*.intermediate.dense", "layers/mlp/up", "f", "d"),
    **_linear("encoder.layer.*.output.dense", "layers/mlp/down", "d", "f"),
    **_norm("encoder.layer.*.output.LayerNorm", "layers/mlp_norm"),
}
_DISTILBERT: Tensors = {
    **_EMBED,
    **_linear("transformer.layer.*.attention.q_lin", "layers/attention/query", "hk", "d"),
    **_linear("transformer.layer.*.attention.k_lin", "layers/attention/key", "gk", "d"),
    **_linear("transformer.layer.*.attention.v_lin", "layers/attention/value", "gk", "d"),
    **_linear("transformer.layer.*.attention.out_lin", "layers/attention/out", "d", "hk"),
    **_norm("transformer.layer.*.sa_layer_norm", "layers/attention_norm"),
    **_linear("transformer.layer.*.ffn.lin1", "layers/mlp/up", "f", "d"),
    **_linear("transformer.layer.*.ffn.lin2", "layers/mlp/down", "d", "f"),
    **_norm("transformer.layer.*.output_layer_norm", "layers/mlp_norm"),
}


def _classifier(dense: str, out: str) -> Tensors:
    return {**_linear(dense, "dense", "e", "d"), **_linear(out, "classifier", "n", "d")}


_BUFFERS = r"embeddings\.(position_ids|token_type_ids)"
_POOLER = r"pooler\.dense\.(weight|bias)"  # read where a classifier stands on it
FAMILIES: tuple[Family, ...] = (
    Family(
        name="Bert",
        model_type="bert",
        prefix="bert.",
        tensors=_BERT,
        classifier=_classifier("bert.pooler.dense", "classifier"),
        fields=_bert_fields,
        unused=(_BUFFERS, _POOLER),
        heads=(r"cls\.(predictions|seq_relationship)\..+",),
    ),
    Family(
        name="DistilBert",
        model_type="distilbert",
        prefix="distilbert.",
        tensors=_DISTILBERT,
        classifier=_classifier("pre_classifier", "classifier"),
        fields=_distilbert_fields,
        unused=(_BUFFERS,),
        heads=(r"vocab_(transform|layer_norm|projector)\.(weight|bias)",),
    ),
    Family(
        name="Roberta",
        model_type="roberta",
        prefix="roberta.",
        tensors=_BERT,
        classifier=_classifier("classifier.dense", "classifier.out_proj"),
        fields=_roberta_fields,
        unused=(_BUFFERS, _POOLER),  # classifiers that were fine-tuned long ago carry an idle pooler along
        heads=(r"lm_head\..+",),
    ),
)
_BARE = ("Model", "ForMaskedLM", "ForPreTraining")
_CLASSIFIER = "ForSequenceClassification"


def family_of(source: Mapping[str, Any], store: Store) -> tuple[Family, bool]:
    """The family of a checkpoint, and whether it has a classifier; a UserError lists what there is."""
    listed = source.get("architectures") or []
    if not isinstance(listed, list):
        raise UserError(f"architectures is a list of names, not {listed!r:.80}")
    for family in FAMILIES:
        if listed:
            if listed[0] in [family.name + ending for ending in (*_BARE, _CLASSIFIER)]:
                return family, listed[0].endswith(_CLASSIFIER)
        elif source.get("model_type") == family.model_type:
            return family, any(name in store for name in family.classifier if name.startswith("classifier."))
    known = ", ".join(f"{family.name}Model and {family.name}{_CLASSIFIER}" for family in FAMILIES)
    found = listed[0] if listed else f"model_type {source.get('model_type')}"
    raise UserError(f"{found!r} is no encoder that is read here: {known}. Decoders are opened with hf.load(_reward).")


# --- loading ----------------------------------------------------------------------------------------------------------


def load(path_or_name: str | os.PathLike[str], *, mesh: Any, dtype: Any) -> tuple[Encoder, Params]:
    """See `rljax.models.encoder.load`."""
    from rljax.models.resolve import resolve

    folder = resolve(path_or_name)
    if folder.suffix == ".gguf":
        raise UserError(f"{folder} is a GGUF file; encoders are read from a folder with config.json and safetensors.")
    source, store = read_json(folder / "config.json"), renamed(open_safetensors(folder))
    try:
        family, classifies = family_of(source, store)
        config = encoder_config(family, source, classifies)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    kind = np.dtype(np.float32) if dtype is None else jax.numpy.dtype(dtype)
    config = dataclasses.replace(
        config, compute_dtype=kind.name, **sentence_settings(folder, family, config.max_positions)
    )
    model = build(config)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    wanted = account(folder, family, store, config)
    return model, fill(store, wanted, sizes_of(config), abstract, mesh=mesh, dtype=kind)


def renamed(store: Store) -> Store:
    """Checkpoints that were once TensorFlow's call the weight and bias of their norms gamma and beta."""
    new: Store = {}
    for name, tensor in store.items():
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        if name in new:
            raise UserError(f"{tensor.where} holds {name!r} twice, under its new and its old name; remove one.")
        new[name] = tensor
    return new


def encoder_config(family: Family, source: Mapping[str, Any], classifies: bool) -> EncoderConfig:
    """`config.json` as an EncoderConfig. Defaults come from the config classes of transformers."""
    from transformers import CONFIG_MAPPING

    try:
        c = CONFIG_MAPPING[family.model_type](**source)
        fields = family.fields(c)
        labels = {int(i): str(label) for i, label in (c.id2label or {}).items()} if classifies else {}
        if sorted(labels) != list(range(len(labels))):
            raise UserError(f"id2label={c.id2label} must number its labels 0, 1, 2, …")
        return EncoderConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            num_layers=c.num_hidden_layers,
            num_heads=c.num_attention_heads,
            max_tokens=fields["max_positions"],
            labels=tuple(labels[i] for i in range(len(labels))),
            **fields,
        )
    except Exception as error:  # transformers' own validation has its own error classes
        raise UserError(f"the settings of this {family.name} cannot be used: {error}") from error


def sizes_of(config: EncoderConfig) -> dict[str, int]:
    """The axis letters in numbers."""
    own = {"y": config.num_types, "n": len(config.labels), "e": config.hidden_size}
    return {**hf_read.sizes_of(block_config(config)), **own}


def account(folder: pathlib.Path, family: Family, store: Store, config: EncoderConfig) -> dict[str, Target]:
    """Match every stored tensor with its leaf, exactly once, or say which one does not fit."""
    embedding = next(iter(family.tensors))
    prefix = "" if embedding in store and not config.labels else family.prefix
    found = {prefix + name: tensor for name, tensor in family.tensors.items()}
    found |= family.classifier if config.labels else {}
    wanted = {
        name.replace("*", str(layer)): Target(*tensor, layer if "*" in name else None)
        for name, tensor in found.items()
        for layer in range(config.num_layers if "*" in name else 1)
    }
    missing = [name for name in wanted if name not in store]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(wanted)} tensors that its config.json asks for: "
            f"{missing[0]!r}; {len(store)} are there. Fetch it again, or correct config.json (architectures, layers)."
        )
    unused = [re.escape(prefix) + pattern for pattern in family.unused]
    unused += [] if config.labels else family.heads
    for name, tensor in store.items():
        if name in wanted:
            hf_read._check(name, tensor, stored_shape(wanted[name].layout, sizes_of(config)))
        elif not any(re.fullmatch(pattern, name) for pattern in unused):
            raise UserError(
                f"{tensor.where} holds the tensor {name!r} {list(tensor.shape)}, which a {family.name} "
                f"{'classifier' if config.labels else 'encoder'} with this config.json does not have. Correct "
                "config.json (architectures, layers), or remove the tensor."
            )
    return wanted


def fill(
    store: Store, wanted: Mapping[str, Target], sizes: Mapping[str, int], abstract: Params, *, mesh: Any, dtype: Any
) -> Params:
    """Params of the abstract tree's shapes; each process reads what its own devices hold."""
    names: dict[str, list[str]] = {}
    for name, target in wanted.items():
        names.setdefault(target.leaves[0], []).append(name)

    def reader(leaf: str, shape: tuple[int, ...]) -> Callable[[Any], np.ndarray]:
        def one(name: str, box: Box) -> np.ndarray:
            layout = wanted[name].layout
            return read_part(store[name], layout, 0, _AXES.get(leaf) or axes_of(leaf, layout), sizes, box)

        def read(index: Any) -> np.ndarray:
            box = tuple(slice(*cut.indices(n)) for cut, n in zip(index, shape, strict=True))
            if wanted[names[leaf][0]].layer is None:
                return one(names[leaf][0], box).astype(dtype)
            return np.stack([one(name, box[1:]).astype(dtype) for name in names[leaf][box[0]]])

        return read

    from rljax.sharding import shardings

    places = hf_read.flat(shardings(abstract, RULES, mesh)) if mesh is not None else {}
    filled = {}
    for leaf, array in hf_read.flat(abstract).items():
        read = reader(leaf, array.shape)
        if places:
            filled[leaf] = jax.make_array_from_callback(array.shape, places[leaf], read)
        else:
            filled[leaf] = jax.device_put(read((slice(None),) * len(array.shape)))
    return unflatten_dict(filled, sep="/")


# --- what sentence-transformers writes beside a model -----------------------------------------------------------------

_POOLINGS = {"pooling_mode_mean_tokens": "mean", "mean": "mean", "pooling_mode_cls_token": "cls", "cls": "cls"}


def sentence_settings(folder: pathlib.Path, family: Family, max_positions: int) -> dict[str, Any]:
    """pooling, normalize and max_tokens of EncoderConfig, as far as the folder says them."""
    settings: dict[str, Any] = {}
    pooling = folder / "1_Pooling"
    if (folder / "modules.json").is_file():
        modules = _modules(folder / "modules.json")
        settings["normalize"] = "Normalize" in modules
        pooling = folder / modules.get("Pooling", "1_Pooling")
    if (pooling / "config.json").is_file():
        settings["pooling"] = _pooling(pooling / "config.json")
    for name in (f"sentence_{family.model_type}_config.json", "sentence_bert_config.json"):
        longest = read_json(folder / name).get("max_seq_length") if (folder / name).is_file() else None
        if longest:
            settings["max_tokens"] = min(int(longest), max_positions)
            break
    return settings


def _modules(file: pathlib.Path) -> dict[str, str]:
    """Kind and folder of every step from tokens to the embedding."""
    try:
        modules = {str(entry["type"]).rsplit(".", 1)[-1]: str(entry["path"]) for entry in json.loads(file.read_text())}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no list of modules with type and path ({error!r}).") from error
    strange = [kind for kind in modules if kind not in ("Transformer", "Pooling", "Normalize")]
    if strange:
        raise UserError(
            f"{file} has a module {strange[0]}, so its embeddings are more than a pooled encoder; only Transformer, "
            "Pooling and Normalize are read."
        )
    return modules


def _pooling(file: pathlib.Path) -> str:
    given = read_json(file)
    modes = given.get("pooling_mode") or [key for key, on in given.items() if key.startswith("pooling_mode_") and on]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise UserError(f"{file} asks for the pooling {modes}; either mean or cls can be computed here.")
    return _POOLINGS[modes[0]]
