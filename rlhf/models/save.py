"""Writing a trained model as a plain Hugging Face directory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf.engine import comm
from rlhf.models.adapters import adapter_state, merged_state, plain
from rlhf.models.generation import generation_settings
from rlhf.models.shared import ADAPTER, SharedScalar


class Snapshot:
    """A model's whole weights in this process's memory (rank 0), ready to be written.

    Taking one is collective; writing one is not.
    """

    def __init__(self, module: Any) -> None:
        keep = comm.rank() == 0
        self.model = module.model
        self.adapters = None
        self.skeleton: Callable[[], Any] = self._skeleton
        if isinstance(module, SharedScalar):
            self.state, self.skeleton = module.whole_state(keep), module.skeleton
            return
        self.state = merged_state(self.model, keep)
        if isinstance(self.model, PeftModel):
            self.adapters = adapter_state(self.model, keep)

    def write(
        self,
        directory: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        card: str,
        generation: dict[str, Any] | None = None,
    ) -> None:
        """Config, safetensors, tokenizer with its template, generation config, model card.

        Adapters are merged; they are also kept apart in `adapter/`, as peft saves them.
        """
        directory.mkdir(parents=True, exist_ok=True)
        skeleton = self.skeleton()
        ties = getattr(skeleton, "all_tied_weights_keys", None) or {}
        if any(one in self.state and other in self.state for one, other in ties.items()):
            skeleton = self._skeleton(tied=False)  # an adapter has parted them
        if skeleton.can_generate():
            live = plain(self.model)
            skeleton.generation_config = GenerationConfig(
                **generation_settings(tokenizer, live, generation)
            )
        skeleton.save_pretrained(directory, state_dict=dict(self.state))
        tokenizer.save_pretrained(directory)
        (directory / "README.md").write_text(card, encoding="utf-8")
        if self.adapters is not None:
            self.model.save_pretrained(
                directory / ADAPTER,
                state_dict=self.adapters,
                save_embedding_layers=False,
                selected_adapters=["default"],
            )

    def _skeleton(self, *, tied: bool = True) -> Any:
        live = plain(self.model)
        config = live.config
        if not tied:
            config = copy.deepcopy(config)
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        with torch.device("meta"):
            # In the weights' dtype: config.json states it, and loaders follow it.
            return type(live)(config).to(live.dtype)


def model_card(title: str, *, base: str, lines: list[str]) -> str:
    """A short model card: what it is, what it came from, what was measured."""
    facts = "\n".join(f"- {line}" for line in lines)
    return f"---\nlibrary_name: transformers\n---\n# {title}\n\nStarted from `{base}`.\n\n{facts}\n"
