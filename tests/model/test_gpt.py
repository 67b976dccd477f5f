"""The network equals transformers' GPT-2; its norms and initial weights are those of their papers."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from gpt2.model.config import GPTConfig
from gpt2.model.evaluate import mean_loss
from gpt2.model.gpt import GPT
from gpt2.train.optim import OptimConfig, build_optimizer
from tests.analysed import BLOCK_SIZE, VOCAB_SIZE, make_model, make_windows
from tests.reference import is_transposed, make_reference

NORMS = ("preln", "postln", "deepnorm")


def make_config(**changed) -> GPTConfig:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 50, "norm": "preln"}
    return GPTConfig(**{**shape, **changed})


def randomise(model: GPT) -> GPT:
    """Move every weight, layer norms and biases too, so that none is left without effect; padding stays zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.wte.weight[model.config.vocab_size :] = 0
    return model


@pytest.mark.parametrize("norm", NORMS)
def test_no_position_sees_a_later_token_and_every_position_sees_the_earlier_ones(norm):
    model, idx = make_model(norm), make_windows(2)[:, :-1]
    with torch.no_grad():
        before = model(idx)
        for position in (0, 1, 11, BLOCK_SIZE - 1):
            changed = idx.clone()
            changed[:, position] = (changed[:, position] + 1) % VOCAB_SIZE
            after = model(changed)
            assert torch.equal(after[:, :position], before[:, :position])
            assert (after[:, position:] != before[:, position:]).any(-1).all()


def test_values_and_gradients_equal_those_of_transformers():
    model = randomise(make_model())
    reference = make_reference(model)
    idx = make_windows(4)[:, :-1]
    expected = reference(idx, labels=idx)
    # Both round in fp32 (6e-8), over sums of a few hundred terms of order one.
    torch.testing.assert_close(model(idx), expected.logits, rtol=1e-5, atol=1e-5)

    loss = model(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.loss.backward()
    theirs = dict(reference.transformer.named_parameters())
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        gradient = parameter.grad[:VOCAB_SIZE] if name == "wte.weight" else parameter.grad
        their_gradient = theirs[name].grad.t() if is_transposed(name) else theirs[name].grad
        torch.testing.assert_close(
            gradient, their_gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_gpt2_has_124439808_parameters():
    model = GPT(make_config(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257))
    assert model.n_params() == 124_439_808
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808 + 47 * 768


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 128), (128, 128), (129, 256), (50257, 50304)])
def test_the_vocabulary_is_padded_to_a_multiple_of_128(vocab_size, padded):
    assert make_config(vocab_size=vocab_size).padded_vocab_size == padded


@pytest.mark.parametrize("norm", NORMS)
def test_the_initial_loss_is_that_of_a_uniform_guess(norm):
    model = GPT(make_config(norm=norm, n_embd=32, vocab_size=1000))
    idx = torch.randint(1000, (64, 9), generator=torch.Generator().manual_seed(0))
    # Logits of variance s add s / 2 to ln(vocab_size); with weights of 0.02 over 32 channels that is below 0.01.
    assert model(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(math.log(1000), abs=0.05)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_logits(with_gradients):
    model, windows = randomise(make_model()), make_windows(3)
    with torch.set_grad_enabled(with_gradients):
        loss = model(windows[:, :-1], windows[:, 1:])
    logits = model(windows[:, :-1])
    assert logits.shape == (3, BLOCK_SIZE, VOCAB_SIZE)
    assert loss.shape == ()
    torch.testing.assert_close(loss, F.cross_entropy(logits.transpose(1, 2), windows[:, 1:]), rtol=1e-5, atol=1e-6)


def test_the_classifier_is_the_token_embedding_itself():
    model = GPT(make_config(vocab_size=300))
    idx = torch.arange(16).view(2, 8)
    assert [name for name, tensor in model.state_dict().items() if len(tensor) == 384] == ["wte.weight"]
    with torch.no_grad():
        torch.testing.assert_close(model(idx), model.hidden(idx) @ model.wte.weight[:300].t())
    # Ids that no input holds get a gradient through the classifier alone.
    model(idx, idx + 1).backward()
    assert model.wte.weight.grad[17:300].any(1).all()


def test_an_output_matrix_of_its_own_makes_the_logits_and_learns_apart_from_the_embedding():
    config, windows = make_config(n_embd=32, vocab_size=VOCAB_SIZE, block_size=BLOCK_SIZE), make_windows(3)
    model, idx, targets = GPT(config, seed=3, tied=False), windows[:, :-1], windows[:, 1:]
    assert model.n_params() == GPT(config).n_params() + VOCAB_SIZE * 32
    # The other weights are those of the tied model.
    tied, state = GPT(config, seed=3).state_dict(), model.state_dict()
    assert state.keys() - tied.keys() == {"lm_head"} and all(torch.equal(state[name], tied[name]) for name in tied)
    assert model.lm_head[:VOCAB_SIZE].std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.lm_head[VOCAB_SIZE:].any()

    loss = model(idx, targets)
    loss.backward()
    logits = F.linear(model.hidden(idx), model.lm_head[:VOCAB_SIZE])
    torch.testing.assert_close(model(idx), logits)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, parameter, gradient in zip(names, parameters, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
        )
    # Ids that no input holds have no gradient through the embedding.
    assert not model.wte.weight.grad[sorted({*range(VOCAB_SIZE)} - {*idx.flatten().tolist()})].any()
    assert mean_loss(model, windows, batch_size=2) == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("norm", ["postln", "deepnorm"])
def test_without_a_final_norm_the_last_block_normalises(norm):
    model, idx = make_model(norm), make_windows(3)[:, :-1]
    assert not [name for name in model.state_dict() if name.startswith("ln_f")]
    with torch.no_grad():
        hidden = model.hidden(idx)
    torch.testing.assert_close(hidden.mean(-1), torch.zeros(3, BLOCK_SIZE), rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden.var(-1, correction=0), torch.ones(3, BLOCK_SIZE), rtol=0, atol=1e-3)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return norm.weight * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() + norm.bias


def attention(x: Tensor, c_attn: nn.Linear, c_proj: nn.Linear, n_head: int) -> Tensor:
    """Head by head and position by position, x (T, C)."""
    queries, keys, values = (x @ c_attn.weight.t() + c_attn.bias).chunk(3, dim=1)
    size = queries.shape[1] // n_head
    out = torch.zeros_like(queries)
    for h in range(n_head):
        columns = slice(h * size, (h + 1) * size)
        for t in range(len(x)):
            scores = keys[: t + 1, columns] @ queries[t, columns] / math.sqrt(size)
            weights = scores.exp() / scores.exp().sum()
            out[t, columns] = weights @ values[: t + 1, columns]
    return out @ c_proj.weight.t() + c_proj.bias


def perceptron(x: Tensor, c_fc: nn.Linear, c_proj: nn.Linear) -> Tensor:
    x = x @ c_fc.weight.t() + c_fc.bias
    x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x @ c_proj.weight.t() + c_proj.bias


def block_by_hand(x: Tensor, block: nn.Module, norm: str, n_layer: int) -> Tensor:
    attn, mlp = block.attn, block.mlp
    if norm == "preln":
        x = x + attention(layer_norm(x, block.ln_1), attn.c_attn, attn.c_proj, attn.n_head)
        return x + perceptron(layer_norm(x, block.ln_2), mlp.c_fc, mlp.c_proj)
    alpha = {"postln": 1.0, "deepnorm": (2 * n_layer) ** (1 / 4)}[norm]
    x = layer_norm(alpha * x + attention(x, attn.c_attn, attn.c_proj, attn.n_head), block.ln_1)
    return layer_norm(alpha * x + perceptron(x, mlp.c_fc, mlp.c_proj), block.ln_2)


@pytest.mark.parametrize("norm", NORMS)
def test_a_block_equals_the_formula_of_its_norm(norm):
    # Layer 1 has lost a head, so that its width is not the model's.
    block = randomise(make_model(norm, heads=(4, 3, 4))).h[1].double()
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x[None])[0], block_by_hand(x, block, norm, n_layer=3), rtol=0, atol=1e-12)


def expected_deviations(norm: str, n_layer: int, width: int) -> dict[str, float]:
    """Standard deviation of each matrix of a block, by the papers of the norms."""
    plain = dict.fromkeys(("query", "key", "value", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), 0.02)
    if norm == "preln":
        into_residual = 0.02 / math.sqrt(2 * n_layer)
        return {**plain, "attn.c_proj": into_residual, "mlp.c_proj": into_residual}
    if norm == "postln":
        return plain
    square, beta = math.sqrt(2 / (width + width)), (8 * n_layer) ** (-1 / 4)
    oblong = math.sqrt(2 / (width + 4 * width))
    return {
        **{"query": square, "key": square, "value": beta * square, "attn.c_proj": beta * square},
        **{"mlp.c_fc": beta * oblong, "mlp.c_proj": beta * oblong},
    }


@pytest.mark.parametrize("norm", NORMS)
def test_initial_weights_have_the_deviations_of_the_papers(norm):
    model = GPT(make_config(norm=norm, n_layer=3, n_embd=256, block_size=128, vocab_size=500), seed=5)
    expected = expected_deviations(norm, n_layer=3, width=256)
    for block in model.h:
        modules = {"attn.c_proj": block.attn.c_proj, "mlp.c_fc": block.mlp.c_fc, "mlp.c_proj": block.mlp.c_proj}
        weights = dict(zip(("query", "key", "value"), block.attn.c_attn.weight.chunk(3), strict=True))
        weights |= {name: module.weight for name, module in modules.items()}
        for name, weight in weights.items():
            # A sample of 65,536 knows its deviation to 0.3 %.
            assert weight.std().item() == pytest.approx(expected[name], rel=0.02), name
            assert abs(weight.mean().item()) < 0.02 * expected[name], name
    assert model.wte.weight[:500].std().item() == pytest.approx(0.02, rel=0.02)
    assert model.wpe.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == float("ln_" in name and name.endswith("weight"))).all(), name


@pytest.mark.parametrize("norm", NORMS)
def test_the_initial_scale_multiplies_all_but_the_matrices_of_deepnorm(norm):
    config = make_config(norm=norm)
    narrow, wide = (GPT(config, seed=5, init_std=std).state_dict() for std in (0.02, 0.1))
    assert all(torch.equal(tensor, narrow[name]) for name, tensor in GPT(config, seed=5).state_dict().items())
    for name, tensor in narrow.items():
        scaled = tensor.dim() == 2 and (norm != "deepnorm" or name.startswith("w"))
        torch.testing.assert_close(wide[name], 5 * tensor if scaled else tensor)


@pytest.mark.parametrize("norm", NORMS)
def test_a_model_without_options_has_the_weights_drawn_for_gpt2_one_after_another(norm):
    config = make_config(norm=norm)
    state, generator = GPT(config, seed=7).state_dict(), torch.Generator().manual_seed(7)
    beta = (8 * 2) ** -0.25
    for name in [name for name, tensor in state.items() if tensor.dim() == 2]:
        std = 0.02 / math.sqrt(2 * 2) if norm == "preln" and "c_proj" in name else 0.02
        if norm == "deepnorm" and "c_" in name:
            fan_out, fan_in = state[name].shape
            std = beta * math.sqrt(2 / (fan_in + (fan_out // 3 if "c_attn" in name else fan_out)))
        drawn = torch.empty_like(state[name]).normal_(std=std, generator=generator)
        if norm == "deepnorm" and "c_attn" in name:
            drawn[: 2 * 16] /= beta
        if name == "wte.weight":
            drawn[50:] = 0
        assert torch.equal(state[name], drawn), name


def test_padded_rows_stay_zero_through_optimizer_steps():
    model, windows = make_model(), make_windows(4)
    settings = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "grad_clip": 1.0}
    optimizer = build_optimizer(model, OptimConfig(**settings, max_steps=9, max_lr=0.1, min_lr=0.1, warmup_steps=0))
    before = model.wte.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(windows[:, :-1], windows[:, 1:]).backward()
        assert not model.wte.weight.grad[VOCAB_SIZE:].any()
        optimizer.step()
    assert model.config.padded_vocab_size > VOCAB_SIZE
    assert not model.wte.weight[VOCAB_SIZE:].any()
    assert (model.wte.weight[:VOCAB_SIZE] != before[:VOCAB_SIZE]).all()


def test_the_seed_alone_decides_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    first = GPT(make_config(), seed=7).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = GPT(make_config(), seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = GPT(make_config(), seed=8).state_dict()
    assert not torch.equal(first["wte.weight"], other["wte.weight"])


def test_a_sequence_beyond_the_context_is_refused_with_both_lengths():
    model = GPT(make_config())
    assert model(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 50)
    with pytest.raises(ValueError, match="9 tokens exceeds block_size=8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("norm", NORMS)
def test_a_layer_without_heads_adds_its_bias_alone(norm):
    bare, whole = make_model(norm, heads=(4, 0, 4)), make_model(norm)
    state = whole.state_dict()
    state["h.1.attn.c_attn.weight"] = state["h.1.attn.c_attn.weight"][:0]
    state["h.1.attn.c_attn.bias"] = state["h.1.attn.c_attn.bias"][:0]
    state["h.1.attn.c_proj.weight"] = state["h.1.attn.c_proj.weight"][:, :0]
    bare.load_state_dict(state)
    whole.h[1].attn.c_proj.weight.data.zero_()
    windows = make_windows(3)
    loss = bare(windows[:, :-1], windows[:, 1:])
    torch.testing.assert_close(loss, whole(windows[:, :-1], windows[:, 1:]))
    loss.backward()
    assert bare.h[1].attn.c_proj.bias.grad.any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_embd": 15}, "n_embd=15 must be a multiple of n_head=2; nearest: 16"),
        ({"heads": (1,)}, r"heads=\(1,\) must list one number for each of n_layer=2 layers"),
        ({"heads": (2, 3)}, r"heads=\(2, 3\) must not exceed n_head=2"),
        ({"heads": (2, -1)}, "heads.1"),
        ({"norm": "rms"}, "'preln', 'postln' or 'deepnorm'"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changed, message):
    with pytest.raises(ValidationError, match=message):
        make_config(**changed)
