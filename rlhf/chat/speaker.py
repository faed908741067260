"""A model that answers, token by token, in a conversation of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import torch

from rlhf.config.schema import EngineConfig, ModelConfig, RolloutConfig
from rlhf.config.training import LoraConfig
from rlhf.data.cutting import INSIDE, shortened
from rlhf.data.templates import Messages, render
from rlhf.data.tokenizers import Encoder
from rlhf.data.typed import unguarded
from rlhf.errors import ConfigError, UserError
from rlhf.models import choose_dtype, load_causal, load_tokenizer, materialise
from rlhf.models.generation import end_ids, sampling_settings, without_text
from rlhf.rollout.stopping import StopStrings

DEFAULT_NEW_TOKENS = 256  # for a model that says nothing of it


class Refused(UserError):
    """A message that cannot be answered; the conversation stays as it was."""


@dataclass(frozen=True)
class Answer:
    """An answer, with the ids that it was sampled after."""

    prompt: str
    """The text that the model was given."""
    text: str
    prompt_ids: list[int]
    ids: list[int]
    """As they are read: a stop string is not among them, the token that ends the answer is."""
    end: str
    """"" where it ended by itself, else why not."""
    dropped: int = 0
    """How many of the conversation's oldest messages had no room."""


@dataclass
class Speaker:
    """A model with its tokenizer and what has been said."""

    name: str
    model: Any
    """A transformers model that generates, in evaluation mode."""
    tokenizer: Any
    turns: Messages = field(default_factory=list)
    last: Answer | None = None

    def __post_init__(self) -> None:
        self.encoder = Encoder(self.tokenizer, "auto")
        generation = self.model.generation_config
        self.stop = list(generation.stop_strings or [])
        self.stops = StopStrings(self.tokenizer, self.stop)
        eos = generation.eos_token_id
        self.ends = set(eos if isinstance(eos, list) else [eos])

    @property
    def has_template(self) -> bool:
        """Without one, each message is a text that the model goes on with."""
        return bool(self.tokenizer.chat_template)

    @property
    def positions(self) -> int | None:
        """How many tokens the model can hold; None: no limit is known."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def reset(self) -> None:
        self.turns, self.last = [], None

    def prompt(self, said: str) -> tuple[str, list[int], int]:
        """(text, ids, how many of the oldest messages are left out) for one more message.

        The ids are those that training made of such a conversation: special tokens that somebody
        typed are text. Raises Refused: no room for it, or the template refuses it.
        """
        if not self.has_template:
            return self._fitting(
                said, self.encoder.prompts([self.encoder.special.mark(said)], [True])[0], 0
            )
        mark = self.encoder.special.mark
        wanted = [*self.turns, {"role": "user", "content": mark(said)}]
        try:
            text = self._written(wanted)
            ids = self.encoder.prompts([text])[0]
            if self._fits(ids):
                return self._fitting(text, ids, 0)
            kept = shortened(wanted, lambda some: self._fits(self._ids(some)), mark)
            if kept is None or kept[1] == INSIDE:
                return self._fitting(text, self._ids(wanted[-1:]), 0)
            text = self._written(kept[0])
        except jinja2.TemplateError as error:
            raise Refused(f"the model's chat template refuses this: {error}") from error
        return self._fitting(text, self.encoder.prompts([text])[0], len(wanted) - len(kept[0]))

    def _fitting(self, text: str, ids: list[int], dropped: int) -> tuple[str, list[int], int]:
        if not ids:
            raise Refused("an empty text gives the model nothing to go on with: type something")
        if not self._fits(ids):
            raise Refused(
                f"{len(ids)} tokens: with {self.new_tokens} for the answer, that is more than "
                f"{self.name}'s {self.positions} positions. Type less, or give --max-new-tokens"
            )
        return unguarded(text), ids, dropped

    def _written(self, messages: Messages) -> str:
        return render(self.tokenizer, self.encoder.template, messages, generate=True)

    def _ids(self, messages: Messages) -> list[int]:
        return self.encoder.prompts([self._written(messages)])[0]

    @property
    def new_tokens(self) -> int:
        return int(self.model.generation_config.max_new_tokens)

    def _fits(self, ids: Sequence[int]) -> bool:
        return self.positions is None or len(ids) + self.new_tokens <= self.positions

    def answer(self, said: str, show: Callable[[str], None]) -> Answer:
        """Samples an answer; `show` gets its text in pieces, as they come. Ctrl-C ends it early.

        Raises Refused.
        """
        text, prompt_ids, dropped = self.prompt(said)
        stream = Stream(self.tokenizer, self.stop, show)
        rows = torch.tensor([prompt_ids], device=self.model.device)
        stopped = False
        try:
            with torch.inference_mode():
                self.model.generate(
                    input_ids=rows,
                    attention_mask=torch.ones_like(rows),
                    streamer=stream,
                    tokenizer=self.tokenizer,
                )
        except KeyboardInterrupt:
            stopped = True
        stream.end()
        ids, end = self._read(stream.ids, stopped)
        answer = Answer(text, stream.text, prompt_ids, ids, end, dropped)
        if self.has_template:
            said = self.encoder.special.mark(said)
            heard = self.encoder.special.mark(answer.text.strip())
            kept = self.turns[dropped:]
            self.turns = [*kept, {"role": "user", "content": said}]
            self.turns += [{"role": "assistant", "content": heard}]
        self.last = answer
        return answer

    def _read(self, ids: list[int], stopped: bool) -> tuple[list[int], str]:
        """(the answer's tokens as they are read, why it did not end by itself)."""
        if ids and ids[-1] in self.ends:
            return ids, ""
        if stopped:
            return ids, "stopped"
        cut = f"cut at {len(ids)} tokens"
        whole = torch.tensor([ids]), torch.tensor([len(ids)])
        if self.stops and ids and self.stops.first_ends(*whole)[0]:
            read = self.stops.read(ids, self.tokenizer.eos_token_id, self.new_tokens)
            return (ids, cut) if read is None else (read, "")
        return ids, cut


class Stream:
    """transformers' streamer: collects the answer's ids and passes its text on as it grows.

    Held back is what may still change: half a character, and what may become a stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], show: Callable[[str], None]) -> None:
        self._tokenizer, self._stop, self._show = tokenizer, stop, show
        self._prompt_seen = False
        self.ids: list[int] = []
        self.text = ""
        """What has been shown."""

    def put(self, value: torch.Tensor) -> None:
        """The prompt's ids first, then those of each step."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        self._pass_on(last=False)

    def end(self) -> None:
        """The rest."""
        self._pass_on(last=True)

    def _pass_on(self, last: bool) -> None:
        text = self._tokenizer.decode(
            self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if found := [at for stop in self._stop if (at := text.find(stop)) >= 0]:
            text = text[: min(found)]
        elif not last:
            text = text[: len(text) - self._unsure(text)]
        if len(text) > len(self.text):
            self._show(text[len(self.text) :])
            self.text = text

    def _unsure(self, text: str) -> int:
        """How many characters at the end may change."""
        fragment = len(text) - len(text.rstrip("\ufffd"))
        begun = [
            size
            for stop in self._stop
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        ]
        return max([fragment, *begun])


def load_speaker(
    name: str,
    place: str,
    tokenizer_at: str,
    *,
    trusted: bool,
    max_new_tokens: int | None,
    temperature: float | None,
    rollout: Mapping[str, Any] | None = None,
) -> Speaker:
    """Reads model and tokenizer, and how it samples: as saved with it, but for what is given.

    `rollout`: settings of the run's rollout, for a model that saves none. Raises RequirementError,
    ConfigError.
    """

    def no_texts() -> list[str]:
        raise ConfigError(f"model {place!r}: random weights have nothing to say; train them first")

    where = materialise(place, made_in=None, texts=no_texts, seed=0)  # type: ignore[arg-type]
    read_from = where if tokenizer_at == place else tokenizer_at
    tokenizer = load_tokenizer(read_from, template=None, trust_remote_code=trusted)
    dtype = choose_dtype("auto")
    loaded = load_causal(
        where,
        ModelConfig(trust_remote_code=trusted, lora=LoraConfig()),
        engine=EngineConfig(),
        dtype=dtype,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        dropout=False,
    )
    model: Any = loaded.model
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if rollout is not None:
        model.generation_config.update(**sampling_settings(RolloutConfig(**rollout)))
    _settle(model, tokenizer, max_new_tokens, temperature)
    return Speaker(name, model, tokenizer)


def _settle(
    model: Any, tokenizer: Any, max_new_tokens: int | None, temperature: float | None
) -> None:
    """Completes the generation config: ends, pads, what is never sampled, and what is given."""
    generation = model.generation_config
    generation.eos_token_id = list(end_ids(tokenizer, model))
    generation.pad_token_id = tokenizer.pad_token_id
    generation.suppress_tokens = without_text(model, len(tokenizer)) or generation.suppress_tokens
    if max_new_tokens or not generation.max_new_tokens:
        generation.max_new_tokens = max_new_tokens or DEFAULT_NEW_TOKENS
    generation.max_length = None  # a hub model's total length would contradict it
    if temperature == 0:
        generation.do_sample = False
        generation.temperature, generation.top_p, generation.top_k = 1.0, 1.0, 50
    elif temperature is not None:
        generation.do_sample, generation.temperature = True, temperature


def sampling_line(speaker: Speaker) -> str:
    """How answers are sampled, in words."""
    settings = speaker.model.generation_config
    if settings.do_sample:
        words = [f"temperature {settings.temperature or 1.0:g}"]
        words += [f"top_k {settings.top_k}"] if settings.top_k else []
        words += [f"top_p {settings.top_p:g}"] if (settings.top_p or 1.0) < 1 else []
        words += ["all tokens"] if len(words) == 1 else []
    else:
        words = ["always the likeliest token"]
    words += [f"ends at {', '.join(map(repr, speaker.stop))}"] if speaker.stop else []
    return ", ".join([*words, f"at most {settings.max_new_tokens} new tokens"])
