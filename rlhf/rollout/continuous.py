"""Our rollout engine: rows retire when they end, waiting prompts take their places.

Per generate: prompts wait in order of length, longest first. Each turn is exactly one forward:
either a prefill of waiting prompts (a prompt with n samples once, its cache repeated) or one
decode step of all live rows. Which random number a token consumes depends on its row and position
alone, so batch size and company do not change what is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig
from torch import Tensor

from rlhf import stall
from rlhf.errors import UserError
from rlhf.rollout.base import Rollouts
from rlhf.rollout.forward import Forward, ModuleForward, forward_of
from rlhf.rollout.generation import (
    Generation,
    causal_lm,
    check_fits,
    evaluating,
    prompt_lengths,
)
from rlhf.rollout.sampling import choose
from rlhf.rollout.slab import Slab

# Waiting prompts join when this share of the slots is free: prefills of one row cost too much.
_REFILL_SHARE = 8


@dataclass
class RolloutStats:
    """Work done by the last generate: forwards, prompt rows prefilled, row-steps decoded."""

    prefills: int = 0
    prefilled_rows: int = 0
    decodes: int = 0
    decoded_rows: int = 0
    idle: int = 0


class ContinuousRollout(Rollouts):
    """See the module. `engine.module` is, or has as `.model`, a Hugging Face causal LM.

    Args:
        lean: use packed weights and our own forward where they serve; False: the model's own.
        graphs: on a GPU, record the steps of our own forward (graphs.py).
        options: see Rollouts.
    """

    name = "continuous"

    def __init__(
        self,
        engine: Any,
        tokenizer: Any,
        *,
        lean: bool = True,
        graphs: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(engine, tokenizer, **options)
        self.lean, self.graphs = lean, graphs
        self.stats = RolloutStats()

    @torch.no_grad()
    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> Generation:
        """Answer every prompt `sampling.n_samples_per_prompt` times.

        Raises:
            ValueError: the request is empty or not left-padded.
            ConfigError: prompt + answer exceed the model's positions.
            UserError: the model's logits are not finite.
        """
        model = causal_lm(self.engine.module)
        run = _Run(self, model, request, sampling)
        with (
            self.gather(),
            evaluating(self.engine.module),
            forward_of(
                model, lean=self.lean, whole=not self.lockstep, graphs=self.graphs
            ) as forward,
        ):
            while run.turn(forward):
                pass
        self.stats = run.stats
        out = run.result()
        out.exact = next(model.parameters()).dtype == torch.float32
        return out


class _Run:
    """One generate: N answers of at most A tokens, on up to `slots` rows at once."""

    def __init__(
        self,
        owner: ContinuousRollout,
        model: Any,
        request: RolloutRequest,
        sampling: SamplingConfig,
    ) -> None:
        self.owner, self.request, self.sampling = owner, request, sampling
        self.stats = RolloutStats()
        self.samples, self.limit = sampling.n_samples_per_prompt, sampling.max_new_tokens
        self.lengths = prompt_lengths(request)
        check_fits(model, int(self.lengths.max()), self.limit)

        device = request.prompt_ids.device
        order = self.lengths.argsort(descending=True, stable=True)
        rows = order[:, None] * self.samples + torch.arange(self.samples, device=device)
        self.waiting = rows.flatten()  # answers not begun, by prompt, longest first
        total = len(self.waiting)
        # A prompt's samples join together, so that it is prefilled once.
        self.unit = self.samples if self.samples <= owner.batch_size else 1
        self.slots = min(owner.batch_size // self.unit * self.unit, total)
        self.slab: Slab | None = None
        self.live = 0
        # Per slot: which answer, tokens so far, last token, its position.
        self.state = torch.zeros(4, self.slots, dtype=torch.long, device=device)

        self.answers = torch.full((total, self.limit), owner.pad, device=device)
        self.log_probs = torch.zeros(total, self.limit, device=device)
        self.counts = torch.zeros(total, dtype=torch.long, device=device)
        self.ended = torch.zeros(total, dtype=torch.bool, device=device)
        draws = owner.drawn(len(self.lengths), self.samples, self._draw)
        self.uniform = draws.to(device)

    def _draw(self, answers: int) -> Tensor:
        shape, source = (answers, self.limit), self.owner.generator
        return torch.rand(shape, dtype=torch.float64, generator=source)

    def turn(self, forward: Forward) -> bool:
        """One forward; False when there is nothing left to do, on any rank if in lockstep."""
        stall.mark()
        busy = self.live > 0 or len(self.waiting) > 0
        if self.owner.lockstep and not _any_rank(busy, self.state.device):
            return False
        if not busy:
            if self.owner.lockstep:
                assert isinstance(forward, ModuleForward)
                forward.idle(self.state.device)
                self.stats.idle += 1
            return self.owner.lockstep
        joining = self._joining()
        if joining:
            self._prefill(forward, joining)
        else:
            self._decode(forward)
        return True

    def result(self) -> Generation:
        if not bool(torch.isfinite(self.log_probs).all()):
            raise UserError(
                "rollout: the policy's logits are not finite; its weights have diverged: go back "
                "to an earlier checkpoint with a lower learning rate"
            )
        return self.owner.finished(
            self.request, self.samples, self.answers, self.counts, self.ended, self.log_probs
        )

    def _joining(self) -> int:
        """How many waiting answers to begin now; 0 to decode."""
        free = self.slots - self.live
        take = min(free // self.unit * self.unit, len(self.waiting))
        enough = min(max(self.slots // _REFILL_SHARE, self.unit), len(self.waiting))
        return take if self.live == 0 or take >= enough else 0

    def _prefill(self, forward: Forward, count: int) -> None:
        rows, self.waiting = self.waiting[:count], self.waiting[count:]
        prompts, source = torch.unique_consecutive(rows // self.samples, return_inverse=True)
        lengths = self.lengths[prompts]
        width = int(lengths.max())
        layers, logits = forward.prefill(
            self.request.prompt_ids[prompts, -width:],
            self.request.prompt_attention_mask[prompts, -width:].bool(),
        )
        if self.slab is None:
            self.slab = Slab(layers, self.slots)
        self.slab.append(layers, source, lengths[source])
        self.stats.prefills += 1
        self.stats.prefilled_rows += len(prompts)

        first, self.live = self.live, self.live + count
        joined = self.state[:, first : self.live]
        joined[0], joined[1], joined[3] = rows, 0, lengths[source] - 1
        self._record(first, logits[source])

    def _decode(self, forward: Forward) -> None:
        assert self.slab is not None
        self.slab.make_room()
        _, _, tokens, positions = self.state[:, : self.live]
        logits = forward.decode(tokens, positions, self.slab)
        self.slab.step()
        self.stats.decodes += 1
        self.stats.decoded_rows += self.live
        self._record(0, logits)

    def _record(self, first: int, logits: Tensor) -> None:
        """Sample for the slots from `first` on, note the tokens, retire rows that are done."""
        rows, counts, tokens, positions = self.state[:, first : self.live]
        sampling = self.sampling
        chosen, log_probs = choose(
            logits[:, : self.owner.vocab_size],
            self.uniform[rows, counts],
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        self.answers[rows, counts] = chosen
        self.log_probs[rows, counts] = log_probs
        tokens.copy_(chosen)
        counts += 1
        positions += 1
        ended = self.owner.ends(chosen)
        if self.owner.stop:
            ended |= self.owner.stop.completed(self.answers[rows], counts)
        done = ended | (counts >= self.limit)
        finished = done.nonzero().squeeze(1)  # the step's one host synchronisation
        if len(finished):
            self.counts[rows[finished]] = counts[finished]
            self.ended[rows[finished]] = ended[finished]
            self._retire(finished + first)

    def _retire(self, finished: Tensor) -> None:
        """Drop slots: live rows from the tail move into the holes, so few rows are copied."""
        assert self.slab is not None
        remaining = self.live - len(finished)
        gone = torch.zeros(self.live, dtype=torch.bool, device=finished.device)
        gone[finished] = True
        holes = gone[:remaining].nonzero().squeeze(1)
        movers = remaining + (~gone[remaining:]).nonzero().squeeze(1)
        self.state[:, holes] = self.state[:, movers]
        self.slab.retire(holes, movers, remaining)
        self.live = remaining


def _any_rank(flag: bool, device: torch.device) -> bool:
    if not dist.is_initialized():
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
