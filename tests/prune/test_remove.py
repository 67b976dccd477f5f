"""Removal of heads, criteria, the frontier, and the stage that writes them."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpt2.data.shards import TokenSet
from gpt2.data.windows import spread_windows
from gpt2.heads.similarity import SAVED_SIMILARITIES, Head, list_heads
from gpt2.model import flops as costs
from gpt2.model.config import GPTConfig
from gpt2.model.evaluate import mean_loss
from gpt2.model.gpt import GPT
from gpt2.model.weights import load_model, save_model
from gpt2.pipeline import params
from gpt2.pipeline.files import UserError, read_json
from gpt2.prune import criteria, frontier
from gpt2.prune.bootstrap import draw_weights
from gpt2.prune.criteria import SIMILAR_ORDERS, make_masks, mask_heads, order_by_redundancy, order_by_score
from gpt2.prune.frontier import Evaluator, Frontier
from gpt2.prune.remove import PruneConfig, count_removals, remove_heads
from gpt2.prune.repair import gather_calibration, remove_and_repair
from gpt2.prune.study import loss_without_attention, read_text
from stages import head_similarity
from stages import prune as prune_stage
from tests.analysed import (
    BLOCK_SIZE,
    NORMS,
    REMOVED,
    SECTIONS,
    make_evaluator,
    make_model,
    make_windows,
    prepare_folder,
    read_outputs,
    slice_head,
)


@torch.no_grad()
def masked_logits(model: GPT, idx: torch.Tensor, removed: list[Head]) -> torch.Tensor:
    with mask_heads(model, make_masks(model, removed)):
        return model(idx)


@pytest.fixture
def windows() -> torch.Tensor:
    return make_windows(5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("removed", [[Head(2, 0)], REMOVED, [*REMOVED, Head(0, 0), Head(0, 1), Head(2, 3)]], ids=len)
def test_pruned_model_equals_masked_model(norm, removed, windows):
    model = make_model(norm)
    pruned = remove_heads(model, removed)
    assert sum(pruned.config.layer_heads) == 12 - len(removed)
    with torch.no_grad():
        found = pruned(windows[:, :-1])
    # Logits are of order 1 to 10; sums over fewer channels round differently in fp32.
    torch.testing.assert_close(found, masked_logits(model, windows[:, :-1], removed), rtol=0, atol=2e-5)
    assert (found - model(windows[:, :-1])).abs().max() > 1e-3


def test_masking_equals_zeroing_columns_of_c_proj_and_ends_with_the_context(windows):
    model, idx = make_model(), windows[:, :-1]
    whole, masked = model(idx), masked_logits(model, idx, REMOVED)
    assert torch.equal(model(idx), whole) and torch.equal(masked_logits(model, idx, []), whole)
    for head in REMOVED:
        slice_head(model, head)[2].zero_()
    torch.testing.assert_close(masked, model(idx), rtol=0, atol=2e-5)
    assert not torch.equal(masked, whole)


def test_removal_leaves_the_model_as_it_was(windows):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = remove_heads(model, REMOVED)
    for parameter in pruned.parameters():
        parameter.data.zero_()
    assert model.config.heads is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_removing_nothing_gives_the_whole_model(windows):
    model = make_model()
    same = remove_heads(model, [])
    assert same.config == model.config
    assert torch.equal(same(windows[:, :-1]), model(windows[:, :-1]))


def test_pruned_model_survives_the_disk(tmp_path, windows):
    pruned = remove_heads(make_model("deepnorm"), REMOVED)
    save_model(pruned, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config.heads == (3, 0, 4)
    assert torch.equal(loaded(windows[:, :-1]), pruned(windows[:, :-1]))
    assert not loaded.training and not any(module.training for module in pruned.modules())


def test_refuses_to_remove_all_heads():
    model = make_model()
    with pytest.raises(UserError, match="12 of 12 heads: a model must keep one"):
        remove_heads(model, list_heads(model.config))


@pytest.mark.parametrize("head", [Head(0, 4), Head(3, 0), Head(-1, 0)])
def test_refuses_to_remove_a_head_that_is_not_there(head):
    with pytest.raises(UserError, match=rf"removed=\[\({head.layer}, {head.index}\)\]: the model has no such"):
        remove_heads(make_model(), [head])


def test_refuses_to_prune_twice():
    pruned = remove_heads(make_model(), REMOVED)
    with pytest.raises(UserError, match=r"already pruned, heads=\[3, 0, 4\]"):
        remove_heads(pruned, [Head(0, 0)])
    with pytest.raises(UserError, match="already pruned"):
        count_removals(pruned, [0.5])


def test_counts_hold_the_whole_model_the_claim_and_each_share_once():
    # 15 % of 12 heads are 1.8; so are 0.16.
    assert count_removals(make_model(), [0.5, 0.16, 0.75]) == [0, 2, 6, 9]


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_refuses_shares_of_no_head_or_all(share):
    with pytest.raises(UserError, match=rf"prune\.shares contains {share}, which is (0|12) of 12 heads"):
        count_removals(make_model(), [0.5, share])


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("shares", [0.5, 1.0], r"tiny.prune.shares.1 = 1.0"),
        ("shares", [0.0], r"tiny.prune.shares.0 = 0.0"),
        ("shares", [], r"tiny.prune.shares = \[\]"),
        ("shares", [0.5, 0.5], r"shares=\[0.5, 0.5\] must not repeat"),
        ("random_seeds", [1, 1], r"random_seeds=\[1, 1\] must not repeat"),
        ("random_seeds", [], r"tiny.prune.random_seeds = \[\]"),
        ("limit_percent", 0, r"tiny.prune.limit_percent = 0"),
        ("calibration_tokens", 0, r"tiny.prune.calibration_tokens = 0"),
        ("random_sets", 0, r"tiny.prune.random_sets = 0"),
        ("shares", [float("nan")], r"tiny.prune.shares.0 = nan"),
        ("ridge", 0, r"tiny.prune.ridge = 0"),
    ],
)
def test_refuses_parameters_by_name(key, value, named):
    with pytest.raises(UserError, match=named):
        params.build(PruneConfig, {**SECTIONS["prune"], key: value}, "tiny.prune")


def test_redundancy_takes_the_head_that_is_more_like_the_others():
    heads = [Head(0, 0), Head(0, 1), Head(0, 2), Head(1, 0), Head(1, 1)]
    similarity = np.eye(5)
    for (i, j), value in {(0, 1): 0.9, (0, 2): 0.1, (1, 2): 0.6, (3, 4): 0.8, (2, 3): 0.99, (0, 4): 0.3}.items():
        similarity[i, j] = similarity[j, i] = value
    # 0-1 is the closest pair of a layer, and 1 is the closer to 2. Then 3-4, a tie: the later. Then 0-2, a tie.
    # One head a layer is left: 0 and 3.
    expected = [Head(0, 1), Head(1, 1), Head(0, 2), Head(1, 0), Head(0, 0)]
    assert order_by_redundancy(similarity, heads) == expected


def test_redundancy_keeps_a_head_in_each_layer_while_pairs_are_left():
    generator = np.random.default_rng(0)
    heads = list_heads(make_model().config)
    random = generator.uniform(-1, 1, (12, 12))
    order = order_by_redundancy((random + random.T) / 2, heads)
    assert sorted(order) == heads
    assert {head.layer for head in order[9:]} == {0, 1, 2}


def test_other_similarities_rank_heads_by_their_own_matrix():
    rng, heads = np.random.default_rng(0), list_heads(make_model().config)
    matrices = {name: rng.uniform(-1, 1, (12, 12)) for name in SAVED_SIMILARITIES}
    similarities = {name: matrix + matrix.T for name, matrix in matrices.items()}
    assert SIMILAR_ORDERS == ("pattern_nosink", "output", "written", "qk", "ov")
    assert criteria.rank_by_similarity(similarities, heads) == {
        f"similarity_{name}": [order_by_redundancy(similarities[name], heads)] for name in SIMILAR_ORDERS
    }


def test_taylor_equals_finite_differences(windows):
    model = make_model()
    found = criteria.score_taylor(model, windows, batch_size=2)
    exact = make_model().double()

    def window_losses(head: Head, mask: float) -> torch.Tensor:
        masks = [row.double() for row in make_masks(exact)]
        masks[head.layer][head.index] = mask
        with torch.no_grad(), mask_heads(exact, masks):
            logits = exact(windows[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)

    step = 1e-4
    for layer, scores in enumerate(found):
        slopes = [
            (window_losses(Head(layer, h), 1 + step) - window_losses(Head(layer, h), 1 - step)) / (2 * step)
            for h in range(4)
        ]
        expected = torch.stack([slope.abs().mean() for slope in slopes])
        torch.testing.assert_close(scores, expected / expected.norm(), rtol=1e-3, atol=1e-5)
        assert scores.norm() == pytest.approx(1)


def test_taylor_does_not_depend_on_the_batch_size_and_leaves_no_gradients(windows):
    model = make_model("postln")
    one, all_at_once = (criteria.score_taylor(model, windows, batch_size) for batch_size in (1, 5))
    torch.testing.assert_close(one, all_at_once, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_magnitude_is_the_norm_of_all_weights_of_a_head():
    model = make_model()
    attn = model.h[1].attn
    rows = [attn.c_attn.weight[part * 32 + 2 * 8 : part * 32 + 3 * 8].flatten() for part in range(3)]
    expected = torch.cat([*rows, attn.c_proj.weight[:, 16:24].flatten()]).norm()
    assert criteria.score_magnitude(model)[1][2].item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_head_without_effect_goes_first(windows):
    model = make_model()
    attn = model.h[2].attn
    attn.c_proj.weight.data[:, 8:16] = 0
    assert order_by_score(criteria.score_taylor(model, windows, 5))[0] == Head(2, 1)
    assert order_by_score(criteria.score_magnitude(model))[0] == Head(2, 1)


def test_equal_scores_go_by_position():
    scores = [torch.tensor([1.0, 0.5]), torch.tensor([0.5, 1.0])]
    assert order_by_score(scores) == [Head(0, 1), Head(1, 0), Head(0, 0), Head(1, 1)]


def test_every_criterion_orders_all_heads(windows):
    model = make_model()
    orders = criteria.rank_heads(model, np.eye(12), criteria.score_taylor(model, windows, 5), seeds=[0, 1, 0])
    assert list(orders) == ["redundancy", "taylor", "magnitude", "random"]
    for ranked in orders.values():
        assert all(sorted(order) == list_heads(model.config) for order in ranked)
    first, second, again = orders["random"]
    assert first == again != second


def make_orders(model: GPT, windows: torch.Tensor) -> dict[str, list]:
    """An order by each criterion of COLUMNS; the iterative ones are those of other criteria here."""
    orders = criteria.rank_heads(model, np.eye(12), criteria.score_taylor(model, windows, 5), seeds=[0, 1, 2])
    return orders | {"taylor_iterative": orders["magnitude"], "loss": orders["taylor"]}


def test_frontier_is_the_perplexity_of_the_pruned_models(windows):
    model = make_model()
    orders = make_orders(model, windows)
    calibration = gather_calibration(model, make_windows(20, seed=6), 5, 1e-3, np.eye(12))
    measured = frontier.measure_frontier(Evaluator(model, calibration, windows, 5), orders, [0, 2, 6])
    assert list(measured.losses) == [column.name for column in frontier.COLUMNS]

    def perplexity(pruned: GPT):
        return pytest.approx(math.exp(mean_loss(pruned, windows, 5)), rel=1e-12)

    assert all(values[0] == perplexity(model) for values in measured.perplexity.values())
    assert measured.perplexity["magnitude"][2] == perplexity(remove_heads(model, orders["magnitude"][0][:6]))
    samples = [math.exp(mean_loss(remove_heads(model, order[:2]), windows, 5)) for order in orders["random"]]
    random = [measured.perplexity[name][1] for name in ("random", "random_low", "random_high")]
    assert random == [pytest.approx(value) for value in (sum(samples) / 3, min(samples), max(samples))]
    for column in (column for column in frontier.COLUMNS if column.repair in ("mean", "merge", "merge_refit")):
        repaired = remove_and_repair(model, orders[column.criterion][0][:6], column.repair, calibration)
        assert measured.perplexity[column.name][2] == perplexity(repaired)
    refitted = remove_and_repair(model, orders["random"][2][:6], "refit", calibration)
    found = math.exp(mean_loss(refitted, windows, 5))
    assert measured.perplexity["random_refit_low"][2] <= found <= measured.perplexity["random_refit_high"][2]


def test_a_set_of_heads_is_evaluated_once(windows, monkeypatch):
    model, passes = make_model(), []
    count = frontier.window_losses
    monkeypatch.setattr(frontier, "window_losses", lambda *given: passes.append(given) or count(*given))
    evaluator = make_evaluator(model, windows)
    heads = list_heads(model.config)
    for order in (heads[:2], heads[1::-1], [], heads[:3]):
        for repair in ("none", "refit"):
            evaluator.losses(order, repair)
    # The whole model, and two sets with and without repair.
    assert len(passes) == 5
    assert evaluator.losses(heads[:2]) is evaluator.losses(heads[1::-1])


def make_frontier(**rises: list[float]) -> Frontier:
    """A frontier of 0, 1, 2 and 3 heads from rises in percent of a perplexity of 100, equal in two windows."""
    columns = {column.name: [50, 50, 50] for column in frontier.COLUMNS} | rises
    losses = {
        name: [np.full((1, 2), math.log(100 + rise)) for rise in (0, *values)] for name, values in columns.items()
    }
    return Frontier([0, 1, 2, 3], losses)


ORDERS = {
    name: [[Head(layer, i) for layer in range(4)]]
    for i, name in enumerate(dict.fromkeys(column.criterion for column in frontier.COLUMNS))
}


def test_rise_and_most_removed():
    measured = make_frontier(taylor=[6, 4, 5.001])
    assert measured.rise_percent("taylor", 1) == pytest.approx(6)
    # The largest below the limit counts, whatever a smaller one costs.
    assert measured.most_removed("taylor", 5.0) == 2
    assert measured.most_removed("taylor", measured.rise_percent("taylor", 2)) == 0
    assert measured.most_removed("magnitude", 5.0) == 0


@pytest.mark.parametrize(
    ("rises", "name", "n_removed"),
    [
        ({"redundancy": [1, 2, 9], "taylor": [1, 2, 3]}, "taylor", 3),
        ({"redundancy": [1, 2, 9], "magnitude": [3, 1, 9]}, "magnitude", 2),
        ({"taylor": [1, 2, 9], "taylor_refit": [1, 1, 4]}, "taylor_refit", 3),
        ({"redundancy": [1, 9, 9], "random": [-9, -9, -9], "random_refit": [-9, -9, -9]}, "redundancy", 1),
        ({}, "redundancy", 0),
    ],
    ids=["more heads win", "then lower perplexity", "repairs count", "random decides nothing", "none qualifies"],
)
def test_choice_of_the_saved_model(rises, name, n_removed):
    chosen, removed = frontier.choose_removed(make_frontier(**rises), ORDERS, limit_percent=5.0)
    assert (chosen.name, removed) == (name, ORDERS[chosen.criterion][0][:n_removed])


def test_columns_are_measured_down_to_the_largest_set_below_the_limit(windows):
    model = make_model()
    evaluator, orders, counts = make_evaluator(model, windows), make_orders(model, windows), [0, 2, 4, 6, 8]
    full = frontier.measure_frontier(evaluator, orders, counts)
    for limit in (0.0, np.median([full.rise_percent("random", count) for count in counts[1:]]), 1e9):
        part = frontier.measure_frontier(evaluator, orders, counts, limit_percent=limit)
        for name in full.perplexity:
            most = full.most_removed(name, limit)
            assert part.most_removed(name, limit) == most
            assert part.rise_percent(name, most) == full.rise_percent(name, most)
    assert all(np.isnan(rows[1]).all() and not np.isnan(rows[-1]).any() for rows in part.losses.values())


def test_selection_windows_choose_and_test_windows_judge():
    selection = make_frontier(taylor=[1, 2, 5.1])
    chosen, removed = frontier.choose_removed(selection, ORDERS, limit_percent=5.0)
    assert (chosen.name, len(removed)) == ("taylor", 2)
    # 15 % of 12 heads are 2. The rises on the test windows change nothing of the choice.
    for rise in (2, 9):
        test = make_frontier(taylor=[1, rise, 4.9], loss=[1, 9, 9])
        weights = draw_weights(np.arange(2))
        figures = frontier.summarise_frontier(make_model(), test, selection, chosen, removed, weights)
        assert figures["taylor_perplexity_rise_percent_at_15"] == pytest.approx(rise)
        assert figures["pruned_perplexity_rise_percent"] == pytest.approx(rise)
        assert figures["taylor_max_pruned_percent_below_5"] == pytest.approx(100 * 2 / 12, abs=1e-5)
        assert figures["loss_max_pruned_percent_below_5"] == 0


@pytest.mark.parametrize(("scoring", "selection"), [(100, 50), (96, 96), (24, 300)])
def test_scoring_and_selection_windows_are_disjoint_and_spread_over_the_split(scoring, selection, tmp_path):
    prepare_folder(tmp_path, make_model())
    values = SECTIONS["prune"] | {"scoring_tokens": scoring, "selection_tokens": selection}
    text = read_text(tmp_path / "data" / "tokens", BLOCK_SIZE, params.build(PruneConfig, values, "tiny.prune"))
    assert (len(text.scoring), len(text.selection)) == (scoring // BLOCK_SIZE, selection // BLOCK_SIZE)
    stream = TokenSet(tmp_path / "data" / "tokens", "val").read(0, 500).astype(np.int64)
    positions = {tuple(stream[start : start + BLOCK_SIZE + 1]): start for start in range(500 - BLOCK_SIZE)}
    starts = [[positions[tuple(window.tolist())] for window in windows] for windows in (text.scoring, text.selection)]
    assert len({start // BLOCK_SIZE for start in (*starts[0], *starts[1])}) == len(starts[0]) + len(starts[1])
    for own in starts:
        assert max(np.diff([0, *own, 500])) <= 2.5 * 500 / (1 + len(own))


def test_costs_count_what_the_pruned_model_has():
    model = make_model()
    pruned = remove_heads(model, REMOVED)
    config = model.config
    assert pruned.n_params() == model.n_params() - len(REMOVED) * costs.params_per_head(config)
    products = [module.weight.numel() for module in pruned.modules() if isinstance(module, nn.Linear)]
    weights = sum(products) + config.vocab_size * config.n_embd
    attention = 4 * 7 * config.head_dim * config.block_size
    assert costs.flops_per_token(config, 7) == 2 * weights + attention


def test_costs_of_gpt2():
    config = GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, norm="preln")
    # Keys and values of 12 layers of 768 channels in two bytes.
    assert costs.kv_cache_bytes_per_token(144, config.head_dim) == 12 * 2 * 768 * 2
    # 22 heads are 15 % of the heads, but 3.5 % of the parameters.
    assert 22 * costs.params_per_head(config) / 124_439_808 == pytest.approx(0.035, abs=5e-4)


def run_stages(folder, monkeypatch, model: GPT, **changed: dict) -> None:
    monkeypatch.chdir(folder)
    prepare_folder(folder, model, **changed)
    head_similarity.main()
    prune_stage.main()


def test_stage_is_reproducible_bit_for_bit(tmp_path, monkeypatch):
    model = make_model()
    run_stages(tmp_path, monkeypatch, model, prune={"limit_percent": 1000.0})
    first = read_outputs(tmp_path)
    prune_stage.main()
    assert read_outputs(tmp_path) == first
    figures = read_json(tmp_path / "metrics" / "prune.json")
    assert figures["heads_removed_at_15"] == 2
    assert all(
        f"{prefix}{key}" in figures
        for prefix in ("", *(f"{column.name}_" for column in frontier.COLUMNS if column.name != "redundancy"))
        for key in ("perplexity_rise_percent_at_15", "max_pruned_percent_below_5")
    )
    tables = {path.stem: pd.read_csv(path) for path in (tmp_path / "plots" / "prune").iterdir()}
    assert len(tables["heads"]) == 12
    assert -1 <= figures["similarity_rank_correlation"] <= 1
    # The limit lets every share pass; half of the heads is the largest.
    pruned = load_model(tmp_path / "models" / "pruned")
    assert sum(pruned.config.layer_heads) == 12 - figures["pruned_heads"] == 6
    assert pruned.n_params() == figures["pruned_params"]
    assert sum(figures[f"pruned_by_{column.name}"] for column in frontier.SELECTABLE) == 1
    assert figures["calibration_tokens"] == 288
    assert tables["frontier"]["heads_removed"].tolist() == [0, 1, 2, 6]
    assert tables["frontier"]["redundancy"][0] == figures["baseline_perplexity"]
    rise = 100 * (tables["frontier"]["taylor"][2] / figures["baseline_perplexity"] - 1)
    assert figures["taylor_perplexity_rise_percent_at_15"] == pytest.approx(rise, abs=1e-4)
    assert -1 <= figures["pruned_hellaswag_acc_norm_difference"] <= 1 and figures["random_sets"] == 3
    assert (figures["scoring_tokens"], figures["selection_tokens"]) == (96, 48)
    # The invented tokens are a single document.
    assert figures["eval_document_groups"] == 1 and figures["attention_loss"] != 0
    for key in ("", "similarity_qk_"):
        low, rise, high = (figures[f"{key}perplexity_rise_percent_at_15{end}"] for end in ("_low", "", "_high"))
        assert low < rise < high
        assert 0 <= figures[f"{key}cheaper_random_sets_at_15"] <= 3
        assert figures[f"{key}matched_random_sets_at_15"] == 3 >= figures[f"{key}cheaper_matched_random_sets_at_15"]
    intervals, names = tables["intervals"], [column.name for column in (*frontier.COLUMNS, *frontier.SIMILAR)]
    measured = [(name, count) for name in names for count in (1, 2, 6)]
    assert list(zip(intervals["column"], intervals["heads_removed"], strict=True)) == measured
    assert (intervals["low"] < intervals["rise_percent"]).all() and (
        intervals["rise_percent"] < intervals["high"]
    ).all()
    assert set(tables["similarities"]["order"]) == {"redundancy", *SIMILAR_ORDERS}
    models = ["pruned", *(f"heads_removed_{count}" for count in (0, 1, 2, 6))]
    timed = read_json(tmp_path / "metrics" / "speed" / "prune.json")
    assert timed.keys() >= {f"{name}_{phase}_tokens_per_s" for name in models for phase in ("prefill", "decode")}


def test_attention_loss_is_the_rise_without_the_output_of_any_head(windows):
    model, silent = make_model(), make_model()
    for block in silent.h:
        block.attn.c_proj.weight.data.zero_()
    found = loss_without_attention(model, windows, 2)
    assert found == pytest.approx(mean_loss(silent, windows, 2), abs=1e-6) != mean_loss(model, windows, 2)


def test_stage_saves_the_whole_model_when_no_share_qualifies(tmp_path, monkeypatch):
    # The model is trained on the validation and test tokens, so that each head that it loses costs something.
    model = make_model()
    prepare_folder(tmp_path, model, prune={"limit_percent": 1e-6})
    learned = torch.cat(
        [spread_windows(TokenSet(tmp_path / "data" / "tokens", split), BLOCK_SIZE, 480) for split in ("val", "test")]
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(learned[:, :-1], learned[:, 1:]).backward()
        optimizer.step()
    save_model(model, tmp_path / "models" / "gpt2")
    monkeypatch.chdir(tmp_path)
    head_similarity.main()
    prune_stage.main()
    figures = read_json(tmp_path / "metrics" / "prune.json")
    assert figures["perplexity_rise_percent_at_15"] > 1
    assert (figures["pruned_heads"], figures["pruned_perplexity"]) == (0, figures["baseline_perplexity"])
    assert {figures[f"pruned_by_{column.name}"] for column in frontier.SELECTABLE} == {0}
    saved = load_model(tmp_path / "models" / "pruned")
    assert saved.config == model.config
    assert torch.equal(saved(learned[:, :-1]), load_model(tmp_path / "models" / "gpt2")(learned[:, :-1]))


def test_stage_trains_the_pruned_model_if_asked(tmp_path, monkeypatch):
    model = make_model()
    run_stages(tmp_path, monkeypatch, model, prune={"limit_percent": 1000.0, "recovery_steps": 3})
    figures = read_json(tmp_path / "metrics" / "prune.json")
    saved = load_model(tmp_path / "models" / "pruned")
    windows = spread_windows(TokenSet(tmp_path / "data" / "tokens", "test"), BLOCK_SIZE, 200)
    assert figures["pruned_perplexity"] == pytest.approx(math.exp(mean_loss(saved, windows, 3)), abs=1e-5)
    assert figures["pruned_perplexity"] != figures["pruned_perplexity_before_recovery"]
    assert (figures["recovery_steps"], figures["pruned_heads"]) == (3, 6)


@pytest.mark.parametrize(
    ("key", "split"), [("scoring_tokens", "val"), ("eval_tokens", "test"), ("calibration_tokens", "train")]
)
def test_stage_refuses_too_few_tokens(key, split, tmp_path, monkeypatch):
    message = rf"prune: data/tokens/{split} has 500 tokens, 20 windows of 24; \d+ tokens, 4\d windows, were asked for"
    with pytest.raises(SystemExit, match=message):
        run_stages(tmp_path, monkeypatch, make_model(), prune={key: 1000})


def test_stage_refuses_a_pruned_model(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"prune: the model is already pruned, heads=\[3, 0, 4\]"):
        run_stages(tmp_path, monkeypatch, remove_heads(make_model(), REMOVED))
