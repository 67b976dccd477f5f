"""Norms by layer equal those computed by hand from the gradients and the residual stream."""

import pytest
import torch

from gpt2.train.layer_norms import activation_norms, gradient_norms
from tests.analysed import make_model, make_windows

pytestmark = pytest.mark.parametrize("norm", ["preln", "postln", "deepnorm"])


def test_gradient_norms_cover_embeddings_and_blocks(norm):
    model, windows = make_model(norm), make_windows(2)
    model(windows[:, :-1], windows[:, 1:]).backward()
    norms = gradient_norms(model)
    assert len(norms) == 1 + len(model.h)
    blocks = torch.tensor(norms[1:])
    for found, block in zip(blocks, model.h, strict=True):
        by_hand = sum(parameter.grad.square().sum() for parameter in block.parameters()).sqrt()
        torch.testing.assert_close(found, by_hand)
    squares = sum(norm**2 for norm in norms) + sum(p.grad.square().sum().item() for p in model.ln_f.parameters())
    total = sum(parameter.grad.square().sum() for parameter in model.parameters()).item()
    assert squares == pytest.approx(total, rel=1e-5)


def test_activation_norms_are_those_of_the_residual_stream(norm):
    model, idx = make_model(norm), make_windows(3)[:, :-1]
    norms = activation_norms(model, idx)
    x = model.wte(idx) + model.wpe.weight[: idx.shape[1]]
    expected = [x.square().mean(-1).sqrt().mean().item()]
    for block in model.h:
        x = block(x)
        expected.append(x.square().mean(-1).sqrt().mean().item())
    assert norms == pytest.approx(expected, rel=1e-5)
    if norm != "preln":
        # The last thing that such a block does is to normalise.
        assert norms[1:] == pytest.approx([1.0] * len(model.h), rel=1e-3)
    # The model is left as it was.
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in model.h)
