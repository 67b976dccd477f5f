"""GPT-2 on one page (Radford et al. 2019), with three placements of layer normalisation.

Shapes: B sequences, T tokens, C = n_embd channels, H heads of D = n_embd / n_head channels, L = n_layer blocks.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.model.config import GPTConfig
from gpt2.model.loss import linear_cross_entropy

# Queries, keys and values, each (B, H, T, D), to the weighted values (B, H, T, D).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# GPT._init_weights sets every weight; the modules' own draws would be thrown away.
_linear = partial(nn.utils.skip_init, nn.Linear)
_embedding = partial(nn.utils.skip_init, nn.Embedding)
# A layer may keep no head at all.
warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)


causal: Attend = partial(F.scaled_dot_product_attention, is_causal=True)


class LayerNorm(nn.LayerNorm):
    """Layer norm with the precision of its input in and out and that of autocast, fp32, within."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and the tokens before it, with `n_head` heads (0 after pruning)."""

    def __init__(self, config: GPTConfig, n_head: int):
        super().__init__()
        self.n_head, self.head_dim = n_head, config.head_dim
        self.c_attn = _linear(config.n_embd, 3 * n_head * config.head_dim)
        self.c_proj = _linear(n_head * config.head_dim, config.n_embd)

    def forward(self, x: Tensor, attend: Attend = causal) -> Tensor:
        B, T, _ = x.shape
        if self.n_head == 0:
            return self.c_proj.bias.expand_as(x)
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = attend(q, k, v)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """Two linear maps around GPT-2's tanh form of GELU (Hendrycks & Gimpel 2016)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = _linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = _linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP with residual sums; `norm` says where the layer norms stand.

    preln:    x + f(LN(x))        Radford et al. 2019
    postln:   LN(x + f(x))        Vaswani et al. 2017
    deepnorm: LN(alpha x + f(x))  alpha = (2 L)^(1/4), Wang et al. 2022 (decoder-only)
    """

    def __init__(self, config: GPTConfig, n_head: int):
        super().__init__()
        self.pre_norm = config.norm == "preln"
        self.alpha = (2 * config.n_layer) ** 0.25 if config.norm == "deepnorm" else 1.0
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, n_head)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Attend = causal) -> Tensor:
        if self.pre_norm:
            x = x + self.attn(self.ln_1(x), attend)
            return x + self.mlp(self.ln_2(x))
        x = self.ln_1(self.alpha * x + self.attn(x, attend))
        return self.ln_2(self.alpha * x + self.mlp(x))


class GPT(nn.Module):
    """Token and position embeddings, L blocks, for Pre-LN a final norm, and logits by the transposed output matrix.

    The output matrix is the token embedding (`tied`), as in GPT-2, or has weights of its own, which no saved model has.
    The same `seed` gives the same weights on every platform with the same torch, whatever the global generator did.
    """

    # A ModuleList, whose type does not say what it holds.
    h: Sequence[Block]
    # Under autocast: keep the residual stream in fp32 instead of autocast's precision.
    residual_in_fp32 = False
    # Train the output matrix with fp8 products.
    fp8_head = False

    def __init__(self, config: GPTConfig, seed: int = 0, *, tied: bool = True, init_std: float = 0.02):
        super().__init__()
        self.config = config
        self.wte = _embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = _embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, n_head) for n_head in config.layer_heads)  # type: ignore[assignment]
        self.ln_f = LayerNorm(config.n_embd) if config.norm == "preln" else nn.Identity()
        self.lm_head = None if tied else nn.Parameter(torch.empty_like(self.wte.weight))
        self._init_weights(init_std, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _init_weights(self, init_std: float, generator: torch.Generator) -> None:
        """N(0, init_std) and zero biases as GPT and GPT-2; the two exceptions are in the papers of the norms.

        preln: the projections into the residual stream are scaled by 1 / sqrt(2 L) (Radford et al. 2019, section 2.3).
        deepnorm: Xavier normal with gain 1 for queries and keys, beta = (8 L)^(-1/4) for values, the attention's
        projection and the MLP (Wang et al. 2022, figure 2, which leaves the embeddings open).
        """
        L = self.config.n_layer
        beta = (8 * L) ** -0.25
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=init_std, generator=generator)
            elif isinstance(module, nn.Linear):
                module.bias.zero_()
                std = init_std
                if self.config.norm == "preln" and name.endswith("c_proj"):
                    std /= math.sqrt(2 * L)
                elif self.config.norm == "deepnorm":
                    fan_out = module.out_features // 3 if name.endswith("c_attn") else module.out_features
                    std = beta * math.sqrt(2 / (module.in_features + fan_out))
                module.weight.normal_(std=std, generator=generator)
                if self.config.norm == "deepnorm" and name.endswith("c_attn"):
                    module.weight[: 2 * (len(module.weight) // 3)] /= beta
        if self.lm_head is not None:
            self.lm_head.normal_(std=init_std, generator=generator)
        for matrix in (self.wte.weight, self.output_matrix):
            matrix[self.config.vocab_size :] = 0

    @property
    def output_matrix(self) -> Tensor:
        """Matrix (padded_vocab_size, C) whose products with the final hidden states are the logits."""
        return self.wte.weight if self.lm_head is None else self.lm_head

    def hidden(self, idx: Tensor, positions: Tensor | None = None, attends: Sequence[Attend] | None = None) -> Tensor:
        """Final hidden states (B, T, C) of token ids (B, T). Raises ValueError beyond block_size.

        A caller whose tokens do not simply follow each other gives their `positions`, (T,) or (B, T) below block_size,
        and in `attends` what each layer does in place of causal attention.
        """
        T = idx.shape[1]
        if positions is None and T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens exceeds block_size={self.config.block_size}")
        x = self.wte(idx) + (self.wpe.weight[:T] if positions is None else self.wpe(positions))
        if torch.is_autocast_enabled(x.device.type) and not self.residual_in_fp32:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block, attend in zip(self.h, attends or [causal] * len(self.h), strict=True):
            x = block(x, attend)
        return self.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Mean cross-entropy (scalar, nats) against `targets` (B, T), or logits (B, T, vocab_size) without them."""
        x = self.hidden(idx)
        if targets is None:
            return x @ self.output_matrix[: self.config.vocab_size].t()
        rows = (x.flatten(0, 1), self.output_matrix, targets.flatten(), self.config.vocab_size)
        return linear_cross_entropy(*rows, fp8=self.fp8_head)

    def n_params(self) -> int:
        """Number of parameters, the padding of the vocabulary left out."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        n_matrices = 1 if self.lm_head is None else 2
        return sum(p.numel() for p in self.parameters()) - n_matrices * padding
