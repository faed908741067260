"""`config.json`: sizes, names and types, by the rules of the families that are known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.families import FAMILIES, ModelShape
from rlhf.plan.classes import architectures, functions, rope_types
from rlhf.plan.files.fault import Fault, Rule, broken, is_count, shown

MAX_LAYERS = 10_000
FILE = "config.json"
_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
_MEND = "give a model directory that is whole, or mend the file"

_SIZE = Rule(is_count, "a whole number from 1 to 10^9")
_OR_NULL = Rule(lambda value: value is None or is_count(value), _SIZE.text + ", or null")
_LAYERS = Rule(lambda n: is_count(n, 1, MAX_LAYERS), f"a whole number from 1 to {MAX_LAYERS:,}")
_TEXT = Rule(lambda value: value is None or isinstance(value, str), "text")
_TRUTH = Rule(lambda value: value is None or isinstance(value, bool), "true or false")
_OBJECT = Rule(lambda value: value is None or isinstance(value, dict), "a JSON object")
_NAMES = Rule(
    lambda value: value is None or (isinstance(value, list) and all(type(x) is str for x in value)),
    "a list of class names",
)
_DTYPE = Rule(
    lambda value: value is None or str(value).removeprefix("torch.") in _DTYPES,
    f"one of {', '.join(_DTYPES)}",
)


def _number(least: float, most: float, text: str) -> Rule:
    def holds(value: Any) -> bool:
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value is None or (known and math.isfinite(value) and least <= value <= most)

    return Rule(holds, text)


def _any_size(value: Any) -> bool:
    """Of families that are not known here a size may be a list, one number for each layer, or 0
    where a part is absent."""
    return value is None or isinstance(value, (list, dict)) or is_count(value, 0)


def _any_layers(value: Any) -> bool:
    return _any_size(value) and not (isinstance(value, int) and value > MAX_LAYERS)


_SHARE = _number(0.0, 1.0, "a number from 0 to 1")
_POSITIVE = _number(1e-30, 1e30, "a number above 0")
_SIZES = ("hidden_size", "n_embd", "num_attention_heads", "n_head", "vocab_size",
          "intermediate_size", "ffn_dim")  # fmt: skip
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_ACTIVATIONS = ("hidden_act", "activation_function", "hidden_activation")
_ROPES = ("rope_parameters", "rope_scaling")

# Of every configuration.
_ANYWHERE = {
    "architectures": _NAMES,
    **dict.fromkeys(("auto_map", "text_config"), _OBJECT),
    **dict.fromkeys(("dtype", "torch_dtype"), _DTYPE),
    **dict.fromkeys(_SIZES, Rule(_any_size, "whole numbers from 0 to 10^9")),
    **dict.fromkeys(_LAYER_KEYS, Rule(_any_layers, _LAYERS.text)),
}
# Of the families whose shape is known.
_KNOWN = {
    **dict.fromkeys(_SIZES, _SIZE),
    **dict.fromkeys(_LAYER_KEYS, _LAYERS),
    **dict.fromkeys(("n_inner", "num_key_value_heads", "head_dim", "word_embed_proj_dim",
                     "max_position_embeddings", "n_positions"), _OR_NULL),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout", "attn_pdrop", "embd_pdrop",
                     "resid_pdrop"), _SHARE),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta"),
                    _POSITIVE),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), _TRUTH),
    **dict.fromkeys(_ROPES, _OBJECT),
    **dict.fromkeys(_ACTIVATIONS, _TEXT),
}  # fmt: skip


def config_faults(config: Mapping[str, Any], *, own_code: bool = False) -> list[Fault]:
    """What in a model's configuration cannot be right, each with file, key, value and rule.

    Args:
        own_code: the model's Python files are trusted: its sizes and names are theirs to judge.
    """
    faults = [
        Fault(f"{FILE}: {key} is NaN", "a number", _MEND)
        for key, value in config.items()
        if isinstance(value, float) and math.isnan(value)
    ]
    faults = faults or list(broken(FILE, dict(config), _ANYWHERE, _MEND))
    faults = faults or list(_quantised(config))
    if faults or (own_code and "auto_map" in config):
        return faults
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        said = "names no model_type" if not family else f"model_type is {shown(family)}"
        return [Fault(f"its {FILE} {said}", "the name of a family, e.g. llama", _MEND)]
    return [*_unknown_names(config, family), *(size_faults(config) or _special_ids(config))]


def size_faults(config: Mapping[str, Any]) -> list[Fault]:
    """Of a family whose shape is known: sizes that are there, are numbers, and divide."""
    family = str(config.get("model_type"))
    known = FAMILIES.get(family)
    if known is None or known.shape is None:
        return []
    if faults := list(broken(FILE, dict(config), _KNOWN, _MEND)):
        return faults
    try:
        shape: ModelShape = known.shape(config)
    except KeyError as error:
        return [Fault(f"{FILE}: {error.args[0]} is missing", f"each size of a {family}", _MEND)]
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        return [Fault(f"{FILE}: not the sizes of a {family}: {error}", "numbers", _MEND)]
    width, heads, kv_heads = shape.hidden, shape.heads, shape.kv_heads
    faults = []
    if width % heads and shape.head_dim == width // heads:  # it has no head_dim of its own
        found = f"{FILE}: {heads} attention heads do not divide the hidden size {width}"
        faults.append(Fault(found, "a hidden size that is a multiple of the heads", _MEND))
    if heads % kv_heads:
        found = f"{FILE}: num_key_value_heads is {kv_heads}, which does not divide {heads} heads"
        faults.append(Fault(found, "heads that are a multiple of num_key_value_heads", _MEND))
    return faults


def parameters(config: Mapping[str, Any]) -> int:
    """Parameters of the causal LM that a configuration without faults describes; where the family
    is not known, of its largest matrix that is sure to be there (0: none is)."""
    inner = config.get("text_config") or config
    known = FAMILIES.get(str(inner.get("model_type")))
    if known is not None and known.shape is not None and not size_faults(inner):
        return known.shape(inner).causal
    sizes = [
        next((inner[key] for key in keys if is_count(inner.get(key))), 0)
        for keys in (("hidden_size", "n_embd", "d_model"), ("vocab_size",))
    ]
    return sizes[0] * sizes[1]


def _quantised(config: Mapping[str, Any]) -> Iterator[Fault]:
    for place in (config, config.get("text_config") or {}):
        if found := place.get("quantization_config"):
            method = found.get("quant_method", "") if isinstance(found, dict) else ""
            yield Fault(
                f"its weights are quantised ({method or 'quantization_config'} in {FILE})",
                "weights in 16 or 32 bits",
                "give the model that it was made from: quantised weights cannot be trained",
            )


def _unknown_names(config: Mapping[str, Any], family: str) -> Iterator[Fault]:
    """Classes, activations and rotary positions that the installed transformers does not have."""
    # A class that nobody brings the code of is judged by its weights, when they are loaded.
    for name in config.get("architectures") or () if "auto_map" in config else ():
        if architectures() and name.lower() not in architectures():
            remedy = "set model.trust_remote_code=true if you trust the code that it brings"
            found = f"{FILE}: architectures names {shown(name)}, whose code auto_map names"
            yield Fault(found, "a class that transformers has", remedy)
    known = FAMILIES.get(family)
    if known is None or known.shape is None:
        return
    for key in _ACTIVATIONS:
        name = config.get(key)
        if isinstance(name, str) and functions() and name not in functions():
            found = f"{FILE}: {key} is {shown(name)}"
            yield Fault(found, f"one of {', '.join(sorted(functions()))}", _MEND)
    for key in _ROPES:
        rope = config.get(key)
        kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None
        if kind is not None and rope_types() and kind not in rope_types():
            found = f"{FILE}: {key} has the type {shown(kind)}"
            yield Fault(found, f"one of {', '.join(sorted(rope_types()))}", _MEND)


def _special_ids(config: Mapping[str, Any]) -> Iterator[Fault]:
    """Ids of special tokens that the embeddings have no row for; -1 says "none" in old files."""
    rows = config.get("vocab_size")
    if not is_count(rows):
        return
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not is_count(one, -1, rows - 1):
                rule = f"ids from 0 to {rows - 1} (vocab_size is {rows:,})"
                yield Fault(f"{FILE}: {key} is {shown(one)}", rule, _MEND)
                break
