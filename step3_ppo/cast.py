"""The models of an evaluation: those of a step 3 that has just trained, or the published ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import models
from rlhf.engine.ema import WeightEMA
from rlhf.engine.train import FrozenEngine
from rlhf.errors import UserError
from rlhf.harness import StepRun
from rlhf.store import MANIFEST, read_manifest
from step3_ppo.parents import reward_model
from step3_ppo.roles import Roles, frozen_policy, frozen_reward

Speaker = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Cast:
    """Who scores answers, and who gives them: name -> an engine, for as long as it is entered, or
    None where the model cannot be read."""

    reference: FrozenEngine
    reward: FrozenEngine | None
    speakers: dict[str, Speaker]

    @property
    def statistics(self) -> tuple[float, float] | None:
        """Mean and deviation of the reward model's scores, if there is one."""
        return scale_of(self.reward)


def scale_of(reward: FrozenEngine | None) -> tuple[float, float] | None:
    """A reward model's statistics."""
    return None if reward is None else reward.module.statistics


def live_cast(run: StepRun, roles: Roles, tokenizer: Any, ema: WeightEMA | None) -> Cast:
    """The models of a step 3 that has just trained."""

    @contextlib.contextmanager
    def average() -> Iterator[Any]:
        assert ema is not None
        with ema.swapped_in(), roles.actor.evaluating():
            yield roles.actor

    @contextlib.contextmanager
    def policy() -> Iterator[Any]:
        with roles.actor.evaluating():
            yield roles.actor

    speakers: dict[str, Speaker] = {
        **_base(run, tokenizer),
        "sft": lambda: nullcontext(roles.reference),
        "ppo": policy,
    }
    if ema is not None:
        speakers["ema"] = average
    return Cast(roles.reference, roles.reward, speakers)


def published_cast(run: StepRun, tokenizer: Any) -> Cast:
    """The same models, from the artifacts; each is loaded when it is its turn."""
    settings = run.config.step3
    reference = _frozen(run, tokenizer, run.parent("sft"))
    reward = None
    if place := reward_model(run):
        reward = FrozenEngine(
            frozen_reward(settings, place, tokenizer),
            settings.reference_engine,
            dtype=models.choose_dtype(settings.critic.model.dtype),
        )
    artifact = run.directory.artifact
    speakers: dict[str, Speaker] = {
        **_base(run, tokenizer),
        "sft": lambda: nullcontext(reference),
        "ppo": lambda: nullcontext(_frozen(run, tokenizer, str(artifact("actor")))),
    }
    if artifact("actor_ema").is_dir():
        speakers["ema"] = lambda: nullcontext(_frozen(run, tokenizer, str(artifact("actor_ema"))))
    return Cast(reference, reward, speakers)


def _base(run: StepRun, tokenizer: Any) -> dict[str, Speaker]:
    """What SFT started from, where that is known; None is entered, and a line is on the console,
    where it cannot be read any more."""
    name = metrics_of(run.parent("sft")).get("base")
    if name is None:
        return {}

    @contextlib.contextmanager
    def base() -> Iterator[Any]:
        try:
            engine = _frozen(run, tokenizer, name)
        except UserError as error:
            run.say(f"the verdict is without the base model: {error}")
            engine = None
        yield engine

    return {"base": base}


def _frozen(run: StepRun, tokenizer: Any, place: str) -> FrozenEngine:
    settings = run.config.step3
    dtype = models.choose_dtype(settings.actor.model.dtype)
    model = frozen_policy(settings, place, tokenizer)
    return FrozenEngine(model, settings.reference_engine, dtype=dtype)


def metrics_of(place: str) -> dict[str, Any]:
    """What our own artifact's manifest says was measured; nothing for foreign models."""
    if not (Path(place) / MANIFEST).is_file():
        return {}
    return dict(read_manifest(place).metrics)
