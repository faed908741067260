"""Step 3: PPO and its relatives. Read `main`, then `iterate`; the numbers are README.md's."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlhf import data, track
from rlhf.algo.algorithms import ALGORITHMS
from rlhf.algo.kl import build_kl_controller
from rlhf.config.schema import RLConfig
from rlhf.engine import comm
from rlhf.engine.ema import WeightEMA
from rlhf.engine.memory import peak_memory
from rlhf.engine.train import TrainEngine
from rlhf.errors import ConfigError
from rlhf.evaluation.answers import distinct_2
from rlhf.evaluation.reward_model import judge_reward_model
from rlhf.harness import StepRun, run_step
from rlhf.resume import Keeper, Stateful
from rlhf.rollout import build_rollout, gathering
from rlhf.stages import SFT
from rlhf.stragglers import Stragglers
from step3_ppo.cast import live_cast, metrics_of, scale_of
from step3_ppo.conclude import publish
from step3_ppo.evaluation import evaluate, refuse_functions
from step3_ppo.experience import Clock, correct_sampler, credit, generate, reward, score
from step3_ppo.health import check_finite, check_kl
from step3_ppo.parents import reward_model
from step3_ppo.prompts import read_prompts, read_tokenizer
from step3_ppo.rewarder import Rewarder
from step3_ppo.roles import Roles, load_roles
from step3_ppo.rollout import Rollout, answer_ids
from step3_ppo.update import PtxBatches, first_critic_step, update, value_quality


def main(run: StepRun) -> None:
    settings = run.config.step3
    run.rank, world = comm.init_distributed()
    torch.manual_seed(run.config.seed)
    algorithm = ALGORITHMS[settings.algorithm]
    sft, reward = run.parent("sft"), reward_model(run)

    with run.phase("read the prompts"):
        tokenizer = read_tokenizer(run)
        refuse_functions(run)
        rows = read_prompts(run, tokenizer, "train")
        held_out = read_prompts(run, tokenizer, "eval")
        prompts = rows.dataset
        per_iteration = _prompts_per_iteration(settings, len(prompts), world)
        iterations = settings.iterations or max(len(prompts) // per_iteration, 1)

    with run.phase("load the models"):
        if reward is not None:
            run.say(judge_reward_model(metrics_of(reward)).line())
        steps = settings.ppo.epochs * settings.ppo.minibatches
        roles = load_roles(
            settings,
            tokenizer,
            sft=sft,
            reward=reward,
            actor_steps=max(iterations - settings.ppo.critic_warmup, 1) * steps,
            critic_steps=iterations * steps,
            needs_critic=algorithm.needs_critic,
            say=run.say,
        )

    with run.phase("train"):
        trainer = Trainer(run, roles, tokenizer, prompts, per_iteration, iterations, world)
        frozen = {"reference": roles.reference}
        frozen |= {"reward model": roles.reward} if roles.reward else {}
        keeper = Keeper(
            run, trainer.engines, trainer.parts, data_fingerprint=rows.fingerprint, frozen=frozen
        )
        state = keeper.restore()
        trainer.iteration = done = state.get("iteration", 0)
        _same_prompts(state.get("prompts", per_iteration), per_iteration, world)
        _train(run, trainer, keeper, done)

    with run.phase("publish"):
        publish(run, roles, tokenizer, trainer.ema, data_fingerprint=rows.fingerprint)

    with run.phase("evaluate"):
        evaluate(run, tokenizer, held_out, lambda: live_cast(run, roles, tokenizer, trainer.ema))


def _train(run: StepRun, trainer: Trainer, keeper: Keeper, done: int) -> None:
    """All iterations that are left; logs and saves."""
    settings, iterations = run.config.step3, trainer.iterations
    trainer.pace = pace = Stragglers.of(run)
    with (
        track.open_tracker(
            run.config.track,
            run.step_dir,
            step=run.stage.number,
            rank=run.rank,
            config=run.config.model_dump(mode="json"),
            keep_bytes=keeper.metrics_bytes,
            done=done,
        ) as tracker,
        track.progress(iterations, settings.algorithm.upper(), run.rank, initial=done) as bar,
    ):
        for stats in trainer.iterate():
            bar.update(
                1,
                score=stats["score_normalised"],
                kl=stats["kl_per_answer"],
                length=stats["answer_length"],
                eos=stats["eos_fraction"],
            )
            if trainer.iteration % settings.log_every == 0 or trainer.iteration == iterations:
                tracker.log(stats | pace.figures(trainer.iteration), trainer.iteration)
            keeper.after(
                trainer.iteration,
                {"iteration": trainer.iteration, "prompts": trainer.per_iteration},
                metrics_bytes=tracker.metrics_bytes,
                last=trainer.iteration == iterations,
            )


def _prompts_per_iteration(settings: RLConfig, available: int, world: int) -> int:
    """Over all ranks, the same number on each; fewer than asked for where the data has fewer.

    Raises ConfigError where a rank would have less than one answer per minibatch.
    """
    prompts = min(settings.rollout.prompts, available) // world * world
    answers = prompts // world * settings.rollout.samples_per_prompt
    if answers < settings.ppo.minibatches:
        raise ConfigError(
            f"step 3: {available} prompts and rollout.prompts = {settings.rollout.prompts} give "
            f"{answers} answers per process, too few for step3.ppo.minibatches = "
            f"{settings.ppo.minibatches}: lower that, or bring more prompts"
        )
    return prompts


def _same_prompts(before: int, now: int, world: int) -> None:
    """Raises ConfigError where these processes cannot share out the checkpoint's iterations."""
    if before != now:
        raise ConfigError(
            f"step 3: the checkpoint's iterations have {before} prompts, {world} process(es) can "
            f"share out {now}: start with a number of processes that {before} is a multiple of, "
            "or start the step again: --resume never"
        )


@dataclass
class Trainer:
    """The loop and its state."""

    run: StepRun
    roles: Roles
    tokenizer: Any
    prompts: Any
    per_iteration: int
    iterations: int
    world: int
    pace: Stragglers | None = None

    def __post_init__(self) -> None:
        settings = self.run.config.step3
        ppo, rollout = settings.ppo, settings.rollout
        self.iteration = 0
        self.algorithm = ALGORITHMS[settings.algorithm]
        self.controller = build_kl_controller(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)
        self.rewarder = Rewarder(settings, self.tokenizer, scale_of(self.roles.reward))
        self.statistics = self.rewarder.statistics
        self.ema = WeightEMA(self.roles.actor.module, ppo.ema_decay) if ppo.ema_decay else None
        self.ptx_rows = data.Replayable(self._ptx_rows, items=self._rows_in)
        self.ptx = PtxBatches(self._ptx_batches, ppo.ptx_coef) if ppo.ptx_coef else None
        actor = self.roles.actor
        how = gathering(rollout.gather, rollout.engine, actor.module)
        if how.why:
            self.run.say(f"to generate, the policy is {how.why}")
        self.sampler = build_rollout(
            rollout.engine,
            actor.deepspeed,
            self.tokenizer,
            batch_size=rollout.batch_size,
            stop=rollout.stop,
            seed=self.run.config.seed,
            rank=self.run.rank,
            world=self.world,
            **how.options,
        )

    @property
    def engines(self) -> dict[str, TrainEngine]:
        """What trains."""
        critic = self.roles.critic
        return {"actor": self.roles.actor} | ({"critic": critic} if critic else {})

    @property
    def parts(self) -> dict[str, Stateful]:
        """State besides the engines'."""
        parts: dict[str, Stateful] = {"rollout": self.sampler, "kl": self.controller}
        if self.ema is not None:
            parts["ema"] = self.ema
        if self.ptx is not None:
            parts["ptx"] = self.ptx_rows
        return parts

    def iterate(self) -> Iterator[dict[str, float]]:
        """All iterations that are left; yields each one's figures (metric glossary: README.md)."""
        settings = self.run.config.step3
        rollout_settings, ppo, critic = settings.rollout, settings.ppo, self.roles.critic
        kl_in_reward = settings.kl_place == "reward"
        size = data.Budget(settings.micro_batch_size, settings.micro_batch_tokens)
        for prompts in itertools.islice(self._prompt_batches(), self.iterations - self.iteration):
            clock = Clock(self.pace)
            # 1. The policy answers.
            with self.roles.actor.evaluating():
                rollout = generate(self.sampler, prompts, rollout_settings)
            clock.lap("rollout")
            # 2. Reward model, reference and critic read prompt + answer.
            reads_later = critic is not None and ppo.minibatches == 1  # in its first step
            temperature = rollout_settings.temperature
            rollout = score(
                self.roles, rollout, temperature, size, ppo.old_log_probs, values=not reads_later
            )
            check_finite(rollout)
            rollout, terms = self.rewarder(rollout, prompts)
            # 3. Rewards of tokens.
            rollout, stats = reward(
                rollout, ppo, self.controller, self.statistics, kl_in_reward=kl_in_reward
            )
            stats |= terms
            check_kl(rollout, stats["kl_per_token"], ppo.max_kl)
            clock.lap("score")
            # 4. Advantages and returns.
            began = None
            if critic is not None and reads_later:
                began = first_critic_step(critic, rollout, ppo, size, self._returns)
                rollout = replace(rollout, values=began.values)
            rollout = credit(rollout, self.algorithm, ppo, rollout_settings.samples_per_prompt)
            rollout, gap = correct_sampler(rollout, rollout_settings.importance_cap)
            stats |= gap
            stats |= value_quality(rollout)
            # 5. PPO epochs.
            stats["actor_lr"] = self.roles.actor.learning_rate
            stats |= update(
                self.roles.actor,
                critic,
                rollout,
                ppo,
                temperature=temperature,
                micro_batch_size=size,
                seed=self.run.config.seed + 7919 * self.iteration,
                samples=rollout_settings.samples_per_prompt,
                train_actor=self.iteration >= ppo.critic_warmup,
                kl_loss_coef=self._kl_loss_coef(stats["kl_coef"]),
                ptx=self.ptx,
                after_step=self.ema.update if self.ema else None,
                began=began,
            )
            self.sampler.sync_weights(self.iteration)
            clock.lap("update")
            stats["distinct_2"] = distinct_2(comm.gather_lists(answer_ids(rollout)))
            self.iteration += 1
            yield stats | self._speed(clock, stats["tokens"])

    def _returns(self, batch: Rollout) -> torch.Tensor:
        """Of rows with values and token rewards: (n, A)."""
        ppo = self.run.config.step3.ppo
        return credit(batch, self.algorithm, ppo, 1, whiten=False).need("returns")

    def _kl_loss_coef(self, coef: float) -> float:
        """Set: that; unset: the iteration's `coef` where the KL is in the loss (22, 37)."""
        settings = self.run.config.step3
        if settings.ppo.kl_loss_coef is not None:
            return settings.ppo.kl_loss_coef
        return coef if settings.kl_place == "loss" else 0.0

    def _speed(self, clock: Clock, tokens: float) -> dict[str, float]:
        total = sum(clock.seconds.values())
        speed = {f"seconds_{name}": value for name, value in clock.seconds.items()}
        speed |= {f"peak_memory_bytes_{name}": peak for name, peak in clock.peaks.items()}
        return speed | {
            "seconds_iteration": total,
            "tokens_per_second": tokens / total,
            "rollout_tokens_per_second": tokens / clock.seconds["rollout"],
            "peak_memory_bytes": peak_memory(),
        }

    def _prompt_batches(self) -> Iterator[data.PromptBatch]:
        """This rank's share of each global batch of prompts; a new permutation for each pass."""
        wanted = self.per_iteration
        pad, device = self.tokenizer.pad_token_id, self.roles.actor.device
        passes = max(len(self.prompts) // wanted, 1)
        first, skipped = divmod(self.iteration, passes)
        for epoch in itertools.count(first):
            generator = torch.Generator().manual_seed(self.run.config.seed + epoch)
            order = torch.randperm(len(self.prompts), generator=generator).tolist()
            starts = range(0, len(order) - wanted + 1, wanted)
            for start in starts[skipped if epoch == first else 0 :]:
                mine = order[start : start + wanted][self.run.rank :: self.world]
                yield data.collate_prompts(self.prompts.select(mine).to_list(), pad).to(device)

    @functools.cached_property
    def _sft_rows(self) -> Any:
        """Step 1's rows."""
        config = self.run.config
        with comm.rank_zero_first():
            return data.prepare(
                config.data,
                SFT,
                self.tokenizer,
                seed=config.seed,
                max_prompt_length=config.step1.max_prompt_length,
                max_length=config.step1.max_length,
                response_column=config.step1.response_column,
            ).dataset

    @functools.cached_property
    def _sft_lengths(self) -> list[int]:
        return data.row_lengths(self._sft_rows)

    def _ptx_rows(self, skipped: int) -> Iterator[int]:
        """Numbers of step 1's rows, for ever, without the first `skipped`."""
        epoch, skipped = divmod(skipped, len(self._sft_rows))
        for number in itertools.count(epoch):
            yield from data.row_order(len(self._sft_rows), self.run.config.seed, number)[skipped:]
            skipped = 0

    def _rows_in(self, micro_batches: int) -> int:
        """Step 1's rows in so many micro-batches, each of which no epoch's end divided."""
        size, rows = self.run.config.step3.micro_batch_size * self.world, len(self._sft_rows)
        epochs, more = divmod(micro_batches, -(-rows // size))
        return epochs * rows + more * size

    def _ptx_batches(self, rows: int) -> list[data.SFTBatch]:
        """This rank's micro-batches of the next so many of step 1's rows, over all ranks."""
        taken = [next(self.ptx_rows) for _ in range(rows)]
        size, pad = self.run.config.step3.micro_batch_size, self.tokenizer.pad_token_id
        batches = []
        for start in range(0, rows, size * self.world):
            part = taken[start : start + size * self.world]
            for index in data.deal(part, self._sft_lengths, size, self.run.rank, self.world):
                batches.append(data.collate_sft(self._sft_rows.select(index).to_list(), pad))
        return batches


if __name__ == "__main__":
    run_step("ppo", main)
