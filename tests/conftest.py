"""Before anything imports torch: the tests' own environment.

One thread per process, since tests and ranks share few cores; and nothing of the shell's that says
how a run is to be made (a mirror, offline mode, a scheduler's job), which would change its result.
"""

import os

_ABOUT_RUNS = ("HF_", "RLHF_", "TRANSFORMERS_", "DS_", "TORCHELASTIC_", "MASTER_")
_ABOUT_JOBS = ("SLURM_", "OMPI_", "NCCL_", "GLOO_")
_ABOUT_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# Where made models are kept; .ci/run's own.
_KEPT = ("RLHF_CACHE", "RLHF_CI_TIMED", "RLHF_TEST_SCRATCH")

for _name in list(os.environ):
    if _name not in _KEPT and (
        _name.startswith(_ABOUT_RUNS + _ABOUT_JOBS) or _name in _ABOUT_RANKS
    ):
        del os.environ[_name]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
