"""Measured prefill and decoding speed of models with fewer heads."""

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from gpt2.model.gpt import GPT
from gpt2.sampling.cache import Cache

ROUNDS = 3
# At most this many tokens are decoded, after half of the context.
MAX_WRITTEN = 16


@torch.no_grad()
def compare_speed(models: Mapping[str, GPT], windows: Tensor) -> dict[str, float]:
    """<name>_prefill_tokens_per_s and _decode_tokens_per_s of each model for one sequence and, _batch_, for all B.

    Prefill: one pass over the first half of the context of windows (B, T + 1). Decode: greedy decoding with the cache.
    Both end with the logits of a next token. On a GPU also <name>_peak_memory_gib, model included. Medians of ROUNDS;
    the models take turns, so a slowdown of the machine affects all of them.
    """
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    prompts = windows[:, : windows.shape[1] // 2].to(next(iter(models.values())).wte.weight.device)
    on_gpu = prompts.device.type == "cuda"
    for number in range(1 + ROUNDS):
        for name, model in models.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                others = torch.cuda.memory_allocated() - sum(p.nbytes for p in model.parameters())
            for rows, kind in ((prompts[:1], ""), (prompts, "batch_")):
                for phase, rate in zip(("prefill", "decode"), _rates(model, rows), strict=True):
                    # The first round warms caches and kernels.
                    if number:
                        seconds.setdefault(f"{name}_{phase}_{kind}tokens_per_s", []).append(rate)
            if on_gpu:
                peaks[f"{name}_peak_memory_gib"] = round((torch.cuda.max_memory_allocated() - others) / 2**30, 3)
    return {key: round(statistics.median(rates), 1) for key, rates in seconds.items()} | peaks


def _rates(model: GPT, prompts: Tensor) -> tuple[float, float]:
    """Tokens/s of the prefill of prompts (B, T) and of decoding after them."""
    cache, written = Cache(model, len(prompts)), min(MAX_WRITTEN, model.config.block_size - prompts.shape[1])
    # On a GPU the second step records the CUDA graph, which is not timed.
    cache.begin(prompts)
    for _ in range(min(2, written)):
        cache.extend(prompts[:, -1:])
    started = time.perf_counter()
    chosen = _likeliest(model, cache.begin(prompts))
    read = time.perf_counter()
    for _ in range(written):
        chosen = _likeliest(model, cache.extend(chosen.to(prompts.device)))
    return prompts.numel() / (read - started), len(prompts) * written / (time.perf_counter() - read)


def _likeliest(model: GPT, hidden: Tensor) -> Tensor:
    """Most probable next tokens (B, 1) after hidden states (B, C); copying them to the CPU waits for a GPU."""
    return (model.wte.weight[: model.config.vocab_size] @ hidden.t()).argmax(0)[:, None].cpu()
