"""trl's side of the comparisons, in a process of its own: `benchmarks.pairs.serve`.

A trainer of trl's runs in a thread and is held after each part of its work (a PPO iteration, an
epoch of SFT) until the next one is asked for.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.pairs import serve
from benchmarks.workload import (
    ANSWER,
    EOS,
    PAD,
    Workload,
    end_answers,
    model_dirs,
    prompts,
    sft_rows,
)


class Held:
    """Lets a trainer's thread go on for one part of its work at a time."""

    def __init__(self, work: float) -> None:
        self.work = work
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)

    def wait(self) -> None:
        """In the trainer's thread: until the next part is asked for."""
        self._go.acquire()

    def finished(self) -> None:
        """In the trainer's thread: a part is done."""
        self._done.release()
        self._go.acquire()

    def fail(self) -> None:
        """In the trainer's thread: there will be no more parts."""
        self._done.release()

    def __call__(self) -> float:
        self._go.release()
        self._done.acquire()
        return self.work


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


def callback(held: Held, event: str) -> Any:
    """Holds the trainer when training begins and after each `event`."""
    from transformers import TrainerCallback

    class Hold(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            torch.set_num_threads(1)  # holds for the thread that calls it
            held.wait()

    setattr(Hold, event, lambda *_, **__: held.finished())
    return Hold()


COMMON: dict[str, Any] = {
    "use_cpu": not torch.cuda.is_available(),
    "gradient_checkpointing": False,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}
FOREVER = 100_000


def ppo(workload: Workload, peer_bf16: str) -> tuple[Held, Callable[[], Any]]:
    import datasets
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    dtype = weights_dtype(workload, peer_bf16)
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

    held = Held(workload.rows)
    rows = datasets.Dataset.from_dict({"input_ids": prompts(workload).tolist()})
    trainer = PPOTrainer(
        PPOConfig(
            output_dir=tempfile.mkdtemp(),
            bf16=workload.dtype == "bfloat16" and peer_bf16 == "default",
            per_device_train_batch_size=workload.micro,
            gradient_accumulation_steps=workload.rows // workload.micro,
            total_episodes=workload.rows * FOREVER,
            num_ppo_epochs=workload.epochs,
            num_mini_batches=1,
            local_rollout_forward_batch_size=workload.rows,
            response_length=ANSWER,
            stop_token="eos" if workload.early else None,
            temperature=1.0,
            num_sample_generations=0,
            seed=workload.seed,
            **COMMON,
        ),
        tokenizer(),
        model=causal(),
        ref_model=causal(),
        reward_model=scalar(),
        value_model=scalar(),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[callback(held, "on_step_end")],
    )
    return held, trainer.train


def sft(workload: Workload, peer_bf16: str) -> tuple[Held, Callable[[], Any]]:
    import datasets
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = sft_rows(workload)
    held = Held(len(rows))
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(
            model_dirs(workload.model, workload.seed)[0], dtype=weights_dtype(workload, peer_bf16)
        ),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            bf16=workload.dtype == "bfloat16" and peer_bf16 == "default",
            per_device_train_batch_size=workload.micro,
            gradient_accumulation_steps=workload.rows // workload.micro,
            num_train_epochs=FOREVER,
            completion_only_loss=True,
            max_length=None,
            logging_strategy="no",
            **COMMON,
        ),
        train_dataset=datasets.Dataset.from_list(
            [
                {
                    "input_ids": row["prompt_ids"] + row["answer_ids"],
                    "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["answer_ids"]),
                }
                for row in rows
            ]
        ),
        processing_class=tokenizer(),
        callbacks=[callback(held, "on_epoch_end")],
    )
    return held, trainer.train


def weights_dtype(workload: Workload, peer_bf16: str) -> torch.dtype:
    """`default`: as trl keeps them, fp32 (with bf16=True); `weights`: in bf16 themselves."""
    if workload.dtype == "bfloat16" and peer_bf16 == "weights":
        return torch.bfloat16
    return torch.float32


def main() -> None:
    kind, workload, peer_bf16 = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    held, train = {"ppo": ppo, "sft": sft}[kind](Workload(**workload), peer_bf16)
    threading.Thread(target=train, daemon=True).start()
    serve(held)


if __name__ == "__main__":
    main()
