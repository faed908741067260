"""One PPO iteration against trl's: `python -m benchmarks.ppo --help`.

Both sides generate, score and update on the same random weights, prompts, lengths and dtype, with
one thread, in turn in one process: trl's trainer is held at the end of each of its iterations while
ours runs. The ratio is of CPU seconds, which a busy machine distorts less than the clock on the
wall. trl comes into a directory of its own: `pip install --no-deps --target DIR trl==1.10.0`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.workload import (
    ANSWER,
    EOS,
    PAD,
    OurPPO,
    Workload,
    end_answers,
    model_dirs,
    prompts,
)


def run_trl(
    workload: Workload, iterations: int, peer_bf16: str, at_end: Callable[[float, float], None]
) -> None:
    """trl's PPOTrainer; calls `at_end(cpu_seconds, wall_seconds)` after each iteration."""
    import datasets
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    whole = workload.dtype == "float32" or peer_bf16 == "autocast"
    dtype = torch.float32 if whole else torch.bfloat16
    policy_dir, reward_dir = model_dirs(workload.model, workload.seed)

    def causal() -> Any:
        model = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=dtype)
        end_answers(model, workload.early)
        model.generation_config.pad_token_id = PAD
        return model

    def scalar() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            reward_dir, num_labels=1, dtype=dtype
        )

    class AtEnd(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start()

        def start(self) -> None:
            self.cpu, self.wall = time.process_time(), time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            at_end(time.process_time() - self.cpu, time.perf_counter() - self.wall)
            self.start()

    ids = prompts(workload)
    settings = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=workload.dtype == "bfloat16" and peer_bf16 == "autocast",
        gradient_checkpointing=False,
        per_device_train_batch_size=workload.micro,
        gradient_accumulation_steps=workload.rows // workload.micro,
        total_episodes=workload.rows * iterations,
        num_ppo_epochs=workload.epochs,
        num_mini_batches=1,
        local_rollout_forward_batch_size=workload.rows,
        response_length=ANSWER,
        stop_token="eos" if workload.early else None,
        temperature=1.0,
        num_sample_generations=0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=workload.seed,
    )
    trainer = PPOTrainer(
        settings,
        tokenizer(),
        model=causal(),
        ref_model=causal(),
        reward_model=scalar(),
        value_model=scalar(),
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids.tolist()}),
        eval_dataset=datasets.Dataset.from_dict({"input_ids": ids.tolist()}),
        callbacks=[AtEnd()],
    )
    trainer.train()


def tokenizer() -> Any:
    """trl wants one to pad with; nothing is ever tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", choices=["trl", "nothing"], default="trl")
    parser.add_argument("--trl", help="directory that trl was installed into with --target")
    parser.add_argument("--model", choices=["6m", "135m"], default="6m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rows", type=int, default=16, help="prompts per iteration")
    parser.add_argument("--micro", type=int, default=16, help="rows per forward, both sides")
    parser.add_argument("--epochs", type=int, default=1, help="PPO epochs")
    parser.add_argument("--early", action="store_true", help="mean answer 24 tokens, not 64")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--peer-bf16",
        choices=["autocast", "weights"],
        default="autocast",
        help="trl's bfloat16: its own default (fp32 weights under autocast), or bf16 weights",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.trl:
        sys.path.insert(0, args.trl)
    workload = Workload(
        model=args.model,
        dtype=args.dtype,
        rows=args.rows,
        micro=min(args.micro, args.rows),
        early=args.early,
        epochs=args.epochs,
    )
    ours = OurPPO(workload)
    ours.iteration()  # warm up
    pairs: list[dict[str, float]] = []

    def our_turn(cpu: float = 0.0, wall: float = 0.0) -> None:
        began = time.process_time(), time.perf_counter()
        stats = ours.iteration()
        pairs.append(
            {name: stats[name] for name in stats if name.startswith("cpu_")}
            | {
                "ours": time.process_time() - began[0],
                "ours_wall": time.perf_counter() - began[1],
                "theirs": cpu,
                "theirs_wall": wall,
                "answer_length": stats["answer_length"],
            }
        )

    if args.against == "trl":
        run_trl(workload, args.pairs + 1, args.peer_bf16, our_turn)
        pairs.pop(0)  # trl's warm-up
    else:
        for _ in range(args.pairs):
            our_turn()
    print(json.dumps(_result(args, pairs)))
    sys.stdout.flush()
    os._exit(0)


def _result(args: argparse.Namespace, pairs: list[dict[str, float]]) -> dict[str, Any]:
    def median(name: str) -> float:
        return round(statistics.median(pair[name] for pair in pairs), 4)

    result: dict[str, Any] = {"benchmark": "ppo", "settings": vars(args)}
    result["versions"] = {"torch": torch.__version__}
    if args.against == "trl":
        import trl

        ratios = [pair["theirs"] / pair["ours"] for pair in pairs]
        result["versions"]["trl"] = trl.__version__
        result["median_ratio"] = round(statistics.median(ratios), 3)
        result["spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
        result["theirs_samples_per_cpu_second"] = round(args.rows / median("theirs"), 3)
    return result | {
        "ours_samples_per_cpu_second": round(args.rows / median("ours"), 3),
        "ours_samples_per_second": round(args.rows / median("ours_wall"), 3),
        "ours_cpu_seconds": {
            name: median(f"cpu_{name}") for name in ("rollout", "score", "update")
        },
        "mean_answer": median("answer_length"),
    }


if __name__ == "__main__":
    main()
