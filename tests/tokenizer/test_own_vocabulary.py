"""A whole run on a vocabulary of its own: it travels with tokens and models, and every later stage works with it."""

import json
import math
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2 import generate
from gpt2.data.shards import TokenSet
from gpt2.export import export_model, split_token
from gpt2.huggingface.pretrained import load_pretrained
from gpt2.model.weights import load_model
from gpt2.pipeline.files import UserError, read_json
from gpt2.prepare.corpus import read_split
from gpt2.tokenizer.bpe import VocabularyConfig, byte_of_character, encoding_for
from gpt2.tokenizer.encodings import encoding_of, make_encoding, ranked_tokens, write_encoding
from tests.declared import STAGES, module_of
from tests.huggingface.test_export import TEXTS
from tests.test_end_to_end import SETTINGS, write_params, write_source

NAME, SIZE = "bpe_400", 400
MODELS = ("models/gpt2", "models/pruned")
CORPUS = Path("data/corpus")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Iterator[Path]:
    """A folder in which every stage has run with tokenize.encoding: bpe_400."""
    folder = tmp_path_factory.mktemp("own_vocabulary")
    write_source(folder / "source")
    # A word has more tokens than GPT-2's, and an item must fit the context.
    changed = {"tokenize": {"encoding": NAME}, "model": {"block_size": 64}, "train": {"max_steps": 20, "max_lr": 1e-2}}
    write_params(folder, **changed)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("DVC_ROOT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        for stage in STAGES:
            import_module(f"stages.{module_of(stage).stem}").main()
        yield folder


@pytest.fixture(scope="module")
def exported(root) -> Path:
    return export_model(root / "models/gpt2", root / "exported")


def test_the_vocabulary_is_that_of_the_study_and_lies_beside_tokens_and_models(root):
    expected = ranked_tokens(encoding_for(NAME, root / CORPUS, VocabularyConfig(**SETTINGS["vocabulary"])))
    files = [root / folder / f"{NAME}.tiktoken" for folder in ("data/tokens", *MODELS)]
    assert len({file.read_bytes() for file in files}) == 1
    assert ranked_tokens(encoding_of(root / "models/pruned")) == expected


def test_tokens_are_those_of_the_vocabulary(root):
    encoding = encoding_of(root / "data/tokens")
    for split in ("train", "val", "test"):
        tokens = TokenSet(root / "data/tokens", split)
        assert (tokens.vocabulary.encoding, tokens.vocabulary.vocab_size) == (NAME, SIZE)
        ids = [id_ for text in read_split(root / CORPUS, split) for id_ in (SIZE - 1, *encoding.encode_ordinary(text))]
        assert tokens.read(0, tokens.n_tokens).tolist() == ids


def test_the_model_has_learned_and_its_loss_is_told_in_bits_per_byte(root):
    train, tokens = (read_json(root / f"metrics/{name}.json") for name in ("train", "tokens"))
    val = TokenSet(root / "data/tokens", "val")
    assert load_model(root / "models/gpt2").config.vocab_size == SIZE == tokens["vocab_size"]
    assert tokens["encoding"] == NAME and train["val_loss"] < math.log(SIZE) - 0.3
    assert train["val_bits_per_byte"] == pytest.approx(train["val_loss"] / math.log(2) * val.n_tokens / val.n_bytes)


def test_later_stages_scored_generated_pruned_and_reported(root):
    assert read_json(root / "metrics/hellaswag.json")["items"] == 100
    samples = (root / "plots/generate/samples.csv").read_text(encoding="utf-8")
    assert samples.count("Return the ") >= 2
    assert read_json(root / "metrics/prune.json")["baseline_perplexity"] < SIZE
    report = (root / "report.md").read_text(encoding="utf-8")
    assert f"vocabulary `{NAME}`" in report and "no, other vocabulary" in report
    assert "| Validation bits per byte |" in report


@pytest.mark.parametrize("model", MODELS)
def test_text_is_generated_by_the_vocabulary_of_the_folder(root, model, capsys):
    (text,) = generate.generate(root / model, "Return the", max_tokens=12, temperature=0)
    encoding = encoding_of(root / model)
    idx = torch.tensor([encoding.encode_ordinary("Return the")])
    network = load_model(root / model)
    for _ in range(12):
        idx = torch.cat([idx, network(idx)[:, -1:].argmax(-1)], 1)
    assert encoding.decode(idx[0].tolist()) == "Return the" + text
    generate.main(["--model", str(root / model), "--prompt", "Return the", "--max_tokens", "12", "--temperature", "0"])
    assert capsys.readouterr().out == f"--- 1 ---\nReturn the{text}\n"


def test_a_model_without_its_vocabulary_is_refused(root, tmp_path):
    shutil.copytree(root / "models/gpt2", tmp_path / "model")
    (tmp_path / "model" / f"{NAME}.tiktoken").unlink()
    with pytest.raises(UserError, match=r"vocab_size=400, encoding gpt2 has 50257; .*lies in the folder of the model"):
        generate.generate(tmp_path / "model", "x")
    with pytest.raises(UserError, match=r"vocab_size=400, and the tokenizer to export with it, gpt2, has 50257"):
        export_model(tmp_path / "model", tmp_path / "out")


def test_autotokenizer_gives_the_same_tokens_and_the_text_back(root, exported):
    tokenizer, encoding = AutoTokenizer.from_pretrained(exported), encoding_of(root / "models/gpt2")
    assert len(tokenizer) == SIZE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (SIZE - 1, SIZE - 1)
    documents = list(read_split(root / CORPUS, "test"))
    for text in [*TEXTS, "".join(TEXTS), *documents, *(bytes([i]).decode("latin-1") for i in range(256))]:
        ids = tokenizer(text)["input_ids"]
        assert ids == encoding.encode_ordinary(text), text
        assert tokenizer.decode(ids) == text
    assert json.loads((exported / "vocab.json").read_text(encoding="utf-8")) == tokenizer.get_vocab()


def test_transformers_gives_the_same_logits(root, exported):
    idx = torch.randint(SIZE, (2, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(exported).eval()(idx).logits
        ours = load_model(root / "models/gpt2")(idx)
    assert (theirs - ours).abs().max() < 1e-4
    state = safetensors.torch.load_file(exported / "model.safetensors")
    assert state["transformer.wte.weight"].shape == (SIZE, 16)
    assert load_pretrained(str(exported))[0].config.vocab_size == SIZE


def test_the_card_names_the_vocabulary(exported):
    assert f"| Vocabulary | {SIZE} (`{NAME}`, trained on the same corpus: byte-level BPE) |" in (
        (exported / "README.md").read_text(encoding="utf-8")
    )


def test_a_token_is_split_into_the_two_that_were_merged():
    tokens = [bytes([byte]) for byte in range(256)] + [b"an", b"na", b"ana", b"banana", b"ban", b"b\xc3"]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    assert split_token(b"an", ranks) == (b"a", b"n")
    assert split_token(b"ana", ranks) == (b"an", b"a")
    assert split_token(b"ban", ranks) == (b"b", b"an")
    assert split_token(b"b\xc3", ranks) == (b"b", b"\xc3")
    assert len(byte_of_character()) == 256


def test_another_run_takes_its_vocabulary_with_it(root, tmp_path, monkeypatch):
    """Tokens made again with GPT-2's vocabulary leave nothing of the old one behind."""
    shutil.copytree(root / "data", tmp_path / "data")
    write_encoding(make_encoding("bpe_257", ranked_tokens(encoding_of(root / "data/tokens"))[:256]), tmp_path / "old")
    shutil.rmtree(tmp_path / "data/tokens")
    write_params(tmp_path)
    monkeypatch.chdir(tmp_path)
    import_module("stages.tokenize").main()
    assert encoding_of(Path("data/tokens")).name == "gpt2"
    assert encoding_of(tmp_path / "old").n_vocab == 257
