"""The shape of a model. Needs no torch."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from gpt2.pipeline.params import Config

Norm = Literal["preln", "postln", "deepnorm"]
VOCAB_MULTIPLE = 128


class ModelShape(Config):
    """Section `model`. GPT-2 (124M) is n_layer 12, n_head 12, n_embd 768, block_size 1024."""

    n_layer: PositiveInt
    n_head: PositiveInt
    n_embd: PositiveInt
    # Longest sequence, in tokens.
    block_size: PositiveInt

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> "ModelShape":
        if self.n_embd % self.n_head:
            near = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}; nearest: {near}")
        return self

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


class GPTConfig(ModelShape):
    """Shape and kind of a model. GPT-2 has a vocab_size of 50257 and norm preln."""

    vocab_size: PositiveInt
    norm: Norm
    # Heads left in each layer after pruning; none given means n_head everywhere.
    heads: tuple[NonNegativeInt, ...] | None = None

    @model_validator(mode="after")
    def _heads_fit(self) -> "GPTConfig":
        if self.heads is not None and len(self.heads) != self.n_layer:
            raise ValueError(f"heads={self.heads} must list one number for each of n_layer={self.n_layer} layers")
        if self.heads is not None and max(self.heads) > self.n_head:
            raise ValueError(f"heads={self.heads} must not exceed n_head={self.n_head}")
        return self

    @property
    def layer_heads(self) -> tuple[int, ...]:
        """Number of heads of each layer."""
        return self.heads or (self.n_head,) * self.n_layer

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: padding to a multiple of 128 keeps the matrix products on aligned tiles."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
