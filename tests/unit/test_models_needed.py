"""Layers compute what is needed alone: the same numbers and gradients, in fewer operations."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.config.training import LoraConfig
from rlhf.models import causal, last_tokens
from rlhf.models.adapters import add_adapters
from rlhf.models.causal import CausalModel
from rlhf.models.needed import FIRST_QUERY, LAYERS, only_needed

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {
        "vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64, "dropout": 0.0,
    },
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": SIZES | {"num_key_value_heads": 4},
    "llama": SIZES, "mistral": SIZES, "qwen2": SIZES, "qwen3": SIZES, "gemma": SIZES,
    "gemma2": SIZES, "phi": SIZES | {"num_key_value_heads": 4},
}  # fmt: skip
NOT_KNOWN = {"bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 4}}


def model_of(family: str, dtype: torch.dtype = torch.float32, lora: int = 0) -> CausalModel:
    sizes = (FAMILIES | NOT_KNOWN)[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if lora:
        model = add_adapters(model, LoraConfig(rank=lora), task="CAUSAL_LM", dropout=False)
    return CausalModel(model)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """(4, 20) ids; rows padded on both sides; read: the last few real tokens of each row."""
    ids = torch.randint(3, 64, (4, 20), generator=torch.Generator().manual_seed(1))
    real = torch.ones(4, 20, dtype=torch.bool)
    real[1, :7], real[2, -6:], real[3, :3], real[3, -2:] = False, False, False, False
    read = torch.zeros_like(real)
    for row, (start, end) in enumerate(((12, 20), (15, 20), (10, 14), (14, 18))):
        read[row, start:end] = True
    return ids, real, read


def run(model: CausalModel, read: Tensor | None) -> tuple[Tensor, dict[str, Tensor], int]:
    """Hidden states that the test reads, gradients of a loss on them, operations."""
    ids, real, wanted = batch()
    weight = torch.randn(32, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden(ids, real, read)[wanted].float()
        (hidden @ weight).sin().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), gradients, counter.get_total_flops()


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls with all of every layer computed."""

    def call(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(causal, "only_needed", lambda *_: nullcontext())
            return run(*args)

    return call

    def __exit__(self, *_: Any) -> None: ...


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_numbers_in_fewer_operations(family: str, lora: int, everything: Any) -> None:
    """13: hidden states that are read and every gradient, full and with adapters."""
    model = model_of(family, lora=lora)
    read = batch()[2]
    hidden, gradients, work = run(model, read)
    expected, wanted, all_work = everything(model, None)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-4)
    assert gradients.keys() == wanted.keys()
    assert len(gradients) > 3
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4, rtol=1e-3, msg=name)
    assert work < 0.9 * all_work
    # Without `read` pads alone are left out.
    hidden, _, some_work = run(model, None)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-4)
    assert work < some_work < all_work


def test_half_precision_leaves_queries_out(everything: Any) -> None:
    """Block attention begins at the first column that is read; the numbers are bfloat16's."""
    model = model_of("llama", torch.bfloat16)
    hidden, gradients, _ = run(model, batch()[2])
    expected, wanted, _ = everything(model, None)
    torch.testing.assert_close(hidden, expected, atol=0.1, rtol=0.05)
    for name, gradient in gradients.items():
        error = (gradient - wanted[name]).float().norm() / wanted[name].float().norm()
        assert error < 0.05, name


def test_the_last_token_alone() -> None:
    """The reward model's reading: one position a row."""
    model = model_of("opt")
    ids, real, _ = batch()
    last = last_tokens(real)
    assert last.sum(1).tolist() == [1, 1, 1, 1]
    assert last.long().argmax(1).tolist() == [19, 19, 13, 17]
    with torch.no_grad():
        torch.testing.assert_close(
            model.hidden(ids, real, last)[last], model.hidden(ids, real)[last], atol=1e-5, rtol=1e-4
        )


def test_an_unknown_family_computes_everything() -> None:
    model = model_of("bloom")
    assert not any(type(part).__name__ in LAYERS for part in model.modules())
    read = batch()[2]
    assert run(model, read)[2] == run(model, None)[2]


def test_nothing_is_left_behind() -> None:
    """Not after an error either; somebody else's patch comes back."""
    model = model_of("opt")
    _, real, read = batch()
    decoder: Any = model.model.base_model  # type: ignore[union-attr]
    layers = decoder.decoder.layers

    def own(x: Tensor) -> Tensor:
        return x

    layers[0].fc1.forward = own

    def fail() -> None:
        with only_needed(decoder, real, read):
            assert layers[0].fc1.forward is not own
            assert hasattr(layers[2].self_attn, FIRST_QUERY)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    changed = [n for n, module in model.named_modules() if "forward" in vars(module)]
    assert changed == ["model.model.decoder.layers.0.fc1"]
    assert layers[0].fc1.forward is own
    assert not any(hasattr(layer.self_attn, FIRST_QUERY) for layer in layers)


def test_checkpointed_layers_compute_everything() -> None:
    """They are run again in the backward pass, outside."""
    model = model_of("llama")
    plain = run(model, batch()[2])
    model.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.train()
    hidden, gradients, _ = run(model, batch()[2])
    torch.testing.assert_close(hidden, plain[0], atol=1e-5, rtol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[1][name], atol=1e-4, rtol=1e-3, msg=name)


def test_few_rows_to_spare_are_not_chosen() -> None:
    """Choosing costs more than it saves where nearly everything is needed."""
    model = model_of("llama")
    decoder: Any = model.model.base_model  # type: ignore[union-attr]
    real = torch.ones(4, 20, dtype=torch.bool)
    real[0, 0] = False
    with only_needed(decoder, real, None):
        assert not any("forward" in vars(module) for module in decoder.modules())
