"""rlhf.models.causal: log-probs against transformers' own, for every family (13, 15, 18)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.config.schema import EngineConfig, ModelConfig
from rlhf.errors import ConfigError, RequirementError
from rlhf.families import TINY_FAMILIES
from rlhf.models import causal, check_positions, describe, load_causal
from rlhf.models.attention import fast_attention
from rlhf.models.families import logit_transform
from tests.unit import model_help as help_

FAMILIES = sorted(TINY_FAMILIES)


def full_log_probs(model: Any, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """(T,) of one unpadded row: log_softmax over all logits of transformers' own forward."""
    with torch.no_grad():
        logits = model(ids.unsqueeze(0)).logits[0, :-1].float()
    return (logits / temperature).log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)


def padded(rows: list[torch.Tensor], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows)) + 2  # every row has pads
    ids = torch.full((len(rows), width), help_.PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = row, True
    return ids, mask


def first_and_rest(mask: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: the real tokens that a token before them predicts."""
    return mask & (mask.cumsum(1) > 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_transformers_own(family: str) -> None:
    """13, 15: left-padded, right-padded and unpadded rows agree with the full log_softmax to
    1e-5, at temperature 1 and 0.7; entropies too. Gemma 2 caps its logits."""
    module = help_.load_policy(family, name=help_.lively(family)).eval()
    plain = AutoModelForCausalLM.from_pretrained(help_.lively(family)).eval()
    g = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 200, (n,), generator=g) for n in (9, 14, 5)]
    for temperature in (1.0, 0.7):
        expected = [full_log_probs(plain, row, temperature) for row in rows]
        assert torch.cat(expected).std() > 0.3, "a flat model would hide mistakes"
        for left in (True, False):
            ids, mask = padded(rows, left)
            counted = first_and_rest(mask)
            with torch.no_grad():
                found, entropy = module(ids, mask, counted, temperature, True)
            assert found.dtype == torch.float32
            assert float(found[~counted].abs().max()) == 0.0
            torch.testing.assert_close(
                found[counted], torch.cat(expected), atol=1e-5, rtol=1e-5, msg=f"left={left}"
            )
            assert (entropy[counted] > 0).all()
        for row, log_probs in zip(rows, expected, strict=True):
            mask = torch.ones(1, len(row), dtype=torch.bool)
            with torch.no_grad():
                found, _ = module(row[None], mask, mask, temperature)
            torch.testing.assert_close(found[0, 1:], log_probs, atol=1e-5, rtol=1e-5)
            assert found[0, 0] == 0, "nothing predicts the first token"


def test_chunks_are_invisible(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head runs on a few rows at a time; values, gradients and entropies do not change."""
    ids, mask = padded([torch.arange(3, 20), torch.arange(30, 60)], True)
    found = []
    for chunk in (256, 7):
        monkeypatch.setattr(causal, "HEAD_CHUNK", chunk)
        module = help_.load_policy(name=help_.lively())
        log_probs, entropy = module(ids, mask, first_and_rest(mask), 1.0, True)
        (log_probs.sum() + entropy.sum()).backward()
        found.append([log_probs, entropy, *(p.grad for p in module.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_only_what_counts_is_scored() -> None:
    """12: the prompt conditions the answer's log-probs and has none itself."""
    module = help_.load_policy(name=help_.lively()).eval()
    ids = torch.arange(3, 15)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    score = mask.clone()
    score[:, :8] = False
    with torch.no_grad():
        whole, _ = module(ids, mask, mask)
        answer, none = module(ids, mask, score)
        alone, _ = module(ids[:, 8:], mask[:, 8:], mask[:, 8:])
    assert none is None
    assert torch.equal(answer[:, :8], torch.zeros(1, 8))
    torch.testing.assert_close(answer[:, 8:], whole[:, 8:])
    assert (answer[:, 9:] - alone[:, 1:]).abs().max() > 0.1


def test_bf16_log_probs_are_fp32() -> None:
    """33: the softmax is fp32 over bf16 logits."""
    module = help_.load_policy(name=help_.lively(), dtype="bfloat16").eval()
    exact = help_.load_policy(name=help_.lively()).eval()
    ids = torch.arange(3, 40)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        rounded, _ = module(ids, mask, mask)
        reference, _ = exact(ids, mask, mask)
        with fast_attention(module.model.model):
            hidden = module.model.model(ids).last_hidden_state[:, :-1]
        head = module.model.get_output_embeddings().weight[: module.vocab_size]
        logits = torch.nn.functional.linear(hidden, head).float()
    assert rounded.dtype == torch.float32
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(rounded[:, 1:], expected, atol=2e-2, rtol=1e-2)
    assert (rounded - reference).abs().mean() < 0.1


_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64} | {
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 8,
}  # fmt: skip
_ODD: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "nanochat": {"final_logit_softcapping": 3.0},
    "vaultgemma": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "granitemoeshared": {"logits_scaling": 4.0, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("family", sorted(_ODD))
def test_families_that_change_their_logits(family: str) -> None:
    """13: what a family does after its output head is done here too (families.py)."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_SMALL, **_ODD[family]))
    help_.spread(hf, scale=0.4)
    hf.eval()
    module = causal.CausalModel(hf).eval()
    row = torch.randint(3, 60, (12,))
    mask = torch.ones(1, 12, dtype=torch.bool)
    with torch.no_grad():
        found, _ = module(row[None], mask, mask)
    torch.testing.assert_close(found[0, 1:], full_log_probs(hf, row, 1.0), atol=1e-5, rtol=1e-4)


def test_a_cap_of_a_nested_text_config() -> None:
    config = AutoConfig.for_model("gemma3")
    config.text_config.final_logit_softcapping = 2.0
    transform = logit_transform(config)
    assert transform is not None
    assert transform(torch.tensor([100.0])).item() == pytest.approx(2.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_dropout(family: str, tmp_path: Any) -> None:
    """18: in training mode too, two forwards agree, whatever the checkpoint's config says."""
    hf = AutoModelForCausalLM.from_pretrained(help_.lively(family))
    names = [n for n, v in vars(hf.config).items() if "drop" in n and isinstance(v, float)]
    for name in names:
        setattr(hf.config, name, 0.4)
    hf.save_pretrained(tmp_path)
    ids = torch.arange(3, 40)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)

    def differs(dropout: bool) -> bool:
        module = help_.load_policy(family, name=str(tmp_path), dropout=dropout).train()
        with torch.no_grad():
            return not torch.equal(module(ids, mask, mask)[0], module(ids, mask, mask)[0])

    assert not differs(dropout=False)
    if names:
        assert differs(dropout=True), "else this test proves nothing"


def test_a_new_pad_token_grows_the_embeddings() -> None:
    """1: a tokenizer with a new token; the old rows keep their bits and the output head grows."""
    before = help_.load_policy()
    size = len(help_.tokenizer())
    module = help_.load_policy(vocab_size=size + 1)
    old, new = before.model.get_input_embeddings(), module.model.get_input_embeddings()
    assert new.num_embeddings == size + 1 == module.config.vocab_size
    assert torch.equal(new.weight[:size], old.weight)
    assert module.model.get_output_embeddings().weight is new.weight
    assert module.config.pad_token_id == help_.PAD
    assert help_.load_policy(vocab_size=10).config.vocab_size == size, "it never shrinks"


def test_positions_that_do_not_exist_are_refused() -> None:
    """The position table has 96 rows; BLOOM has none."""
    for family in ("llama", "gpt2", "opt"):
        module = help_.load_policy(family)
        check_positions(module, 96)
        with pytest.raises(ConfigError, match=r"97 tokens .* 96 positions: lower"):
            check_positions(module, 97)
    check_positions(help_.load_policy("bloom"), 10**6)


def test_describe() -> None:
    module = help_.load_policy(lora={"rank": 2})
    total = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    line = describe(module, "float32")
    assert line.startswith("LlamaForCausalLM")
    assert f"{total:,} parameters, {trained:,} trained" in line


def test_target_modules_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"target_modules \['no_such'\].*all-linear"):
        help_.load_policy(lora={"rank": 2, "target_modules": ["no_such"]})


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_adapters_on_the_last_layers(family: str) -> None:
    """L2: `last_layers` 1 of 2: the first layer has no adapter, the last has them all."""
    module = help_.load_policy(family, lora={"rank": 2, "last_layers": 1})
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    assert names
    assert all(".1." in name and "lora_" in name for name in names)


def _load(name: str) -> None:
    load_causal(
        name, ModelConfig(), engine=EngineConfig(), dtype="float32", pad_token_id=0, vocab_size=1,
        dropout=False,
    )  # fmt: skip


def test_directories_that_are_no_model(tmp_path: Any) -> None:
    """Y: empty, config only, foreign config, broken config, a cut weight file, nothing there:
    RequirementError with the name and what is needed."""
    empty = tmp_path / "empty"
    empty.mkdir()
    no_weights = tmp_path / "no_weights"
    help_.load_policy().config.save_pretrained(no_weights)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "no_such_model"}')
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    cut = tmp_path / "cut"
    help_.load_policy().model.save_pretrained(cut)
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    wanted = dict.fromkeys((empty, no_weights, foreign, cut, tmp_path / "absent"), "safetensors")
    for directory, said in {**wanted, broken: "config.json is not readable as JSON"}.items():
        with pytest.raises(RequirementError) as error:
            _load(str(directory))
        assert str(directory) in str(error.value), directory
        assert said in str(error.value), directory


def test_weights_in_torchs_old_format(tmp_path: Any) -> None:
    """facebook/opt-1.3b has only a `.bin` file: it is read, but a pickle that would run code is
    refused and does not run."""
    module = help_.load_policy(name=help_.lively())
    module.config.save_pretrained(tmp_path)
    torch.save(module.model.state_dict(), tmp_path / "pytorch_model.bin")
    again = help_.load_policy(name=str(tmp_path))
    for one, other in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    torch.save({"lm_head.weight": _Code(str(tmp_path / "ran"))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RequirementError, match="cannot be loaded"):
        _load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


class _Code:
    """Unpickled without care, it opens (makes) a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_weights_that_are_absent_are_not_made_up(tmp_path: Any) -> None:
    """transformers would go on with random weights: a head-less directory is refused."""
    module = help_.load_value()
    module.config.tie_word_embeddings = False
    module.model.save_pretrained(tmp_path)
    with pytest.raises(RequirementError, match=r"lacks weights that lm_head.weight"):
        _load(str(tmp_path))


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """C4: the message names the model, the endpoint and the ways out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.invalid")
    with pytest.raises(RequirementError) as error:
        _load("org/no-such-model")
    for word in ("org/no-such-model", "http://mirror.invalid", "--hf-endpoint", "give its path"):
        assert word in str(error.value)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_packed_rows_do_not_see_each_other(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """13: real tokens side by side in one row, as flash-attention gets them, give the log-probs and
    gradients of padded rows (here with torch's attention, which transformers masks accordingly)."""
    ids, mask = padded([torch.arange(3, 20), torch.arange(30, 60), torch.arange(5, 9)], True)
    found = []
    for packed in (False, True):
        monkeypatch.setattr(causal, "packs", lambda _, packed=packed: packed)
        module = help_.load_policy(family, name=help_.lively(family))
        log_probs, _ = module(ids, mask, first_and_rest(mask))
        log_probs.sum().backward()
        found.append([log_probs, *(p.grad for p in module.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_packing_is_for_flash_attention_alone() -> None:
    """Not run here: there is no GPU."""
    for name, expected in (("flash_attention_2", True), ("sdpa", False), ("eager", False)):
        assert causal.packs(SimpleNamespace(_attn_implementation=name)) == expected
