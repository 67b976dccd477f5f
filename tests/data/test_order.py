"""The tokens of a step follow from seed and step alone, and every epoch visits each window once."""

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2.data.order import MicroBatches, TrainOrder, permute, sample_windows
from gpt2.data.windows import eval_windows
from gpt2.pipeline.files import UserError

SIZES = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4096, 4097)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permute_is_a_bijection(n, key):
    assert sorted(permute(np.arange(n), n, key)) == list(range(n))


def test_an_image_does_not_depend_on_the_other_positions_asked():
    positions = np.array([999, 0, 513, 0])
    assert (permute(positions, 1000, 3) == permute(np.arange(1000), 1000, 3)[positions]).all()


def test_keys_give_unlike_orders_without_regularity():
    orders = [permute(np.arange(1000), 1000, key) for key in range(20)]
    for i, order in enumerate(orders):
        # Fixed points, places shared with another order and repeats of one step between neighbours each have mean one
        # in a random permutation, and exceed ten once in 10^8. Its correlation with the identity deviates by 0.03.
        assert (order == np.arange(1000)).sum() <= 10
        assert all((order == other).sum() <= 10 for other in orders[:i])
        assert np.unique(np.diff(order), return_counts=True)[1].max() <= 10
        assert abs(np.corrcoef(np.arange(1000), order)[0, 1]) < 0.2


@pytest.mark.parametrize("n_windows", [1, 2, 10, 97])
def test_every_epoch_visits_each_window_once(n_windows):
    windows = sample_windows(np.arange(5 * n_windows), n_windows, seed=4).reshape(5, n_windows)
    assert (np.sort(windows, axis=1) == np.arange(n_windows)).all()


def test_epochs_and_seeds_have_orders_of_their_own():
    one, other = (sample_windows(np.arange(4 * 97), 97, seed).reshape(4, 97) for seed in (4, 5))
    orders = {tuple(order) for order in (*one, *other)}
    assert len(orders) == 8


BLOCK, BATCH = 8, 16


@pytest.fixture
def order(write_tokens) -> TrainOrder:
    """53 windows an epoch, so that batches of 16 run across epochs; token i is the number i."""
    return TrainOrder(write_tokens(range(53 * BLOCK + 5)), BLOCK, BATCH, seed=9)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_shares_of_all_processes_make_up_the_whole_batch(order, world_size, micro_batch):
    for step in (0, 3, 50):
        shares = [
            order.batch(step, first, micro_batch)
            for rank in range(world_size)
            for first in range(rank * BATCH // world_size, (rank + 1) * BATCH // world_size, micro_batch)
        ]
        whole = order.batch(step, 0, BATCH)
        assert torch.equal(torch.cat([idx for idx, _ in shares]), whole[0])
        assert torch.equal(torch.cat([targets for _, targets in shares]), whole[1])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_read_ahead_are_those_asked_for_in_any_order(order, monkeypatch, device):
    # The second of two processes, four rows of eight each in two parts.
    batches = MicroBatches(order, BATCH // 2, 4, 2, torch.device("cpu"))
    if device == "cuda":
        # The path of a GPU, without one.
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        monkeypatch.setattr(Tensor, "to", lambda tensor, *_, **__: tensor)
        batches = MicroBatches(order, BATCH // 2, 4, 2, torch.device("cuda"))
    for step, micro_step in [(0, 0), (0, 0), (0, 1), (1, 0), (1, 1), (7, 1), (8, 0), (3, 0)]:
        expected = order.batch(step, BATCH // 2 + 4 * micro_step, 4)
        for given, rows in zip(batches.get(step, micro_step), expected, strict=True):
            assert torch.equal(given, rows)
        batches.read_ahead(step, micro_step)


def test_inputs_are_whole_windows_and_targets_the_next_tokens_across_shards_and_epochs(order):
    # Shards end inside most windows; steps 3 and 6 hold the end of an epoch.
    for step in range(8):
        idx, targets = order.batch(step, 0, BATCH)
        assert idx.shape == targets.shape == (BATCH, BLOCK)
        assert idx.dtype == targets.dtype == torch.int64
        starts = torch.from_numpy(order.windows(step, 0, BATCH)) * BLOCK
        assert torch.equal(idx, starts[:, None] + torch.arange(BLOCK))
        assert torch.equal(targets, idx + 1)


def test_steps_run_on_from_epoch_to_epoch_without_a_gap(order):
    stream = np.concatenate([order.windows(step, 0, BATCH) for step in range(53)])
    epochs = stream.reshape(BATCH, 53)
    assert (np.sort(epochs, axis=1) == np.arange(53)).all()
    assert len({tuple(epoch) for epoch in epochs}) == BATCH


def test_a_step_does_not_depend_on_those_before(order):
    late = order.batch(7, 0, BATCH)
    fresh = TrainOrder(order.tokens, BLOCK, BATCH, seed=9)
    for step in range(7):
        fresh.batch(step, 0, BATCH)
    assert torch.equal(fresh.batch(7, 0, BATCH)[0], late[0])


@pytest.mark.parametrize(("n_tokens", "n_windows"), [(17 * BLOCK, 16), (17 * BLOCK + 1, 17)])
def test_a_window_needs_the_target_of_its_last_token(write_tokens, n_tokens, n_windows):
    order = TrainOrder(write_tokens(range(n_tokens)), BLOCK, BATCH, seed=0)
    assert order.windows_per_epoch == n_windows
    seen = torch.cat([order.batch(step, 0, BATCH)[1] for step in range(n_windows)])
    assert seen.max() == n_windows * BLOCK


def test_a_split_smaller_than_a_batch_is_refused_by_name(write_tokens):
    TrainOrder(write_tokens(range(BATCH * BLOCK + 1)), BLOCK, BATCH, seed=0)
    with pytest.raises(UserError, match=r"tokens/train has 128 tokens, .* batch of 128 \+ 1; .*train\.tokens_per_step"):
        TrainOrder(write_tokens(range(BATCH * BLOCK)), BLOCK, BATCH, seed=0)


@pytest.mark.parametrize(("n_tokens", "start", "count"), [(100, 0, 12), (96, 4, 12), (15, 30, 1)])
def test_evaluation_windows_predict_every_token_of_a_stretch_once(write_tokens, n_tokens, start, count):
    windows = eval_windows(write_tokens(range(101)), BLOCK, n_tokens, start)
    assert windows.shape == (count, BLOCK + 1)
    assert windows.dtype == torch.int64
    assert windows[:, :-1].flatten().tolist() == list(range(start, start + count * BLOCK))
    assert torch.equal(windows[:, 1:], windows[:, :-1] + 1)


@pytest.mark.parametrize(("n_tokens", "start", "needed"), [(104, 0, 105), (96, 5, 102), (7, 0, 9), (8, 93, 102)])
def test_evaluation_of_more_tokens_than_there_are_is_refused(write_tokens, n_tokens, start, needed):
    tokens = write_tokens(range(101), split="val")
    with pytest.raises(
        UserError, match=rf"tokens/val has 101 tokens; {needed} are needed for {n_tokens} in windows of 8"
    ):
        eval_windows(tokens, BLOCK, n_tokens, start)
