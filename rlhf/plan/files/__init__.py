"""A model's files, looked at before anything is built from them: what is broken in them, in lines.

No torch: `--dry-run` and `doctor` ask here, and so does every step before it loads a model.
"""

from rlhf.plan.files.config import config_faults
from rlhf.plan.files.fault import Fault, read_object
from rlhf.plan.files.tokenizer import tokenizer_faults
from rlhf.plan.files.weights import too_many_parameters, weight_faults

__all__ = [
    "Fault",
    "config_faults",
    "read_object",
    "tokenizer_faults",
    "too_many_parameters",
    "weight_faults",
]
