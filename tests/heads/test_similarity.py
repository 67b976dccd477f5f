"""Cosines of heads equal those of whole vectors, for every norm and block; nulls, thresholds, files and the stage."""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from gpt2.heads import redundancy
from gpt2.heads import similarity as heads
from gpt2.heads.null_models import compare_with_nulls, shuffle_tokens
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
from gpt2.model.gpt import GPT, Block
from gpt2.pipeline import params
from gpt2.pipeline.files import UserError, read_json
from stages import head_similarity
from tests.analysed import BLOCK_SIZE, SECTIONS, make_model, make_windows, prepare_folder, read_outputs
from tests.closure import ROOT
from tests.reference import make_reference


@pytest.fixture
def idx() -> torch.Tensor:
    return make_windows(5)[:, :-1]


def slice_head(model: GPT, head: Head) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of the rows (3, D, C) and biases (3, D) of c_attn and of the columns (C, D) of c_proj of one head."""
    attn = model.h[head.layer].attn
    shape = (attn.n_head, attn.head_dim)
    return (
        attn.c_attn.weight.data.unflatten(0, (3, *shape))[:, head.index],
        attn.c_attn.bias.data.unflatten(0, (3, *shape))[:, head.index],
        attn.c_proj.weight.data.unflatten(1, shape)[:, head.index],
    )


def brute_force(model: GPT, idx: torch.Tensor) -> dict[str, np.ndarray]:
    """The ACTIVITY from whole vectors, one sequence and one head at a time."""
    vectors = {name: [[] for _ in list_heads(model.config)] for name in ACTIVITY}
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
            vectors["output"][i].append(output.flatten())
            vectors["written"][i].append((output @ slice_head(model, Head(layer, h))[2].double().t()).flatten())
    stacked = {name: torch.stack([torch.cat(parts) for parts in rows]) for name, rows in vectors.items()}
    return {name: torch.cosine_similarity(x[:, None], x[None], dim=2).numpy() for name, x in stacked.items()}


def pattern_of(qkv: torch.Tensor) -> torch.Tensor:
    """Patterns (B, H, T, T) of a layer's queries, keys and values (B, T, 3, H, D)."""
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return attend(q, k)


def test_patterns_equal_those_of_transformers(idx):
    model = make_model()
    reference = make_reference(model)
    with torch.no_grad(), capture_heads(model) as captured:
        model.hidden(idx)
        expected = reference(idx, output_attentions=True).attentions
    assert len(captured.qkv) == len(expected) == model.config.n_layer
    for qkv, pattern in zip(captured.qkv, expected, strict=True):
        torch.testing.assert_close(pattern_of(qkv).float(), pattern, rtol=0, atol=2e-6)


def attend_as_transformers(block: Block, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and pattern of transformers' eager GPT-2 attention with the weights of a block, on the same input."""
    config = GPT2Config(n_embd=x.shape[-1], n_head=block.attn.n_head, attn_implementation="eager")
    reference = GPT2Attention(config, layer_idx=0).eval()
    reference.load_state_dict({
        name: tensor.t() if name.endswith("weight") else tensor for name, tensor in block.attn.state_dict().items()
    })  # fmt: skip
    mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min).triu(1)
    return reference(x, attention_mask=mask[None, None], output_attentions=True)[:2]


@pytest.mark.parametrize("norm", ["preln", "postln", "deepnorm"])
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


@pytest.mark.parametrize("norm", ["preln", "postln", "deepnorm"])
def test_equals_brute_force(norm, idx):
    model = make_model(norm)
    found, expected = compare_heads(model, idx, batch_size=2), brute_force(model, idx)
    assert tuple(found) == ACTIVITY
    for name in ACTIVITY:
        # Batches of another size round the fp32 activations of the model in another way.
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6, err_msg=name)


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
    for name in ACTIVITY:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6, err_msg=name)


def test_patterns_alone_are_those_of_all(idx):
    model = make_model()
    every, found = compare_heads(model, idx, 2), compare_heads(model, idx, 2, outputs=False)
    assert tuple(found) == PATTERNS
    assert all((found[name] == every[name]).all() for name in PATTERNS)


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


def test_symmetric_with_ones_on_the_diagonal(idx):
    for matrix in compare_heads(make_model(), idx, 5).values():
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


def test_orthogonal_vectors_have_cosine_zero_and_zero_vectors_too():
    vectors = np.array([[1.0, 0, 0], [0, 2, 0], [3, 0, 0], [0, 0, 0]])
    expected = [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert cosine(vectors @ vectors.T).tolist() == expected


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


def test_causal_masks_alone_make_untrained_heads_alike(idx):
    untrained = GPT(make_model().config, seed=1)
    assert compare_heads(untrained, idx, 5)["pattern"].min() > 0.95
    assert compare_heads(make_model(), idx, 5)["pattern"].min() < 0.9


def test_layers_without_heads_are_left_out(idx):
    model = make_model(heads=(2, 0, 3))
    assert list_heads(model.config) == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    assert {matrix.shape for matrix in compare_heads(model, idx, 5).values()} == {(5, 5)}


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
    for name in PATTERNS:
        assert (found[name] == trained[name]).all()
        assert (found[f"shuffled_{name}"] == shuffled[name]).all() and (shuffled[name] != trained[name]).any()
        assert (found[f"untrained_{name}"] == untrained[name]).all()
    assert set(found) == {
        *SAVED_SIMILARITIES,
        *(f"{null}_{name}" for null in NULLS for name in PATTERNS),
        *UNTRAINED_CIRCUITS,
    }
    assert set(found) == set(redundancy.COSINES.values())
    # Random matrices have nothing in common.
    assert all(abs(found[name] - np.eye(12)).max() < 0.3 for name in UNTRAINED_CIRCUITS)


def test_heads_that_see_positions_alone_are_as_alike_on_shuffled_tokens(idx):
    model = make_model()
    model.wte.weight.data.zero_()
    found = compare_with_nulls(model, idx, HeadsConfig(**SECTIONS["heads"]))
    for name in PATTERNS:
        np.testing.assert_allclose(found[f"shuffled_{name}"], found[name], rtol=0, atol=1e-12)


UNTRAINED_CIRCUITS = ("untrained_qk", "untrained_ov")


def test_pairs_are_of_one_layer_most_similar_first(idx):
    model = make_model()
    matrices = compare_with_nulls(model, idx, HeadsConfig(**SECTIONS["heads"]))
    pairs = redundancy.list_pairs(model.config, matrices)
    similarities = [pair.similarity for pair in pairs]
    assert similarities == sorted(similarities, reverse=True)
    expected = {(layer, a, b) for layer in range(3) for a, b in itertools.combinations(range(4), 2)}
    assert {pair[:3] for pair in pairs} == expected
    pair = pairs[0]
    i, j = 4 * pair.layer + pair.head_a, 4 * pair.layer + pair.head_b
    assert redundancy.Pair._fields[3:] == tuple(redundancy.COSINES)
    assert list(pair[3:]) == [matrices[name][i, j] for name in redundancy.COSINES.values()]


def test_refuses_to_pair_lone_heads():
    model = make_model(n_head=1)
    with pytest.raises(UserError, match=r"n_head=1.*set it to 2 or more"):
        redundancy.list_pairs(model.config, dict.fromkeys(redundancy.COSINES.values(), np.eye(3)))


def pair_up(*ends: tuple[int, int], layer: int = 0, **cosines: float) -> list[redundancy.Pair]:
    cosines = {**dict.fromkeys(redundancy.COSINES, 0.25), "similarity": 0.9, **cosines}
    return [redundancy.Pair(layer, a, b, **cosines) for a, b in ends]


def test_clusters_join_pairs_that_share_a_head():
    assert redundancy.cluster(pair_up((4, 5), (0, 1), (2, 3), (1, 3))) == [[0, 1, 2, 3], [4, 5]]
    assert redundancy.cluster([]) == []


def test_summary_counts_what_exceeds_the_threshold():
    config = make_model(n_layer=4).config
    pairs = [
        *pair_up((0, 1), (1, 2), layer=1, untrained=0.7, shuffled=0.9),
        *pair_up((2, 3), layer=3, untrained=0.7),
        *pair_up((0, 1), layer=2, similarity=0.85, untrained=0.7),
        *pair_up((0, 1), layer=0, similarity=0.1, untrained=0.95, nosink=0.9),
    ]
    figures = redundancy.summarise_pairs(config, pairs, threshold=0.85, null_percentile=95)
    assert (figures["heads"], figures["same_layer_pairs"]) == (16, 5)
    # A cosine equal to the threshold is not above it.
    assert (figures["redundant_pairs"], figures["redundant_heads"], figures["redundant_pairs_nosink"]) == (3, 5, 1)
    assert (figures["redundant_clusters"], figures["largest_cluster"]) == (2, 3)
    assert figures["redundant_pairs_middle_percent"] == pytest.approx(100 * 2 / 3, abs=1e-5)
    assert figures["middle_layers_percent"] == 50
    assert (figures["max_similarity"], figures["mean_similarity"]) == (0.9, pytest.approx((2.7 + 0.95) / 5))
    assert (figures["untrained_redundant_pairs"], figures["untrained_mean_similarity"]) == (1, 0.75)
    assert (figures["shuffled_redundant_pairs"], figures["shuffled_max_similarity"]) == (2, 0.9)
    rows = redundancy.summarise_layers(pairs, threshold=0.85, null_percentile=95)
    assert [row.layer for row in rows] == [0, 1, 2, 3]
    assert (rows[1].redundant_pairs, rows[1].redundant_heads, rows[1].clusters) == (2, 3, "0+1+2")
    assert (rows[0].untrained_redundant_pairs, rows[0].untrained_max) == (1, 0.95)
    assert (rows[1].shuffled_redundant_pairs, rows[1].shuffled_mean) == (2, 0.9)


def test_thresholds_leave_their_share_of_a_null_models_pairs_below():
    ends = list(itertools.combinations(range(15), 2))[:101]
    pairs = [pair_up(end, shuffled=i / 100, untrained=0.5 + i / 1000)[0] for i, end in enumerate(ends)]
    assert redundancy.calibrate_threshold(pairs, "shuffled", 95) == pytest.approx(0.95)
    assert redundancy.calibrate_threshold(pairs, "shuffled", 50) == pytest.approx(0.5)
    figures = redundancy.summarise_pairs(make_model().config, pairs, threshold=0.85, null_percentile=95)
    assert figures["null_percentile"] == 95
    assert (figures["shuffled_threshold"], figures["untrained_threshold"]) == (0.95, 0.595)
    # All trained pairs have 0.9.
    assert (figures["pairs_above_shuffled_threshold"], figures["pairs_above_untrained_threshold"]) == (0, 101)
    figures = redundancy.summarise_pairs(make_model().config, pairs, threshold=0.85, null_percentile=50)
    assert (figures["pairs_above_shuffled_threshold"], figures["shuffled_threshold_nosink"]) == (101, 0.25)
    rows = redundancy.summarise_layers(pairs, threshold=0.85, null_percentile=50)
    assert (rows[0].pairs_above_shuffled_threshold, rows[0].pairs_above_untrained_threshold) == (101, 101)


def test_a_model_that_is_its_own_null_has_the_rest_of_its_pairs_above():
    rng = np.random.default_rng(0)
    ends = list(itertools.combinations(range(40), 2))
    cosines = rng.random(len(ends))
    pairs = [pair_up(end, similarity=x, shuffled=x)[0] for end, x in zip(ends, cosines.tolist(), strict=True)]
    for percentile in (90, 95, 99):
        figures = redundancy.summarise_pairs(make_model().config, pairs, 0.85, percentile)
        expected = len(pairs) * (100 - percentile) / 100
        assert abs(figures["pairs_above_shuffled_threshold"] - expected) <= 1
    assert figures["shuffled_rank_correlation"] == 1


def test_rank_correlation_has_its_ends_and_is_zero_without_variation():
    pairs = [pair_up((0, i), similarity=i / 10, qk=i**2 / 100, ov=-(i**3) / 1000)[0] for i in range(1, 8)]
    assert redundancy.correlate_similarities(pairs, "similarity", "qk") == pytest.approx(1)
    assert redundancy.correlate_similarities(pairs, "similarity", "ov") == pytest.approx(-1)
    assert redundancy.correlate_similarities(pairs, "similarity", "written") == 0
    assert redundancy.correlate_similarities(pairs[:1], "similarity", "qk") == 0


def test_summary_without_redundant_pairs():
    config = make_model().config
    figures = redundancy.summarise_pairs(config, pair_up((0, 1)), threshold=0.95, null_percentile=95)
    assert (figures["redundant_pairs"], figures["redundant_heads"], figures["largest_cluster"]) == (0, 0, 0)
    assert figures["redundant_pairs_middle_percent"] == 0


@pytest.mark.parametrize(("n_layer", "middle"), [(12, range(3, 9)), (4, range(1, 3)), (2, range(2)), (1, range(1))])
def test_middle_is_symmetric(n_layer, middle):
    assert redundancy.middle_layers(n_layer) == middle


def test_similarities_survive_the_file(tmp_path, idx):
    model = make_model()
    matrices = compare_with_nulls(model, idx, HeadsConfig(**SECTIONS["heads"]))
    heads.save_similarities(tmp_path / "heads.npz", model.config, matrices)
    loaded = heads.load_similarities(tmp_path / "heads.npz", model.config)
    assert tuple(loaded) == SAVED_SIMILARITIES == ("pattern", "pattern_nosink", "output", "written", "qk", "ov")
    assert all((loaded[name] == matrices[name]).all() for name in SAVED_SIMILARITIES)
    with np.load(tmp_path / "heads.npz") as saved:
        assert set(saved) == {*SAVED_SIMILARITIES, "untrained_pattern", "shuffled_pattern", "layer", "head"}
        for name in ("untrained_pattern", "shuffled_pattern"):
            assert (saved[name] == matrices[name]).all() and saved[name].dtype == np.float64


def test_refuses_similarities_of_another_model(tmp_path):
    model, other = make_model(), make_model(n_layer=2)
    matrices = dict.fromkeys(redundancy.COSINES.values(), np.eye(12))
    heads.save_similarities(tmp_path / "heads.npz", model.config, matrices)
    with pytest.raises(UserError, match=r"compares 12 heads.*dvc repro"):
        heads.load_similarities(tmp_path / "heads.npz", other.config)


def test_refuses_a_file_of_an_older_version(tmp_path):
    np.savez(tmp_path / "heads.npz", layer=[0], head=[0], pattern=np.eye(1))
    with pytest.raises(UserError, match=r"heads\.npz cannot be read.*pattern_nosink.*dvc repro head-similarity"):
        heads.load_similarities(tmp_path / "heads.npz", make_model().config)


@pytest.mark.parametrize("content", [None, b"", b"no archive"])
def test_refuses_an_absent_or_damaged_file(tmp_path, content):
    path = tmp_path / "heads.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"heads\.npz cannot be read"):
        heads.load_similarities(path, make_model().config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("threshold", 1.0), ("threshold", 0), ("null_percentile", 100), ("n_tokens", 0), ("batch_size", 1.5)],
)
def test_refuses_parameters_by_name(key, value):
    with pytest.raises(UserError, match=f"tiny.heads.{key} = {value}"):
        params.build(HeadsConfig, {**SECTIONS["heads"], key: value}, "tiny.heads")


def test_stage_is_reproducible_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_folder(tmp_path, make_model())
    head_similarity.main()
    first = read_outputs(tmp_path)
    head_similarity.main()
    assert read_outputs(tmp_path) == first
    figures = read_json(tmp_path / "metrics" / "heads.json")
    assert (figures["heads"], figures["threshold"], figures["tokens"]) == (12, 0.85, 200 // BLOCK_SIZE * BLOCK_SIZE)
    lines = {path.stem: path.read_text().splitlines() for path in (tmp_path / "plots/head_similarity").iterdir()}
    assert {name: len(rows) for name, rows in lines.items()} == {"matrix": 13, "layers": 4, "pairs": 19}
    assert lines["matrix"][0].startswith("head,l0h0,l0h1") and lines["matrix"][1].startswith("l0h0,1.0,")


def test_stage_refuses_too_few_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_folder(tmp_path, make_model(), heads={"n_tokens": 10_000})
    with pytest.raises(SystemExit, match=r"head-similarity: data/tokens/val has 500 tokens, 20 windows of 24; 10000 "):
        head_similarity.main()
    assert not (tmp_path / "metrics" / "heads.json").exists()
