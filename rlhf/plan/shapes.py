"""A decoder's shape, from its Hugging Face configuration, and what it has of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhf.errors import ConfigError


@dataclass(frozen=True)
class Linear:
    """One matrix of a layer, `inputs` x `outputs`, perhaps with a bias."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def size(self) -> int:
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class ModelShape:
    """Everything that memory and time depend on. Sizes are numbers of elements."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    linears: tuple[Linear, ...]
    """The matrices of one layer."""
    layer_rest: int
    """A layer's other parameters: norms."""
    outside: int
    """Parameters outside the layers but for embedding and head: positions, final norm ..."""
    embed_dim: int
    """Width of embedding and head; not `hidden` for opt-350m alone."""
    tied: bool
    outside_linears: tuple[Linear, ...] = ()
    """Linears among `outside` (opt-350m's projections), which adapters on all linears adapt."""
    positions: int | None = None
    """Longest row, where the family has a table or states a limit."""
    dropout: float = 0.0
    attention_dropout: float = 0.0
    stored: int = 2
    """Bytes of an element in the model's files."""

    @property
    def embedding(self) -> int:
        return self.vocab * self.embed_dim

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer."""
        return sum(linear.size for linear in self.linears) + self.layer_rest

    @property
    def backbone(self) -> int:
        """Parameters without the output head."""
        return self.embedding + self.layers * self.layer + self.outside

    @property
    def causal(self) -> int:
        """Parameters of the causal LM; tied weights once."""
        return self.backbone + (0 if self.tied else self.embedding)

    @property
    def scalar(self) -> int:
        """Parameters with a scalar head instead of the LM head."""
        return self.backbone + self.embed_dim

    @property
    def largest(self) -> int:
        """Elements of the largest single parameter."""
        return max(self.embedding, *(linear.inputs * linear.outputs for linear in self.linears))

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


Config = Mapping[str, Any]


def shape_of(config: Config, name: str = "the model") -> ModelShape:
    """The shape that a `config.json` describes.

    Raises ConfigError: a family that is not in FAMILIES, or a configuration without its sizes.
    """
    config = config.get("text_config") or config
    family = str(config.get("model_type", ""))
    build = FAMILIES.get(family)
    if build is None:
        raise ConfigError(
            f"{name}: the planner does not know the model type {family!r}; it knows "
            f"{', '.join(sorted(FAMILIES))}"
        )
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float16")
    try:
        return replace(build(config), stored=4 if stored.endswith("float32") else 2)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{name}: its config.json lacks or garbles a size of a {family} model: {error}"
        ) from error


def _gated(config: Config) -> ModelShape:
    """Llama and its relatives: RMS norms, rotary positions, a gated feed-forward of 3 matrices."""
    family, hidden, mlp = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    fixed_head = {"qwen3": 128, "gemma": 256, "gemma2": 256}.get(family)
    head_dim = config.get("head_dim") or fixed_head or hidden // heads
    query, kv = heads * head_dim, kv_heads * head_dim
    # Qwen2 has biases on q, k, v whatever its configuration says, and none on the output.
    attention_bias = bool(config.get("attention_bias", False))
    qkv_bias = attention_bias or family == "qwen2"
    mlp_bias = bool(config.get("mlp_bias", False))
    linears = (
        Linear("q_proj", hidden, query, qkv_bias),
        Linear("k_proj", hidden, kv, qkv_bias),
        Linear("v_proj", hidden, kv, qkv_bias),
        Linear("o_proj", query, hidden, attention_bias),
        Linear("gate_proj", hidden, mlp, mlp_bias),
        Linear("up_proj", hidden, mlp, mlp_bias),
        Linear("down_proj", mlp, hidden, mlp_bias),
    )
    norms = 4 * hidden if family == "gemma2" else 2 * hidden
    if family == "qwen3":
        norms += 2 * head_dim
    return ModelShape(
        family=family,
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=mlp,
        vocab=config["vocab_size"],
        linears=linears,
        layer_rest=norms,
        outside=hidden,
        embed_dim=hidden,
        tied=bool(config.get("tie_word_embeddings", family in ("gemma", "gemma2"))),
        positions=config.get("max_position_embeddings"),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
    )


def _opt(config: Config) -> ModelShape:
    hidden, mlp = config["hidden_size"], config["ffn_dim"]
    embed = config.get("word_embed_proj_dim") or hidden
    bias = bool(config.get("enable_bias", True))
    norm = 2 * hidden if config.get("layer_norm_elementwise_affine", True) else 0
    projections: tuple[Linear, ...] = ()
    if embed != hidden:
        projections = (Linear("project_out", hidden, embed), Linear("project_in", embed, hidden))
    positions = config.get("max_position_embeddings", 2048)
    before = config.get("do_layer_norm_before", True)
    final_norm = norm if before and not config.get("_remove_final_layer_norm", False) else 0
    return ModelShape(
        family="opt",
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=config["num_attention_heads"],
        kv_heads=config["num_attention_heads"],
        head_dim=hidden // config["num_attention_heads"],
        mlp=mlp,
        vocab=config["vocab_size"],
        linears=(
            *(Linear(f"{x}_proj", hidden, hidden, bias) for x in "qkv"),
            Linear("out_proj", hidden, hidden, bias),
            Linear("fc1", hidden, mlp, bias),
            Linear("fc2", mlp, hidden, bias),
        ),
        layer_rest=2 * norm,
        # OPT's position table has two more rows than positions.
        outside=(positions + 2) * hidden + final_norm + sum(p.size for p in projections),
        outside_linears=projections,
        embed_dim=embed,
        tied=bool(config.get("tie_word_embeddings", True)),
        positions=positions,
        dropout=float(config.get("dropout", 0.1)),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
    )


def _gpt2(config: Config) -> ModelShape:
    hidden = config["n_embd"]
    positions = config.get("n_positions", 1024)
    return _layer_norm_decoder(
        config,
        "gpt2",
        hidden=hidden,
        layers=config["n_layer"],
        heads=config["n_head"],
        mlp=config.get("n_inner") or 4 * hidden,
        names=("c_attn", "c_proj", "c_fc", "c_proj"),
        outside=positions * hidden + 2 * hidden,
        tied=True,
        positions=positions,
        dropout=float(config.get("resid_pdrop", 0.1)),
        attention_dropout=float(config.get("attn_pdrop", 0.1)),
    )


def _gpt_neox(config: Config) -> ModelShape:
    hidden = config["hidden_size"]
    return _layer_norm_decoder(
        config,
        "gpt_neox",
        hidden=hidden,
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp=config["intermediate_size"],
        names=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        outside=2 * hidden,
        tied=False,
        positions=config.get("max_position_embeddings"),
        dropout=float(config.get("hidden_dropout") or 0.0),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
    )


def _bloom(config: Config) -> ModelShape:
    hidden = config.get("hidden_size") or config["n_embed"]
    return _layer_norm_decoder(
        config,
        "bloom",
        hidden=hidden,
        layers=config.get("n_layer") or config["num_hidden_layers"],
        heads=config.get("n_head") or config["num_attention_heads"],
        mlp=4 * hidden,
        names=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        outside=4 * hidden,  # a norm after the embedding and a final one; no position table
        tied=True,
        positions=None,
        dropout=float(config.get("hidden_dropout") or 0.0),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
    )


def _layer_norm_decoder(
    config: Config, family: str, *, hidden: int, heads: int, mlp: int, names: Any, **rest: Any
) -> ModelShape:
    """Fused q, k, v, biases everywhere, two layer norms, a feed-forward of 2 matrices."""
    qkv, dense, up, down = names
    rest["tied"] = bool(config.get("tie_word_embeddings", rest["tied"]))
    return ModelShape(
        family=family,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        mlp=mlp,
        vocab=config["vocab_size"],
        linears=(
            Linear(qkv, hidden, 3 * hidden, True),
            Linear(dense, hidden, hidden, True),
            Linear(up, hidden, mlp, True),
            Linear(down, mlp, hidden, True),
        ),
        layer_rest=4 * hidden,
        embed_dim=hidden,
        **rest,
    )


# model_type in config.json -> its shape
FAMILIES: dict[str, Callable[[Config], ModelShape]] = {
    "llama": _gated,
    "mistral": _gated,
    "qwen2": _gated,
    "qwen3": _gated,
    "gemma": _gated,
    "gemma2": _gated,
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
}
