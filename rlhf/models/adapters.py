"""Low-rank adapters through peft: adding them, and merging them without touching the live model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from rlhf.config.training import LoraConfig
from rlhf.engine.zero3 import gathered
from rlhf.errors import ConfigError


def plain(model: Any) -> Any:
    """The Hugging Face model inside peft's wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def add_adapters(model: Any, lora: LoraConfig, *, task: str, dropout: bool) -> Any:
    """Wraps the model when `lora.rank` is not 0. A scalar head is trained in full.

    Raises:
        ConfigError: target modules that the model does not have.
    """
    if not lora.rank:
        return model
    config = lora_config(model, lora, task=task, dropout=dropout)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"lora.target_modules {lora.target_modules!r} do not fit "
            f"{type(model).__name__}: {error}. Use `all-linear` or names of its linear layers."
        ) from error
    _refuse_position_tables(adapted, lora)
    return adapted


def _refuse_position_tables(model: Any, lora: LoraConfig) -> None:
    """peft's embedding layer looks ids up; OPT's position table is called with a mask."""
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        inner = layer.get_base_layer()
        own_forward = type(inner).forward is not torch.nn.Embedding.forward
        # A scale on the looked-up rows (Gemma 3) is something that peft knows.
        if (
            isinstance(inner, torch.nn.Embedding)
            and own_forward
            and not hasattr(inner, "embed_scale")
        ):
            raise ConfigError(
                f"lora.target_modules {lora.target_modules!r} takes in {name.rsplit('.', 1)[-1]}, "
                f"a {type(inner).__name__}, which peft cannot adapt: leave it out"
            )


def lora_config(model: Any, lora: LoraConfig, *, task: str, dropout: bool) -> PeftLora:
    """peft's configuration; the model may have other adapters already."""
    layers = None
    if lora.last_layers:
        total = model.config.get_text_config().num_hidden_layers
        layers = list(range(max(0, total - lora.last_layers), total))
    return PeftLora(
        task_type=task,
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft only multiplies by it
        lora_dropout=lora.dropout if dropout else 0.0,
        target_modules=_targets(model, lora),
        layers_to_transform=layers,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def _targets(model: Any, lora: LoraConfig) -> Any:
    """peft refuses `all-linear` together with a choice of layers, and with layers that have
    adapters already: list the names ourselves."""
    again = isinstance(model, PeftModel)
    if lora.target_modules != "all-linear" or not (lora.last_layers or again):
        return lora.target_modules
    model = plain(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    score = getattr(model, "score", None)
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if _is_linear(module)
            and ".lora_" not in name
            and not name.endswith(".base_layer")
            and module is not head
            and module is not score
        }
    )


def _is_linear(module: Any) -> bool:
    inner = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return isinstance(inner, torch.nn.Linear) or type(inner).__name__ == "Conv1D"


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Within, the model answers as its frozen base does."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        yield


def merged_state(
    model: Any, keep: bool, adapters: Sequence[str] = ("default",)
) -> dict[str, torch.Tensor]:
    """The plain Hugging Face state dict on CPU, `adapters` added into the weights they adapt.

    Collective under ZeRO-3: every rank calls it; only those with `keep` get the tensors. Tied
    weights appear once, under their first name, unless an adapter on one of them parts them.
    """
    hf = plain(model)
    state: dict[str, torch.Tensor] = {}
    adapted: dict[str, Any] = {
        name: m
        for name, m in hf.named_modules()
        if isinstance(m, LoraLayer) and any(_has(m, adapter) for adapter in adapters)
    }
    for name, module in adapted.items():
        with gathered(module.parameters()), torch.no_grad():
            if keep:
                base = module.get_base_layer()
                weight = base.weight
                for adapter in adapters:
                    if _has(module, adapter):
                        weight = weight + module.get_delta_weight(adapter).to(base.weight.dtype)
                state[f"{name}.weight"] = weight.cpu()
    # A weight tied to an adapted one is another weight once that is merged: both are kept.
    tied = {id(module.get_base_layer().weight) for module in adapted.values()}
    seen: set[int] = set()
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        if id(parameter) in seen and id(parameter) not in tied:
            continue
        seen.add(id(parameter))
        key = _plain_key(name)
        if key is None or key.removesuffix(".weight") in adapted:  # the same on every rank
            continue
        with gathered([parameter]):
            if keep:
                state[key] = parameter.detach().cpu().clone()
    if keep:
        saved = set(hf.state_dict().keys())
        for name, buffer in hf.named_buffers():
            if name in saved and "lora_" not in name:
                state[name] = buffer.detach().cpu().clone()
    return state


def _has(layer: Any, adapter: str) -> bool:
    """peft keeps an embedding's matrices under another name."""
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def _plain_key(name: str) -> str | None:
    """A parameter's name without peft's insertions; None for parameters that only peft has."""
    if "lora_" in name or ".original_module." in name:
        return None
    return name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


def adapter_state(model: PeftModel, keep: bool) -> dict[str, torch.Tensor]:
    """The model's own adapters' parameters on CPU, with peft's names; collective under ZeRO-3."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if f"{name}.".find(".default.") >= 0 and ("lora_" in name or ".modules_to_save." in name):
            with gathered([parameter]):
                if keep:
                    state[name] = parameter.detach().cpu().clone()
    return state
