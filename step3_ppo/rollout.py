"""What one iteration hands from generation to the update: `Rollout`, and cutting it up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlhf.data.plan import Budget, deal, piece_sizes, pieces_needed
from rlhf.engine import comm
from rlhf.rollout.generation import Generation


@dataclass(frozen=True)
class Rollout:
    """N answers of this rank, with everything that the update reads.

    An answer is what was sampled. With stop strings there is a second form: `read_ids`, in which
    EOS stands for the stop string, is what the reward model and all who judge read (16).

    P is the width of the left-padded prompts, A of the right-padded answers. Rows k n ... k n + n-1
    answer one prompt (n = samples per prompt). Masks are bool, True = counts.
    """

    input_ids: Tensor  # (N, P + A) int64
    attention_mask: Tensor  # (N, P + A) bool
    answer_mask: Tensor  # (N, A) bool, up to and including the token that ended the answer
    ended: Tensor  # (N,) bool, False where the length limit ended it
    read_ids: Tensor | None = None  # (N, P + R) int64; None: read as sampled
    read_mask: Tensor | None = None  # (N, P + R) bool
    log_probs: Tensor | None = None  # (N, A) fp32, under the policy that sampled
    sampler_log_probs: Tensor | None = None  # (N, A) fp32, as another engine (vLLM) reports them
    ref_log_probs: Tensor | None = None  # (N, A) fp32
    values: Tensor | None = None  # (N, A) fp32, before each token
    scores: Tensor | None = None  # (N,) fp32, a reward model's raw ones, or the sum of all rewards
    token_rewards: Tensor | None = None  # (N, A) fp32
    advantages: Tensor | None = None  # (N, A) fp32
    returns: Tensor | None = None  # (N, A) fp32

    @classmethod
    def of(cls, generation: Generation) -> Rollout:
        return cls(
            input_ids=generation.input_ids,
            attention_mask=generation.attention_mask.bool(),
            answer_mask=generation.answer_mask,
            ended=generation.ended,
            read_ids=generation.read_ids,
            read_mask=generation.read_mask,
            log_probs=generation.log_probs,
            sampler_log_probs=generation.sampler_log_probs,
        )

    def need(self, name: str) -> Tensor:
        """A field that an earlier act has filled in. Raises ValueError if it has not."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"rollout.{name} is not there yet: score and credit come before update"
            )
        return value

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def prompt_width(self) -> int:
        return self.input_ids.shape[1] - self.answer_mask.shape[1]

    @property
    def read(self) -> tuple[Tensor, Tensor]:
        """Prompt and answer as they are judged: (N, P + R) ids and bool mask."""
        if self.read_ids is None or self.read_mask is None:
            return self.input_ids, self.attention_mask
        return self.read_ids, self.read_mask

    @property
    def score_mask(self) -> Tensor:
        """(N, P + A) bool: the answer tokens, in the columns of `input_ids`."""
        return torch.nn.functional.pad(self.answer_mask, (self.prompt_width, 0))

    def rows(self, index: Tensor) -> Rollout:
        """Some rows, with columns that only hold their pads cut off on both sides."""
        mask, answers = self.attention_mask[index], self.answer_mask[index]
        left = int(mask.long().argmax(dim=1).min())
        width = max(int(answers.sum(dim=1).max()), 1)
        read_width = 0
        if self.read_mask is not None:
            read_width = int(self.read_mask[index, self.prompt_width :].sum(dim=1).max())
        changed: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            value = value[index]
            if field.name in ("input_ids", "attention_mask"):
                value = value[:, left : self.prompt_width + width]
            elif field.name in ("read_ids", "read_mask"):
                value = value[:, left : self.prompt_width + read_width]
            elif value.dim() == 2:
                value = value[:, :width]
            changed[field.name] = value
        return replace(self, **changed)

    def of_all_ranks(self, samples: int) -> Rollout:
        """Every rank's rows, on each rank: prompts in the order in which they were dealt to the
        ranks, with `samples` answers each. Every rank has as many rows. Collective."""
        prompt, answer = self.prompt_width, self.answer_mask.shape[1]
        read = 0 if self.read_ids is None else self.read_ids.shape[1] - prompt
        found = torch.tensor([prompt, answer, read], device=self.input_ids.device)
        most = comm.all_reduce(found.clone(), "max") - found
        left, right, more_read = most.tolist()
        changed: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if field.name in ("input_ids", "attention_mask"):
                value = torch.nn.functional.pad(value, (left, right))
            elif field.name in ("read_ids", "read_mask"):
                value = torch.nn.functional.pad(value, (left, more_read))
            elif value.dim() == 2:
                value = torch.nn.functional.pad(value, (0, right))
            ranks = comm.all_gather(value).unflatten(1, (-1, samples))
            changed[field.name] = ranks.transpose(0, 1).flatten(0, 2)
        return replace(self, **changed)

    def dealt(self, index: Tensor, size: int | Budget) -> list[Rollout]:
        """This rank's micro-batches of rows `index`, where every rank has all rows: as many on
        every rank; where there is none for it, a row that counts for nothing."""
        lengths = self.attention_mask.sum(dim=1).tolist()
        pieces = deal(index.tolist(), lengths, size, comm.rank(), comm.world_size())
        device = self.input_ids.device
        batches = [self.rows(torch.tensor(rows or [0], device=device)) for rows in pieces]
        return [
            batch if rows else replace(batch, answer_mask=torch.zeros_like(batch.answer_mask))
            for rows, batch in zip(pieces, batches, strict=True)
        ]

    def micro_batches(self, index: Tensor, size: int | Budget) -> list[Tensor]:
        """Rows `index` in groups within `size`, of similar length, as few as possible.

        The same number of groups on every rank, which has to have as many rows: each group may be a
        collective. Collective itself where tokens are limited.
        """
        budget = Budget.of(size)
        lengths = self.attention_mask[index].sum(dim=1)
        lengths, order = torch.sort(lengths, descending=True, stable=True)
        found = lengths.tolist()
        pieces = pieces_needed(found, budget)
        if budget.tokens:
            count = torch.tensor(pieces, device=self.input_ids.device)
            pieces = int(comm.all_reduce(count, "max"))
        return list(torch.split(index[order], piece_sizes(found, budget, pieces)))

    def map(self, compute: Callable[[Rollout], Tensor], size: int | Budget) -> Tensor:
        """`compute` over micro-batches, put together in the order of the rows.

        `compute` gives (n,) or (n, a) with a <= A; missing columns are filled with 0.
        """
        everything = torch.arange(len(self), device=self.input_ids.device)
        groups = self.micro_batches(everything, size)
        return self.assembled(groups, [compute(self.rows(index)) for index in groups])

    def assembled(self, groups: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
        """Parts (n,) or (n, a) of `micro_batches` of all rows, in the order of the rows."""
        shape = (len(self),) if parts[0].dim() == 1 else tuple(self.answer_mask.shape)
        result = parts[0].new_zeros(shape)
        for index, part in zip(groups, parts, strict=True):
            if part.dim() == 1:
                result[index] = part
            else:
                result[index, : part.shape[1]] = part
        return result


def answer_ids(rollout: Rollout) -> list[list[int]]:
    """The answers' tokens as they are judged: a stop string is not among them (16)."""
    answers, masks = (x[:, rollout.prompt_width :] for x in rollout.read)
    return [row[mask].tolist() for row, mask in zip(answers, masks, strict=True)]
