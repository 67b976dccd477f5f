"""Cosines of heads equal those of whole vectors, for every norm and block; null models and files."""

import math
import os
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from gpt2.heads import similarity as heads
from gpt2.heads.similarity import (
    ACTIVITY,
    NULLS,
    PATTERNS,
    SAVED_SIMILARITIES,
    Head,
    HeadsConfig,
    attend,
    capture_heads,
    compare_heads,
    cosine,
    list_heads,
)
from gpt2.heads.study import compare_with_nulls, shuffle_tokens
from gpt2.model.gpt import GPT, Block
from gpt2.pipeline import params
from gpt2.pipeline.files import UserError
from tests.analysed import BLOCK_SIZE, NORMS, SECTIONS, make_model, make_windows, slice_head
from tests.closure import ROOT

# Rows and columns of two different heads.
OTHERS = ~np.eye(12, dtype=bool)


@pytest.fixture
def idx() -> torch.Tensor:
    return make_windows(5)[:, :-1]


def brute_force(model: GPT, idx: torch.Tensor) -> dict[str, np.ndarray]:
    """What compare_heads measures, from whole vectors, one sequence and one head at a time."""
    vectors = {name: [[] for _ in list_heads(model.config)] for name in ACTIVITY}
    uniform = torch.ones(idx.shape[1], idx.shape[1], dtype=torch.float64).tril()
    uniform /= uniform.sum(1, keepdim=True)
    for sequence in idx:
        with torch.no_grad(), capture_heads(model) as captured:
            model.hidden(sequence[None])
        for i, (layer, h) in enumerate(list_heads(model.config)):
            q, k, v = captured.qkv[layer][0, :, :, h].double().unbind(1)
            scores = (q @ k.t()) / math.sqrt(q.shape[1])
            pattern = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf).softmax(1)
            output = pattern @ v
            vectors["pattern"][i].append(pattern.flatten())
            vectors["pattern_nosink"][i].append(pattern[:, 1:].flatten())
            vectors["pattern_centred"][i].append((pattern - uniform).flatten())
            vectors["output"][i].append(output.flatten())
            vectors["written"][i].append((output @ slice_head(model, Head(layer, h))[2].double().t()).flatten())
    stacked = {name: torch.stack([torch.cat(parts) for parts in rows]) for name, rows in vectors.items()}
    found = {name: torch.cosine_similarity(x[:, None], x[None], dim=2).numpy() for name, x in stacked.items()}
    alike = torch.cosine_similarity(stacked["pattern"], uniform.flatten().repeat(len(idx))[None], dim=1)
    return found | {"uniform": alike.numpy()}


def pattern_of(qkv: torch.Tensor) -> torch.Tensor:
    """Patterns (B, H, T, T) of a layer's queries, keys and values (B, T, 3, H, D)."""
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return attend(q, k)


def attend_as_transformers(block: Block, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and pattern of transformers' eager GPT-2 attention with the weights of a block, on the same input."""
    config = GPT2Config(n_embd=x.shape[-1], n_head=block.attn.n_head, attn_implementation="eager")
    reference = GPT2Attention(config, layer_idx=0).eval()
    reference.load_state_dict({
        name: tensor.t() if name.endswith("weight") else tensor for name, tensor in block.attn.state_dict().items()
    })  # fmt: skip
    mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min).triu(1)
    return reference(x, attention_mask=mask[None, None], output_attentions=True)[:2]


@pytest.mark.parametrize("norm", NORMS)
def test_patterns_of_every_norm_equal_those_of_transformers_layer_by_layer(norm, idx):
    model, seen = make_model(norm), []

    def keep(module, args, output) -> None:
        seen.append((args[0], output))

    hooks = [block.attn.register_forward_hook(keep) for block in model.h]
    with torch.no_grad(), capture_heads(model) as captured:
        model.hidden(idx)
        for hook in hooks:
            hook.remove()
        for block, qkv, (x, y) in zip(model.h, captured.qkv, seen, strict=True):
            expected_output, expected = attend_as_transformers(block, x)
            torch.testing.assert_close(pattern_of(qkv).float(), expected, rtol=0, atol=2e-6)
            torch.testing.assert_close(y, expected_output, rtol=0, atol=2e-5)
    # Every weight counts: the attention is neither uniform nor of one key alone.
    assert 0.1 < expected.max(-1).values.mean() < 0.9


@pytest.mark.parametrize("norm", NORMS)
def test_equals_brute_force(norm, idx):
    model = make_model(norm)
    found, expected = compare_heads(model, idx, batch_size=2), brute_force(model, idx)
    assert set(found) == {*ACTIVITY, "uniform"}
    for name, cosines in expected.items():
        # Batches of another size round the fp32 activations of the model in another way.
        np.testing.assert_allclose(found[name], cosines, rtol=0, atol=1e-6, err_msg=name)


def test_centred_cosines_are_exact_where_patterns_are_almost_uniform(idx):
    # The first layer of Post-LN reads embeddings of standard deviation 0.02 without a norm.
    model = GPT(make_model("postln").config, seed=1)
    found, expected = compare_heads(model, idx, batch_size=1), brute_force(model, idx)
    assert (1 - found["uniform"][:4] < 1e-9).all()
    np.testing.assert_allclose(found["pattern_centred"], expected["pattern_centred"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("batch_size", "block_bytes", "most_rows", "splits"),
    [(1, 2**22, 1, 1), (5, 1, 1 / 8, 64), (2, 2**15, 1 / 3, 1), (5, 2**14, 1 / 100, 6)],
)
def test_independent_of_batch_and_block(batch_size, block_bytes, most_rows, splits, idx, monkeypatch):
    model = make_model()
    expected = compare_heads(model, idx, batch_size=3)
    monkeypatch.setitem(heads.BLOCK_BYTES, "cpu", block_bytes)
    monkeypatch.setitem(heads.PARTIAL_SUMS, "cpu", splits)
    monkeypatch.setattr(heads, "MOST_ROWS", most_rows)
    found = compare_heads(model, idx, batch_size)
    for name, cosines in expected.items():
        np.testing.assert_allclose(found[name], cosines, rtol=0, atol=1e-6, err_msg=name)


def test_patterns_alone_are_those_of_all(idx):
    model = make_model()
    every, found = compare_heads(model, idx, 2), compare_heads(model, idx, 2, outputs=False)
    assert set(found) == {*PATTERNS, "uniform"}
    assert all((cosines == every[name]).all() for name, cosines in found.items())


MEASURE_MEMORY = """
import re, sys, torch
from pathlib import Path
from gpt2.heads.similarity import BLOCK_BYTES, compare_heads
from gpt2.model.gpt import GPT
from gpt2.model.config import GPTConfig
n, batch_size = map(int, sys.argv[1:])
torch.set_num_threads(1)
shape = {"n_embd": 128, "block_size": 512, "vocab_size": 97, "norm": "preln"}
model = GPT(GPTConfig(n_layer=4, n_head=16, **shape))
idx = torch.randint(97, (n, 512))
# The libraries take room of their own when they are first used.
compare_heads(GPT(GPTConfig(n_layer=1, n_head=2, **shape)), idx[:1], 1)
# getrusage would begin with the size of the process that started this one.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
compare_heads(model, idx, batch_size)
print(peak() - before)
"""


def measure_memory(n: int, batch_size: int) -> int:
    """Bytes by which the resident set grows while n sequences are compared."""
    command = [sys.executable, "-c", MEASURE_MEMORY, str(n), str(batch_size)]
    # What is freed goes back to the system at once, so that the figure is that of live memory.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_batch_and_never_of_whole_patterns():
    L, T, C, M = 4, 512, 128, 64
    forward, slack = 40 * T * C, 2**22
    # The bound knows nothing of the number of sequences.
    for n, batch_size in ((16, 1), (16, 16)):
        bound = 16 * L * batch_size * T * C + 24 * L * T * C + 4 * heads.BLOCK_BYTES["cpu"] + forward * batch_size
        # The maps alone would take 134 MB a sequence.
        assert bound + slack < 8 * batch_size * M * T * T
        assert measure_memory(n, batch_size) < bound + slack


def test_rows_of_a_block_are_rows_of_the_whole():
    q, k = torch.randn(2, 4, 2, 10, 8, generator=torch.Generator().manual_seed(0))
    whole, block = attend(q, k), attend(q[..., 3:7, :], k[..., :7, :])
    torch.testing.assert_close(block, whole[:, :, 3:7, :7], rtol=0, atol=1e-14)
    torch.testing.assert_close(whole.sum(-1), torch.ones(4, 2, 10, dtype=torch.float64))
    assert not whole.triu(1).any()


@pytest.mark.parametrize("kept", [None, (2, 0, 3)])
def test_symmetric_with_ones_on_the_diagonal_and_a_row_for_each_head(kept, idx):
    model = make_model(heads=kept)
    n_heads = sum(model.config.layer_heads)
    found = compare_heads(model, idx, 5)
    assert found["uniform"].shape == (n_heads,)
    for matrix in (found[name] for name in ACTIVITY):
        assert matrix.shape == (n_heads, n_heads)
        assert (matrix == matrix.T).all()
        assert (np.diagonal(matrix) == 1).all()
        assert (np.abs(matrix) <= 1).all()


def test_identical_heads_have_cosine_one(idx):
    model = make_model()
    for ours, theirs in zip(slice_head(model, Head(1, 0)), slice_head(model, Head(1, 3)), strict=True):
        ours.copy_(theirs)
    first, second = list_heads(model.config).index((1, 0)), list_heads(model.config).index((1, 3))
    matrices = compare_with_nulls(model, idx, HeadsConfig(**SECTIONS["heads"]))
    for name in SAVED_SIMILARITIES:
        matrix = matrices[name]
        assert matrix[first, second] == pytest.approx(1, abs=1e-12), name
        assert matrix[first, second + 1] < 0.99, name


def test_heads_that_write_to_different_channels_have_cosine_zero(idx):
    model = make_model()
    slice_head(model, Head(0, 0))[2][16:] = 0
    slice_head(model, Head(0, 1))[2][:16] = 0
    matrices = compare_heads(model, idx, 5)
    assert matrices["written"][0, 1] == 0
    assert abs(matrices["written"][0, 2]) > 0


def test_orthogonal_and_short_vectors_have_cosine_zero():
    vectors = np.array([[1.0, 0, 0], [0, 2, 0], [3, 0, 0], [0, 0, 0]])
    expected = [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert cosine(vectors @ vectors.T).tolist() == expected
    assert cosine(vectors @ vectors.T, least=1).tolist() == [[0] * 4, [0, 1, 0, 0], [0, 0, 1, 0], [0] * 4]


def test_uniform_heads_have_centred_cosine_zero_to_all(idx):
    model = make_model()
    for index in (1, 2):
        rows, biases, _ = slice_head(model, Head(1, index))
        rows[0], biases[0] = 0, 0
    found = compare_heads(model, idx, 2)
    assert not found["pattern_centred"][[5, 6]].any()
    assert found["pattern"][5, 6] == pytest.approx(1, abs=1e-12)
    assert (found["uniform"] == 1).nonzero()[0].tolist() == [5, 6]


def test_heads_that_attend_to_the_first_key_alone_have_cosine_zero_without_it(idx):
    model = make_model()
    # Only the first position is large in channel 0, which is all that the keys of two heads read.
    model.wpe.weight.data[0, 0] = 1e3
    for index in (0, 1):
        rows, biases, _ = slice_head(model, Head(0, index))
        rows[:2], biases[0], biases[1] = 0, 1, 0
        rows[1, :, 0] = 100
    found = compare_heads(model, idx, 2)
    assert not found["pattern_nosink"][:2].any()
    assert found["pattern"][0, 1] == found["pattern_centred"][0, 1] == pytest.approx(1, abs=1e-12)


def test_written_does_not_depend_on_the_basis_of_the_values(idx):
    model = make_model()
    before = compare_heads(model, idx, 5)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    rows, biases, columns = slice_head(model, Head(0, 1))
    rows[2], biases[2] = rotation @ rows[2], rotation @ biases[2]
    columns.copy_(columns @ rotation.t())
    after = compare_heads(model, idx, 5)
    np.testing.assert_allclose(after["written"], before["written"], rtol=0, atol=1e-6)
    assert abs(after["output"] - before["output"]).max() > 0.01


def test_untrained_heads_are_alike_by_their_masks_and_not_when_centred(idx):
    untrained, trained = (compare_heads(model, idx, 5) for model in (GPT(make_model().config, seed=1), make_model()))
    assert untrained["pattern"].min() > 0.95 and trained["pattern"].min() < 0.9
    assert untrained["uniform"].min() > 0.95 and trained["uniform"].max() < 0.9
    assert abs(untrained["pattern_centred"][OTHERS].mean()) < 0.05


def test_layers_without_heads_are_not_listed():
    assert list_heads(make_model(heads=(2, 0, 3)).config) == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]


def test_hooks_are_removed_even_after_an_error(idx):
    model = make_model()
    with pytest.raises(ValueError, match="block_size"), capture_heads(model):
        model.hidden(torch.zeros(1, BLOCK_SIZE + 1, dtype=torch.long))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_refuses_a_model_that_computes_nan(idx):
    model = make_model()
    model.h[1].attn.c_attn.bias.data[0] = math.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        compare_heads(model, idx, 5)


def test_shuffled_tokens_are_the_same_in_another_order():
    rows = make_windows(6)[:, :-1]
    rows[1] = rows[0]
    shuffled = shuffle_tokens(rows, seed=1)
    assert (shuffled.sort(1).values == rows.sort(1).values).all()
    assert ((shuffled == rows).float().mean(1) < 0.5).all()
    # Each window has an order of its own, which the seed alone decides.
    assert (shuffled[0] != shuffled[1]).any()
    assert (shuffle_tokens(rows, seed=1) == shuffled).all() and (shuffle_tokens(rows, seed=2) != shuffled).any()


def test_nulls_are_an_untrained_model_and_shuffled_tokens(idx):
    model, config = make_model(), HeadsConfig(**SECTIONS["heads"])
    found = compare_with_nulls(model, idx, config)
    trained, shuffled = compare_heads(model, idx, 3), compare_heads(model, shuffle_tokens(idx, config.seed), 3)
    untrained = compare_heads(GPT(model.config, config.seed), idx, 3)
    measured = (*PATTERNS, "uniform")
    for name in measured:
        assert (found[name] == trained[name]).all()
        assert (found[f"shuffled_{name}"] == shuffled[name]).all() and (shuffled[name] != trained[name]).any()
        assert (found[f"untrained_{name}"] == untrained[name]).all()
    circuits = {"untrained_qk", "untrained_ov"}
    of_nulls = {f"{null}_{name}" for null in NULLS for name in measured}
    assert set(found) == {*SAVED_SIMILARITIES, "uniform"} | of_nulls | circuits
    # Random matrices have nothing in common.
    assert all(abs(found[name][OTHERS]).max() < 0.3 for name in circuits)


def test_heads_that_see_positions_alone_are_as_alike_on_shuffled_tokens(idx):
    model = make_model()
    model.wte.weight.data.zero_()
    found = compare_with_nulls(model, idx, HeadsConfig(**SECTIONS["heads"]))
    for name in PATTERNS:
        np.testing.assert_allclose(found[f"shuffled_{name}"], found[name], rtol=0, atol=1e-12)


def test_similarities_survive_the_file_for_their_model_alone(tmp_path, idx):
    model = make_model()
    matrices = compare_with_nulls(model, idx, HeadsConfig(**SECTIONS["heads"]))
    heads.save_similarities(tmp_path / "heads.npz", model.config, matrices)
    loaded = heads.load_similarities(tmp_path / "heads.npz", model.config)
    assert tuple(loaded) == SAVED_SIMILARITIES == (*PATTERNS, "output", "written", "qk", "ov")
    assert all((loaded[name] == matrices[name]).all() for name in SAVED_SIMILARITIES)
    with np.load(tmp_path / "heads.npz") as saved:
        assert set(saved) == {*SAVED_SIMILARITIES, "untrained_pattern", "shuffled_pattern", "layer", "head"}
        for name in ("untrained_pattern", "shuffled_pattern"):
            assert (saved[name] == matrices[name]).all() and saved[name].dtype == np.float64
    with pytest.raises(UserError, match=r"heads\.npz compares 12 heads.*dvc repro head-similarity"):
        heads.load_similarities(tmp_path / "heads.npz", make_model(n_layer=2).config)


def test_refuses_a_file_that_is_absent_or_damaged_or_of_an_older_version(tmp_path):
    path = tmp_path / "heads.npz"
    older = BytesIO()
    np.savez(older, layer=[0], head=[0], pattern=np.eye(1))
    for content, reason in ((None, ""), (b"", ""), (b"no archive", ""), (older.getvalue(), "pattern_nosink")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=rf"heads\.npz cannot be read.*{reason}.*dvc repro head-similarity"):
            heads.load_similarities(path, make_model().config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("threshold", 1.0), ("threshold", 0), ("null_percentile", 100), ("n_tokens", 0), ("batch_size", 1.5)],
)
def test_refuses_parameters_by_name(key, value):
    with pytest.raises(UserError, match=f"tiny.heads.{key} = {value}"):
        params.build(HeadsConfig, {**SECTIONS["heads"], key: value}, "tiny.heads")
