"""Hugging Face checkpoints: `load` reads them onto the mesh, `save` writes them back with the same names and bits.

What `save` writes opens in `transformers`. Only safetensors and GGUF files are read: never pickle, never code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.errors import UserError
from rljax.models import folders, hf_pad, hf_read, hf_write, spellings, tokenizer_files
from rljax.models.config import COMPUTED, ModelConfig, Rope
from rljax.models.families import FAMILIES, Family, family_of, model_config
from rljax.models.hf_read import NOTE, Checkpoint
from rljax.models.rules import RULES
from rljax.models.transformer import build
from rljax.types import LanguageModel, Params

Path = str | os.PathLike[str]


def load(path_or_name: Path, *, mesh: Any = None, dtype: Any = None) -> tuple[LanguageModel, Params]:
    """A causal language model and its params, from a folder, a GGUF file or a name that `resolve` knows.

    mesh   places every leaf by `rljax.models.RULES`; each process reads only what its devices hold. None: one device.
    dtype  None keeps what is stored and computes in bfloat16 on accelerators, in float32 on CPUs. A dtype
           ("float32", "bfloat16") is what is held and computed in.

    UserError for anything that is not exactly such a checkpoint: unsupported architecture or feature, missing,
    unknown or misshaped tensors, damaged files, pickled weights.
    """
    checkpoint = _open_causal(path_or_name)
    config = _config(checkpoint, mesh, dtype)
    shapes = jax.eval_shape(build(config).init, jax.random.key(0))
    params, note = _read(checkpoint, config, shapes, mesh, dtype)
    return build(_with_source(config, checkpoint, note)), params


def abstract(path_or_name: Path, *, mesh: Any = None, dtype: Any) -> tuple[LanguageModel, Params]:
    """What `load` gives, without its weights: the model, and shapes with the shardings that the mesh implies."""
    checkpoint = _open_causal(path_or_name)
    config = _config(checkpoint, mesh, dtype)
    shapes: Params = jax.eval_shape(build(config).init, jax.random.key(0))
    _, note = hf_read.account(checkpoint, config, set(hf_read.flat(shapes)))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), shapes)
    return build(_with_source(config, checkpoint, note)), placed(shapes, mesh)


def config(path_or_name: Path) -> ModelConfig:
    """The config of a decoder, of which no weight is read."""
    checkpoint = _open(path_or_name)
    return hf_read.config_of(checkpoint.source, checkpoint.where)


def placed(shapes: Params, mesh: Any) -> Params:
    """Shapes with the shardings of `rljax.models.RULES` on a mesh; as they are without one."""
    if mesh is None:
        return shapes
    places = _shardings(shapes, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def load_reward(path_or_name: Path, *, mesh: Any = None, dtype: Any = None) -> tuple[LanguageModel, Params]:
    """A reward model: the decoder, and params {"model": …, "head": {"kernel": [d], "bias": []}} for `heads`.

    Reads …ForSequenceClassification checkpoints with one label (more are a UserError). These have no output matrix, so
    "model" has no "unembed" (`heads.reward_model` needs none). The bias comes from config.json (see `save_reward`) and
    is 0 where that has none.
    """
    checkpoint = _open(path_or_name)
    if "score.weight" not in checkpoint.store:
        raise UserError(
            f"{checkpoint.where} has no score.weight: it is not a reward model. Open it with hf.load and give it a "
            "head with rljax.models.heads.reward_model."
        )
    labels = checkpoint.source.get("id2label") or {}
    if len(labels) > 1:
        raise UserError(
            f"{checkpoint.where} tells {len(labels)} labels apart ({', '.join(map(str, labels.values()))}): a reward "
            "model of a decoder has one, the reward. Give it a head of its own with rljax.models.heads.reward_model."
        )
    config = _config(checkpoint, mesh, dtype)
    shapes: Params = jax.eval_shape(build(config).init, jax.random.key(0))
    shapes = {key: value for key, value in shapes.items() if key != "unembed"}
    shapes["head"] = {"kernel": jax.ShapeDtypeStruct((config.hidden_size,), jnp.float32)}
    params, note = _read(checkpoint, config, shapes, mesh, dtype)
    head = params.pop("head")
    bias = np.float32((checkpoint.source.get(NOTE) or {}).get("reward_bias", 0.0))
    placed = _shardings({"bias": bias}, mesh)
    head["bias"] = jax.device_put(bias, placed["bias"] if placed else None)
    return build(_with_source(config, checkpoint, note)), {"model": params, "head": head}


def save(
    path: Path, model: LanguageModel, params: Params, *, tokenizer: Any = None, stop_ids: Sequence[int] = ()
) -> None:
    """Write a folder that `load` and `transformers` open: config.json, safetensors and, if given, the tokenizer.

    tokenizer  a loaded tokenizer, or a folder whose tokenizer files are copied.
    stop_ids   where texts end: generation_config.json names them all, so that they end there in other programs too.

    Names and bits are those that were loaded (a Gemma 3 with vision is written as its text model). Written beside
    `path`, then renamed; a folder that holds only an earlier export is replaced, any other that is not empty is a
    UserError.
    """
    family, source = _source(model.config)
    _write(pathlib.Path(path), family, _stopping(source, stop_ids), model.config, params, tokenizer)


def save_reward(
    path: Path, model: LanguageModel, params: Params, *, tokenizer: Any = None, stop_ids: Sequence[int] = ()
) -> None:
    """Write a reward model as …ForSequenceClassification with one label, which `transformers` opens.

    `transformers` has no bias there: ours (the normalisation of the reward) is kept in config.json as
    {"rljax": {"reward_bias": …}}, and its scores are ours minus that bias. It scores the last token that is not the pad
    id, so pad is made another token than those that texts end in (`stop_ids` and the checkpoint's own): else that would
    be the token before the last. Where there is no other special token pad is null, and it scores one text at a time.
    """
    family, source = _source(model.config)
    bias = float(hf_write.gather(params["head"]["bias"]))
    note = {**(source.get(NOTE) or {}), "reward_bias": bias}
    labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    source = {**source, "architectures": [family.classifier], **labels, NOTE: note}
    source, tokenizer = hf_pad.apart(source, tokenizer, stop_ids)
    model_params = {key: value for key, value in params["model"].items() if key != "unembed"}
    tree = {**model_params, "head": {"kernel": params["head"]["kernel"]}}
    _write(pathlib.Path(path), family, source, model.config, tree, tokenizer)


# --- loading ----------------------------------------------------------------------------------------------------------


def _open(path_or_name: Path) -> Checkpoint:
    from rljax.models.resolve import resolve

    return hf_read.open_checkpoint(resolve(path_or_name))


def _open_causal(path_or_name: Path) -> Checkpoint:
    checkpoint = _open(path_or_name)
    if "score.weight" in checkpoint.store:
        raise UserError(f"{checkpoint.where} is a reward model (it has score.weight); open it with hf.load_reward.")
    return checkpoint


def _config(checkpoint: Checkpoint, mesh: Any, dtype: Any) -> ModelConfig:
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    compute = jnp.dtype(dtype).name if dtype is not None else "float32" if platform == "cpu" else "bfloat16"
    return dataclasses.replace(hf_read.config_of(checkpoint.source, checkpoint.where), compute_dtype=compute)


def _plain(source: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key != NOTE}


def _read(
    checkpoint: Checkpoint, config: ModelConfig, shapes: Params, mesh: Any, dtype: Any
) -> tuple[Params, dict[str, Any]]:
    wanted, note = hf_read.account(checkpoint, config, set(hf_read.flat(shapes)))
    kind = None if dtype is None else jnp.dtype(dtype)
    places = _shardings(shapes, mesh)
    return hf_read.fill(checkpoint, config, shapes, wanted, shardings=places, dtype=kind), note


def _shardings(tree: Any, mesh: Any) -> Any:
    if mesh is None:
        return None
    from rljax.sharding import shardings

    return shardings(tree, RULES, mesh)


def _with_source(config: ModelConfig, checkpoint: Checkpoint, note: dict[str, Any]) -> ModelConfig:
    generation = pathlib.Path(checkpoint.where) / "generation_config.json"
    if generation.is_file():
        note = {**note, "generation_config": hf_read.read_json(generation)}
    return dataclasses.replace(config, source=hf_read.source_text(checkpoint.source, note))


# --- saving -----------------------------------------------------------------------------------------------------------

_RUNTIME = (*COMPUTED, "source")


def _architecture_fields(config: ModelConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    return {key: value for key, value in fields.items() if key not in _RUNTIME}


def _source(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family and config.json of a model: where it came from, or the first family that can express it."""
    if not config.source:
        return _derive(config)
    source = json.loads(config.source)
    family = family_of(hf_read._architecture(source))
    said = _architecture_fields(model_config(family, _plain(source)))
    differs = [key for key, value in _architecture_fields(config).items() if said[key] != value]
    if differs:
        raise UserError(
            f"this model has {differs[0]}={getattr(config, differs[0])!r}, but the config.json that it came from says "
            f'{said[differs[0]]!r}; if that is meant, replace(config, source="") lets save write a new one.'
        )
    return family, source


def _stopping(source: dict[str, Any], stop_ids: Sequence[int]) -> dict[str, Any]:
    """A config.json whose generation_config.json names all of these ids as ends."""
    note = source.get(NOTE) or {}
    generation = note.get("generation_config") or {}
    given = generation.get("eos_token_id", source.get("eos_token_id"))
    known = {i for i in (given if isinstance(given, list) else [given]) if i is not None}
    if known.issuperset(stop_ids):
        return source
    ends = sorted({*known, *map(int, stop_ids)})
    generation = {**generation, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    return {**source, NOTE: {**note, "generation_config": generation}}


def _write(
    path: pathlib.Path, family: Family, source: dict[str, Any], config: ModelConfig, params: Params, tokenizer: Any
) -> None:
    note = dict(source.get(NOTE) or {})
    leaves = hf_read.flat(params)
    wanted = hf_read.targets(family, set(leaves), config.num_layers, note.get("prefix", family.prefixes[0]))
    tensors = list(hf_write.stored_tensors(params, wanted, note.get("derived", {})))
    first = jax.process_index() == 0

    def fill(folder: pathlib.Path | None) -> None:
        hf_write.write_tensors(folder, tensors)
        if folder is None:
            return
        hf_write.write_json(folder / "config.json", spellings.both(_config_json(source, leaves["embed/tokens"].dtype)))
        if "generation_config" in note:
            hf_write.write_json(folder / "generation_config.json", note["generation_config"])
        if tokenizer is not None:
            tokenizer_files.write_tokenizer(folder, tokenizer)

    if first:
        folders.check_target(path, hf_write.OWN_FILES)
        folders.replace_folder(path, fill)
    else:
        fill(None)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"rljax.hf.save {path}")


def _config_json(source: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """config.json as it was read, with the type of the weights in the spelling that it uses."""
    spellings = [name for name in ("dtype", "torch_dtype") if name in source] or ["dtype"]
    bias = (source.get(NOTE) or {}).get("reward_bias")
    return {
        **_plain(source),
        **dict.fromkeys(spellings, jnp.dtype(dtype).name),
        **({} if bias is None else {NOTE: {"reward_bias": bias}}),
    }


def _derive(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """For a model that no config.json describes: the first family whose rules read the same model from a candidate."""
    from transformers import CONFIG_MAPPING

    candidate, meant = _candidate(config), _architecture_fields(config)
    for family in FAMILIES:
        known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family.model_type])}
        source = {key: value for key, value in candidate.items() if key in known}
        source = {"architectures": [family.architecture], "model_type": family.model_type, **source}
        with contextlib.suppress(UserError):
            if _architecture_fields(model_config(family, source)) == meant:
                return family, source
    raise UserError(
        "no supported family has this combination of ModelConfig fields, so transformers could not open the model; "
        "keep the `source` of a loaded config, or save the params with rljax.checkpoint."
    )


def _candidate(config: ModelConfig) -> dict[str, Any]:
    """Every field of every family's config.json that this model gives a value to; a family keeps those that it has."""
    c = config
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(c.activation, c.activation)
    scale = None if c.attention_scale is None else round(c.attention_scale**-2)
    window = next((w for w in c.windows if w), None)
    ropes = [_rope_parameters(rope, c) for rope in c.ropes]
    kinds = ["sliding_attention" if w else "full_attention" for w in c.windows or (0,) * c.num_layers]
    by_kind = {kinds[i]: ropes[rope] for i, rope in enumerate(c.rope_of_layer)}
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tied,
        "rms_norm_eps": c.norm_eps,
        "layer_norm_eps": c.norm_eps,
        "layer_norm_epsilon": c.norm_eps,
        "hidden_act": activation,
        "hidden_activation": activation,
        "activation_function": activation,
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        "use_parallel_residual": c.parallel_residual,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": kinds,
        "query_pre_attn_scalar": scale,
        "attn_logit_softcapping": c.attention_softcap,
        "final_logit_softcapping": c.final_softcap,
        "rope_parameters": by_kind or ropes[0],
        "n_positions": c.max_positions,
        "n_embd": c.hidden_size,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_inner": c.intermediate_size,
        "scale_attn_weights": c.attention_scale is None,
        "original_max_position_embeddings": c.ropes[0].original_max_positions or c.max_positions,
    }


def _rope_parameters(rope: Rope, config: ModelConfig) -> dict[str, Any]:
    given: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if config.rotary_dim:
        given["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "truncate"),
        "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
    }[rope.kind]
    values = {name: getattr(rope, name) for name in names}
    if rope.original_max_positions:
        given["original_max_position_embeddings"] = rope.original_max_positions
    return given | {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
