"""Whether the published policy has been evaluated."""

from __future__ import annotations

from rlhf.errors import ArtifactError
from rlhf.store.layout import RunDir
from rlhf.store.manifest import Manifest, read_manifest, verify

NO_VERDICT = (
    "no_verdict.txt"  # beside no verdict.txt: what an evaluation without prompts has to say
)


def find_evaluation(run: RunDir) -> tuple[Manifest | None, str]:
    """(the evaluation of the policy that step 3 has published, ""), or (None, why there is none).

    Raises ArtifactError if there is no such policy.
    """
    if not run.artifact("ppo").is_dir():
        raise ArtifactError(
            f"{run.artifact('ppo')}: no 'ppo' artifact here; make it with: python train.py --step 3"
        )
    policy = read_manifest(run.artifact("ppo"))
    place = run.artifact("evaluation")
    if not place.exists():
        return None, "it has not been evaluated"
    try:
        found = verify(place, "evaluation")
    except ArtifactError as error:
        return None, f"its evaluation does not verify ({error})"
    if found.config.get("policy") != policy.content_id:
        return None, "its evaluation is that of an earlier policy"
    return found, ""
