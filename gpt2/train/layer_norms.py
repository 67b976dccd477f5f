"""Norms of gradients and activations, layer by layer: where vanishing and exploding show first."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from gpt2.model.gpt import GPT


def gradient_norms(model: GPT) -> list[float]:
    """L2 norm of the gradients of the embeddings, and of each block's parameters."""
    parts = [[model.wte.weight, model.wpe.weight], *([*block.parameters()] for block in model.h)]
    return [nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]).item() for part in parts]


@torch.no_grad()
def activation_norms(model: GPT, idx: Tensor) -> list[float]:
    """Root mean square over channels of the residual stream, averaged over the tokens idx (B, T).

    The first is that of the embeddings' sum, the others those after each block.
    """
    norms: list[float] = []

    def measure(x: Tensor) -> None:
        norms.append(x.float().square().mean(-1).sqrt().mean().item())

    with ExitStack() as hooks:
        for block in model.h:
            hooks.enter_context(block.register_forward_pre_hook(lambda _, inputs: measure(inputs[0])))
        hooks.enter_context(model.h[-1].register_forward_hook(lambda _, __, output: measure(output)))
        model.hidden(idx)
    return norms
