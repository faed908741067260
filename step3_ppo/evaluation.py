"""The evaluation of a published policy: read `evaluate`.

At the end of step 3 it has the models that are loaded already. As a script (`python train.py
evaluate RUN`) it loads them from the artifacts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlhf import data, models
from rlhf.config.rewards import is_model_alone
from rlhf.data.encode import KEPT
from rlhf.engine import comm
from rlhf.evaluation.answers import AnswerRecord
from rlhf.evaluation.verdict import build_verdict, render
from rlhf.harness import StepRun, run_step
from rlhf.rewards import ENDED, Asked, Judge, asked, check_terms, offered_columns, resolve_judge
from rlhf.store import (
    CARD,
    NO_VERDICT,
    Manifest,
    amend,
    find_evaluation,
    fingerprint,
    jsonable,
    pretty_json,
    publish,
    read_manifest,
    verify,
    write_text_atomic,
)
from rlhf.text import normalised
from step3_ppo.answers import Questions, prompt_indices
from step3_ppo.cards import cards, figures
from step3_ppo.cast import Cast, metrics_of, published_cast
from step3_ppo.parents import reward_model
from step3_ppo.prompts import choose_template, read_prompts

Answers = dict[str, list[AnswerRecord]]
UNJUDGED = "unjudged.jsonl"  # in the step's directory: answers whose evaluation is not finished
NOTHING_HELD_OUT = (
    "NO VERDICT: nothing was held out (data.eval_fraction=0), so nothing says what was learned.\n"
    "Evaluate on prompts of your own: python train.py evaluate RUN --data-path test.jsonl\n"
)


def main(run: StepRun) -> None:
    """Evaluates what step 3 of this run has published."""
    run.rank, _ = comm.init_distributed()
    torch.manual_seed(run.config.seed)
    with run.phase("read the held-out prompts"):
        refuse_functions(run)
        if run.rank == 0:
            verify(run.directory.artifact("ppo"), "ppo")
        tokenizer = models.load_tokenizer(str(run.directory.artifact("actor")), template=None)
        choose_template(run, tokenizer)
        held_out = read_prompts(run, tokenizer, "eval")
    with run.phase("evaluate"):
        evaluate(run, tokenizer, held_out, lambda: published_cast(run, tokenizer))


def evaluate(
    run: StepRun, tokenizer: Any, held_out: data.StageData, cast: Callable[[], Cast]
) -> None:
    """All models answer the held-out prompts, a judge scores them, the verdict is published.

    Collective as far as the answers; then rank 0 alone goes on, so that a judge may take its time.
    An earlier evaluation stays until this one is whole. `cast` is called where new answers are
    needed: those to the same prompts with the same settings are judged again as they are.
    """
    settings = run.config.step3
    indices = prompt_indices(held_out.dataset["prompt"], settings.eval.prompts)
    questions = Questions(
        rows=held_out.dataset.select(indices).to_list(),
        settings=settings,
        tokenizer=tokenizer,
        seed=run.config.seed + 1,
    )
    identity = fingerprint(_identity(run, questions)) if run.rank == 0 else ""
    answers = _kept_answers(run, identity) if run.rank == 0 else None
    if not comm.broadcast_object(answers is not None) and indices:
        run.say(_intention(questions))
        answers = questions.answers(cast())
        if run.rank == 0:
            write_text_atomic(run.step_dir / UNJUDGED, _as_lines(answers, identity))
    if run.rank == 0:
        _publish(run, held_out, answers or {}, identity)


def refuse_functions(run: StepRun) -> None:
    """Raises ConfigError or RequirementError, before anything is trained, for a judge or a reward
    that does not exist."""
    if run.rank == 0:
        check_terms(run.config.step3.rewards, run.config.data.keep_columns)
        _judge(run)


def _judge(run: StepRun) -> Judge | None:
    name = run.config.step3.eval.judge
    if name is None and run.config.data.path == ["sample:courtesy"]:
        name = "courtesy"
    if name is None:
        return None
    judge = resolve_judge(name)
    judge.score.refuse_missing(offered_columns(run.config.data.keep_columns), "judge")
    return judge


def _intention(questions: Questions) -> str:
    prompts = len({normalised(row["prompt"]) for row in questions.rows})
    return f"{len(questions.rows)} answers of each model to {prompts} held-out prompts"


def _identity(run: StepRun, questions: Questions) -> dict[str, Any]:
    """All that decides the answers, but for the number of processes."""
    rollout, terms = questions.settings.rollout, questions.settings.rewards
    kept = run.config.data.keep_columns
    names = ("engine", "max_new_tokens", "temperature", "stop")
    return {
        "policy": read_manifest(run.directory.artifact("ppo")).content_id,
        "parents": run.parent_ids(),
        "prompts": [row["prompt_ids"] for row in questions.rows],
        "rollout": {name: getattr(rollout, name) for name in names},
        "seed": questions.seed,
        **({} if is_model_alone(terms) else {"rewards": jsonable(terms)}),
        **({"columns": [row[KEPT] for row in questions.rows]} if kept else {}),
    }


def _kept_answers(run: StepRun, identity: str) -> Answers | None:
    """Answers that need no generation: judged ones, or what an evaluation that failed has left."""
    manifest, _ = find_evaluation(run.directory)
    if manifest is not None and manifest.config["answers"] == identity:
        lines = (run.directory.artifact("evaluation") / "answers.jsonl").read_text("utf-8")
        return _from_lines(lines.splitlines())
    try:
        head, *rest = (run.step_dir / UNJUDGED).read_text("utf-8").splitlines()
        return _from_lines(rest) if json.loads(head) == {"identity": identity} else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _as_lines(answers: Answers, identity: str | None = None) -> str:
    """A line for each answer; with `identity`, a line before them that says what they answer."""
    rows: list[dict[str, Any]] = [{"identity": identity}] if identity else []
    for name, records in answers.items():
        rows += [{"model": name, **record.as_json()} for record in records]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _from_lines(lines: list[str]) -> Answers:
    answers: Answers = {}
    for line in lines:
        row = json.loads(line)
        answers.setdefault(row.pop("model"), []).append(AnswerRecord.from_json(row))
    return answers


def _publish(run: StepRun, held_out: data.StageData, answers: Answers, identity: str) -> None:
    """Judges, writes the figures into the cards, and publishes verdict and answers."""
    texts, metrics = {NO_VERDICT: NOTHING_HELD_OUT}, {}
    policy = read_manifest(run.directory.artifact("ppo"))
    if answers:
        judge = _judge(run)
        answers = {name: _judged(run, judge, records) for name, records in answers.items()}
        verdict = _verdict(run, held_out, answers, judge)
        texts = {
            "verdict.txt": render(verdict),
            "verdict.json": pretty_json(verdict),
            "answers.jsonl": _as_lines(answers),
        }
        metrics = {name: figures(records) for name, records in answers.items()}
    policy = _amend_cards(run, policy, metrics)

    def write(directory: Path) -> None:
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")

    ppo = {"path": str(run.directory.artifact("ppo")), "id": policy.id}
    publish(
        run.step_dir,
        write,
        name="evaluation",
        kind="evaluation",
        step=run.stage.number,
        parents={**run.parent_records(), "ppo": ppo},
        data_fingerprint=held_out.fingerprint,
        tokenizer_fingerprint=policy.tokenizer_fingerprint,
        config={
            "policy": policy.content_id,
            "answers": identity,
            "eval": run.config.step3.eval,
        },
        metrics=metrics,
    )
    (run.step_dir / UNJUDGED).unlink(missing_ok=True)
    said = "evaluated" if answers else "no held-out prompts, so no verdict"
    run.say(f"{run.stage}: {said}: {run.directory.artifact('evaluation')}")


def _judged(run: StepRun, judge: Judge | None, records: list[AnswerRecord]) -> list[AnswerRecord]:
    if judge is None:
        return [replace(record, judge=None) for record in records]
    kept = run.config.data.keep_columns
    points = asked(
        judge.score,
        [record.prompt for record in records],
        [record.answer for record in records],
        {
            ENDED: [record.ended for record in records],
            **{name: [record.columns[name] for record in records] for name in kept},
        },
        Asked("judge", run.config.step3.eval.judge_timeout, "step3.eval.judge_timeout"),
    )
    return [replace(record, judge=value) for record, value in zip(records, points, strict=True)]


def _verdict(
    run: StepRun, held_out: data.StageData, answers: Answers, judge: Judge | None
) -> dict[str, Any]:
    return build_verdict(
        answers,
        held_out=held_out.held_out,
        sft=metrics_of(run.parent("sft")),
        reward=metrics_of(reward) if (reward := reward_model(run)) else None,
        rewards=run.config.step3.rewards,
        judge=judge,
        samples=run.config.step3.eval.samples,
    )


def _amend_cards(run: StepRun, policy: Manifest, evaluation: dict[str, Any]) -> Manifest:
    """Each model's own figures into its card, beside those of its training."""
    settings, parts = run.config.step3, sorted({name.split("/")[0] for name in policy.files})
    texts = cards(
        parts,
        algorithm=settings.algorithm,
        sft=run.parent("sft"),
        critic=settings.critic.model.name or reward_model(run) or run.parent("sft"),
        rewards=settings.rewards,
        ema_decay=settings.ppo.ema_decay,
        training=policy.metrics.get("training", {}),
        evaluation=evaluation,
    )
    return amend(
        run.directory.artifact("ppo"),
        {f"{part}/{CARD}": text for part, text in texts.items()},
        {"evaluation": evaluation},
    )


if __name__ == "__main__":
    run_step("ppo", main)
