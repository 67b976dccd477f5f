"""Token files hold every document of the corpus in order, each behind an end-of-text token, whoever dies."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pytest
import tiktoken

from gpt2.data.shards import TokenSet
from gpt2.hellaswag.items import load_benchmark
from gpt2.pipeline.files import UserError, read_json
from gpt2.prepare import corpus
from gpt2.prepare.corpus import Document, new_corpus
from gpt2.tokenizer import contamination, encode, tokenize
from gpt2.tokenizer.bpe import make_encoding
from gpt2.tokenizer.encodings import END_OF_TEXT, load_encoding
from gpt2.tokenizer.tokenize import SPLITS, token_identity, tokenize_corpus
from tests.closure import ROOT
from tests.training_run import CONTEXTS, ENDINGS

TEXTS = {
    "train": [f"document {i} of many, naïve 漢字 🙂" + " and more" * (i % 7) for i in range(23)],
    "val": ["a single one"],
    "test": ["<|endoftext|> as text", "line\n\nends", "x", ""],
}


def write_corpus(folder: Path, texts: dict[str, list[str]]) -> Path:
    with new_corpus(folder) as writers:
        for split, documents in texts.items():
            for i, text in enumerate(documents):
                writers[split].add(Document(text, str(i)))
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A corpus of several Parquet files, each of several row groups, read in batches smaller than a row group."""
    monkeypatch.setattr(corpus, "FILE_DOCUMENTS", 10)
    monkeypatch.setattr(corpus, "ROW_GROUP_DOCUMENTS", 4)
    monkeypatch.setattr(encode, "BATCH", 3)
    write_corpus(tmp_path / "corpus", TEXTS)
    return tmp_path


@pytest.fixture
def eager(monkeypatch):
    """A corpus of any size is worth processes."""
    monkeypatch.setattr(tokenize, "PROCESS_BYTES", 1)
    monkeypatch.setattr(contamination, "PROCESS_TOKENS", 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_document_stands_behind_an_end_of_text_token_in_the_order_of_the_corpus(folder):
    encoding = load_encoding()
    tokenize_corpus(folder / "corpus", folder / "tokens", encoding, shard_tokens=50, workers=2)
    for split in SPLITS:
        tokens = TokenSet(folder / "tokens", split)
        expected = [id_ for text in TEXTS[split] for id_ in (50256, *encoding.encode_ordinary(text))]
        assert tokens.read(0, tokens.n_tokens).tolist() == expected
        assert tokens.n_documents == len(TEXTS[split])
        assert tokens.n_bytes == sum(len(text.encode("utf-8")) for text in TEXTS[split])
        assert (tokens.vocabulary.encoding, tokens.vocabulary.vocab_size) == ("gpt2", 50257)
        assert tokens.vocabulary.eot_token == 50256


def test_figures_count_tokens_with_separators_and_bytes_of_text(folder):
    encoding = load_encoding()
    figures = tokenize_corpus(folder / "corpus", folder / "tokens", encoding, shard_tokens=50, workers=1)
    n_bytes = n_tokens = 0
    for split, texts in TEXTS.items():
        count = sum(1 + len(encoding.encode_ordinary(text)) for text in texts)
        assert figures.pop(f"tokens_{split}") == count
        assert figures.pop(f"documents_{split}") == len(texts)
        n_tokens += count
        n_bytes += sum(len(text.encode("utf-8")) for text in texts)
    assert figures == {"vocab_size": 50257, "bytes_per_token": pytest.approx(n_bytes / n_tokens, rel=1e-12)}


def test_the_number_of_workers_changes_nothing(folder, eager):
    written = []
    for workers in (1, 2, 5):
        out = folder / f"tokens_{workers}"
        figures = tokenize_corpus(folder / "corpus", out, load_encoding(), shard_tokens=50, workers=workers)
        written.append((figures, contents(out)))
    assert written[0] == written[1] == written[2]
    # Three manifests, and shards of 50 tokens.
    assert len(written[0][1]) == 3 + sum(-(-written[0][0][f"tokens_{split}"] // 50) for split in SPLITS)


def test_processes_take_any_encoding_that_tiktoken_can_hold(folder, eager):
    trained = make_encoding("bpe_258", [bytes([byte]) for byte in range(256)] + [b"an"])
    bare = tiktoken.Encoding(
        "letters", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={END_OF_TEXT: 300},
    )  # fmt: skip
    for encoding, vocab_size in ((trained, 258), (bare, 301)):
        out = folder / encoding.name
        tokenize_corpus(folder / "corpus", out, encoding, shard_tokens=50, workers=2)
        tokens = TokenSet(out, "train")
        expected = [id_ for text in TEXTS["train"] for id_ in (vocab_size - 1, *encoding.encode_ordinary(text))]
        assert tokens.read(0, tokens.n_tokens).tolist() == expected
        assert (tokens.vocabulary.encoding, tokens.vocabulary.vocab_size) == (encoding.name, vocab_size)


def test_an_encoding_of_too_many_ids_is_refused(folder):
    wide = tiktoken.Encoding(
        "wide", pat_str=r".", mergeable_ranks={b"a": 0}, special_tokens={END_OF_TEXT: 65536}
    )  # fmt: skip
    with pytest.raises(UserError, match="encoding wide has 65537 ids; uint16 shards hold 65536"):
        tokenize_corpus(folder / "corpus", folder / "tokens", wide, shard_tokens=50, workers=1)


def test_a_split_without_files_is_refused(folder):
    for file in (folder / "corpus" / "val").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"corpus/val holds no Parquet file; run `dvc repro prepare`"):
        tokenize_corpus(folder / "corpus", folder / "tokens", load_encoding(), shard_tokens=50, workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_file_is_named_whoever_reads_it(folder, eager, workers):
    file = folder / "corpus" / "train" / "00001.parquet"
    content = bytearray(file.read_bytes())
    # The first page of the first row group; the footer stays.
    content[4:60] = bytes(56)
    file.write_bytes(content)
    message = r"(?s)00001\.parquet, row group 0 cannot be read .*; run `dvc repro -f prepare`"
    with pytest.raises(UserError, match=message):
        tokenize_corpus(folder / "corpus", folder / "tokens", load_encoding(), shard_tokens=50, workers=workers)


def test_a_text_is_encoded_by_no_more_processes_than_it_is_worth(folder, monkeypatch):
    started = []
    monkeypatch.setattr(tokenize, "in_order", lambda f, tasks, n: started.append(n) or (f(task) for task in tasks))
    size = sum(group.n_bytes for split in SPLITS for group in tokenize._row_groups(folder / "corpus" / split))
    for worth, processes in ((size + 1, 1), (size // 3, 3), (1, 8)):
        monkeypatch.setattr(tokenize, "PROCESS_BYTES", worth)
        tokenize_corpus(folder / "corpus", folder / "tokens", load_encoding(), shard_tokens=50, workers=8)
        assert started.pop() == processes


def test_the_identity_is_that_of_content_encoding_and_shards(folder):
    def identity(name: str = "corpus", encoding: tiktoken.Encoding | None = None, shard_tokens: int = 50) -> dict:
        return token_identity(folder / name, encoding or load_encoding(), shard_tokens, threads=2)

    shutil.copytree(folder / "corpus", folder / "copy")
    assert identity("copy") == identity()
    assert identity(shard_tokens=51) != identity()
    assert identity(encoding=make_encoding("gpt2", [bytes([byte]) for byte in range(256)])) != identity()
    file = folder / "copy" / "val" / "00000.parquet"
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity("copy") != identity()


# The stage, killed and starved.

SETTINGS = {
    "scale": "tiny",
    "tiny": {
        "vocabulary": {"train_bytes": 1000},
        "tokenize": {"encoding": "gpt2", "shard_tokens": 2000},
        "hardware": {
            **{"nproc": 1, "threads": 1, "workers": 2, "max_restarts": 0},
            **{"nnodes": 1, "rdzv_endpoint": None, "local_addr": None},
        },
    },
}
IMPORTS = (
    "from gpt2.data import shards; from gpt2.tokenizer import contamination, tokenize; "
    "from stages import tokenize as stage\n"
)
# Two workers, though the text is short.
WORKERS = "tokenize.PROCESS_BYTES = contamination.PROCESS_TOKENS = 1\n"


# Items whose answer is among the training documents.
IN_TRAINING = [1, 3]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder in which the stage can run: Python's manual, some 130,000 tokens."""
    folder = tmp_path_factory.mktemp("source")
    paragraphs = [part for text in topics.values() for part in text.split("\n\n") if part.strip()]
    # Long enough to be looked for.
    contexts = [f"This is what the old book has to say about the matter at hand. {ctx}" for ctx in CONTEXTS]
    answers = [f"{contexts[i]} {ENDINGS[i][1]}" for i in IN_TRAINING]
    splits = {"train": [*paragraphs[40:], *answers], "val": paragraphs[:20], "test": paragraphs[20:40]}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(corpus, "ROW_GROUP_DOCUMENTS", 50)
        patched.setattr(corpus, "FILE_DOCUMENTS", 1000)
        write_corpus(folder / "data" / "corpus", splits)
    items = [
        {"ind": i, "activity_label": "", "ctx_a": ctx, "ctx_b": "", "ctx": ctx, "endings": endings, "label": 1}
        for i, (ctx, endings) in enumerate(zip(contexts, ENDINGS, strict=True))
    ]
    (folder / "data" / "hellaswag.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "params.yaml").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> Path:
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    finish(start(folder, WORKERS), folder)
    return folder


@pytest.fixture
def place(source, tmp_path) -> Path:
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    return tmp_path


def start(folder: Path, before: str = "") -> subprocess.Popen:
    """Start the stage as DVC does, without what it wrote before."""
    shutil.rmtree(folder / "data" / "tokens", ignore_errors=True)
    (folder / "metrics" / "tokens.json").unlink(missing_ok=True)
    given = {key: value for key, value in os.environ.items() if key not in ("DVC_ROOT", "DVC_STAGE")}
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", f"{IMPORTS}{before}\nprint('ready', flush=True); stage.main()"],
            cwd=folder, env={**given, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def finish(process: subprocess.Popen, folder: Path) -> str:
    code = process.wait(timeout=120)
    log = (folder / "log.txt").read_text()
    assert code == 0, log
    return log


def recorded(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard that is finished: recorded, or in place."""
    names = {name: tokens for tokens in (folder / "data").glob("tokens") for name in os.listdir(tokens)}
    for record in (folder / ".scratch" / "tokenize").glob("*/*.json"):
        names |= {name: record.parent / "tokens" for name in read_json(record)}
    stats = {name: (folder_of / name).stat() for name, folder_of in names.items() if name.endswith(".bin")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def assert_same_outcome(folder: Path, undisturbed: Path) -> None:
    assert contents(folder / "data" / "tokens") == contents(undisturbed / "data" / "tokens")
    metrics = "metrics/tokens.json"
    assert (folder / metrics).read_bytes() == (undisturbed / metrics).read_bytes()
    # No orphans: no half-written file, nothing in scratch.
    assert list((folder / ".scratch" / "tokenize").iterdir()) == []
    assert sorted(os.listdir(folder / "data")) == ["corpus", "hellaswag.jsonl", "tokens"]


def test_the_stage_writes_what_one_process_writes(undisturbed, source, tmp_path):
    shards = contents(undisturbed / "data" / "tokens")
    assert len(shards) > 50
    tokenize_corpus(source / "data" / "corpus", tmp_path / "tokens", load_encoding(), shard_tokens=2000, workers=1)
    assert contents(tmp_path / "tokens") == {name: shards[name] for name in shards if name != "hellaswag.npz"}


def test_the_benchmark_has_a_flag_for_items_whose_answer_is_in_training_documents(undisturbed):
    flags = load_benchmark(undisturbed / "data" / "tokens" / "hellaswag.npz").in_training
    assert [i for i, flag in enumerate(flags) if flag] == IN_TRAINING
    figures = read_json(undisturbed / "metrics" / "tokens.json")
    counts = [figures[key] for key in ("benchmark_items", "benchmark_items_in_train")]
    assert counts == [len(CONTEXTS), len(IN_TRAINING)]


# So slow that there is time to kill it between its first shard and its last.
SLOWLY = (
    f"{WORKERS}import time; add = shards.ShardWriter.add\n"
    "def add_slowly(self, piece): time.sleep(0.05); add(self, piece)\n"
    "shards.ShardWriter.add = add_slowly"
)


def wait_until(condition: Callable[[], object], process: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, (folder / "log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_at_ten_moments_the_stage_keeps_what_was_finished(place, undisturbed):
    moments = random.Random(7)
    for number in range(10):
        before = recorded(place)
        process = start(place, SLOWLY)
        # By turns from the start of the work and from its first new shard.
        wait_until(lambda: "ready" in (place / "log.txt").read_text(), process, place)
        if number % 2 == 0:
            wait_until(lambda before=before: recorded(place).keys() - before, process, place)
        time.sleep(moments.uniform(0, 0.5))
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert psutil.wait_procs(family, timeout=20)[1] == []
        now = recorded(place)
        assert now and {name: now[name] for name in before} == before, (place / "log.txt").read_text()
    before = recorded(place)
    assert "going on after" in finish(start(place), place)
    assert {name: stat for name, stat in recorded(place).items() if name in before} == before
    assert_same_outcome(place, undisturbed)


DIE = "import os; die = lambda *_: os.kill(os.getpid(), 9)\n"


@pytest.mark.parametrize("at", ["stage.items_in_training = die", "import shutil; shutil.move = die"])
def test_killed_when_all_tokens_are_written_it_encodes_none_again(place, undisturbed, at):
    assert start(place, DIE + at).wait(timeout=60) == -signal.SIGKILL
    before = recorded(place)
    assert not (place / "data" / "tokens").exists()
    # Whatever is encoded ends the run.
    finish(start(place, f"{DIE}tokenize.encode_group = die"), place)
    assert recorded(place) == before
    assert_same_outcome(place, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_ends_soon_and_the_next_run_goes_on(place, undisturbed, number):
    process = start(place, "tokenize.CHECK_SECONDS = 0\n" + SLOWLY)
    wait_until(lambda: recorded(place), process, place)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(timeout=20) == 128 + number
    assert psutil.wait_procs(family, timeout=20)[1] == []
    assert "Traceback" not in (place / "log.txt").read_text()
    before = recorded(place)
    finish(start(place), place)
    assert {name: stat for name, stat in recorded(place).items() if name in before} == before
    assert_same_outcome(place, undisturbed)


def test_a_full_disk_ends_the_stage_in_words_and_room_lets_it_go_on(place, undisturbed):
    limited = (
        "import resource; write = shards._write_shard\n"
        "def limit(path, *rest):\n"
        "    if '00020' in path.name: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, -1))\n"
        "    return write(path, *rest)\n"
        "shards._write_shard = limit"
    )
    process = start(place, limited)
    assert process.wait(timeout=120) == 1
    last = (place / "log.txt").read_text().strip().splitlines()[-1]
    assert last.startswith("tokenize: ") and "train_00020.bin cannot be written" in last
    assert "make room and run dvc repro" in last and "Traceback" not in (place / "log.txt").read_text()
    assert not (place / "data" / "tokens").exists()
    before = recorded(place)
    assert sorted(before) == [f"train_{i:05d}.bin" for i in range(20)]
    assert not list((place / ".scratch").rglob("*.tmp"))
    assert "going on after 20 finished shards" in finish(start(place), place)
    assert {name: stat for name, stat in recorded(place).items() if name in before} == before
    assert_same_outcome(place, undisturbed)


def test_a_killed_worker_ends_the_stage_in_words(place, undisturbed):
    process = start(place, SLOWLY)
    wait_until(lambda: recorded(place), process, place)
    psutil.Process(process.pid).children()[-1].kill()
    assert process.wait(timeout=60) == 1
    last = (place / "log.txt").read_text().strip().splitlines()[-1]
    assert last.startswith("tokenize: a worker process was killed at data/corpus/")
    assert "lower hardware.workers" in last
    finish(start(place), place)
    assert_same_outcome(place, undisturbed)


def test_another_corpus_takes_up_nothing(place, undisturbed):
    process = start(place, SLOWLY)
    wait_until(lambda: recorded(place), process, place)
    process.kill()
    process.wait()
    write_corpus(place / "data" / "corpus", {"train": ["one"], "val": ["two"], "test": ["three"]})
    assert "going on" not in finish(start(place), place)
    assert sorted(os.listdir(place / "data" / "tokens"))[0] == "hellaswag.npz"
    assert TokenSet(place / "data" / "tokens", "train").n_documents == 1
    assert list((place / ".scratch" / "tokenize").iterdir()) == []
