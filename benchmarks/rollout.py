"""The `continuous` rollout against `model.generate`: `python -m benchmarks.rollout --help`.

Same random OPT (about 6M parameters), same prompts, one thread, the two sides in turn. The ratio is
tokens per second of CPU time, which a busy machine distorts less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, OPTConfig

from rlhf.rollout import RolloutRequest, SamplingConfig, build_rollout

PAD, EOS = 0, 1
PROMPT, ANSWER = 128, 64
MEAN_ANSWER = 24  # with --early: EOS has probability 1 / 24 at each step


class FixedEnd(torch.nn.Module):
    """A head whose EOS has a fixed probability: 0, or 1 / MEAN_ANSWER."""

    def __init__(self, head: torch.nn.Module, early: bool) -> None:
        super().__init__()
        self.head, self.early = head, early

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden)
        logits[..., EOS] = -1e4
        if self.early:
            others = torch.logsumexp(logits.float(), dim=-1)
            logits[..., EOS] = (others - math.log(MEAN_ANSWER - 1)).to(logits.dtype)
        return logits


class Wrapped(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model


def build_model(vocab: int, dtype: str, early: bool) -> Any:
    config = OPTConfig(
        vocab_size=vocab,
        hidden_size=256,
        word_embed_proj_dim=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        ffn_dim=1024,
        max_position_embeddings=512,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=2,
        dropout=0.0,
    )
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    model.lm_head = FixedEnd(model.lm_head, early)
    return model


def tokens_per_cpu_second(generate: Callable[[], int]) -> float:
    began = time.process_time()
    tokens = generate()
    return tokens / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", choices=["generate"], default="generate")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each side")
    parser.add_argument("--rows", type=int, default=16, help="prompts")
    parser.add_argument("--batch", type=int, default=16, help="rows generated at once")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--early", action="store_true", help=f"mean answer {MEAN_ANSWER}, not 64")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(args.vocab, args.dtype, args.early)
    ids = torch.randint(3, args.vocab, (args.rows, PROMPT))
    mask = torch.ones_like(ids)
    engine = build_rollout(
        "continuous",
        SimpleNamespace(module=Wrapped(model)),
        SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS),
        batch_size=args.batch,
    )

    def ours() -> int:
        request = RolloutRequest(ids, mask)
        return int(engine.generate(request, SamplingConfig(ANSWER)).answer_mask.sum())

    def theirs() -> int:
        tokens = 0
        for start in range(0, args.rows, args.batch):
            part = slice(start, start + args.batch)
            answers = model.generate(
                ids[part],
                attention_mask=mask[part],
                max_new_tokens=ANSWER,
                do_sample=True,
                top_k=0,
                pad_token_id=PAD,
                eos_token_id=EOS,
            )[:, PROMPT:]
            tokens += int((answers != PAD).sum())
        return tokens

    ours(), theirs()
    ratios = [
        tokens_per_cpu_second(ours) / tokens_per_cpu_second(theirs) for _ in range(args.pairs)
    ]
    result = {
        "benchmark": "rollout",
        "against": args.against,
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": vars(args),
        "median_ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
