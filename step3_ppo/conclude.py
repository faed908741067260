"""The end of step 3: evidence, then the artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf import data, models
from rlhf.config.schema import LoraConfig
from rlhf.data.judges import Judge, resolve_judge
from rlhf.engine import comm
from rlhf.engine.ema import WeightEMA
from rlhf.engine.train import FrozenEngine
from rlhf.errors import UserError
from rlhf.evaluation.answers import AnswerRecord, paired_gain, summarise
from rlhf.evaluation.verdict import build_verdict, render
from rlhf.harness import StepRun
from rlhf.store import MANIFEST, read_manifest, write_json_atomic, write_text_atomic
from step3_ppo.evaluate import Evaluation
from step3_ppo.roles import Roles

FIGURES = ("models", "gain", "gain_ci", "gain_in_sft_std")


def conclude(
    run: StepRun,
    roles: Roles,
    tokenizer: Any,
    prompts: Any,
    ema: WeightEMA | None,
    *,
    data_fingerprint: str,
) -> None:
    """Evaluates base, SFT and trained model, publishes, and writes the verdict; without held-out
    prompts, which must have been asked for, publishes alone."""
    verdict = _verdict(run, roles, tokenizer, prompts) if len(prompts) else None
    snapshots = {"actor": models.Snapshot(roles.actor.module)}
    if roles.critic is not None:
        snapshots["critic"] = models.Snapshot(roles.critic.module)
    if ema is not None:
        with ema.swapped_in():
            snapshots["actor_ema"] = models.Snapshot(roles.actor.module)
    settings = run.config.step3
    generation = {"do_sample": True, "temperature": settings.rollout.temperature, "top_k": 0}
    facts = ["no held-out prompts: nothing is measured"]
    if verdict is not None:
        facts = [
            f"held-out reward {verdict['models']['ppo']['reward']:.3f} "
            f"(SFT {verdict['models']['sft']['reward']:.3f})",
            f"KL to the SFT model {verdict['models']['ppo']['kl']:.2f} nats per answer",
        ]

    def write(directory: Path) -> None:
        for name, snapshot in snapshots.items():
            card = models.model_card(
                f"{settings.algorithm.upper()} {name}", base=run.parent("sft"), lines=facts
            )
            snapshot.write(directory / name, tokenizer, card=card, generation=generation)

    # Before publishing: who is killed after it has a finished step, and must have its verdict.
    if comm.rank() == 0 and verdict is None:
        for name in ("verdict.json", "verdict.txt"):
            (run.step_dir / name).unlink(missing_ok=True)  # of an earlier run with other settings
        run.say("step 3: no held-out prompts, so no verdict")
    elif comm.rank() == 0 and verdict is not None:
        write_json_atomic(run.step_dir / "verdict.json", verdict)
        write_text_atomic(run.step_dir / "verdict.txt", render(verdict))
    run.publish(
        write,
        kind="ppo",
        data_fingerprint=data_fingerprint,
        metrics={key: value for key, value in (verdict or {}).items() if key in FIGURES},
        tokenizer_fingerprint=models.fingerprint(tokenizer),
    )


def _verdict(run: StepRun, roles: Roles, tokenizer: Any, prompts: Any) -> dict[str, Any]:
    sft_metrics = _parent_metrics(run.parent("sft"))
    answers = _answers(run, roles, tokenizer, prompts, sft_metrics.get("base"))
    judge = _judge(run)
    return build_verdict(
        models={name: summarise(rows, judge.good if judge else None) for name, rows in answers},
        gain=paired_gain(dict(answers)["ppo"], dict(answers)["sft"]),
        samples=_samples(answers, run.config.step3.eval.samples),
        sft=sft_metrics,
        reward=_parent_metrics(run.parent("reward")),
        judge=judge.name if judge else None,
    )


def _answers(
    run: StepRun, roles: Roles, tokenizer: Any, prompts: Any, base: str | None
) -> list[tuple[str, list[AnswerRecord]]]:
    """The models' answers to the same held-out prompts, drawn with the same seeds."""
    settings = run.config.step3
    world = comm.world_size()
    count = max(min(settings.eval.prompts, len(prompts)) // world, 1) * world
    # Every rank needs one; a prompt repeats where there are fewer prompts than ranks.
    mine = [index % len(prompts) for index in range(count)][run.rank :: world]
    evaluation = Evaluation(
        prompts=data.collate_prompts(prompts.select(mine).to_list(), tokenizer.pad_token_id).to(
            roles.actor.device
        ),
        settings=settings,
        roles=roles,
        tokenizer=tokenizer,
        judge=_judge(run),
        seed=run.config.seed + 1,
    )
    answers = []
    engine = _base_engine(run, roles, tokenizer, base)
    if engine is not None:
        answers.append(("base", evaluation.answers_of(engine)))
        del engine
    answers.append(("sft", evaluation.answers_of(roles.reference)))
    with roles.actor.evaluating():
        answers.append(("ppo", evaluation.answers_of(roles.actor)))
    return answers


def _base_engine(
    run: StepRun, roles: Roles, tokenizer: Any, base: str | None
) -> FrozenEngine | None:
    """What SFT started from; None, and a line on the console, where it cannot be read any more:
    a comparison is not worth a trained model."""
    if base is None:
        return None
    settings = run.config.step3
    try:
        model = models.load_causal(
            base,
            settings.actor.model.model_copy(update={"lora": LoraConfig()}),
            engine=settings.reference_engine,
            dtype=roles.actor_dtype,
            pad_token_id=tokenizer.pad_token_id,
            vocab_size=len(tokenizer),
            dropout=False,
        )
    except UserError as error:
        run.say(f"the verdict is without the base model: {error}")
        return None
    return FrozenEngine(model, settings.reference_engine, dtype=roles.actor_dtype)


def _judge(run: StepRun) -> Judge | None:
    name = run.config.step3.eval.judge
    if name is None and run.config.data.path == ["sample:courtesy"]:
        name = "courtesy"
    return resolve_judge(name) if name else None


def _parent_metrics(place: str) -> dict[str, Any]:
    """What our own artifact's manifest says was measured; nothing for foreign models."""
    if not (Path(place) / MANIFEST).is_file():
        return {}
    return dict(read_manifest(place).metrics)


def _samples(answers: list[tuple[str, list[AnswerRecord]]], count: int) -> list[dict[str, str]]:
    prompts = [record.prompt for record in answers[0][1]]
    # Prompts repeat in some data sets: show different ones.
    chosen = list({prompt: i for i, prompt in reversed(list(enumerate(prompts)))}.values())
    return [
        {"prompt": prompts[i]} | {name: rows[i].answer for name, rows in answers}
        for i in sorted(chosen)[:count]
    ]
