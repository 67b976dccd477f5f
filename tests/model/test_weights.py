"""A saved model comes back as it was; one that is absent, damaged or of another shape is refused in words."""

import pytest
import safetensors.torch
import torch

from gpt2.model.gpt import GPT
from gpt2.model.weights import load_model, save_model
from gpt2.pipeline.files import UserError, read_json, write_json
from tests.analysed import VOCAB_SIZE, make_model, make_windows


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    save_model(make_model(), tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("norm", ["preln", "postln", "deepnorm"])
@pytest.mark.parametrize("heads", [None, (4, 0, 3), (0, 0, 0)])
def test_a_model_returns_as_it_was(tmp_path, norm, heads):
    model, idx = make_model(norm, heads=heads), make_windows(2)[:, :-1]
    save_model(model, tmp_path / "gpt2")
    loaded = load_model(tmp_path / "gpt2")
    assert loaded.config == model.config
    assert not loaded.training
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(loaded(idx), model(idx))


def test_the_file_holds_gpt2_names_and_no_padding(folder):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    assert state["wte.weight"].shape == (VOCAB_SIZE, 32)
    assert {name for name in state if not name.startswith("h.")} == {
        *("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")
    }
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    assert {name for name in state if name.startswith("h.1.")} == {
        f"h.1.{part}.{kind}" for part in parts for kind in ("weight", "bias")
    }
    assert sum(tensor.numel() for tensor in state.values()) == make_model().n_params()


def test_saving_does_not_touch_the_model(tmp_path):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_same_model_gives_the_same_bytes(tmp_path, folder):
    save_model(make_model(), tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_every_difference_of_name_and_shape_is_listed_at_once(folder):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    del state["ln_f.bias"]
    state["lm_head.weight"] = torch.zeros(VOCAB_SIZE, 32)
    state["wte.weight"] = torch.zeros(128, 32)
    state["h.2.mlp.c_fc.weight"] = state["h.2.mlp.c_fc.weight"].t().contiguous()
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError) as raised:
        load_model(folder)
    heading, *faults = str(raised.value).splitlines()
    assert heading.endswith("model.safetensors does not fit config.json beside it:")
    assert [fault.strip() for fault in faults] == [
        "h.2.mlp.c_fc.weight: expected (128, 32), found (32, 128)",
        "lm_head.weight: expected nothing, found (97, 32)",
        "ln_f.bias: expected (32,), found nothing",
        "wte.weight: expected (97, 32), found (128, 32)",
    ]


def test_weights_of_another_norm_are_refused(folder):
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "norm": "postln"})
    with pytest.raises(UserError, match=r"ln_f\.bias: expected nothing, found \(32,\)"):
        load_model(folder)


def test_an_absent_model_is_named_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"gpt2 holds no model \(config\.json is missing\); .*dvc repro train"):
        load_model(tmp_path / "gpt2")


@pytest.mark.parametrize("kept", [0, 5, 1000])
def test_cut_weights_are_refused(folder, kept):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read .*; run `dvc repro train`"):
        load_model(folder)


def test_a_configuration_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 3}, r"config\.json\.n_layers = 3 is not a known key; did you mean n_layer"),
        ({"n_head": "4"}, r"config\.json\.n_head = '4'"),
        ({"n_head": 5}, "n_embd=32 must be a multiple of n_head=5"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(folder, change, message):
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **change})
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_a_save_that_fails_leaves_no_model_that_mixes_old_and_new(folder, monkeypatch):
    def disk_full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        save_model(GPT(make_model().config, seed=9), folder)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors"}
    with pytest.raises(UserError, match="holds no model"):
        load_model(folder)


def test_a_model_with_an_output_matrix_of_its_own_is_refused(tmp_path):
    save_model(GPT(make_model().config, tied=False), tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"lm_head: expected nothing, found \(128, 32\)"):
        load_model(tmp_path / "gpt2")
