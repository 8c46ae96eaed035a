"""config.json for transformers 4 and 5: rotary settings under the names of both."""

from __future__ import annotations

from typing import Any

_OWN_KEYS = ("rope_theta", "partial_rotary_factor")
_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def both(config: dict[str, Any]) -> dict[str, Any]:
    """A config with `rope_parameters` alone, as transformers 5 writes it, with `rope_theta` and `rope_scaling` added.

    transformers 4 would not miss them: it would take its default base of 10,000 and compute other logits without a
    word. A config that has either already, or (LongRoPE) rules of its own, is left alone.
    """
    given = config.get("rope_parameters")
    if not isinstance(given, dict) or not given or {"rope_theta", "rope_scaling", "rotary_emb_base"} & set(config):
        return config
    local = given.get("sliding_attention")
    whole = given.get("full_attention") if isinstance(local, dict) else given
    if not isinstance(whole, dict) or whole.get("rope_type", "default") not in _KINDS:
        return config
    if "rope_theta" not in whole:
        return config
    scaled = {key: value for key, value in whole.items() if key not in _OWN_KEYS}
    old: dict[str, Any] = {"rope_theta": whole["rope_theta"]}
    old["rope_scaling"] = scaled if scaled.get("rope_type", "default") != "default" else None
    if config.get("model_type") == "gpt_neox":
        old = {"rotary_emb_base": old.pop("rope_theta"), "rotary_pct": whole.get("partial_rotary_factor", 1.0), **old}
    elif "partial_rotary_factor" in whole:
        old["partial_rotary_factor"] = whole["partial_rotary_factor"]
    if isinstance(local, dict) and "rope_theta" in local:
        old["rope_local_base_freq"] = local["rope_theta"]
    return {**config, **old}
