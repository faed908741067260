"""`config.json`: sizes, names and types, by the rules of the families that are known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.plan.classes import architectures, functions, rope_types
from rlhf.plan.files.fault import AGAIN, Fault, Rule, broken, is_count, shown
from rlhf.plan.shapes import FAMILIES, ModelShape

MAX_LAYERS = 10_000
DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
_MEND = "give a model directory that is whole, or mend the file"

_SIZE = Rule(is_count, "a whole number from 1 to 10^9")
_OR_NULL = Rule(lambda value: value is None or is_count(value), _SIZE.text + ", or null")
_LAYERS = Rule(lambda n: is_count(n, 1, MAX_LAYERS), f"a whole number from 1 to {MAX_LAYERS:,}")
_TRUTH = Rule(lambda value: value is None or isinstance(value, bool), "true or false")
_OBJECT = Rule(lambda value: value is None or isinstance(value, dict), "a JSON object")
_NAMES = Rule(
    lambda value: value is None or (isinstance(value, list) and all(type(x) is str for x in value)),
    "a list of class names",
)
_DTYPE = Rule(
    lambda value: value is None or str(value).removeprefix("torch.") in DTYPES,
    f"one of {', '.join(DTYPES)}",
)


def _number(least: float, most: float, text: str) -> Rule:
    def holds(value: Any) -> bool:
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value is None or (known and math.isfinite(value) and least <= value <= most)

    return Rule(holds, text)


_SHARE = _number(0.0, 1.0, "a number from 0 to 1")
_POSITIVE = _number(1e-30, 1e30, "a number above 0")

# Of every configuration.
_ANYWHERE = {
    "architectures": _NAMES,
    "auto_map": _OBJECT,
    "text_config": _OBJECT,
    "id2label": _OBJECT,
    "label2id": _OBJECT,
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
}
# Of the families whose sizes are known (rlhf/plan/shapes.py). Of others a size may be a list, one
# number for each layer, or 0 where a part is absent.
_KNOWN = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), _LAYERS),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "n_embed", "num_attention_heads", "n_head", "vocab_size",
         "ffn_dim"), _SIZE),
    "intermediate_size": _SIZE,
    **dict.fromkeys(("n_inner", "num_key_value_heads", "head_dim", "word_embed_proj_dim",
                     "max_position_embeddings", "n_positions"), _OR_NULL),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout", "attn_pdrop", "embd_pdrop",
                     "resid_pdrop", "initializer_range"), _SHARE),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta"),
                    _POSITIVE),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), _TRUTH),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _OBJECT),
}  # fmt: skip
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Their heads have a width of their own.
_OWN_HEAD_DIM = ("qwen3", "gemma", "gemma2")


def config_faults(
    config: Mapping[str, Any], *, own_code: bool = False, file: str = "config.json"
) -> list[Fault]:
    """What in a model's configuration cannot be right, each with file, key, value and rule.

    Args:
        own_code: the model's Python files are trusted: its sizes and names are theirs to judge.
    """
    faults = list(broken(file, dict(config), _ANYWHERE, _MEND))
    faults += _quantised(file, config)
    if faults:
        return faults
    inner = config.get("text_config") or config
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        if own_code:
            return []
        found = f"{file}: its config.json names no model_type" if family is None else ""
        return [
            Fault(found or f"{file}: model_type is {shown(family)}", "the name of a family", _MEND)
        ]
    for key in _LAYER_KEYS:  # of whatever family: a module is built for each
        if isinstance(inner.get(key), int) and inner[key] > MAX_LAYERS:
            faults += broken(file, {key: inner[key]}, {key: _LAYERS}, _MEND)
    if own_code or faults:
        return faults
    faults += _unknown_names(file, config, inner)
    if family in FAMILIES:
        faults += list(broken(file, dict(config), _KNOWN, _MEND)) or _sizes(file, config, family)
    return faults


def parameters(config: Mapping[str, Any]) -> int:
    """Parameters of the causal LM that a configuration without faults describes; at least so many,
    where the family is not known (0: not a size is)."""
    inner = config.get("text_config") or config
    build = FAMILIES.get(str(inner.get("model_type")))
    try:
        if build is not None:
            return build(inner).causal
        sizes = {
            "width": ("hidden_size", "n_embd", "d_model"),
            "layers": _LAYER_KEYS,
            "vocab": ("vocab_size",),
        }
        width, layers, vocab = (
            next((inner[key] for key in keys if is_count(inner.get(key))), 0)
            for keys in sizes.values()
        )
        return width * (vocab + layers * width)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError):
        return 0


def _quantised(file: str, config: Mapping[str, Any]) -> Iterator[Fault]:
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        if found := place.get("quantization_config"):
            method = found.get("quant_method", "") if isinstance(found, dict) else ""
            yield Fault(
                f"{file}: its weights are quantised ({method or 'quantization_config'})",
                "weights in 16 or 32 bits",
                "give the model that it was made from: quantised weights cannot be trained",
            )


def _unknown_names(
    file: str, config: Mapping[str, Any], inner: Mapping[str, Any]
) -> Iterator[Fault]:
    """Classes, activations and rotary positions that the installed transformers does not have."""
    for name in config.get("architectures") or ():
        if architectures() and name.lower() not in architectures():
            remedy = (
                "set model.trust_remote_code=true if you trust the code that it brings"
                if "auto_map" in config
                else "if the weights are those of a class that transformers has, write its name"
            )
            found = f"{file}: architectures names {shown(name)}"
            yield Fault(found, "a class that transformers has", remedy)
    for key in ("hidden_act", "activation_function", "hidden_activation"):
        name = inner.get(key)
        if isinstance(name, str) and functions() and name not in functions():
            found = f"{file}: {key} is {shown(name)}"
            yield Fault(found, f"one of {', '.join(sorted(functions()))}", _MEND)
    if inner.get("model_type") in FAMILIES:
        for key in ("rope_parameters", "rope_scaling"):
            rope = inner.get(key)
            kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None
            if kind is not None and rope_types() and kind not in rope_types():
                found = f"{file}: {key} has the type {shown(kind)}"
                yield Fault(found, f"one of {', '.join(sorted(rope_types()))}", _MEND)


def _sizes(file: str, config: Mapping[str, Any], family: str) -> Iterator[Fault]:
    """All sizes are there, and heads divide."""
    if config.get("text_config"):
        yield Fault(f"{file}: text_config is set", f"none: a {family} has no such part", _MEND)
        return
    try:
        shape: ModelShape = FAMILIES[family](config)
    except KeyError as error:
        yield Fault(f"{file}: {error.args[0]} is missing", f"each size of a {family}", _MEND)
        return
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
        yield Fault(f"{file}: not the sizes of a {family}: {error}", "numbers", AGAIN)
        return
    own_width = config.get("head_dim") or family in _OWN_HEAD_DIM
    if shape.hidden % shape.heads and not own_width:
        found = f"{file}: {shape.heads} heads do not divide the width {shape.hidden}"
        yield Fault(found, "a width that is a multiple of the heads", _MEND)
    if shape.heads % shape.kv_heads:
        found = f"{file}: {shape.kv_heads} key-value heads do not divide {shape.heads} heads"
        yield Fault(found, "heads that are a multiple of num_key_value_heads", _MEND)
