"""Token files return what was written, wherever shards end, and no damaged or foreign file is read."""

import errno
import hashlib
import math
import shutil

import numpy as np
import pytest

from gpt2.data import shards
from gpt2.data.shards import HEADER_BYTES, Piece, ShardWriter, TokenSet, Vocabulary, write_split
from gpt2.pipeline.files import UserError, read_json, write_json

VOCABULARY = Vocabulary(encoding="gpt2", vocab_size=1000, eot_token=0)


def make_documents(*lengths: int) -> list[tuple[np.ndarray, int]]:
    """Documents of ids that count on from one to the next, and byte counts of ten a token."""
    ends = np.cumsum(lengths)
    return [
        (np.arange(end - length, end, dtype=np.uint16), 10 * length) for end, length in zip(ends, lengths, strict=True)
    ]


def write(folder, documents, shard_tokens=10, split="train"):
    write_split(folder, split, documents, VOCABULARY, shard_tokens)
    return TokenSet(folder, split)


@pytest.mark.parametrize("lengths", [(1,), (10,), (10, 10), (3, 4, 5), (95,), (9, 1, 1, 9, 41, 0, 2), (0, 7)])
@pytest.mark.parametrize("shard_tokens", [1, 7, 10, 1000])
def test_every_stretch_returns_as_written_wherever_shards_end(tmp_path, lengths, shard_tokens):
    tokens = write(tmp_path, make_documents(*lengths), shard_tokens)
    total = sum(lengths)
    assert (tokens.n_tokens, tokens.n_documents, tokens.n_bytes) == (total, len(lengths), 10 * total)
    assert tokens.vocabulary == VOCABULARY
    sizes = [shard["tokens"] for shard in read_json(tmp_path / "train.json")["shards"].values()]
    assert sizes[:-1] == [shard_tokens] * (len(sizes) - 1)
    for start in range(0, total + 1, 3):
        for count in {0, 1, total // 2, total - start}:
            if start + count <= total:
                assert tokens.read(start, count).tolist() == list(range(start, start + count))


def test_the_largest_ids_of_uint16_return_as_written(tmp_path):
    ids = np.array([65535, 0, 256, 255], dtype=np.uint16)
    write_split(tmp_path, "val", [(ids, 4)], Vocabulary(encoding="x", vocab_size=65536, eot_token=1), 3)
    assert TokenSet(tmp_path, "val").read(0, 4).tolist() == ids.tolist()


def test_a_shard_is_the_header_of_llm_c_and_little_endian_ids(tmp_path):
    write(tmp_path, make_documents(13))
    content = (tmp_path / "train_00001.bin").read_bytes()
    header = np.frombuffer(content[:1024], dtype="<i4")
    assert header[:4].tolist() == [20240520, 1, 3, 1000]
    assert not header[4:].any()
    assert content[1024:] == bytes([10, 0, 11, 0, 12, 0])
    shard = read_json(tmp_path / "train.json")["shards"]["train_00001.bin"]
    assert shard == {"tokens": 3, "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 26), (25, 1), (26, 0), (5, -1)])
def test_reading_past_an_end_is_refused(tmp_path, start, count):
    tokens = write(tmp_path, make_documents(25))
    with pytest.raises(UserError, match=rf"train: tokens {start} to {start + count} asked, it holds 25"):
        tokens.read(start, count)


def test_unigram_entropy_is_that_of_the_token_frequencies_of_all_shards(tmp_path):
    # Frequencies 1/2, 1/4, 1/4.
    tokens = write(tmp_path, [(np.array([5, 7, 5, 5, 999, 5, 7, 999], dtype=np.uint16), 8)], shard_tokens=3)
    assert tokens.unigram_entropy == pytest.approx(math.log(2) / 2 + 2 * math.log(4) / 4)
    assert write(tmp_path, [(np.full(9, 3, dtype=np.uint16), 9)]).unigram_entropy == 0


def test_a_shorter_run_leaves_no_shard_of_a_longer_one_and_no_other_split_changes(tmp_path):
    write(tmp_path, make_documents(95))
    write(tmp_path, make_documents(35), split="val")
    assert write(tmp_path, make_documents(15)).n_tokens == 15
    assert {path.name for path in tmp_path.glob("train*")} == {"train.json", "train_00000.bin", "train_00001.bin"}
    assert TokenSet(tmp_path, "val").n_tokens == 35


def test_the_same_documents_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, make_documents(3, 4, 25))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("documents", [[], make_documents(0, 0)])
def test_a_split_without_tokens_is_refused_and_cannot_be_read(tmp_path, documents):
    write(tmp_path, make_documents(15))
    with pytest.raises(UserError, match="the split train has no tokens; give prepare more documents"):
        write_split(tmp_path, "train", documents, VOCABULARY, 10)
    with pytest.raises(UserError, match=r"train\.json does not exist"):
        TokenSet(tmp_path, "train")


def test_a_run_cut_off_in_the_middle_cannot_be_read(tmp_path):
    write(tmp_path, make_documents(95))

    def broken_off():
        yield from make_documents(40)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_split(tmp_path, "train", broken_off(), VOCABULARY, 10)
    with pytest.raises(UserError, match=r"train\.json does not exist"):
        TokenSet(tmp_path, "train")


def test_ids_that_do_not_fit_two_bytes_are_refused_before_anything_is_deleted(tmp_path):
    write(tmp_path, make_documents(15))
    with pytest.raises(UserError, match="encoding o200k has 65537 ids; uint16 shards hold 65536"):
        write_split(tmp_path, "train", [], Vocabulary(encoding="o200k", vocab_size=65537, eot_token=0), 10)
    assert TokenSet(tmp_path, "train").n_tokens == 15


def patch(offset: int, values: list[int]):
    """A change of a file: int32 `values` at `offset` of the header."""

    def change(content: bytes) -> bytes:
        data = np.array(values, dtype="<i4").tobytes()
        return content[:offset] + data + content[offset + len(data) :]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (patch(0, [20240519]), "begins with 20240519, 1; a token shard begins with 20240520, 1"),
        (patch(4, [2]), "begins with 20240520, 2"),
        (patch(8, [9]), "holds 10 tokens, its header says 9, the manifest 10"),
        (patch(12, [50257]), "was written for 50257 ids, the manifest says 1000"),
        (lambda content: content[:-2], "holds 9 tokens, its header says 10, the manifest 10"),
        (lambda content: content[:-1], "holds 9 tokens, its header says 10, the manifest 10"),
        (lambda content: content + b"\0\0", "holds 11 tokens, its header says 10, the manifest 10"),
        (lambda content: content[:100], "has 100 bytes, less than the header of 1024"),
        (lambda content: b"", "has 0 bytes"),
    ],
)
def test_a_damaged_or_foreign_shard_is_named_with_the_remedy(tmp_path, change, message):
    write(tmp_path, make_documents(25))
    shard = tmp_path / "train_00001.bin"
    shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(UserError, match=rf"train_00001\.bin {message}.*; run `dvc repro -f tokenize`"):
        TokenSet(tmp_path, "train")


def test_a_manifest_of_other_counts_is_refused(tmp_path):
    write(tmp_path, make_documents(25))
    manifest = read_json(tmp_path / "train.json")
    manifest["shards"]["train_00002.bin"]["tokens"] = 4
    write_json(tmp_path / "train.json", manifest)
    with pytest.raises(UserError, match=r"train_00002\.bin holds 5 tokens, its header says 5, the manifest 4"):
        TokenSet(tmp_path, "train")


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, make_documents(25))
    (tmp_path / "train_00001.bin").unlink()
    with pytest.raises(UserError, match=r"train_00001\.bin is listed in the manifest and absent; run"):
        TokenSet(tmp_path, "train")


def test_a_shard_of_llm_c_is_read_though_it_names_no_vocabulary(tmp_path):
    write(tmp_path, make_documents(5))
    shard = tmp_path / "train_00000.bin"
    shard.write_bytes(patch(12, [0])(shard.read_bytes()))
    assert len(shard.read_bytes()) == HEADER_BYTES + 10
    manifest = read_json(tmp_path / "train.json")
    manifest["shards"]["train_00000.bin"]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    write_json(tmp_path / "train.json", manifest)
    assert TokenSet(tmp_path, "train").read(0, 5).tolist() == [0, 1, 2, 3, 4]


# Digests.


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A root of DVC's, whose scratch starts empty."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    return tmp_path / "root"


def damage(path) -> None:
    """Change one token and nothing about the size."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_altered_token_is_noticed_at_the_first_read_of_its_shard(tmp_path, root):
    write(tmp_path, make_documents(25))
    damage(tmp_path / "train_00001.bin")
    tokens = TokenSet(tmp_path, "train")
    assert tokens.read(0, 10).tolist() == list(range(10))
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"train_00001\.bin has sha256 \w{8}…, the manifest says .*altered or damaged"
        ):
            tokens.read(5, 10)
    assert tokens.read(20, 5).tolist() == list(range(20, 25))
    assert not root.exists()


def test_a_large_shard_is_hashed_once_as_long_as_it_stays_as_it_is(tmp_path, root, monkeypatch):
    monkeypatch.setattr(shards, "REMEMBERED_BYTES", 1)
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name))
    write(tmp_path / "tokens", make_documents(15))
    # The writer had the content in hand.
    TokenSet(tmp_path / "tokens", "train").read(0, 15)
    assert hashed == []
    # A copy is another file.
    shutil.copytree(tmp_path / "tokens", tmp_path / "copy")
    for _ in range(2):
        TokenSet(tmp_path / "copy", "train").read(0, 15)
    assert hashed == [str(tmp_path / "copy" / f"train_0000{i}.bin") for i in (0, 1)]
    damage(tmp_path / "copy" / "train_00000.bin")
    with pytest.raises(UserError, match=r"altered or damaged"):
        TokenSet(tmp_path / "copy", "train").read(0, 1)


def test_where_scratch_cannot_be_written_every_reader_checks(tmp_path, root, monkeypatch):
    monkeypatch.setattr(shards, "REMEMBERED_BYTES", 1)
    root.write_text("a file where a folder is wanted")
    assert write(tmp_path / "tokens", make_documents(15)).read(0, 15).tolist() == list(range(15))
    damage(tmp_path / "tokens" / "train_00000.bin")
    with pytest.raises(UserError, match=r"altered or damaged"):
        TokenSet(tmp_path / "tokens", "train").read(0, 1)


# A writer that goes on where another was killed.

# Documents that end within shards, at their end, and several shards later; 95 tokens in all.
PIECES = [Piece(tokens, 2, n_bytes) for tokens, n_bytes in make_documents(7, 3, 1, 41, 0, 8, 10, 25)]


def write_pieces(folder, record, stop: int | None = None) -> tuple[int, int]:
    """Write PIECES in shards of 10 tokens, the first `stop` of them only; pieces and shards that were there before."""
    with ShardWriter(folder, "train", VOCABULARY, 10, record) as writer:
        found = writer.pieces, writer.finished_shards
        for piece in PIECES[writer.pieces : stop]:
            writer.add(piece)
        if stop is None:
            writer.close()
    return found


@pytest.fixture
def uninterrupted(tmp_path) -> dict[str, bytes]:
    write_pieces(tmp_path / "whole", tmp_path / "whole.json")
    return contents(tmp_path / "whole")


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("stop", range(len(PIECES) + 1))
def test_a_writer_goes_on_after_the_finished_shards_of_another(tmp_path, uninterrupted, stop):
    folder, record = tmp_path / "tokens", tmp_path / "record.json"
    write_pieces(folder, record, stop)
    n_tokens = sum(len(piece.tokens) for piece in PIECES[:stop])
    written = {path: path.stat().st_ino for path in folder.iterdir()}
    assert len(written) == n_tokens // 10
    pieces, finished = write_pieces(folder, record)
    assert finished == n_tokens // 10 and pieces <= stop
    assert {path: path.stat().st_ino for path in written} == written
    assert contents(folder) == uninterrupted
    # And once more when all is there.
    assert write_pieces(folder, record) == (len(PIECES), 10)
    assert contents(folder) == uninterrupted


@pytest.mark.parametrize("fault", ["damaged", "gone", "cut"])
def test_a_finished_shard_that_is_not_what_it_was_is_written_again_and_all_behind_it(tmp_path, uninterrupted, fault):
    folder, record = tmp_path / "tokens", tmp_path / "record.json"
    write_pieces(folder, record, 6)
    shard = folder / "train_00003.bin"
    if fault == "damaged":
        damage(shard)
    elif fault == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:100])
    assert write_pieces(folder, record)[1] == 3
    assert contents(folder) == uninterrupted


def test_a_shard_that_is_in_no_record_counts_for_nothing(tmp_path, uninterrupted):
    folder, record = tmp_path / "tokens", tmp_path / "record.json"
    write_pieces(folder, record, 6)
    record.unlink()
    (folder / "train_00017.bin").write_bytes(b"left over")
    assert write_pieces(folder, record) == (0, 0)
    assert contents(folder) == uninterrupted


def test_a_full_disk_is_told_with_what_it_needs(tmp_path, uninterrupted, monkeypatch):
    folder, record = tmp_path / "tokens", tmp_path / "record.json"
    write_shard = shards._write_shard

    def refuse_third(path, *arguments):
        if "00002" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_shard(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "_write_shard", refuse_third)
        message = (
            r"train_00002\.bin cannot be written \(.*No space left.*\); it needs 0\.0 MB: make room and run dvc repro"
        )
        with pytest.raises(UserError, match=message):
            write_pieces(folder, record)
    assert write_pieces(folder, record)[1] == 2
    assert contents(folder) == uninterrupted
