import itertools
import math

import numpy as np
import pytest
import torch

from gpt2 import heads, params, redundancy
from gpt2.files import UserError, read_json
from gpt2.heads import MATRICES, Head, HeadsConfig, attend, capture_heads, compare_heads, cosine, list_heads
from gpt2.model import GPT
from stages import head_similarity
from tests.analysed import BLOCK_SIZE, SECTIONS, make_model, make_windows, prepare_folder, read_outputs
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
    """The MATRICES from whole vectors, one sequence and one head at a time."""
    vectors = {name: [[] for _ in list_heads(model.config)] for name in MATRICES}
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


def test_patterns_equal_those_of_transformers(idx):
    model = make_model()
    reference = make_reference(model)
    with torch.no_grad(), capture_heads(model) as captured:
        model.hidden(idx)
        expected = reference(idx, output_attentions=True).attentions
    assert len(captured.qkv) == len(expected) == model.config.n_layer
    for qkv, pattern in zip(captured.qkv, expected, strict=True):
        ours = attend(qkv, slice(0, BLOCK_SIZE)).transpose(0, 1).float()
        torch.testing.assert_close(ours, pattern, rtol=0, atol=2e-6)


@pytest.mark.parametrize("norm", ["preln", "postln", "deepnorm"])
def test_equals_brute_force(norm, idx):
    model = make_model(norm)
    found, expected = compare_heads(model, idx, batch_size=2), brute_force(model, idx)
    assert tuple(found) == MATRICES
    for name in MATRICES:
        # Batches of another size round the fp32 activations of the model in another way.
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("batch_size", "block_bytes"), [(1, 2**22), (5, 1), (2, 2**15), (5, 2**14)])
def test_independent_of_batch_and_block(batch_size, block_bytes, idx, monkeypatch):
    model = make_model()
    expected = compare_heads(model, idx, batch_size=3)
    monkeypatch.setitem(heads.BLOCK_BYTES, "cpu", block_bytes)
    found = compare_heads(model, idx, batch_size)
    for name in MATRICES:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6, err_msg=name)


def test_rows_of_a_block_are_rows_of_the_whole():
    qkv = torch.randn(2, 10, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    whole, block = attend(qkv, slice(0, 10)), attend(qkv, slice(3, 7))
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
    for name, matrix in compare_heads(model, idx, 5).items():
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


def test_pairs_are_of_one_layer_most_similar_first(idx):
    model = make_model()
    matrices = compare_heads(model, idx, 5)
    pairs = redundancy.list_pairs(model.config, matrices)
    similarities = [pair.similarity for pair in pairs]
    assert similarities == sorted(similarities, reverse=True)
    expected = {(layer, a, b) for layer in range(3) for a, b in itertools.combinations(range(4), 2)}
    assert {pair[:3] for pair in pairs} == expected
    pair = pairs[0]
    i, j = 4 * pair.layer + pair.head_a, 4 * pair.layer + pair.head_b
    assert list(pair[3:]) == [matrices[name][i, j] for name in MATRICES]


def test_refuses_to_pair_lone_heads():
    model = make_model(n_head=1)
    with pytest.raises(UserError, match=r"n_head=1.*set it to 2 or more"):
        redundancy.list_pairs(model.config, dict.fromkeys(MATRICES, np.eye(3)))


def pair_up(*ends: tuple[int, int], layer: int = 0, similarity: float = 0.9) -> list[redundancy.Pair]:
    return [redundancy.Pair(layer, a, b, similarity, 0.5, 0.25, 0.125) for a, b in ends]


def test_clusters_join_pairs_that_share_a_head():
    assert redundancy.cluster(pair_up((4, 5), (0, 1), (2, 3), (1, 3))) == [[0, 1, 2, 3], [4, 5]]
    assert redundancy.cluster([]) == []


def test_summary_counts_what_exceeds_the_threshold():
    config = make_model(n_layer=4).config
    pairs = [
        *pair_up((0, 1), (1, 2), layer=1),
        *pair_up((2, 3), layer=3),
        *pair_up((0, 1), layer=2, similarity=0.85),
        *pair_up((0, 1), layer=0, similarity=0.1),
    ]
    untrained = [*pair_up((0, 1), layer=0), *(pair_up((0, 1), layer=i, similarity=0.7)[0] for i in (1, 2, 3))]
    figures = redundancy.summarise(config, pairs, untrained, threshold=0.85)
    assert (figures["heads"], figures["same_layer_pairs"]) == (16, 5)
    # A cosine equal to the threshold is not above it.
    assert (figures["redundant_pairs"], figures["redundant_heads"]) == (3, 5)
    assert (figures["redundant_clusters"], figures["largest_cluster"]) == (2, 3)
    assert figures["redundant_pairs_middle_percent"] == pytest.approx(100 * 2 / 3, abs=1e-5)
    assert figures["middle_layers_percent"] == 50
    assert (figures["max_similarity"], figures["mean_similarity"]) == (0.9, pytest.approx((2.7 + 0.95) / 5))
    assert (figures["untrained_redundant_pairs"], figures["untrained_mean_similarity"]) == (1, 0.75)
    rows = redundancy.summarise_layers(pairs, untrained, threshold=0.85)
    assert [row.layer for row in rows] == [0, 1, 2, 3]
    assert (rows[1].redundant_pairs, rows[1].redundant_heads, rows[1].clusters) == (2, 3, "0+1+2")
    assert (rows[0].untrained_redundant_pairs, rows[0].untrained_max) == (1, 0.9)


def test_summary_without_redundant_pairs():
    config = make_model().config
    figures = redundancy.summarise(config, pair_up((0, 1)), pair_up((0, 1)), threshold=0.95)
    assert (figures["redundant_pairs"], figures["redundant_heads"], figures["largest_cluster"]) == (0, 0, 0)
    assert figures["redundant_pairs_middle_percent"] == 0


@pytest.mark.parametrize(("n_layer", "middle"), [(12, range(3, 9)), (4, range(1, 3)), (2, range(2)), (1, range(1))])
def test_middle_is_symmetric(n_layer, middle):
    assert redundancy.middle_layers(n_layer) == middle


def test_similarities_survive_the_file(tmp_path, idx):
    model = make_model()
    matrices = compare_heads(model, idx, 5)
    heads.save_similarities(tmp_path / "heads.npz", model.config, matrices, matrices["pattern"])
    assert (heads.load_similarity(tmp_path / "heads.npz", model.config) == matrices["pattern"]).all()
    with np.load(tmp_path / "heads.npz") as saved:
        assert set(saved) == {*MATRICES, "untrained_pattern", "layer", "head"}


def test_refuses_similarities_of_another_model(tmp_path):
    model, other = make_model(), make_model(n_layer=2)
    eye = np.eye(12)
    heads.save_similarities(tmp_path / "heads.npz", model.config, {"pattern": eye}, eye)
    with pytest.raises(UserError, match=r"compares 12 heads.*dvc repro"):
        heads.load_similarity(tmp_path / "heads.npz", other.config)


@pytest.mark.parametrize("content", [None, b"", b"no archive"])
def test_refuses_an_absent_or_damaged_file(tmp_path, content):
    path = tmp_path / "heads.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"heads\.npz cannot be read"):
        heads.load_similarity(path, make_model().config)


@pytest.mark.parametrize(("key", "value"), [("threshold", 1.0), ("threshold", 0), ("n_tokens", 0), ("batch_size", 1.5)])
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
