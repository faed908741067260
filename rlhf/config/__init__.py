"""Settings: what there is (schema), where values come from (load), what a step gets (resolve)."""

from rlhf.config.load import load_config
from rlhf.config.resolve import resolve_step
from rlhf.config.schema import ResolvedStep, RunConfig
from rlhf.config.step_args import step_config

__all__ = ["ResolvedStep", "RunConfig", "load_config", "resolve_step", "step_config"]
