"""The only folder that imports deepspeed, but for rlhf/rollout, which implements its interface."""
