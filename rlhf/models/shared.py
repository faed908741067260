"""One frozen base for policy, reference, critic and reward model: adapters and heads differ.

The policy's model carries three adapters: `default` (the policy's own), `reward` (step 2's, frozen)
and `critic` (trained on top of `reward`, as the critic starts from the reward model: 34). A role
switches its adapters on for its forward: the policy `default`, the reference none, the reward model
`reward`, the critic `reward` and `critic`. Outside a role's forward the policy's are on.

Each role shows only the base's parameters and its own, so that its engine trains, freezes, saves
and counts nothing of another role's.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf.config.schema import RLConfig
from rlhf.config.training import LoraConfig
from rlhf.errors import ConfigError
from rlhf.models.adapters import lora_config, merged_state, plain
from rlhf.models.causal import CausalModel
from rlhf.models.loading import choose_dtype
from rlhf.models.scalar import ScalarHead, ScalarModel

POLICY, REWARD, CRITIC = "default", "reward", "critic"
ADAPTER = "adapter"  # directory of an artifact's adapters
_OF_ADAPTER = re.compile(r"\.lora_\w+\.(\w+)")


class _Role(torch.nn.Module):
    """A role's view of the shared model."""

    model: Any
    adapters: tuple[str, ...] = ()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the shared model answers with this role's adapters, and with no others."""
        layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        # Not peft's set_adapter: that one also decides which adapters train.
        before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
        for layer in layers:
            layer._active_adapter = list(self.adapters) or layer._active_adapter
            layer._disable_adapters = not self.adapters
        try:
            yield
        finally:
            for layer, (active, disabled) in zip(layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if self._is_mine(name):
                yield name, parameter

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        for name in [name for name in state if not self._is_mine(name)]:
            del state[name]
        return state

    def _is_mine(self, name: str) -> bool:
        found = _OF_ADAPTER.search(name)
        return found is None or found.group(1) in self.adapters


class SharedPolicy(_Role, CausalModel):
    """The policy, or with `adapters` () the reference."""

    def __init__(
        self, model: PeftModel, adapters: tuple[str, ...], vocab_size: int | None = None
    ) -> None:
        super().__init__(model, vocab_size)
        self.adapters = adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.in_use():
            return super().forward(*args, **kwargs)


class SharedScalar(_Role, ScalarModel):
    """Reward model or critic: its adapters, and a head of its own."""

    def __init__(
        self, model: PeftModel, adapters: tuple[str, ...], config: Any, head: torch.Tensor
    ) -> None:
        super().__init__(model)
        self.adapters = adapters
        self._config = config
        self.score = ScalarHead(head.shape[1], 1, bias=False)
        with torch.no_grad():
            self.score.weight.copy_(head)

    @property
    def config(self) -> Any:
        return self._config

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See ScalarModel."""
        with self.in_use():
            return super().forward(*args, **kwargs)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.score(hidden)

    def whole_state(self, keep: bool) -> dict[str, torch.Tensor]:
        """Its weights as a plain ForSequenceClassification model has them."""
        state = merged_state(self.model, keep, self.adapters)
        if keep:
            wanted = self.skeleton().state_dict().keys()
            state["score.weight"] = self.score.weight.detach().cpu().clone()
            state = {name: tensor for name, tensor in state.items() if name in wanted}
        return state

    def skeleton(self) -> Any:
        """A model of its class without weights."""
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(self._config)
            return model.to(plain(self.model).dtype)


def why_not_shared(settings: RLConfig, sft: str, reward: str, *, needs_critic: bool) -> str | None:
    """What keeps the four models from sharing one base, as a sentence's end; None: nothing."""
    actor, critic = settings.actor, settings.critic
    if not actor.model.lora.rank:
        return "the actor trains all its weights (step3.actor.model.lora.rank is 0)"
    if needs_critic and not critic.model.lora.rank:
        return "the critic trains all its weights (step3.critic.model.lora.rank is 0)"
    if needs_critic and critic.model.name:
        return f"the critic has a model of its own (step3.critic.model.name {critic.model.name!r})"
    if choose_dtype(actor.model.dtype) != choose_dtype(critic.model.dtype):
        return "actor and critic have different dtypes (step3.actor.model.dtype, step3.critic...)"
    engines = {
        "actor": actor.engine,
        "critic": critic.engine,
        "reference": settings.reference_engine,
    }
    for name, engine in engines.items():
        if engine.zero_stage == 3:
            return f"ZeRO-3 shards a model for one engine, and the {name}'s zero_stage is 3"
        if engine.deepspeed_config:
            return f"the {name}'s engine has a deepspeed_config of its own"
    if settings.rollout.engine == "hybrid":
        return "the hybrid rollout rebuilds the model for itself (step3.rollout.engine)"
    if not (Path(reward) / ADAPTER / "adapter_config.json").is_file():
        return (
            f"the reward model {reward} has no adapters kept apart: train it with "
            "step2.model.lora.rank on the SFT model"
        )
    return _other_base(Path(sft), Path(reward))


def _other_base(sft: Path, reward: Path) -> str | None:
    """Adapters fit the base that they were trained on: weights that have none must be equal."""
    adapted = {name.split(".lora_")[0] for name in _names(reward / ADAPTER)}
    ours, theirs = _tensors(sft), _tensors(reward)
    both = sorted(name for name in theirs if name in ours)
    free = [n for n in both if not any(a.endswith(n.removesuffix(".weight")) for a in adapted)]
    if not free:
        return f"the reward model {reward} shares no weight with {sft}"
    for name in free:
        with safe_open(ours[name], "pt") as one, safe_open(theirs[name], "pt") as other:
            a, b = one.get_tensor(name), other.get_tensor(name)
        if a.shape != b.shape or not torch.equal(a.to(b.dtype), b):
            return (
                f"the reward model {reward} was trained on another base than {sft} ({name} differs)"
            )
    return None


def _names(directory: Path) -> list[str]:
    return list(_tensors(directory))


def _tensors(directory: Path) -> dict[str, Path]:
    """Names of a directory's tensors, and the file that each is in."""
    found: dict[str, Path] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            found |= dict.fromkeys(content.keys(), file)
    return found


def share(
    policy: CausalModel, reward: str, lora: LoraConfig | None
) -> tuple[SharedPolicy, SharedPolicy, SharedScalar, SharedScalar | None]:
    """Policy, reference, reward model and critic over the policy's base.

    Args:
        policy: with adapters, as `load_causal` gives it.
        reward: step 2's artifact; `why_not_shared` has found nothing.
        lora: the critic's adapters; None: no critic.
    """
    model: Any = policy.model
    trained = _add_reward_adapter(model, Path(reward))
    config = AutoConfig.from_pretrained(reward, num_labels=1)
    config.pad_token_id = plain(model).config.pad_token_id
    with safe_open(_tensors(Path(reward))["score.weight"], "pt") as content:
        head = content.get_tensor("score.weight").float()
    critic = None
    if lora is not None:
        added = lora_config(model, lora, task="CAUSAL_LM", dropout=False)
        model.add_adapter(CRITIC, added)
        critic = SharedScalar(model, (*trained, CRITIC), copy.deepcopy(config), head)
    judge = SharedScalar(model, trained, config, head)
    for name, parameter in model.named_parameters():
        owner = _OF_ADAPTER.search(name)
        parameter.requires_grad_(owner is not None and owner.group(1) in (POLICY, CRITIC))
    shared = SharedPolicy(model, (POLICY,), policy.vocab_size)
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        layer._active_adapter = [POLICY]
    return shared, SharedPolicy(model, (), policy.vocab_size), judge, critic


def _add_reward_adapter(model: PeftModel, reward: Path) -> tuple[str, ...]:
    config: Any = PeftConfig.from_pretrained(str(reward / ADAPTER))
    config.task_type, config.modules_to_save, config.lora_dropout = "CAUSAL_LM", None, 0.0
    config.inference_mode = False
    model.add_adapter(REWARD, config)
    state = load_file(str(reward / ADAPTER / "adapter_model.safetensors"))
    state = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    result: Any = set_peft_model_state_dict(model, state, adapter_name=REWARD)
    lost = [n for n in result.missing_keys if f".{REWARD}." in n] + list(result.unexpected_keys)
    if lost:
        raise ConfigError(
            f"step3.share_base: the adapters in {reward / ADAPTER} do not fit the SFT model "
            f"({lost[0]}): set step3.share_base to false"
        )
    return (REWARD,)
