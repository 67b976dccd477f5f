"""What a training run leaves behind: its identity, its metrics and its speed."""

import math

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.nn.attention import SDPBackend

from gpt2.data.order import sample_windows
from gpt2.data.shards import TokenSet
from gpt2.model.config import GPTConfig
from gpt2.model.dist import Precision
from gpt2.model.flops import training_flops_per_token
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import read_json
from gpt2.pipeline.scratch import source_files
from gpt2.train.loop import TrainConfig, TrainResult
from gpt2.train.setup import Run
from gpt2.train.stability import count_spikes, has_stalled

# The code that decides the result: a checkpoint of other code is never resumed.
SOURCES = source_files(
    *("data", "model", "train", "hellaswag/items.py", "hellaswag/scoring.py"),
    without=("model/flops.py", "train/heartbeat.py", "train/results.py", "train/short_runs.py"),
)
# Parameters that change only the cost of a run, not its result.
COST_ONLY = {"micro_batch", "compile", "checkpoint_interval", "log_interval"}

# Fraction of the steps after which the last part of a training begins.
LATE = 0.8
# Dense bf16 peak in FLOP/s by part of the device name (vendors' data sheets).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def run_identity(shape: GPTConfig, config: TrainConfig, tokens: TokenSet) -> dict:
    """All that decides the result: two runs with the same identity and sources have the same result."""
    return {
        "model": shape.model_dump(mode="json"),
        "train": config.model_dump(mode="json", exclude=COST_ONLY),
        "tokens": read_json(tokens.path.with_name(f"{tokens.path.name}.json")),
    }


def run_figures(run: Run, result: TrainResult) -> dict[str, float]:
    """Figures of metrics/train.json.

    train_loss is the mean over the last log_interval steps. val_loss_late_fall_percent is how much the validation loss
    fell over the last fifth of the steps (from the evaluation nearest to 80 % of them), as a share of its last value.
    hellaswag_rank_correlation is Spearman's, of the accuracy acc_norm with the step over the evaluations; 0 if all
    accuracies are equal.
    """
    config, per_epoch = run.config, run.order.windows_per_epoch
    rows, evals = result.rows["train"], result.rows["eval"]
    model_step, _, val_loss, acc, acc_norm = evals[-1]
    late = min(evals, key=lambda row: abs(row[0] - LATE * model_step))
    losses = [row[2] for row in rows] or [val_loss]
    last, accuracies = losses[-config.log_interval :], [row[4] for row in evals]
    seen, diverged = len(rows) * config.tokens_per_step, result.diverged_at_step >= 0
    varied = len(set(accuracies)) > 1
    return {
        "n_params": run.model.n_params(),
        "steps": len(rows),
        # Fewer than `steps` only where the last weights had no finite validation loss.
        "model_steps": model_step,
        "max_steps": config.max_steps,
        "tokens_per_step": config.tokens_per_step,
        "tokens_seen": seen,
        "epochs": seen / (per_epoch * run.order.block_size),
        "windows_per_epoch": per_epoch,
        "windows_in_same_place": windows_in_same_place(per_epoch, config.seed),
        "attention_backend": attention_backend(run.model, config.precision),
        "train_loss": sum(last) / len(last),
        "val_loss": val_loss,
        # Capped where the exponential would overflow.
        "val_perplexity": math.exp(min(val_loss, 700.0)),
        "val_bits_per_byte": val_loss / math.log(2) * run.val.n_tokens / run.val.n_bytes,
        "val_loss_late_fall_percent": 100 * (late[2] / val_loss - 1),
        "hellaswag_acc": acc,
        "hellaswag_acc_norm": acc_norm,
        "hellaswag_items": len(run.evaluation.benchmark.labels),
        "hellaswag_evaluations": len(evals),
        "hellaswag_first_acc_norm": accuracies[0],
        "hellaswag_rank_correlation": float(spearmanr(range(len(evals)), accuracies).statistic) if varied else 0.0,
        "max_grad_norm": max((row[4] for row in rows), default=0.0),
        "loss_spikes": count_spikes(losses),
        "diverged": int(diverged),
        "diverged_at_step": result.diverged_at_step,
        "unigram_entropy": run.tokens.unigram_entropy,
        # A run that diverged has not stalled as well: it broke off.
        "stalled": int(not diverged and has_stalled(val_loss, run.tokens.unigram_entropy)),
    }


def run_speed(run: Run, result: TrainResult) -> dict[str, float]:
    """Measured figures of metrics/speed/train.json; `mfu` only where the device's peak is known."""
    # A run that had only to write its results measured no step.
    seconds, step_seconds = result.seconds, max(result.seconds["step"], 1e-9)
    tokens_per_s = result.steps_timed * run.config.tokens_per_step / step_seconds
    total = max(seconds["step"] + seconds["eval"] + seconds["save"], 1e-9)
    figures = {
        "processes": run.dist.world_size,
        "tokens_per_s": round(tokens_per_s, 1),
        "data_wait_percent": round(100 * seconds["data"] / step_seconds, 3),
        "evaluation_percent": round(100 * seconds["eval"] / total, 2),
        "checkpoint_percent": round(100 * seconds["save"] / total, 2),
    }
    if run.dist.device.type == "cuda":
        figures["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        name, shape = torch.cuda.get_device_name(), run.model.config
        if peaks := [peak for part, peak in PEAK_FLOPS.items() if part in name]:
            flops = training_flops_per_token(shape, shape.vocab_size)
            figures["mfu"] = round(flops * tokens_per_s / run.dist.world_size / peaks[0], 4)
    return figures


def windows_in_same_place(windows_per_epoch: int, seed: int) -> int:
    """Number of windows that have the same place in the first and the second epoch, among the first million places."""
    places = np.arange(min(windows_per_epoch, 10**6))
    first, second = (sample_windows(places + epoch * windows_per_epoch, windows_per_epoch, seed) for epoch in (0, 1))
    return int((first == second).sum())


def attention_backend(model: GPT, precision: Precision) -> str:
    """Name of the kernel that scaled_dot_product_attention picks for the training shapes on the model's device."""
    shape, dtype = model.config, torch.bfloat16 if precision != "float32" else torch.float32
    size = (1, shape.n_head, shape.block_size, shape.head_dim)
    q = torch.empty(size, dtype=dtype, device=model.wte.weight.device, requires_grad=True)
    return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name.lower()
