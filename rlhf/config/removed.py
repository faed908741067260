"""Settings that existed once: what to type instead, shown in place of "unknown setting", and the
default that they had: with it an old record decides nothing."""

from __future__ import annotations

from typing import Any, NamedTuple


class Removed(NamedTuple):
    """A setting that is gone."""

    default: Any
    instead: str


_FILTERS = (
    "a filter would make the policy that samples another than the one whose log-probs are trained "
    "and whose KL is reported. Sharpen with step3.rollout.temperature, which rollout, update, "
    "reference and verdict share. Leave it out; the published model can be sampled as you like"
)

REMOVED: dict[str, Removed] = {
    "step3.ppo.kl_estimator": Removed(
        "k1",
        "in the reward only k1 points where the KL does. Leave it out for k1; for a KL loss, type "
        "step3.ppo.kl_in=loss step3.ppo.kl_loss=k2 (or k3). k1, k2 and k3 are all logged",
    ),
    "step3.rollout.top_k": Removed(0, _FILTERS),
    "step3.rollout.top_p": Removed(1.0, _FILTERS),
}


def remedy(name: str) -> str | None:
    """What to do about a setting that was removed, by its dotted name or its last part."""
    name = name.replace("-", "_").lstrip("_")
    found = [key for key in REMOVED if key == name or key.rsplit(".", 1)[-1] == name]
    return REMOVED[found[0]].instead if found else None
