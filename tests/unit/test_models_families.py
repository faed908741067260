"""Every causal LM family of transformers that can be built tiny: fast paths give its own numbers.

Whatever way rlhf.rollout.probe and rlhf.models.trusted choose is compared with the family's own
eager forward over each row alone, and earlier log-probs must not see later tokens (issue 10).
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf.errors import ConfigError
from rlhf.models import trusted
from rlhf.models.attention import NAME, attention_named
from rlhf.models.causal import CausalModel
from rlhf.models.families import takes_position_ids
from rlhf.models.trusted import asks_for_its_name, attention_fits
from rlhf.rollout import ContinuousRollout, SamplingConfig
from tests.unit.rollout_support import IDS, engine_of, prompts

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 3_000_000
SMALL: dict[str, Any] = {
    **{"vocab_size": 64, "max_position_embeddings": 128, "n_positions": 128, "is_decoder": True},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
    **{"hidden_size": 32, "n_embd": 32, "d_model": 32, "intermediate_size": 48, "ffn_dim": 48},
    **{"num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "decoder_layers": 2},
    **{"num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 4},
    **{"head_dim": 8, "rotary_dim": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "state_size": 8},
    **{"shared_expert_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "conv_kernel": 4},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
SPECIAL: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
}


def small(family: str) -> Any:
    """A random fp32 model, or a skip that says why there is none."""
    try:
        kind = CONFIG_MAPPING[family]
        usual = kind()
        wanted = {name: value for name, value in SMALL.items() if hasattr(usual, name)}
        kinds = list(dict.fromkeys(getattr(usual, "layer_types", None) or ()))
        if kinds:
            wanted["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
            wanted["num_hidden_layers"] = len(wanted["layer_types"])
        config = settled(kind, wanted | SPECIAL.get(family, {}))
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            pytest.skip(f"{family}: {size:,} parameters even with small settings")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Whatever a family's configuration or constructor says to settings it was not made for.
    except Exception as error:  # noqa: BLE001
        pytest.skip(f"{family} cannot be built small: {type(error).__name__}: {str(error)[:80]}")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    model.generation_config.eos_token_id = None
    return model.eval()


def settled(kind: Any, wanted: dict[str, Any]) -> Any:
    """The configuration; names that it derives from others are left to it."""
    while True:
        try:
            return kind(**wanted)
        except AttributeError as error:
            found = re.search(r"property '(\w+)'", str(error))
            name = {"layers_block_type": "layer_types"}.get(found[1], found[1]) if found else ""
            if name not in wanted:
                raise
            del wanted[name]


@torch.no_grad()
def alone(model: Any, row: torch.Tensor) -> torch.Tensor:
    """(T, V) log-probs of one row without pads, by the model's own eager attention."""
    extra = {"position_ids": torch.arange(len(row))[None]} if takes_position_ids(model) else {}
    with attention_named(model, "eager"):
        return model(input_ids=row[None], use_cache=False, **extra).logits[0].log_softmax(-1)


def runs_alone(model: Any, family: str) -> None:
    try:
        alone(model, torch.arange(5))
    except Exception as error:  # noqa: BLE001
        pytest.skip(f"{family} has no plain forward: {type(error).__name__}: {str(error)[:80]}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_has_the_familys_own_log_probs(family: str) -> None:
    """Prompts of three lengths side by side; or a refusal, where pads change the family's own."""
    model = small(family)
    runs_alone(model, family)
    engine = ContinuousRollout(engine_of(model), IDS, batch_size=3)
    sampling = SamplingConfig(max_new_tokens=6, temperature=1.0)
    try:
        out = engine.generate(prompts(7, 2, 9), sampling)
    except ConfigError as error:
        if "changes with the tokens after it" in str(error):
            assert reads_ahead(model), f"{family} is refused without need"
        else:
            assert pads_matter(model), f"{family} is refused without need"
        return
    for row, mask, log_probs, counted in zip(
        out.input_ids, out.attention_mask.bool(), out.log_probs, out.answer_mask, strict=True
    ):
        ids, count = row[mask], int(counted.sum())
        own = alone(model, ids)[-count - 1 : -1].gather(1, ids[-count:, None]).squeeze(1)
        torch.testing.assert_close(log_probs[:count], own, atol=2e-3, rtol=0)


def reads_ahead(model: Any) -> bool:
    """Does an earlier token's log-prob change with a later token (XLM without `causal`)?"""
    ids = torch.arange(8) + 3
    other = ids.clone()
    other[-1] = 20
    return bool((alone(model, ids)[:-1] - alone(model, other)[:-1]).abs().max() > 1e-4)


def test_a_model_that_reads_ahead_is_refused_by_that_name() -> None:
    """XLM's own configuration is a masked language model's: every token sees all others."""
    with pytest.raises(ConfigError, match="changes with the tokens after it"):
        ContinuousRollout(engine_of(small("xlm")), IDS, batch_size=3).generate(
            prompts(7, 2, 9), SamplingConfig(max_new_tokens=2, temperature=1.0)
        )


@torch.no_grad()
def pads_matter(model: Any) -> bool:
    """Does the model's own forward over a left-padded row differ from that without pads?"""
    ids = torch.arange(8)[None] + 3
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    extra = {}
    if takes_position_ids(model):
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits
    wanted = alone(model, ids[0, 3:])[-1]
    return bool((padded[0, -1].log_softmax(-1) - wanted).abs().max() > 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_rows_have_the_familys_own_numbers(family: str) -> None:
    """The attention of scoring and update (here in fp32): equal to eager, blind to the future."""
    model = small(family)
    runs_alone(model, family)
    decoder = model.base_model
    name = NAME if attention_fits(decoder, NAME, attention_named) else "sdpa"
    ids = (torch.arange(12) * 5 + 2)[None] % 64
    later = ids.clone()
    later[0, -1] = (later[0, -1] + 1) % 64
    extra = {"position_ids": torch.arange(12)[None]} if takes_position_ids(model) else {}
    with torch.no_grad(), attention_named(model, name):
        ours = model(input_ids=ids, use_cache=False, **extra).logits[0].log_softmax(-1)
        other = model(input_ids=later, use_cache=False, **extra).logits[0].log_softmax(-1)
    torch.testing.assert_close(ours, alone(model, ids[0]), atol=2e-3, rtol=0)
    if (alone(model, later[0])[:-1] - alone(model, ids[0])[:-1]).abs().max() < 1e-4:
        torch.testing.assert_close(other[:-1], ours[:-1], atol=1e-4, rtol=0)


def test_falcon_keeps_its_own_attention(capsys: pytest.CaptureFixture[str]) -> None:
    """It asks for the name "sdpa" and builds no causal mask under another: in bf16, where our
    attention would run, log-probs do not see later tokens; a line says what happens, once."""
    model = small("falcon")
    trusted._said.clear()
    assert not attention_fits(model.base_model, NAME, attention_named)
    assert asks_for_its_name(type(model.base_model))
    model.to(torch.bfloat16)
    wrapped = CausalModel(model)
    ids = (torch.arange(12) * 5 + 2)[None] % 64
    later = ids.clone()
    later[0, -1] += 1
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        one, _ = wrapped(ids, mask, mask)
        two, _ = wrapped(later, mask, mask)
    assert torch.equal(one[:, :-1], two[:, :-1])
    assert capsys.readouterr().out.count("our faster attention does not fit") == 1
