"""HellaSwag: which of four endings does the model find likeliest? One scorer for training, stage and pruning.

The model reads each item once, as one sequence: what its four rows begin with, then what each row has of its own. No
row sees the parts of the others, and positions go on from the shared part, so every token is predicted from the same
history as in a row by itself (tree attention, Miao et al. 2024, section 4.1).
"""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from gpt2.hellaswag.items import ENDINGS, ITEMS, Benchmark, TokenizedItems
from gpt2.model.dist import Dist
from gpt2.model.gpt import GPT
from gpt2.model.loss import token_losses
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import Config

# Widths of sequences are rounded up to this, which masks on a GPU need for their fast kernel.
WIDTH_MULTIPLE = 8
# Items whose shared part is sought at a time, which bounds memory.
CHUNK_ITEMS = 1024


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
    items = ItemSequences(rows, model.config.block_size)
    # Items of like length share a batch, the longest first so that running out of memory shows at once.
    order = np.argsort(-items.width, kind="stable")
    if dist is not None:
        order = order[dist.rank :: dist.world_size]
    scores = torch.zeros(len(items.width) * ENDINGS, dtype=torch.float64, device=device)
    for batch in _batches(order, items.width, batch_tokens):
        idx, positions, part, cell, target, row = (
            array.to(device, non_blocking=True) for array in items.lay_out(batch)
        )
        attend = partial(F.scaled_dot_product_attention, attn_mask=_visible(part))
        hidden = model.hidden(idx, positions, [attend] * model.config.n_layer).flatten(0, 1)
        losses = token_losses(hidden[cell], model.wte.weight, target, model.config.vocab_size)
        scores.index_add_(0, row, -losses.double())
    if dist is not None:
        dist.sum(scores)
    return scores.view(-1, ENDINGS).cpu().numpy()


def _visible(part: Tensor) -> Tensor:
    """Which keys each query attends to, (B, 1, T, T): those before it of its own part (B, T) and of part 0."""
    query, key = part[:, :, None], part[:, None, :]
    return ((key == 0) | (key == query)).tril()[:, None]


def _batches(order: np.ndarray, width: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Cut items, widest first, into batches of at most `batch_tokens` padded tokens (at least one item each)."""
    batches, start = [], 0
    while start < len(order):
        count = max(1, batch_tokens // int(width[order[start]]))
        batches.append(order[start : start + count])
        start += count
    return batches


class ItemSequences:
    """Rows cut to the context, and what those of an item share. A row's last token is only predicted, not read.

    Raises UserError if an ending leaves no context.
    """

    def __init__(self, rows: TokenizedItems, block_size: int):
        self.tokens = rows.tokens
        # (N, 4) each: first token, tokens read, and tokens of the ending.
        starts = np.maximum(rows.offsets[:-1], rows.offsets[1:] - (block_size + 1))
        self.starts = starts.reshape(-1, ENDINGS)
        self.read = (rows.offsets[1:] - starts - 1).reshape(-1, ENDINGS)
        self.scored = rows.ending_tokens.reshape(-1, ENDINGS)
        if (too_long := self.scored > self.read).any():
            item, ending = np.argwhere(too_long)[0]
            raise UserError(
                f"{ITEMS}, line {item + 1}: ending {ending} has {self.scored[item, ending]} tokens, which leaves no "
                f"context within block_size={block_size}; remove the item or raise model.block_size"
            )
        self.shared = self._shared_tokens()
        self.own = self.read - self.shared[:, None]
        # Of an item's one sequence, (N,).
        self.width = -(-(self.shared + self.own.sum(1)) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE

    def _shared_tokens(self) -> np.ndarray:
        """Number of tokens with which all rows of an item begin, (N,)."""
        shared = []
        for first in range(0, len(self.starts), CHUNK_ITEMS):
            starts, limit = self.starts[first : first + CHUNK_ITEMS], self.read[first : first + CHUNK_ITEMS].min(1)
            position = np.arange(limit.max() + 1)
            # Positions beyond the shortest row are never compared, but must be somewhere in the tokens.
            begun = self.tokens[np.minimum(starts[..., None] + position, len(self.tokens) - 1)]
            differs = (begun != begun[:, :1]).any(1) | (position >= limit[:, None])
            shared.append(differs.argmax(1))
        return np.concatenate(shared)

    def lay_out(self, batch: np.ndarray) -> tuple[Tensor, ...]:
        """The items of a batch as sequences, and where the tokens of their endings are predicted.

        Three arrays (B, T): token ids, positions, and parts (0 shared, 1 to 4 a row's own, -1 padding). Three arrays
        over the tokens of all endings: the index into B T of the token that each is predicted from, its id, its row.
        """
        shared, own, starts = self.shared[batch], self.own[batch], self.starts[batch]
        n, width = len(batch), int(self.width[batch].max())
        counts = np.column_stack([shared, own])
        # Where the parts begin: in the sequences, in the benchmark's tokens, in the context.
        cells = np.arange(n)[:, None] * width + np.cumsum(counts, axis=1) - counts
        sources = np.column_stack([starts[:, 0], starts + shared[:, None]])
        positions = np.column_stack([np.zeros_like(shared), *[shared] * ENDINGS])
        idx, position, part = (np.full(n * width, fill, dtype=np.int64) for fill in (0, 0, -1))
        filled = _ranges(cells, counts)
        idx[filled] = self.tokens[_ranges(sources, counts)]
        position[filled] = _ranges(positions, counts)
        part[filled] = np.repeat(np.tile(np.arange(ENDINGS + 1), n), counts.ravel())
        # Each token of an ending is predicted from the one before it, which may be the last of the shared part.
        scored = self.scored[batch]
        row = np.repeat(np.arange(n * ENDINGS), scored.ravel())
        item, before = row // ENDINGS, _ranges(self.read[batch] - scored, scored)
        begin = np.where(before < shared[item], cells[item, 0], cells[:, 1:].ravel()[row] - shared[item])
        target = self.tokens[starts.ravel()[row] + before + 1].astype(np.int64)
        row_of_all = batch[item] * ENDINGS + row % ENDINGS
        sequences = (torch.from_numpy(array).view(n, width) for array in (idx, position, part))
        return *sequences, *map(torch.from_numpy, (begin + before, target, row_of_all))


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The ranges from starts[i] with counts[i] numbers each, laid end to end."""
    starts, counts = starts.ravel(), counts.ravel()
    skipped = np.cumsum(counts) - counts
    return np.repeat(starts - skipped, counts) + np.arange(counts.sum())


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
) -> tuple[dict[str, float], dict[str, list]]:
    """Figures of one protocol (`completion_acc`, `completion_acc_stderr`, …), and columns with an entry for each item.

    The columns are the log-probability of each ending (`completion_logprob_0`, … in nats) and the endings chosen
    (`completion_acc`, `completion_acc_norm`).
    """
    rows = benchmark.protocols[protocol]
    scores = score_rows(model, rows, batch_tokens, dist)
    columns = {f"{protocol}_logprob_{ending}": scores[:, ending].tolist() for ending in range(ENDINGS)}
    figures = {}
    for kind, choice in predictions(protocol, scores, rows).items():
        figures[f"{protocol}_{kind}"], figures[f"{protocol}_{kind}_stderr"] = accuracy(choice, benchmark.labels)
        columns[f"{protocol}_{kind}"] = choice.tolist()
    return figures, columns
