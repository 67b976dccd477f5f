"""Criteria that score the model again after removals: greedy search by loss, and Taylor scores at each count.

Redundancy has no such order: removing a head does not change the patterns of its own layer, where heads are compared.

Letters: B sequences, T tokens, C channels, H heads of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2.heads.similarity import Head
from gpt2.model.gpt import GPT
from gpt2.model.loss import token_losses
from gpt2.prune.criteria import Order, make_masks, mask_heads, order_by_score, score_taylor

# Heads that a step of the greedy search tries.
SHORTLIST = 8


def order_by_taylor_again(
    model: GPT, taylor: Sequence[Tensor], windows: Tensor, counts: Sequence[int], batch_size: int
) -> Order:
    """The first counts[-1] heads by Taylor score, computed again at each of the ascending `counts`.

    taylor: the result of score_taylor for the whole model on these windows (N, T + 1).
    """
    order: Order = []
    for count in counts:
        if order:
            with mask_heads(model, make_masks(model, order)):
                taylor = score_taylor(model, windows, batch_size)
        left = [head for head in order_by_score(taylor) if head not in set(order)]
        order += left[: count - len(order)]
    return order


@torch.no_grad()
def order_by_loss(model: GPT, taylor: Sequence[Tensor], windows: Tensor, count: int, batch_size: int) -> Order:
    """The first `count` heads by greedy search: each step removes the head whose removal gives the lowest mean loss.

    A step tries the SHORTLIST heads of the lowest Taylor scores among those left, on all windows (N, T + 1), so the
    search and Taylor's criterion see the same tokens; ties go to the lower Taylor score. The layers below a head are
    computed once a step, so the search takes count * SHORTLIST passes of half of the blocks, on average, and of the
    classifier. It holds N T C activations.
    """
    device, masks, order = model.wte.weight.device, make_masks(model), []
    batches = [(batch[:, :-1].to(device), batch[:, 1:].to(device)) for batch in windows.split(batch_size)]
    left = order_by_score(taylor)
    with mask_heads(model, masks):
        for _ in range(count):
            shortlist = left[:SHORTLIST]
            losses = _losses_without(model, shortlist, masks, batches)
            head = min(shortlist, key=losses.__getitem__)
            masks[head.layer][head.index] = 0
            left.remove(head)
            order.append(head)
    return order


def _losses_without(
    model: GPT, heads: Sequence[Head], masks: Sequence[Tensor], batches: Sequence[tuple[Tensor, Tensor]]
) -> dict[Head, float]:
    """Summed loss without each of `heads` in turn, over ids and targets (B, T) each; the masks are active."""
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
    # One synchronisation with the device, not one per head.
    return dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
