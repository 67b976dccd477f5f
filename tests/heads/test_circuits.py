"""Cosines of circuits equal those of whole C x C matrices, and do not change where the model does not."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from gpt2.heads.circuits import CIRCUITS, compare_circuits
from gpt2.heads.similarity import Head, list_heads
from gpt2.model.gpt import GPT, Block
from tests.analysed import NORMS, make_model, make_windows, slice_head


def make_normed_model(norm: str, **shape) -> GPT:
    """A model whose layer norms have gains far from 1, and no biases in what feeds the heads."""
    model, generator = make_model(norm, **shape), torch.Generator().manual_seed(8)
    with torch.no_grad():
        for block in model.h:
            block.ln_1.weight.uniform_(0.2, 2, generator=generator)
            block.ln_1.bias.zero_()
            block.attn.c_attn.bias.zero_()
    return model


def build_circuits(model: GPT, head: Head) -> dict[str, np.ndarray]:
    """W_QK and W_OV of a head as C x C matrices, with ln_1 folded in by products with whole matrices."""
    (q, k, v), _, o = (part.double().numpy() for part in slice_head(model, head))
    block = model.h[head.layer]
    gain, centring = np.diag(block.ln_1.weight.detach().double().numpy()), np.eye(o.shape[0]) - 1 / o.shape[0]
    reading, writing = (gain @ centring, centring) if block.pre_norm else (np.eye(o.shape[0]), gain @ centring)
    return {"qk": reading.T @ q.T @ k @ reading, "ov": writing @ o @ v @ reading}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kept", [None, (2, 0, 3)])
def test_cosines_are_those_of_the_whole_matrices(norm, kept):
    model = make_normed_model(norm, heads=kept)
    found, whole = compare_circuits(model), [build_circuits(model, head) for head in list_heads(model.config)]
    assert tuple(found) == CIRCUITS
    for name in CIRCUITS:
        vectors = np.stack([circuits[name].ravel() for circuits in whole])
        lengths = np.linalg.norm(vectors, axis=1)
        expected = vectors @ vectors.T / np.outer(lengths, lengths)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-13, err_msg=name)


def attention_inputs(block: Block, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the attention reads of the stream x, and x by the scale of Pre-LN's norm, which the circuits leave out."""
    if not block.pre_norm:
        return x, x
    return block.ln_1(x), x / (x.var(-1, unbiased=False, keepdim=True) + block.ln_1.eps).sqrt()


@pytest.mark.parametrize("norm", NORMS)
def test_circuits_are_what_the_model_computes(norm):
    model, head = make_normed_model(norm).double(), Head(1, 2)
    block, circuits = model.h[head.layer], build_circuits(model, head)
    qk, ov = (torch.from_numpy(circuits[name]) for name in CIRCUITS)
    read, x = attention_inputs(
        block, torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    )
    with torch.no_grad():
        q, k, v = block.attn.c_attn(read).unflatten(-1, (3, 4, 8))[:, :, head.index].unbind(1)
        written = v @ slice_head(model, head)[2].t()
        # What the next reader sees: a norm that Post-LN and DeepNorm apply with its gain, another one in Pre-LN.
        seen = written - written.mean(-1, keepdim=True)
        seen = seen if block.pre_norm else seen * block.ln_1.weight
    torch.testing.assert_close(x @ qk @ x.t(), q @ k.t())
    torch.testing.assert_close(x @ ov.t(), seen)


def turn_keys(model: GPT) -> None:
    """Any invertible change of basis of the queries that the keys undo."""
    (q, k, _), _, _ = slice_head(model, Head(1, 2))
    basis = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) + 4 * torch.eye(8)
    q.copy_(basis @ q)
    k.copy_(torch.linalg.inv(basis).t() @ k)


def turn_values(model: GPT) -> None:
    (_, _, v), _, o = slice_head(model, Head(1, 2))
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    v.copy_(rotation @ v)
    o.copy_(o @ rotation.t())


def write_to_all_channels(model: GPT) -> None:
    """The same addition to every channel, which the next norm takes away."""
    slice_head(model, Head(1, 2))[2].add_(torch.randn(8, generator=torch.Generator().manual_seed(1)))


def move_gains(model: GPT) -> None:
    """Pre-LN's gains into the weights that read."""
    for block in model.h:
        block.attn.c_attn.weight.data *= block.ln_1.weight
        block.ln_1.weight.data.fill_(1)


def read_from_all_channels(model: GPT) -> None:
    """Pre-LN's norm leaves nothing of what all channels have in common."""
    rows = slice_head(model, Head(1, 2))[0]
    common = torch.randn(3, 8, 1, generator=torch.Generator().manual_seed(1))
    rows.add_(common / model.h[1].ln_1.weight.data)


@pytest.mark.parametrize(
    ("norm", "change"),
    [
        *((norm, change) for norm in NORMS for change in (turn_keys, turn_values, write_to_all_channels)),
        *(("preln", change) for change in (move_gains, read_from_all_channels)),
    ],
)
def test_changes_of_weights_that_the_model_does_not_notice_leave_its_circuits(norm, change: Callable[[GPT], None]):
    model, idx = make_normed_model(norm), make_windows(3)[:, :-1]
    with torch.no_grad():
        logits, before = model(idx), compare_circuits(model)
        weights = [p.clone() for p in model.parameters()]
        change(model)
        assert any((p != old).any() for p, old in zip(model.parameters(), weights, strict=True))
        torch.testing.assert_close(model(idx), logits, rtol=0, atol=1e-4)
    after = compare_circuits(model)
    for name in CIRCUITS:
        np.testing.assert_allclose(after[name], before[name], rtol=0, atol=1e-5, err_msg=name)


def test_a_head_that_reads_alike_and_writes_otherwise_has_one_circuit_in_common():
    model = make_normed_model("preln")
    (ours, _, _), (theirs, _, _) = (slice_head(model, Head(1, index)) for index in (0, 3))
    ours.copy_(theirs)
    first = list_heads(model.config).index((1, 0))
    found = compare_circuits(model)
    assert found["qk"][first, first + 3] == pytest.approx(1, abs=1e-12)
    assert abs(found["ov"][first, first + 3]) < 0.9
    # A score of the opposite sign is the same circuit with the opposite sign.
    ours[0] *= -1
    assert compare_circuits(model)["qk"][first, first + 3] == pytest.approx(-1, abs=1e-12)


def test_a_head_that_writes_nothing_has_cosine_zero_to_all_others():
    model = make_normed_model("postln")
    slice_head(model, Head(0, 1))[2].zero_()
    found = compare_circuits(model)
    assert not found["ov"][1].any() and found["qk"][1, 1] == 1
