"""Numbers that mean the run is lost are caught in the iteration where they appear."""

from __future__ import annotations

import torch

from rlhf.engine.train import rows_of
from rlhf.errors import Diverged
from step3_ppo.rollout import Rollout

_FIELDS = {
    "scores": "the reward model's score",
    "log_probs": "the policy's log-probability",
    "ref_log_probs": "the reference's log-probability",
    "values": "the critic's value",
}


def check_finite(rollout: Rollout) -> None:
    """Raises Diverged, with the rows, if a score, log-probability or value is NaN or infinite."""
    for name, what in _FIELDS.items():
        values = getattr(rollout, name)
        if values is None:
            continue
        bad = ~torch.isfinite(values).reshape(len(values), -1).all(dim=1)
        if bool(bad.any()):
            rows = bad.nonzero().squeeze(1)
            raise Diverged(
                f"{what} is not finite in {len(rows)} of {len(rollout)} answers: the model that "
                "gives it has diverged. Lower its learning rate, or use dtype float32",
                rows_of(rollout.rows(rows)),
            )


def check_kl(rollout: Rollout, kl_per_token: float, limit: float) -> None:
    """Raises Diverged if the policy has left the reference for good."""
    if not abs(kl_per_token) <= limit:
        raise Diverged(
            f"KL to the reference is {kl_per_token:.2f} nats per token, over step3.ppo.max_kl = "
            f"{limit}: the policy has left the reference. Raise step3.ppo.kl_coef or set "
            "step3.ppo.kl_target, or lower step3.actor.optim.learning_rate",
            rows_of(rollout),
        )
