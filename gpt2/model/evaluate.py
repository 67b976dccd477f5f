"""Mean loss over a fixed set of windows, the same for any number of processes."""

import torch
from torch import Tensor

from gpt2.data.shards import TokenSet
from gpt2.model.dist import Dist, Precision, autocast
from gpt2.model.gpt import GPT
from gpt2.model.loss import token_losses
from gpt2.pipeline.files import UserError


@torch.no_grad()
def window_losses(model: GPT, windows: Tensor, batch_size: int, precision: Precision = "float32") -> Tensor:
    """Loss in nats of every predicted token, (N, T) fp32 on the CPU, for windows (N, T + 1) of token ids."""
    device = model.wte.weight.device
    losses = []
    for batch in windows.split(batch_size):
        batch = batch.to(device)
        with autocast(device, precision):
            hidden = model.hidden(batch[:, :-1]).flatten(0, 1)
            loss = token_losses(hidden, model.output_matrix, batch[:, 1:].flatten(), model.config.vocab_size)
        losses.append(loss.view(len(batch), -1).cpu())
    return torch.cat(losses)


def mean_loss(
    model: GPT, windows: Tensor, batch_size: int, precision: Precision = "float32", dist: Dist | None = None
) -> float:
    """Mean loss in nats over all windows (N, T + 1), shared among the processes of `dist` and summed once."""
    mine = windows if dist is None else windows[dist.rank :: dist.world_size]
    total = torch.zeros(1, dtype=torch.float64)
    if len(mine):
        total += window_losses(model, mine, batch_size, precision).double().sum()
    if dist is not None:
        total = dist.sum(total.to(dist.device)).cpu()
    return total.item() / (len(windows) * (windows.shape[1] - 1))


def require_fit(model: GPT, tokens: TokenSet) -> None:
    """Raise UserError if the model was trained on another vocabulary than the tokens have."""
    if model.config.vocab_size != tokens.vocabulary.vocab_size:
        raise UserError(
            f"the model has vocab_size={model.config.vocab_size}, {tokens.path} was made with "
            f"{tokens.vocabulary.encoding} of {tokens.vocabulary.vocab_size}; run `dvc repro` to train on these tokens"
        )
