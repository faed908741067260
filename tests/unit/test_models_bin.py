"""Models that exist only as `.bin` files: read without running what a pickle may hold."""

import os
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from rlhf.config.schema import EngineConfig, ModelConfig
from rlhf.errors import RequirementError
from rlhf.models import load_causal


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def save_bin(directory: Path) -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=32,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        max_position_embeddings=32,
    )
    model = OPTForCausalLM(config)
    config.save_pretrained(directory)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    return model


def load(directory: Path):
    return load_causal(
        str(directory),
        ModelConfig(),
        engine=EngineConfig(),
        dtype="float32",
        pad_token_id=1,
        vocab_size=32,
        dropout=False,
    )


def test_plain_bin_weights_are_read(tmp_path):
    """C2: facebook/opt-SIZE has only .bin files on the hub."""
    saved = save_bin(tmp_path)
    loaded = load(tmp_path).model
    assert all(map(torch.equal, saved.state_dict().values(), loaded.state_dict().values()))


def test_code_in_a_pickle_is_refused_not_run(tmp_path):
    save_bin(tmp_path)
    mark = tmp_path / "it_ran"
    torch.save({"weight": Evil(mark)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RequirementError, match="cannot be loaded"):
        load(tmp_path)
    assert not mark.exists()
