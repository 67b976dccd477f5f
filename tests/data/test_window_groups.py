"""Windows are grouped by the documents that they share."""

import numpy as np
import pytest

from gpt2.data.shards import TokenSet, Vocabulary, write_split
from gpt2.data.windows import group_windows, spread_windows

SIZE = 8


def make_tokens(folder, lengths: list[int]) -> TokenSet:
    """Documents of these numbers of tokens, each after its end-of-text token 0; all other ids are distinct."""
    ids = np.arange(1, sum(lengths) + 1, dtype=np.uint16)
    documents = [(np.concatenate([[0], part]).astype(np.uint16), 4) for part in np.split(ids, np.cumsum(lengths)[:-1])]
    vocabulary = Vocabulary(encoding="gpt2", vocab_size=5000, eot_token=0)
    write_split(folder, "test", documents, vocabulary, shard_tokens=100)
    return TokenSet(folder, "test")


@pytest.mark.parametrize("n_windows", [5, 20, 37])
def test_windows_that_share_a_document_are_in_one_group_and_groups_share_none(tmp_path, n_windows):
    lengths = np.random.default_rng(n_windows).integers(1, 60, 15).tolist()
    tokens = make_tokens(tmp_path, lengths)
    n_windows = min(n_windows, (tokens.n_tokens - 1) // SIZE)
    groups, windows = group_windows(tokens, SIZE, n_windows * SIZE), spread_windows(tokens, SIZE, n_windows * SIZE)
    stream = tokens.read(0, tokens.n_tokens)
    number = dict(zip(stream.tolist(), np.cumsum(stream == 0).tolist(), strict=True))
    documents = [{number[token] for token in window[:-1].tolist() if token} for window in windows]
    assert len(groups) == len(windows) and groups[0] == 0 and set(np.diff(groups)) <= {0, 1}
    for i in range(len(windows)):
        for j in range(i):
            if documents[i] & documents[j]:
                assert groups[i] == groups[j]
    for group in range(1, groups.max() + 1):
        before, after = (set().union(*(documents[i] for i in np.flatnonzero(groups == g))) for g in (group - 1, group))
        assert not before & after


def test_each_window_is_a_group_where_documents_are_short_and_all_are_one_in_a_single_document(tmp_path):
    assert group_windows(make_tokens(tmp_path / "short", [4] * 60), SIZE, 10 * SIZE).tolist() == list(range(10))
    assert group_windows(make_tokens(tmp_path / "long", [300]), SIZE, 10 * SIZE).tolist() == [0] * 10
