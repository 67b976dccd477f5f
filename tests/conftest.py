"""Settings and small inputs that several test files share."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2.data.shards import TokenSet, Vocabulary, write_split
from tests.training_run import finish, prepare_folder, start

# Models are tiny: more threads would only wait for each other, and the bits of a sum depend on their number.
torch.set_num_threads(1)

VOCABULARY = Vocabulary(encoding="gpt2", vocab_size=5000, eot_token=0)


@pytest.fixture
def write_tokens(tmp_path: Path) -> Callable[..., TokenSet]:
    """A function that writes token ids as a split of a folder of its own and opens it; ids below 5000."""

    def write(ids: Sequence[int], shard_tokens: int = 37, split: str = "train") -> TokenSet:
        documents = [(np.asarray(ids, dtype=np.uint16), 3 * len(ids))]
        write_split(tmp_path / "tokens", split, documents, VOCABULARY, shard_tokens)
        return TokenSet(tmp_path / "tokens", split)

    return write


# Training runs that nothing disturbs, in one process and in two: read, never written.


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    folder = prepare_folder(tmp_path_factory.mktemp("whole"))
    finish(start(folder), folder)
    return folder


@pytest.fixture(scope="session")
def whole_pair(tmp_path_factory) -> Path:
    folder = prepare_folder(tmp_path_factory.mktemp("whole_pair"))
    finish(start(folder, processes=2), folder)
    return folder
