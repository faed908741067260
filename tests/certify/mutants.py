"""Bugs, planted one at a time: does the certificate see them? And clean runs: is it quiet?

`nice python -m tests.certify.mutants` runs all of them (docs/certificate.md has the table of the
last run), `--clean 20` clean runs of other seeds, `--one NAME` one bug.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf.algo import advantages, algorithms, kl, losses, masking, rewards
from rlhf.certify import pipeline
from rlhf.certify.check import Check
from rlhf.certify.run import QUICK, checks
from rlhf.engine import comm
from rlhf.engine.train import FrozenEngine, TrainEngine
from rlhf.models import causal, scalar
from rlhf.rollout import continuous, sampling
from rlhf.rollout.stopping import StopStrings
from step3_ppo import experience
from step3_ppo import update as ppo_update
from step3_ppo.rollout import Rollout

MUTANTS: dict[str, Callable[[], None]] = {}


def mutant(plant: Callable[[], None]) -> Callable[[], None]:
    """Registers what plants a bug; its docstring says which."""
    MUTANTS[plant.__name__] = plant
    return plant


def everywhere(original: Any, changed: Any) -> None:
    """Puts `changed` in place of `original` in every module that has it."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "") == __name__:
            continue
        for name, value in list(vars(module).items()) if hasattr(module, "__dict__") else []:
            if value is original:
                setattr(module, name, changed)


def policy_loss_of(change: Callable[..., tuple[Any, ...]]) -> None:
    """`change` gets policy_loss's arguments and gives others."""
    real = losses.policy_loss
    everywhere(real, lambda *given, **more: real(*change(*given), **more))


@mutant
def advantage_sign() -> None:
    """The policy is pushed away from what is better."""
    policy_loss_of(lambda new, old, gain, mask, clip: (new, old, -gain, mask, clip))


@mutant
def old_is_the_reference() -> None:
    """The ratio is taken to the reference, not to the policy that sampled."""
    real = experience.score

    def score(*given: Any, **more: Any) -> Rollout:
        scored = real(*given, **more)
        return replace(scored, log_probs=scored.ref_log_probs)

    everywhere(real, score)


@mutant
def mean_of_each_micro_batch() -> None:
    """The loss is divided by each micro-batch's own tokens (30)."""
    real = losses.policy_loss

    def policy_loss(new: Tensor, old: Tensor, gain: Tensor, mask: Tensor, clip: float) -> Any:
        loss, stats = real(new, old, gain, mask, clip)
        return loss * 100 / mask.sum().clamp(min=1), stats

    ppo_update.policy_loss = policy_loss


@mutant
def last_micro_batch_lost() -> None:
    """An optimiser step leaves its last micro-batch out."""
    real = TrainEngine.step
    TrainEngine.step = (
        lambda self, batches, loss: real(  # type: ignore[method-assign]
            self, batches[:-1] if len(batches) > 1 else batches, loss
        )
    )


@mutant
def kl_sign() -> None:
    """The reward pays for leaving the reference."""
    real = kl.kl_estimate
    rewards.kl_estimate = lambda p, q, kind="k1": -real(p, q, kind)


@mutant
def kl_coefficient_halved() -> None:
    """Half the KL coefficient reaches the reward."""
    real = rewards.token_rewards
    everywhere(real, lambda s, p, q, mask, coef: real(s, p, q, mask, coef / 2))


@mutant
def kl_of_the_last_token_only() -> None:
    """The KL of an answer's earlier tokens is forgotten."""
    real = rewards.token_rewards

    def token_rewards(s: Tensor, p: Tensor, q: Tensor, mask: Tensor, coef: float) -> Tensor:
        last = masking.last_counted(mask)
        return real(s, torch.where(last, p, 0.0), torch.where(last, q, 0.0), mask, coef)

    everywhere(real, token_rewards)


@mutant
def k2_in_the_reward() -> None:
    """The reward has k2, as `kl_estimator: k2` once did."""
    real = kl.kl_estimate
    rewards.kl_estimate = lambda p, q, kind="k1": real(p, q, "k2")


@mutant
def kl_loss_is_k3() -> None:
    """k3 is used where k2 is asked for."""
    real = losses.kl_loss
    everywhere(real, lambda p, q, mask, kind="k2": real(p, q, mask, "k3"))


@mutant
def kl_loss_without_gradient() -> None:
    """The policy's log-probs are detached in the KL loss."""
    real = losses.kl_loss
    everywhere(real, lambda p, q, mask, kind="k2": real(p.detach() + 0 * p, q, mask, kind))


@mutant
def reward_on_the_first_token() -> None:
    """The score is added where the answer begins."""

    def first(mask: Tensor) -> Tensor:
        return mask & (mask.cumsum(-1) == 1)

    rewards.last_counted = first


@mutant
def scores_not_clipped() -> None:
    """The score's bounds are not kept (23)."""
    real = rewards.normalize_and_clip_scores
    everywhere(real, lambda scores, mean, std, clip: real(scores, mean, std, 1e9))


@mutant
def scores_not_scaled() -> None:
    """The score's standard deviation is not divided by (10)."""
    real = rewards.normalize_and_clip_scores
    everywhere(real, lambda scores, mean, std, clip: real(scores, mean, 1.0, clip))


@mutant
def penalty_spared() -> None:
    """An answer without EOS costs nothing (17)."""
    everywhere(rewards.missing_eos, lambda scores, ended, penalty: scores)


@mutant
def penalty_for_ending() -> None:
    """The penalty falls on answers that ended."""
    real = rewards.missing_eos
    everywhere(real, lambda scores, ended, penalty: real(scores, ~ended, penalty))


@mutant
def answer_mask_off_by_one() -> None:
    """An answer's last token is not trained on."""
    real = Rollout.of.__func__  # type: ignore[attr-defined]

    def of(cls: Any, generation: Any) -> Rollout:
        made = real(cls, generation)
        mask = made.answer_mask & ~masking.last_counted(made.answer_mask)
        mask[:, 0] |= made.answer_mask[:, 0]
        return replace(made, answer_mask=mask)

    Rollout.of = classmethod(of)  # type: ignore[assignment, method-assign]


@mutant
def stale_weights_in_the_rollout() -> None:
    """Answers come from the policy as it was before training."""
    real = continuous.ContinuousRollout.generate

    def generate(self: Any, request: Any, settings: Any) -> Any:
        if not hasattr(self, "stale"):
            self.stale = deepcopy(self.engine.module)
        now, self.engine = self.engine, type("Stale", (), {"module": self.stale})()
        try:
            return real(self, request, settings)
        finally:
            self.engine = now

    continuous.ContinuousRollout.generate = generate  # type: ignore[method-assign]


@mutant
def temperature_missing_in_the_update() -> None:
    """The policy's loss is computed at temperature 1 (15)."""
    real = causal.CausalModel.forward

    def forward(self: Any, ids: Any, mask: Any, read: Any, temperature: float = 1.0,
                entropy: bool = False, token_loss: Any = None) -> Any:  # fmt: skip
        return real(self, ids, mask, read, 1.0 if token_loss else temperature, entropy, token_loss)

    causal.CausalModel.forward = forward  # type: ignore[method-assign]


@mutant
def temperature_missing_in_the_reference() -> None:
    """The reference's log-probs are those at temperature 1 (15)."""
    real = experience.policy_log_probs

    def log_probs(engine: Any, rollout: Rollout, temperature: float) -> Tensor:
        return real(engine, rollout, 1.0 if isinstance(engine, FrozenEngine) else temperature)

    experience.policy_log_probs = log_probs


@mutant
def temperature_missing_in_the_rollout() -> None:
    """Tokens are drawn at temperature 1."""
    real = sampling.choose
    everywhere(real, lambda logits, uniform, *, temperature, **more: real(
        logits, uniform, temperature=1.0, **more))  # fmt: skip


@mutant
def one_random_number_for_all_rows() -> None:
    """All answers consume the same random number."""
    real = sampling.choose
    everywhere(real, lambda logits, uniform, **more: real(
        logits, uniform[:1].expand_as(uniform), **more))  # fmt: skip


@mutant
def positions_count_pads() -> None:
    """Position ids begin at the padding (13)."""
    everywhere(causal.positions, lambda mask: torch.arange(mask.shape[1]).expand_as(mask))


@mutant
def pads_are_seen() -> None:
    """Attention reads the padding of prompts."""
    real = causal.Backbone.hidden

    def hidden(self: Any, ids: Tensor, mask: Tensor, read: Tensor | None = None) -> Tensor:
        return real(self, ids, torch.ones_like(mask), read)

    causal.Backbone.hidden = hidden  # type: ignore[method-assign]


@mutant
def values_shifted() -> None:
    """The value of a token is read after it, not before it (25)."""

    def values(engine: Any, rollout: Rollout) -> Tensor:
        raw = engine(rollout.input_ids, rollout.attention_mask, rollout.score_mask)
        found = engine.module.normalize(raw)[:, rollout.prompt_width :]
        return found * rollout.answer_mask

    everywhere(experience.answer_values, values)


@mutant
def no_value_of_the_next_token() -> None:
    """delta_t = r_t - V_t in the advantages: V_{t+1} is left out (25)."""

    def gae(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Any:
        delta = torch.where(mask, r - v, 0.0)
        ahead = torch.where(mask, advantages.discounted_sums(delta, gamma * lam), 0.0)
        return ahead, torch.where(mask, ahead + v, 0.0)

    advantages.gae = gae


@mutant
def returns_of_whitened_advantages() -> None:
    """The critic learns whitened advantages + values (26)."""
    ppo = algorithms.ALGORITHMS["ppo"]

    def credit(*, values: Any, mask: Tensor, **given: Any) -> Any:
        found, _ = ppo.credit(values=values, mask=mask, **given)
        return found, torch.where(mask, advantages.whiten(found, mask) + values, 0.0)

    algorithms.ALGORITHMS["ppo"] = replace(ppo, credit=credit)  # type: ignore[arg-type]


@mutant
def whitened_over_one_rank() -> None:
    """Each rank whitens with its own mean and variance (27)."""
    real = masking.masked_moments
    everywhere(real, lambda x, mask, all_reduce=None: real(x, mask, None))


@mutant
def reward_model_reads_no_eos() -> None:
    """EOS is cut off before the reward model reads an answer."""
    real = Rollout.read.fget  # type: ignore[attr-defined]

    def read(self: Rollout) -> tuple[Tensor, Tensor]:
        ids, mask = real(self)
        return ids, mask & ~((ids == 1) & masking.last_counted(mask))

    Rollout.read = property(read)  # type: ignore[assignment, method-assign]


@mutant
def score_of_the_token_before_the_last() -> None:
    """The reward model's value is read one token too early (6)."""
    real = scalar.last_tokens
    everywhere(real, lambda mask: real(mask).roll(-1, 1))


@mutant
def stop_string_is_read() -> None:
    """The reward model reads the stop string too (16)."""
    StopStrings.read = lambda self, tokens, eos, limit: [*tokens, eos]  # type: ignore[method-assign]


@mutant
def pairs_swapped() -> None:
    """Step 2 prefers the rejected answer."""
    real = losses.pairwise_loss
    everywhere(real, lambda chosen, rejected, *more: real(rejected, chosen, *more))


@mutant
def pairs_without_sigmoid() -> None:
    """Step 2's loss is a hinge at margin 5: right in order, wrong in scale."""
    real = losses.pairwise_loss

    def hinge(chosen: Tensor, rejected: Tensor, *more: Any) -> Any:
        _, stats = real(chosen, rejected, *more)
        return (5 - (chosen - rejected)).clamp(min=0).sum(), stats

    everywhere(real, hinge)


def everything(seed: int) -> Iterator[Check]:
    """The quick certificate, then the other algorithms through the engine."""
    yield from checks(seed, quick=True)
    for case in pipeline.CASES[1:]:
        yield from pipeline.converges(case, seed, QUICK[1])


def one(name: str, seed: int) -> str:
    """What the certificate says of a bug (of none: "clean"): the first check that fails, or ""."""
    torch.set_num_threads(1)
    comm.init_distributed()
    if name != "clean":
        MUTANTS[name]()
    try:
        failed = next((check for check in everything(seed) if not check.holds), None)
    except Exception as error:  # noqa: BLE001 -- a bug that stops the certificate is seen, too
        return f"stops with {type(error).__name__}: {error}"[:200].replace("\n", " ")
    return "" if failed is None else f"{failed.name}: {failed.value:.4g} (at most {failed.bound:g})"


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("names", nargs="*", help="which bugs; without any, all")
    made.add_argument("--one", choices=["clean", *MUTANTS])
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--clean", type=int, default=0, metavar="N", help="clean runs, no bugs")
    flags = made.parse_args()
    if flags.one:
        print("RESULT", one(flags.one, flags.seed), flush=True)
        return 0
    runs = [("clean", seed) for seed in range(flags.clean)] or [
        (name, 0) for name in flags.names or MUTANTS
    ]
    caught = 0
    for name, seed in runs:
        began = time.monotonic()
        command = [sys.executable, "-m", "tests.certify.mutants", "--one", name]
        done = subprocess.run(
            [*command, "--seed", str(seed)], capture_output=True, text=True, check=False
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        said = lines[0].removeprefix("RESULT").strip() if lines else f"exit {done.returncode}"
        caught += bool(said)
        shown = f"{name} (seed {seed})" if name == "clean" else name
        print(f"| `{shown}` | {said or 'nothing'} | {time.monotonic() - began:.0f} s |", flush=True)
    print(f"{caught} of {len(runs)} caught")
    return 0


if __name__ == "__main__":
    sys.exit(main())
