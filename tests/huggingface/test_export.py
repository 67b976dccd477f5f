"""An exported model is, to transformers, the same model with the same tokens; what it cannot be is refused."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from gpt2 import export
from gpt2.export import export_model
from gpt2.heads.similarity import Head
from gpt2.huggingface.card import write_card
from gpt2.huggingface.pretrained import load_pretrained
from gpt2.model.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.model.weights import save_model
from gpt2.pipeline.files import UserError, write_json
from gpt2.prune.remove import remove_heads
from gpt2.tokenizer.encodings import load_encoding

VOCAB_SIZE = 50257
# Sums over channels are taken in another order; the logits are of the order of 1.
MAX_DIFFERENCE = 1e-5
TEXTS = [
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    "  leading, trailing  \n\n\n and\ttabs \t \r\n runs        of spaces   ",
    "def f(x):\n    return {'a': [x ** 2, -1.5e-3]}  # it's they'll I'd WE'VE\n",
    "naïve café, Grüße, Привет мир, 你好\uff0c世界, こんにちは, שלום, नमस्ते, ไทย",
    "👩\u200d👧 🏳\ufe0f\u200d🌈 e\u0301 \u200b\u00a0\u2028 \ufeff \x00\x07 \U0010ffff",
    "1234567890 3.14159 ½ ² Ⅷ ١٢٣",
    "<|endoftext|",
    "https://example.org/a?b=c&d=%20 ``` <b>html</b> \\n \\\\ $x_1^2$",
]


def make_model(norm: str = "preln", **changed) -> GPT:
    """A small model of GPT-2's vocabulary with weights large enough for distinct logits."""
    config = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": VOCAB_SIZE, **changed}
    model = GPT(GPTConfig(**config, norm=norm), seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("h."):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def export_here(model: GPT, folder: Path) -> Path:
    save_model(model, folder / "model")
    return export_model(folder / "model", folder / "exported")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return export_here(make_model(), tmp_path_factory.mktemp("export"))


def load(folder: Path) -> GPT2LMHeadModel:
    """The model as transformers reads it, every name accounted for."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {kind: names for kind, names in report.items() if names} == {}
    assert type(model) is GPT2LMHeadModel and model.dtype == torch.float32
    return model.eval()


def difference(folder: Path, model: GPT) -> float:
    """Largest difference of the logits of transformers and ours."""
    idx = torch.randint(VOCAB_SIZE, (3, model.config.block_size), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs, ours = load(folder)(idx).logits, model(idx)
    assert theirs.shape == ours.shape and ours.std() > 0.05
    return (theirs - ours).abs().max().item()


def test_transformers_loads_it_and_gives_the_same_logits(exported):
    assert difference(exported, make_model()) < MAX_DIFFERENCE


def test_the_weights_are_named_and_shaped_as_transformers_saves_them(exported, tmp_path):
    load(exported).save_pretrained(tmp_path)
    ours, theirs = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (exported, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours["transformer.wte.weight"].shape == (VOCAB_SIZE, 32)
    config, again = (json.loads((folder / "config.json").read_text()) for folder in (exported, tmp_path))
    renamed = {"torch_dtype": "dtype"}
    assert {renamed.get(key, key): value for key, value in config.items()}.items() <= again.items()


def test_exporting_and_loading_gives_back_every_bit(exported):
    model, expected = load_pretrained(str(exported))[0], make_model()
    assert model.config == expected.config
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize(
    "removed",
    [[(0, 1)], [(0, 0), (0, 3), (1, 2)], [(2, head) for head in range(4)]],
    ids=["one", "some", "a whole layer"],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_removed_heads_come_back_as_zeros_with_the_same_logits(tmp_path, removed):
    pruned = remove_heads(make_model(), {Head(*head) for head in removed})
    folder = export_here(pruned, tmp_path)
    assert difference(folder, pruned) < MAX_DIFFERENCE
    state = safetensors.torch.load_file(folder / "model.safetensors")
    for layer, left in enumerate(pruned.config.heads):
        # Of the Conv1D's (in, out) each head owns columns of queries, keys and values, and rows of the projection.
        qkv = state[f"transformer.h.{layer}.attn.c_attn.weight"].view(32, 3, 4, 8)
        bias = state[f"transformer.h.{layer}.attn.c_attn.bias"].view(3, 4, 8)
        projection = state[f"transformer.h.{layer}.attn.c_proj.weight"].view(4, 8, 32)
        for part in (qkv[:, :, left:], bias[:, left:], projection[left:]):
            assert not part.any()
        for part in (qkv[:, :, :left], projection[:left]):
            assert part.all()
    heads = ", ".join(map(str, pruned.config.heads))
    assert f"| Heads left after pruning, by layer | {heads};" in (folder / "README.md").read_text()


def test_autotokenizer_gives_tiktokens_tokens_and_the_text_back(exported):
    tokenizer, encoding = AutoTokenizer.from_pretrained(exported), load_encoding()
    assert len(tokenizer) == encoding.n_vocab == VOCAB_SIZE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (encoding.eot_token, encoding.eot_token)
    for text in [*TEXTS, "".join(TEXTS), *(bytes([i]).decode("latin-1") for i in range(256))]:
        ids = tokenizer(text)["input_ids"]
        assert ids == encoding.encode_ordinary(text), text
        assert tokenizer.decode(ids) == text


def test_every_token_has_the_same_bytes_and_end_of_text_is_read_as_the_token(exported):
    tokenizer, encoding = AutoTokenizer.from_pretrained(exported), load_encoding()
    ids = list(range(VOCAB_SIZE))
    assert tokenizer.decode(ids) == encoding.decode(ids)
    assert json.loads((exported / "vocab.json").read_text()) == tokenizer.get_vocab()
    text = "one<|endoftext|> two"
    ids = tokenizer(text)["input_ids"]
    assert ids == encoding.encode(text, allowed_special="all") and encoding.eot_token in ids
    assert tokenizer.decode(ids) == text and tokenizer.decode(ids, skip_special_tokens=True) == "one two"


# --- what is refused


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"norm": "postln"}, "norm=postln"),
        ({"norm": "deepnorm"}, "norm=deepnorm"),
        ({"vocab_size": 97}, "97.*gpt2.*50257"),
    ],
)
def test_a_model_that_stock_classes_or_the_tokenizer_cannot_express_is_refused(tmp_path, changed, named):
    with pytest.raises(UserError, match=named):
        export_here(make_model(**changed), tmp_path)
    assert not (tmp_path / "exported").exists()


def test_a_folder_in_use_is_refused_and_an_empty_one_is_not(tmp_path):
    (tmp_path / "exported").mkdir()
    export_here(make_model(), tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "exported").iterdir()}
    with pytest.raises(UserError, match=r"--out .*exported is in use.*rm -r .*exported"):
        export_model(tmp_path / "model", tmp_path / "exported")
    assert {path: path.read_bytes() for path in (tmp_path / "exported").iterdir()} == before
    with pytest.raises(UserError, match=r"README\.md is in use"):
        export_model(tmp_path / "model", tmp_path / "exported" / "README.md")


def test_an_export_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def disk_full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "write_text", disk_full)
    with pytest.raises(UserError, match=r"--out .*exported .*no space left on device"):
        export_here(make_model(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_the_command_writes_the_same_and_names_its_content(exported, tmp_path, capsys):
    export.main(["--model", str(exported.parent / "model"), "--out", str(tmp_path / "again")])
    source = re.search(r"\S+@[0-9a-f]{12}$", capsys.readouterr().out.strip())[0]
    load_pretrained(source)
    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files
    with pytest.raises(SystemExit, match=r"export: .*absent holds no model"):
        export.main(["--model", str(tmp_path / "absent"), "--out", str(tmp_path / "other")])


# --- the model card


def read_card(folder: Path) -> tuple[dict, str]:
    """Front matter and text of the card."""
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return YAML(typ="safe", pure=True).load(front), text


def write_run(root: Path, **train: float | str) -> None:
    """The files of a run that the card reads."""
    figures = {"val_loss": 3.21987, "steps": 400, "tokens_seen": 819_200, "epochs": 0.25, "diverged_at_step": -1}
    write_json(root / "metrics/train.json", {**figures, **train})
    scores = {"items": 503, "completion_acc": 0.2823, "completion_acc_stderr": 0.02}
    write_json(root / "metrics/hellaswag.json", scores)
    write_json(root / "metrics/prune.json", {"pruned_heads": 5, "pruned_perplexity": 89.17})
    stages = {
        "prepare": {"tiny.prepare": {"source": "docs", "packages": ["numpy", "torch"], "path": None}},
        "benchmark": {"tiny.benchmark": {"source": "heldout"}},
    }
    lock = {"stages": {stage: {"params": {"params.yaml": params}} for stage, params in stages.items()}}
    # JSON is YAML.
    (root / "dvc.lock").write_text(json.dumps(lock))


def card_of(root: Path, name: str = "gpt2", model: GPT | None = None) -> tuple[dict, str]:
    save_model(model or make_model(), root / "models" / name)
    return read_card(export_model(root / "models" / name, root / "exported"))


def test_the_card_cites_each_figure_with_its_file_and_what_was_trained_on(tmp_path):
    write_run(tmp_path)
    front, text = card_of(tmp_path)
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2"]}
    assert "A base model" in text and "Pre-LN" in text
    assert "| Validation loss (nats per token) | 3.220 | `metrics/train.json: val_loss` |" in text
    assert "accuracy | 0.2823 ± 0.02000 | `metrics/hellaswag.json: completion_acc` |" in text
    assert "503 items; items of HellaSwag's form made from held-out documents" in text
    assert "source `docs` (packages numpy torch) as in `dvc.lock`: 400 steps, 819,200 tokens, 0.2500 epochs" in text
    # Absent keys are not shown, nor are those of the pruned model.
    assert "harness" not in text and "prune" not in text and "diverged" not in text
    write_run(tmp_path, diverged_at_step=17)
    assert "diverged at step 17" in write_card(make_model(), tmp_path / "models/gpt2")


def test_the_card_of_a_pruned_model_cites_its_own_figures(tmp_path):
    write_run(tmp_path)
    _, text = card_of(tmp_path, "pruned", remove_heads(make_model(), {Head(1, 0)}))
    assert "| Test perplexity | 89.17 | `metrics/prune.json: pruned_perplexity` |" in text
    assert "val_loss" not in text and "hellaswag" not in text


def test_the_card_of_loaded_weights_names_their_origin_and_no_training(tmp_path):
    write_run(tmp_path, init_from="someone/gpt2", init_commit="abc1", init_sha256="0f0f")
    front, text = card_of(tmp_path)
    assert front["base_model"] == "someone/gpt2"
    assert "None here: the weights are those of `someone/gpt2`, commit `abc1` (sha256 `0f0f`" in text
    assert "From scratch" not in text


@pytest.mark.parametrize("name", ["gpt2", "another"])
def test_nothing_is_stated_that_is_not_recorded_of_this_model(tmp_path, name):
    if name == "another":
        write_run(tmp_path)
    _, text = card_of(tmp_path, name)
    assert "Not recorded with the model." in text and "None are recorded with the model." in text
    assert "metrics/" not in text


def test_a_lock_that_cannot_be_read_is_named(tmp_path):
    write_run(tmp_path)
    (tmp_path / "dvc.lock").write_text("stages: [")
    with pytest.raises(UserError, match=r"(?s)dvc\.lock cannot be read .*restore it from Git"):
        card_of(tmp_path)
