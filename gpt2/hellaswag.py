"""HellaSwag: which of four endings does the model find likeliest? One scorer for training, stage and pruning."""

import math

import numpy as np
import torch
from pydantic import PositiveInt

from gpt2.dist import Dist
from gpt2.files import UserError
from gpt2.items import ENDINGS, Benchmark, TokenizedItems
from gpt2.loss import token_losses
from gpt2.model import GPT
from gpt2.params import Config


class HellaswagConfig(Config):
    """Section `hellaswag`: how the scoring is batched; the scores do not depend on it."""

    # Padded tokens of one forward pass.
    batch_tokens: PositiveInt


@torch.no_grad()
def score_rows(model: GPT, rows: TokenizedItems, batch_tokens: int, dist: Dist | None = None) -> np.ndarray:
    """Sum of log-probabilities of every ending, (N, 4) float64 nats, fp32 inside.

    Rows longer than the context lose tokens on the left, as in the harness. Raises UserError if an ending alone is
    longer.
    """
    device = model.wte.weight.device
    block_size = model.config.block_size
    # One token more than the context: the last one is only predicted.
    starts = np.maximum(rows.offsets[:-1], rows.offsets[1:] - (block_size + 1))
    lengths = rows.offsets[1:] - starts
    if (too_long := rows.ending_tokens >= lengths).any():
        row = int(too_long.argmax())
        raise UserError(
            f"benchmark item {row // ENDINGS}, ending {row % ENDINGS} has {rows.ending_tokens[row]} tokens, which "
            f"leaves no context within block_size={block_size}; remove the item or raise model.block_size"
        )
    # Rows of like length share a batch, the longest first so that running out of memory shows at once.
    order = np.argsort(-lengths, kind="stable")
    if dist is not None:
        order = order[dist.rank :: dist.world_size]
    scores = torch.zeros(len(lengths), dtype=torch.float64, device=device)
    for batch in _batches(order, lengths, batch_tokens):
        idx = torch.zeros(len(batch), int(lengths[batch[0]]), dtype=torch.int64)
        for i, row in enumerate(batch):
            idx[i, : lengths[row]] = torch.from_numpy(rows.tokens[starts[row] : rows.offsets[row + 1]].astype(np.int64))
        # Target t of a row belongs to its ending if it is among the last ending_tokens ones; padding is behind them.
        position = np.arange(1, idx.shape[1])
        last = lengths[batch][:, None]
        in_ending = torch.from_numpy((position < last) & (position >= last - rows.ending_tokens[batch][:, None]))
        idx, in_ending = idx.to(device), in_ending.to(device)
        losses = token_losses(
            model.hidden(idx[:, :-1])[in_ending], model.wte.weight, idx[:, 1:][in_ending], model.config.vocab_size
        )
        row_of_token = torch.from_numpy(np.repeat(batch, rows.ending_tokens[batch])).to(device)
        scores.index_add_(0, row_of_token, -losses.double())
    if dist is not None:
        dist.sum(scores)
    return scores.view(-1, ENDINGS).cpu().numpy()


def _batches(order: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Cut rows, longest first, into batches of at most `batch_tokens` padded tokens (at least one row each)."""
    batches, start = [], 0
    while start < len(order):
        count = max(1, batch_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + count])
        start += count
    return batches


def predictions(protocol: str, scores: np.ndarray, rows: TokenizedItems) -> dict[str, np.ndarray]:
    """Chosen ending (N,) by raw sum (`acc`) and by the protocol's normalised sum (`acc_norm`).

    completion divides by the tokens of the ending, harness by its characters.
    """
    length = rows.ending_tokens if protocol == "completion" else rows.ending_chars
    return {"acc": scores.argmax(1), "acc_norm": (scores / length.reshape(-1, ENDINGS)).argmax(1)}


def accuracy(chosen: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Share of right answers and its standard error, sqrt(p (1 - p) / (N - 1)) as in the harness."""
    p = float((chosen == labels).mean())
    return p, math.sqrt(p * (1 - p) / max(1, len(labels) - 1))


def evaluate_benchmark(
    model: GPT, benchmark: Benchmark, protocol: str, batch_tokens: int, dist: Dist | None = None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Figures of one protocol (`completion_acc`, `completion_acc_stderr`, …) and its predictions (see above)."""
    rows = benchmark.protocols[protocol]
    chosen = predictions(protocol, score_rows(model, rows, batch_tokens, dist), rows)
    figures = {}
    for kind, choice in chosen.items():
        figures[f"{protocol}_{kind}"], figures[f"{protocol}_{kind}_stderr"] = accuracy(choice, benchmark.labels)
    return figures, chosen
