"""The size of a model, without the model."""

from pydantic import PositiveInt, model_validator

from gpt2.params import Config


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
