"""The end of training: the policy is published at once. Evaluation comes after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf import models
from rlhf.engine.ema import WeightEMA
from rlhf.harness import StepRun
from rlhf.store import find_evaluation
from rlhf.store.files import remove
from rlhf.track import read_metrics
from step3_ppo.cards import cards, training_figures
from step3_ppo.parents import reward_model
from step3_ppo.roles import Roles


def publish(
    run: StepRun, roles: Roles, tokenizer: Any, ema: WeightEMA | None, *, data_fingerprint: str
) -> None:
    """Publishes actor, critic and the actor's average, with figures of their training. Collective.

    Nothing here can fail for a user's mistake: what is asked of an evaluation is asked elsewhere.
    """
    settings = run.config.step3
    snapshots = {"actor": models.Snapshot(roles.actor.module)}
    if roles.critic is not None:
        snapshots["critic"] = models.Snapshot(roles.critic.module)
    if ema is not None:
        with ema.swapped_in():
            snapshots["actor_ema"] = models.Snapshot(roles.actor.module)
    if run.rank != 0:
        return
    training = training_figures(read_metrics(run.directory.metrics(run.stage)))
    texts = cards(
        snapshots,
        algorithm=settings.algorithm,
        sft=run.parent("sft"),
        critic=settings.critic.model.name or reward_model(run) or run.parent("sft"),
        rewards=settings.rewards,
        ema_decay=settings.ppo.ema_decay,
        training=training,
    )
    generation = models.sampling_settings(settings.rollout)

    def write(directory: Path) -> None:
        for name, snapshot in snapshots.items():
            snapshot.write(directory / name, tokenizer, card=texts[name], generation=generation)

    run.publish(
        write,
        kind="ppo",
        data_fingerprint=data_fingerprint,
        metrics={"training": training},
        tokenizer_fingerprint=models.fingerprint(tokenizer),
    )
    evaluation, _ = find_evaluation(run.directory)
    if evaluation is None:  # of the policy that was here before
        remove(run.directory.artifact("evaluation"))
    for name in ("verdict.json", "verdict.txt"):  # where releases before this one kept it
        remove(run.step_dir / name)
