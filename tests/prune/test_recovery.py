"""Training after pruning: lower loss, the model before left alone, the same every time."""

import numpy as np
import pytest
import torch

from gpt2.data.order import TrainOrder
from gpt2.data.shards import TokenSet, Vocabulary, write_split
from gpt2.heads.similarity import Head
from gpt2.model.evaluate import mean_loss
from gpt2.pipeline.files import UserError
from gpt2.prune.recovery import recover
from gpt2.prune.remove import remove_heads
from tests.analysed import BLOCK_SIZE, VOCAB_SIZE, make_model

REMOVED = [Head(0, 2), *(Head(1, index) for index in range(4))]


@pytest.fixture
def order(tmp_path) -> TrainOrder:
    ids = np.random.default_rng(0).integers(1, VOCAB_SIZE, 500).astype(np.uint16)
    vocabulary = Vocabulary(encoding="gpt2", vocab_size=VOCAB_SIZE, eot_token=0)
    write_split(tmp_path, "train", [(ids, 2000)], vocabulary, shard_tokens=200)
    return TrainOrder(TokenSet(tmp_path, "train"), BLOCK_SIZE, batch_windows=4, seed=1)


def read_windows(order: TrainOrder) -> torch.Tensor:
    idx, targets = order.batch(0, 0, 4)
    return torch.cat([idx, targets[:, -1:]], 1)


@pytest.mark.parametrize("norm", ["preln", "postln", "deepnorm"])
def test_training_lowers_the_loss_and_leaves_the_model_before_alone(norm, order):
    pruned = remove_heads(make_model(norm), REMOVED)
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    recovered, windows = recover(pruned, order, 40, 1e-2), read_windows(order)
    assert mean_loss(recovered, windows, 4) < mean_loss(pruned, windows, 4) - 0.3
    assert recovered.config == pruned.config and not recovered.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())
    again = recover(pruned, order, 40, 1e-2).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in recovered.state_dict().items())


def test_no_step_changes_no_bit(order):
    pruned = remove_heads(make_model(), REMOVED)
    same = recover(pruned, order, 0, 1e-2)
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in pruned.state_dict().items())


def test_refuses_a_rate_at_which_the_training_diverges(order):
    with pytest.raises(UserError, match=r"prune\.recovery_max_lr=1e\+30: .* diverged at step \d+; lower"):
        recover(remove_heads(make_model(), REMOVED), order, 20, 1e30)
