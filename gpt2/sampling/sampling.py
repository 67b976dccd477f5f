"""Autoregressive sampling with temperature, top-k and top-p.

The position embeddings are learned and absolute (Radford et al. 2019), so the keys and values of a window that slides
by one token would all change. Instead, a full context loses its older half, and the model reads the rest
again: `window_start`.
"""

from collections.abc import Iterator
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import Config
from gpt2.sampling.cache import Cache
from gpt2.sampling.cuda_graph import CudaGraph

# Random numbers of a sequence that are drawn at a time, since a GPU takes single ones slowly.
UNIFORMS = 1024


class SamplingConfig(Config):
    """How the next token is drawn."""

    # New tokens of each sequence at most; an end-of-text token ends it earlier.
    max_tokens: PositiveInt = 50
    # Sequences drawn from one prompt.
    num_seq: PositiveInt = 1
    # Logits are divided by this; 0 takes the likeliest token.
    temperature: float = Field(default=0.8, ge=0)
    # Only the top_k likeliest tokens; 0 keeps all.
    top_k: NonNegativeInt = 50
    # Only the likeliest tokens that together have this probability.
    top_p: PositiveFloat = Field(default=1.0, le=1)
    seed: int = Field(default=1337, ge=0, lt=2**63)


def window_start(n_tokens: int, block_size: int) -> int:
    """The first of `n_tokens` tokens, prompt included, that the model sees when it predicts the next one.

    Up to block_size tokens are all seen. Whenever there is one more than fits, the oldest half of the context is
    dropped: the start is the smallest multiple of half the context that leaves at most block_size tokens. With 1024
    positions the model sees all of 1024 tokens, and the last 513 of 1025.
    """
    half = (block_size + 1) // 2
    return half * max(0, -(-(n_tokens - block_size) // half))


@torch.no_grad()
def draw_tokens(model: GPT, prompt: Tensor, sampling: SamplingConfig, eot_token: int) -> Iterator[dict[int, int]]:
    """Continue `prompt` (T,) of token ids `num_seq` times; yield the next token of each sequence, by its number.

    A sequence that drew the end-of-text token is left out from there on, and on a CPU costs nothing any more. A GPU
    computes on for it: a step reads all weights for one sequence as for five. Ids that pad the vocabulary are never
    drawn. Each sequence has random numbers of its own, one for a token, which depend on the seed and its number alone:
    neither more sequences nor more tokens change its text, nor does the device (but for the rounding of products of
    another size, which decides where two tokens are almost equally likely). Raises UserError if the hidden states are
    not finite.
    """
    texts = _Texts(model, prompt, sampling)
    going = set(texts.sequences)
    steps = (texts.extend() for _ in range(sampling.max_tokens))
    for chosen in _read_behind(steps) if texts.on_gpu else steps:
        drawn = dict(zip(texts.sequences, chosen.tolist(), strict=True))
        going -= {number for number, token in drawn.items() if token == eot_token}
        if not going:
            return
        yield {number: token for number, token in drawn.items() if number in going}
        if not texts.on_gpu:
            texts.keep(going)


class _Texts:
    """The texts that are being drawn, a row each, with the cache of their keys and values and their random numbers.

    sequences: the number of each row's sequence.
    """

    def __init__(self, model: GPT, prompt: Tensor, sampling: SamplingConfig):
        device = model.wte.weight.device
        self.on_gpu, self.sequences = device.type == "cuda", list(range(sampling.num_seq))
        self._block_size, self._start = model.config.block_size, -1
        # One row until the first draw, since the prompt is the same for all.
        self._idx = prompt[None].to(device)
        self._cache, self._uniforms = Cache(model, sampling.num_seq), _uniforms(sampling, device)
        choose = partial(_choose, model, sampling)
        self._choose = CudaGraph(choose) if self.on_gpu else choose

    def extend(self) -> Tensor:
        """Draw a token for each row, append it, and return the tokens (rows,) on the device of the model."""
        start = window_start(self._idx.shape[1], self._block_size)
        if start == self._start:
            hidden = self._cache.extend(self._idx[:, -1:])
        else:
            hidden, self._start = self._cache.begin(self._idx[:, start:]), start
            if not hidden.isfinite().all():
                raise UserError("the hidden states are not finite: the model's weights are damaged; take another model")
        rows, uniforms = len(self.sequences), next(self._uniforms)
        chosen = self._choose(hidden.expand(rows, -1), uniforms if self.on_gpu else uniforms[self.sequences])
        self._idx = torch.cat([self._idx.expand(rows, -1), chosen[:, None]], dim=1)
        return chosen

    def keep(self, sequences: set[int]) -> None:
        """Drop the rows of all but `sequences`; on a CPU alone."""
        if len(sequences) < len(self.sequences):
            kept = torch.tensor([row for row, number in enumerate(self.sequences) if number in sequences])
            self.sequences, self._idx = sorted(sequences), self._idx[kept]
            self._cache.keep(kept)


def _read_behind(steps: Iterator[Tensor]) -> Iterator[Tensor]:
    """Tensors of a GPU on the CPU, each after the next step has been started: the GPU never waits."""

    def start_copy(chosen: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        copy, copied = chosen.to("cpu", non_blocking=True), torch.cuda.Event()
        copied.record()
        return copy, copied

    copies: Iterator[Any] = chain(map(start_copy, steps), [None])
    for (copy, copied), _ in pairwise(copies):
        copied.synchronize()
        yield copy


def _uniforms(sampling: SamplingConfig, device: torch.device) -> Iterator[Tensor]:
    """For each token a number in [0, 1) for each sequence, (num_seq,) fp64; drawn on the CPU, UNIFORMS at a time."""
    seeds = torch.Generator().manual_seed(sampling.seed)
    generators = [
        torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), generator=seeds)))
        for _ in range(sampling.num_seq)
    ]
    while True:
        drawn = [torch.rand(UNIFORMS, dtype=torch.float64, generator=own) for own in generators]
        yield from torch.stack(drawn, dim=1).to(device)


def _choose(model: GPT, sampling: SamplingConfig, hidden: Tensor, uniforms: Tensor) -> Tensor:
    """One token id for each hidden state (B, C) by its number of `uniforms` (B,)."""
    # In this order the product of the large matrix with a few columns takes half the time on a CPU.
    logits = (model.wte.weight[: model.config.vocab_size] @ hidden.t()).t()
    if sampling.temperature == 0:
        return logits.argmax(-1)
    if logits.is_cuda:
        # Triton comes with torch for GPUs alone.
        from gpt2.sampling.draw_kernels import MAX_TOP_K, draw_top_k

        if 0 < sampling.top_k <= MAX_TOP_K:
            return draw_top_k(logits, uniforms, sampling.top_k, sampling.top_p, sampling.temperature)
    return _draw(logits, sampling, uniforms)


def _draw(logits: Tensor, sampling: SamplingConfig, uniforms: Tensor) -> Tensor:
    """One token id for each row of logits (B, V) by its number of `uniforms` (B,)."""
    ids = None
    if sampling.top_k:
        # In the order of ids: which token a number means may not depend on the last bit of a logit.
        ids = logits.topk(min(sampling.top_k, logits.shape[-1])).indices.sort().values
        logits = logits.gather(-1, ids)
    # The largest is zero, whatever the temperature.
    logits = (logits - logits.amax(-1, keepdim=True)).double()
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # A token is dropped if those before it already have the mass; the likeliest one always stays.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    mass = probabilities.cumsum(-1)
    # Inverse-CDF sampling: 1 - u is in (0, 1], so a token with probability 0 is never drawn.
    drawn = torch.searchsorted(mass, mass[:, -1:] * (1 - uniforms[:, None]))
    return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)
