"""Settings that existed once: what to type instead, shown in place of "unknown setting"."""

from __future__ import annotations

_FILTERS = (
    "a filter would make the policy that samples another than the one whose log-probs are trained "
    "and whose KL is reported. Sharpen with step3.rollout.temperature, which rollout, update, "
    "reference and verdict share"
)

REMOVED: dict[str, str] = {
    "step3.ppo.kl_estimator": (
        "in the reward only k1 points where the KL does. Leave it out for k1; for a KL loss, type "
        "step3.ppo.kl_in=loss step3.ppo.kl_loss=k2 (or k3). k1, k2 and k3 are all logged"
    ),
    "step3.rollout.top_k": f"{_FILTERS}. Leave it out; the published model can be sampled as you "
    "like",
    "step3.rollout.top_p": f"{_FILTERS}. Leave it out; the published model can be sampled as you "
    "like",
}


def remedy(name: str) -> str | None:
    """What to do about a setting that was removed, by its dotted name or its last part."""
    name = name.replace("-", "_").lstrip("_")
    found = [key for key in REMOVED if key == name or key.rsplit(".", 1)[-1] == name]
    return REMOVED[found[0]] if found else None
