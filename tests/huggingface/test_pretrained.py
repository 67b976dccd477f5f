"""Pretrained GPT-2 is loaded exactly as transformers saves it, and whatever does not fit is listed whole."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2.huggingface.pretrained import check_source, load_pretrained
from gpt2.model.config import GPTConfig
from gpt2.model.evaluate import mean_loss
from gpt2.model.gpt import GPT
from gpt2.model.weights import load_model
from gpt2.pipeline.files import UserError, read_json, write_json
from tests.analysed import BLOCK_SIZE, VOCAB_SIZE, make_model, make_windows
from tests.closure import ROOT
from tests.hub import COMMIT, REPOSITORY, serve
from tests.reference import make_reference
from tests.training_run import SHAPE, VOCABULARY, finish, load_parts, prepare_folder, read_table, start, train_here

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """What transformers saves of make_model()."""
    folder = tmp_path_factory.mktemp("saved")
    make_reference(make_model()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(saved, tmp_path / "hf")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = safetensors.torch.load_file(folder / WEIGHTS)
    change(state)
    safetensors.torch.save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **changed: object) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **changed})


def faults_of(folder: Path | str, shape: GPTConfig | None = None) -> list[str]:
    """The lines of the error between the first and the remedy, or the whole of it if it has one line."""
    with pytest.raises(UserError) as raised:
        load_pretrained(str(folder), shape, "tiny")
    return [line.strip() for line in str(raised.value).splitlines()]


def assert_equal(model: GPT, expected: GPT) -> None:
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_model_of_transformers_is_loaded_bit_for_bit(saved):
    model, origin = load_pretrained(str(saved))
    assert_equal(model, make_model())
    digest = hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest()
    assert (origin.source, origin.commit, origin.sha256) == (str(saved), None, digest)
    assert origin.figures() == {"init_from": str(saved), "init_sha256": digest}


def test_random_weights_of_transformers_give_its_logits_and_loss(tmp_path):
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=BLOCK_SIZE, n_embd=32, n_layer=3, n_head=4)
    reference = GPT2LMHeadModel(config).eval()
    reference.save_pretrained(tmp_path)
    model, _ = load_pretrained(str(tmp_path))
    windows = make_windows(3)
    with torch.no_grad():
        theirs = reference(windows[:, :-1]).logits
        assert torch.allclose(model(windows[:, :-1]), theirs, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), windows[:, 1:].flatten())
    assert mean_loss(model, windows, 2) == pytest.approx(loss.item(), abs=1e-5)


def save_plain(folder: Path) -> None:
    make_reference(make_model()).transformer.save_pretrained(folder)
    assert "wte.weight" in safetensors.torch.load_file(folder / WEIGHTS)


def save_shards(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    make_reference(make_model()).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def add_masks_and_head(folder: Path) -> None:
    def add(state):
        for layer in range(3):
            state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
            state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        state["lm_head.weight"] = state["transformer.wte.weight"].clone()

    change_weights(folder, add)


def rename_activation(folder: Path) -> None:
    change_config(folder, activation_function="gelu_pytorch_tanh", n_inner=128)


@pytest.mark.parametrize("change", [save_plain, save_shards, add_masks_and_head, rename_activation])
def test_other_spellings_of_the_same_model_are_loaded_alike(folder, change):
    change(folder)
    assert_equal(load_pretrained(str(folder))[0], make_model())


def test_half_precision_becomes_float32(folder):
    change_weights(folder, lambda state: state.update({name: tensor.half() for name, tensor in state.items()}))
    model, _ = load_pretrained(str(folder))
    expected = make_model()
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.h[1].mlp.c_fc.weight, expected.h[1].mlp.c_fc.weight.half().float())


def test_a_shorter_context_cuts_positions_and_changes_nothing_before(saved):
    whole, idx = make_model(), make_windows(2)[:, :10]
    shape = whole.config.model_copy(update={"block_size": 10})
    model, _ = load_pretrained(str(saved), shape)
    assert model.wpe.weight.shape == (10, 32)
    with torch.no_grad():
        assert torch.allclose(model(idx), whole(make_windows(2)[:, :-1])[:, :10], atol=1e-6)


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd"), [(12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600)]
)
def test_the_configurations_of_all_four_sizes_fit(tmp_path, n_layer, n_head, n_embd):
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    GPT2Config(**sizes).save_pretrained(tmp_path)
    shape = GPTConfig(**sizes, block_size=1024, vocab_size=50257, norm="preln")
    check_source(str(tmp_path), shape, "full")
    with pytest.raises(UserError, match=r"-S full\.model\.block_size=1024"):
        check_source(str(tmp_path), shape.model_copy(update={"block_size": 2048}), "full")


def test_every_difference_of_the_weights_is_listed_at_once(folder):
    def spoil(state):
        del state["transformer.ln_f.bias"]
        state["transformer.h.2.mlp.c_fc.weight"] = state["transformer.h.2.mlp.c_fc.weight"].t().contiguous()
        state["transformer.wpe.weight"] = torch.zeros(20, 32)
        state["transformer.h.0.ln_1.weight"][3] = torch.nan
        state["transformer.h.3.ln_1.bias"] = torch.zeros(32)
        state |= {"transformer.wte.weight": torch.zeros(128, 32), "lm_head.weight": torch.zeros(128, 32)}

    change_weights(folder, spoil)
    heading, *faults = faults_of(folder)
    assert heading == f"train.init_from: the weights of {folder} are not those of a GPT-2:"
    assert faults == [
        "lm_head.weight: expected (97, 32), found (128, 32)",
        "transformer.h.0.ln_1.weight: not finite",
        "transformer.h.2.mlp.c_fc.weight: expected (32, 128), found (128, 32)",
        "transformer.h.3.ln_1.bias: not a weight of GPT-2",
        "transformer.ln_f.bias: missing",
        "transformer.wpe.weight: expected (24, 32), found (20, 32)",
        "transformer.wte.weight: expected (97, 32), found (128, 32)",
    ]


def test_a_head_of_its_own_is_refused(folder):
    change_weights(folder, lambda state: state.update({"lm_head.weight": torch.ones(97, 32)}))
    (fault,) = faults_of(folder)[1:]
    assert fault.startswith("lm_head.weight: differs from transformer.wte.weight")


def test_every_value_that_our_architecture_has_not_is_listed_at_once(folder):
    changed = {
        "model_type": "gptj", "activation_function": "gelu", "layer_norm_epsilon": 1e-6, "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False, "n_inner": 64,
        "add_cross_attention": True, "quantization_config": {"bits": 4},
    }  # fmt: skip
    change_config(folder, **changed, n_layer=24)
    theirs = {"norm": "preln", "n_layer": 24, "n_head": 4, "block_size": 24, "vocab_size": 97}
    ours = {"norm": "postln", "n_head": 8, "block_size": 48, "vocab_size": 50257}
    heading, *faults, remedy = faults_of(folder, make_model().config.model_copy(update=ours))
    assert heading == f"train.init_from: {folder} does not fit:"
    expected = [f"config.json: {key} = {json.dumps(value)}, needed: " for key, value in changed.items()]
    expected += [f"{key} = {ours.get(key, 3)}, the weights have {value}" for key, value in theirs.items()]
    assert len(faults) == len(expected)
    assert all(fault.startswith(start) for fault, start in zip(sorted(faults), sorted(expected), strict=True))
    sizes = "".join(f" -S tiny.model.{key}={theirs[key]}" for key in ("n_layer", "n_head", "block_size"))
    assert remedy.endswith(f" -S norm=preln{sizes}")


def write_index(folder: Path, index: object) -> None:
    """Shards: the weights as a.safetensors, and an index."""
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def leave_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json"),
        (lambda folder: (folder / "config.json").write_text("[1]"), r"config\.json"),
        (lambda folder: change_config(folder, n_layer="3"), "n_layer.*'3'"),
        (lambda folder: change_config(folder, n_head=5), "n_embd=32 must be a multiple of n_head=5"),
        (lambda folder: change_config(folder, model_type=None), 'model_type = null, needed: "gpt2"'),
        (leave_a_pickle, r"pytorch_model\.bin is a pickle.* save_pretrained it"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000]), "get them again"),
        (lambda folder: write_index(folder, {"metadata": {}, "weight_map": {"wte": "b.safetensors"}}), "b.safetensors"),
        (lambda folder: write_index(folder, {"weight_map": ["a.safetensors"]}), r"model\.safetensors\.index\.json"),
        (lambda folder: write_index(folder, {}), "weight_map"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_with_the_cause(folder, damage, named):
    damage(folder)
    with pytest.raises(UserError, match=rf"(?s){folder}.*{named}"):
        load_pretrained(str(folder))


@pytest.mark.parametrize("source", ["/absent/folder", "./absent", "a/b/c", "~/x", "@main"])
def test_what_is_neither_a_folder_nor_an_id_is_refused_without_a_network(source):
    with pytest.raises(UserError, match=rf"train\.init_from = '{source}' is neither a folder .* nor the id"):
        load_pretrained(source)


def test_a_pin_holds_a_folder_to_its_content(folder):
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    for pin in (digest[:8], digest):
        assert load_pretrained(f"{folder}@{pin}")[1].source == str(folder)
    for pin in (digest[:7], "0" * 64, "main"):
        with pytest.raises(UserError, match=f"8 or more digits.*{digest}.*{folder}@{digest[:12]}"):
            load_pretrained(f"{folder}@{pin}")


# --- the hub

PROBE = """
import json, sys
from gpt2.pipeline.files import UserError
from gpt2.huggingface.pretrained import load_pretrained
for source in sys.argv[1:]:
    try:
        print(json.dumps(load_pretrained(source)[1].figures()))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def probe(home: Path, sources: list[str], **environment: str) -> list[dict | str]:
    """Origin or error of each source in a process of its own, since the client reads the environment at its import."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env = {**kept, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [sys.executable, "-c", PROBE, *sources]
    ended = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_a_model_of_the_hub_is_read_by_its_commit_and_again_offline_and_a_pickle_is_not(saved, folder, tmp_path):
    digest = hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest()
    expected = {"init_from": REPOSITORY, "init_sha256": digest, "init_commit": COMMIT}
    with serve(saved) as hub:
        sources = [REPOSITORY, f"{REPOSITORY}@{COMMIT}", f"{REPOSITORY}@v9", "someone/else"]
        main, commit, revision, name = probe(tmp_path, sources, HF_ENDPOINT=hub.address)
    assert main == commit == expected
    for error, named in ((revision, f"{REPOSITORY}@v9"), (name, "someone/else")):
        assert error.startswith(f"train.init_from: {named} ") and "404" in error and "hf auth login" in error
    # Files are asked of the commit, and none but those that are read.
    gets = [path for path in hub.asked if path.startswith("GET") and "/resolve/" in path]
    assert sorted(gets) == [f"GET {REPOSITORY}/resolve/{COMMIT}/{file}" for file in ("config.json", WEIGHTS)]
    again, other = probe(tmp_path, [REPOSITORY, "someone/else"], HF_HUB_OFFLINE="1")
    assert again == expected
    assert other.startswith("train.init_from: someone/else ") and "HF_HUB_OFFLINE" in other
    leave_a_pickle(folder)
    home = tmp_path / "empty"
    home.mkdir()
    with serve(folder) as hub:
        (error,) = probe(home, [REPOSITORY], HF_ENDPOINT=hub.address)
    assert "pytorch_model.bin is a pickle" in error and hub.count("*pytorch_model.bin") == 0


# --- the stage


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A GPT-2 of transformers in the shape of the training runs, with a longer context."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(2)
    sizes = {"n_layer": SHAPE["n_layer"], "n_head": SHAPE["n_head"], "n_embd": SHAPE["n_embd"], "n_positions": 24}
    GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=VOCABULARY.vocab_size)).save_pretrained(folder)
    return folder


def test_the_stage_takes_no_step_and_writes_all_that_a_run_writes(weights, tmp_path, monkeypatch):
    # A step that would not divide is none of its concern.
    folder = prepare_folder(tmp_path, train={"init_from": str(weights), "tokens_per_step": 130})
    train_here(folder, monkeypatch)
    parts = load_parts(folder)
    model, expected = load_model(folder / "models/gpt2"), load_pretrained(str(weights), parts.model.config)[0]
    assert_equal(model, expected)
    figures = read_json(folder / "metrics/train.json")
    assert not any(figures[key] for key in ("steps", "max_steps", "tokens_seen", "diverged", "loss_spikes"))
    digest = hashlib.sha256((weights / WEIGHTS).read_bytes()).hexdigest()
    assert (figures["init_from"], figures["init_sha256"]) == (str(weights), digest)
    assert figures["val_loss"] == mean_loss(model, parts.evaluation.windows, 2)
    stream = torch.from_numpy(parts.order.tokens.read(0, 31 * 16 + 1).astype(np.int64))
    assert figures["train_loss"] == pytest.approx(mean_loss(model, stream.unfold(0, 17, 16), 2), abs=1e-9)
    evaluation = [0, 0, *(figures[key] for key in ("val_loss", "hellaswag_acc", "hellaswag_acc_norm"))]
    assert read_table(folder / "plots/train/eval.csv").tolist() == [evaluation]
    for table in ("train", "layers"):
        assert len((folder / f"plots/train/{table}.csv").read_text().splitlines()) == 1
    assert read_json(folder / "metrics/speed/train.json")["tokens_per_s"] == 0
    assert not (folder / ".scratch").exists()


def test_two_processes_load_and_measure_as_one(weights, tmp_path, monkeypatch):
    folders = [prepare_folder(tmp_path / name, train={"init_from": str(weights)}) for name in ("one", "two")]
    finish(start(folders[1], processes=2), folders[1])
    train_here(folders[0], monkeypatch)
    one, two = (read_json(folder / "metrics/train.json") for folder in folders)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
    assert len({(folder / "models/gpt2" / WEIGHTS).read_bytes() for folder in folders}) == 1


def test_weights_of_another_size_end_the_stage_with_the_remedy(weights, tmp_path, monkeypatch):
    folder = prepare_folder(tmp_path, train={"init_from": str(weights)}, model={"n_layer": 3, "n_embd": 32})
    with pytest.raises(SystemExit) as stopped:
        train_here(folder, monkeypatch)
    assert stopped.value.code.endswith("or set -S tiny.model.n_layer=2 -S tiny.model.n_embd=16")
    assert not (folder / "models").exists() and not (folder / "metrics").exists()


def test_weights_that_predict_no_number_are_refused(weights, tmp_path, monkeypatch):
    huge = shutil.copytree(weights, tmp_path / "huge")
    change_weights(huge, lambda state: state["transformer.wte.weight"].mul_(1e38))
    folder = prepare_folder(tmp_path / "run", train={"init_from": str(huge)})
    with pytest.raises(SystemExit, match=r"weights of train\.init_from have a validation loss of (nan|inf)"):
        train_here(folder, monkeypatch)
    assert not (folder / "models").exists()
