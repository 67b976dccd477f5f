"""How fast models with fewer heads read a prompt and write what follows, measured."""

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from gpt2.model.gpt import GPT
from gpt2.sampling.cache import Cache

ROUNDS = 3
# Tokens written at most, after half of the context.
MAX_WRITTEN = 16


@torch.no_grad()
def compare_speed(models: Mapping[str, GPT], windows: Tensor) -> dict[str, float]:
    """<name>_prefill_tokens_per_s and _decode_tokens_per_s of each model, of one sequence and, _batch_, of all B.

    Prefill: the first half of the context of windows (B, T + 1) passes the model once. Decode: token after token is
    added by the cache, the likeliest each time. Both end with the logits of a next token. On a GPU also the most memory
    that was taken at once, model included: _peak_memory_gib. The median of ROUNDS; the models take turns, so that a
    machine that slows down slows all of them.
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
    """Tokens/s of reading prompts (B, T) and of writing after them."""
    cache, written = Cache(model, len(prompts)), min(MAX_WRITTEN, model.config.block_size - prompts.shape[1])
    # On a GPU the second step is recorded, which counts in no rate.
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
    """Next tokens (B, 1) after hidden states (B, C), on the CPU, so that a GPU has finished."""
    return (model.wte.weight[: model.config.vocab_size] @ hidden.t()).argmax(0)[:, None].cpu()
