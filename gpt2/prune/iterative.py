"""Orders that look at the model again without the heads that are gone: greedy by loss, and Taylor scores taken again.

Redundancy by attention patterns has no such order. It does compare only the heads that are left, but with the cosines
of the whole model: a head that goes changes the patterns of later layers by what it wrote, and of its own layer, where
it is compared, not at all. Taking the cosines again would cost a pass of stage head-similarity for each step.

Letters: B sequences, T tokens, C channels, H heads of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2.heads.similarity import Head, list_heads
from gpt2.model.gpt import GPT
from gpt2.model.loss import token_losses
from gpt2.prune.criteria import Order, mask_heads, order_by_score, score_taylor


def order_by_taylor_again(
    model: GPT, taylor: Sequence[Tensor], windows: Tensor, counts: Sequence[int], batch_size: int
) -> Order:
    """The first counts[-1] heads by Taylor importance, which is taken again at each of the ascending `counts`.

    taylor is what score_taylor returned for the whole model on these windows (N, T + 1).
    """
    masks = _ones(model)
    order: Order = []
    for count in counts:
        if order:
            with mask_heads(model, masks):
                taylor = score_taylor(model, windows, batch_size)
        left = [head for head in order_by_score(taylor) if head not in set(order)]
        for head in left[: count - len(order)]:
            masks[head.layer][head.index] = 0
            order.append(head)
    return order


@torch.no_grad()
def order_by_loss(model: GPT, windows: Tensor, count: int, batch_size: int) -> Order:
    """The first `count` heads, greedily: next goes the one without which the mean loss on windows (N, T + 1) is lowest.

    The search is exact: each step tries every head that is left, with those gone before masked; of equals the first
    goes. What lies below the layer of a head does not change with it and is computed once a step. So a step passes each
    of M heads through half of the blocks on average and through the classifier, and all of the search takes about
    count * (M - count / 2) such passes over the windows.
    """
    device, masks, order = model.wte.weight.device, _ones(model), []
    batches = [(batch[:, :-1].to(device), batch[:, 1:].to(device)) for batch in windows.split(batch_size)]
    left = list_heads(model.config)
    with mask_heads(model, masks):
        for _ in range(count):
            losses = _losses_without(model, left, masks, batches)
            head = min(left, key=losses.__getitem__)
            masks[head.layer][head.index] = 0
            left.remove(head)
            order.append(head)
    return order


def _losses_without(
    model: GPT, heads: Sequence[Head], masks: Sequence[Tensor], batches: Sequence[tuple[Tensor, Tensor]]
) -> dict[Head, float]:
    """Summed loss without each of `heads` in turn, of ids and targets (B, T) each; the masks act, and stay."""
    losses = {}
    states = [model.wte(idx) + model.wpe.weight[: idx.shape[1]] for idx, _ in batches]
    for layer, mask in enumerate(masks):
        for head in (head for head in heads if head.layer == layer):
            mask[head.index] = 0
            total = torch.zeros((), dtype=torch.float64, device=mask.device)
            for state, (_, targets) in zip(states, batches, strict=True):
                for block in model.h[layer:]:
                    state = block(state)
                hidden = model.ln_f(state).flatten(0, 1)
                total += token_losses(hidden, model.wte.weight, targets.flatten(), model.config.vocab_size).sum()
            losses[head] = total
            mask[head.index] = 1
        states = [model.h[layer](state) for state in states]
    # One wait for the device, not one for each head.
    return dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))


def _ones(model: GPT) -> list[Tensor]:
    """A mask of each layer (H,) that keeps all heads."""
    return [torch.ones(n_head, device=model.wte.weight.device) for n_head in model.config.layer_heads]
