"""What all rollout engines have: who answers, with which tokens at the end, and a random state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deepspeed.runtime.rollout import RolloutEngine, RolloutRequest
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.models.generation import end_ids
from rlhf.rollout.generation import Generation, assemble, base_model, causal_lm, special_ids
from rlhf.rollout.stopping import StopStrings


class Rollouts(RolloutEngine):
    """Base of the engines in ROLLOUTS; answers come from `generate`.

    Args:
        engine: has `.module`, a causal LM or a wrapper with it as `.model`.
        tokenizer: pad and EOS tokens, different; `decode` for stop strings.
        batch_size: rows generated at once.
        stop: strings that end an answer.
        seed: of the random numbers, the same on every rank.
        rank, world: this rank's prompts are every `world`-th of all, from the `rank`-th on, and
            every rank has as many: so each answer gets the same numbers on any number of ranks
            (ALGORITHM.md 19).
        gather: makes a context that is entered once per generate, e.g. to gather ZeRO-3
            parameters.
        lockstep: every rank calls forward equally often (ZeRO-3 without `gather`).

    Raises:
        ConfigError: a batch size below 1.
        RequirementError: the tokenizer lacks pad or EOS, or they are the same.
    """

    def __init__(
        self,
        engine: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        stop: Sequence[str] = (),
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        gather: Callable[[], AbstractContextManager[Any]] = nullcontext,
        lockstep: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"rollout batch_size {batch_size} must be at least 1")
        self.engine = engine
        self.batch_size = batch_size
        self.pad, self.eos = special_ids(tokenizer)
        self.eos_ids = end_ids(tokenizer, base_model(causal_lm(engine.module)))
        self.stop = StopStrings(tokenizer, stop)
        self.gather = gather
        self.lockstep = lockstep
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is none of {world}")
        self.rank, self.world = rank, world
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def vocab_size(self) -> int | None:
        """The tokenizer's: ids beyond it are never sampled; None: the model has no others."""
        return getattr(self.engine.module, "vocab_size", None)

    def ends(self, tokens: Tensor) -> Tensor:
        """Which tokens end an answer: bool of their shape."""
        found = tokens == self.eos
        for other in self.eos_ids[1:]:
            found |= tokens == other
        return found

    def finished(
        self,
        request: RolloutRequest,
        samples: int,
        answers: Tensor,
        lengths: Tensor,
        ended: Tensor,
        log_probs: Tensor | None = None,
    ) -> Generation:
        """`assemble`, and with stop strings the answers as they are read (16).

        An answer that has no room for EOS in the place of its stop string has not ended.
        """
        limit = answers.shape[1]
        out = assemble(request, samples, answers, lengths, ended, self.pad, log_probs)
        if not self.stop:
            return out
        rows: list[list[int]] = []
        for row, (ids, mask) in enumerate(zip(out.answers, out.answer_mask, strict=True)):
            sampled: list[int] = ids[mask].tolist()
            if out.ended[row] and sampled[-1] not in self.eos_ids:
                read = self.stop.read(sampled, self.eos, limit)
                out.ended[row] = read is not None
                sampled = read or sampled
            rows.append(sampled)
        out.read_ids, out.read_mask = out.with_answers(rows, self.pad)
        return out

    def drawn(self, prompts: int, samples: int, draw: Callable[[int], Tensor]) -> Tensor:
        """Random numbers for `samples` answers to each of this rank's prompts, in their order.

        `draw` gives those of so many answers, (n, ...), from the generator. Those of the other
        ranks' answers are drawn and left out, a prompt at a time.
        """
        mine = slice(self.rank * samples, (self.rank + 1) * samples)
        return torch.cat([draw(self.world * samples)[mine] for _ in range(prompts)])

    def sync_weights(self, step: int) -> None:
        """Nothing to do where generation reads the trained weights themselves."""

    def state_dict(self) -> dict[str, Any]:
        """The random state, for an exact resume."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the random state of `state_dict`."""
        self.generator.set_state(state["generator"])
