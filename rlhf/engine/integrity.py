"""Silent corruption: weights in memory that changed by themselves, a processor that miscalculates.

Three comparisons, all bit for bit, none of which a sound machine fails:

- what is frozen, with its sum when it was loaded (a rank by itself, ZeRO-3 shards too);
- what data-parallel ranks hold alike, among the ranks: all weights and their moving averages at
  ZeRO 0 to 2, the optimiser's state at ZeRO 0; at ZeRO-3 the small weights that DeepSpeed keeps
  whole. A shard exists once, so there is nothing to compare it with;
- a forward pass of the last micro-batch with itself, repeated.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from rlhf.engine import comm
from rlhf.engine.ema import WeightEMA
from rlhf.engine.train import FrozenEngine, TrainEngine
from rlhf.engine.zero3 import local_tensor
from rlhf.errors import Corrupted

REMEDY = (
    "Nothing was saved or published since the last check. The same command goes on from the last "
    "checkpoint; test that machine first (memory: memtester, `dcgmi diag -r 3`, `dmesg` for ECC "
    "errors){leave}. checkpoint.check_every says how often this is looked at"
)
Named = Iterator[tuple[str, torch.Tensor]]


@torch.no_grad()
def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of the tensor's bits, read as int64 (the last bytes as uint8), modulo 2^64; 0-dim int64.

    One flipped bit always changes it, by a power of two.
    """
    octets = tensor.detach().reshape(-1).view(torch.uint8)
    whole = octets.numel() // 8 * 8
    body = octets[:whole]
    if body.storage_offset() % 8:
        body = body.clone()
    return body.view(torch.int64).sum() + octets[whole:].sum()


def sums(named: Named) -> tuple[list[str], torch.Tensor]:
    """Names, and on the CPU a sum for each: (n,) int64."""
    names, found = [], []
    for name, tensor in named:
        names.append(name)
        found.append(bit_sum(tensor))
    return names, torch.stack(found).cpu() if found else torch.zeros(0, dtype=torch.int64)


def replicated(engine: TrainEngine | FrozenEngine) -> Named:
    """What every rank holds alike of an engine; frozen weights only where they are a copy of
    ZeRO-3's shards."""
    for name, parameter in engine.module.named_parameters():
        if not hasattr(parameter, "ds_id"):
            if parameter.requires_grad:
                yield name, parameter
        elif parameter.ds_persist and parameter.ds_status == ZeroParamStatus.AVAILABLE:
            yield name, parameter.data
    if isinstance(engine, TrainEngine) and engine.config["zero_optimization"]["stage"] == 0:
        state = engine.deepspeed.optimizer.state
        for name, parameter in engine.module.named_parameters():
            for key, value in state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    yield f"{key} of {name}", value


class Integrity:
    """Of all models of a step. All ranks make one, before training, and call `check` together."""

    def __init__(
        self,
        trained: Mapping[str, TrainEngine],
        frozen: Mapping[str, FrozenEngine],
        say: Callable[[str], None],
        averages: Mapping[str, WeightEMA] | None = None,
    ) -> None:
        self._say, self.averages = say, dict(averages or {})
        self.engines: dict[str, TrainEngine | FrozenEngine] = {**trained, **frozen}
        self._at_load = sums(self._frozen())[1]
        self._hosts = comm.gather_lists([socket.gethostname()])
        self._repeatable: bool | None = None  # not known before the first check

    def check(self, position: int) -> None:
        """Raises Corrupted on every rank, saying which rank and tensor. Collective."""
        names, now = sums(self._frozen())
        changed = [names[i] for i in (now != self._at_load).nonzero().flatten().tolist()]
        shared, held = sums(self._replicated())
        differing = [] if self._repeatable is False else self._repeat()
        mine = torch.cat([torch.tensor([len(changed), len(differing)]), held])
        table = comm.all_gather(mine.to(comm.device())).cpu()
        if int(table[:, 0].sum()):
            what = "changed since it was loaded"
            self._raise(_first(self._by_rank(changed)), what, position)
        other = (table[:, 2:] != table[0, 2:]).any(dim=0).nonzero().flatten().tolist()
        if other:
            self._raise_unequal(table[:, 2 + other[0]].tolist(), shared[other[0]], position)
        self._judge_repeated(table[:, 1], differing, position)

    def _frozen(self) -> Named:
        seen: set[int] = set()  # a shared base is looked at once
        for role, engine in self.engines.items():
            for name, parameter in engine.module.named_parameters():
                if not parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{role}: {name}", local_tensor(parameter)

    def _replicated(self) -> Named:
        for role, engine in self.engines.items():
            for name, tensor in replicated(engine):
                yield f"{role}: {name}", tensor
        for role, average in self.averages.items():
            for name, tensor in average.replicated():
                yield f"{role}: average of {name}", tensor

    def _repeat(self) -> list[str]:
        """The models whose last micro-batch gives other bits when it is read again."""
        return [role for role, engine in self.engines.items() if not engine.repeats()]

    def _judge_repeated(self, counts: torch.Tensor, differing: list[str], position: int) -> None:
        bad = counts.nonzero().flatten().tolist()
        if self._repeatable is None:
            # Nothing is known of this machine yet: where all ranks differ, its kernels are not
            # deterministic.
            self._repeatable = len(bad) < len(counts)
            if not self._repeatable:
                self._say(
                    "warning: a forward pass, repeated, gives other bits on every rank: the "
                    "kernels here are not deterministic, so repeated passes are not compared"
                )
                return
        if bad:
            what = "gives another result for the same rows when its forward pass is repeated"
            self._raise(_first(self._by_rank(differing)), what, position)

    def _by_rank(self, mine: list[str]) -> dict[int, list[str]]:
        lists = comm.gather_lists([mine])
        return {rank: found for rank, found in enumerate(lists) if found}

    def _raise(self, found: tuple[int, str], what: str, position: int) -> None:
        rank, where = found
        who = f"rank {rank} on {self._hosts[rank]}"
        raise Corrupted(
            f"{who}: {where} {what} (seen after {position}): memory or a processor there is "
            f"faulty. {self._remedy([rank])}"
        )

    def _raise_unequal(self, values: list[int], tensor: str, position: int) -> None:
        """Some ranks hold other bits than the rest: the minority is named, where there is one."""
        most = max(values, key=values.count)
        ranks = [rank for rank, value in enumerate(values) if value != most]
        if 2 * len(ranks) >= len(values):
            ranks = list(range(len(values)))
        who = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in islice(ranks, 8))
        tail = (
            "other bits than the other ranks"
            if len(ranks) < len(values)
            else "different bits; so few ranks cannot tell which of them are right"
        )
        raise Corrupted(
            f"{who}: {tensor}: {tail} (seen after {position}; ranks must hold the same weights): "
            f"memory or a processor is faulty. {self._remedy(ranks)}"
        )

    def _remedy(self, ranks: list[int]) -> str:
        hosts = sorted({self._hosts[rank] for rank in ranks})
        some = len(hosts) < len(set(self._hosts))
        return REMEDY.format(leave=f", or leave it out: --exclude {'@'.join(hosts)}" * some)


def _first(by_rank: dict[int, list[str]]) -> tuple[int, str]:
    rank = min(by_rank)
    return rank, by_rank[rank][0]
