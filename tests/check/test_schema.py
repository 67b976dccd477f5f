"""A fault anywhere in params.yaml is reported with key, value, rule and remedy, and all faults at once."""

import copy

import pytest

from gpt2.check.schema import SECTIONS, find_faults
from gpt2.pipeline.params import SCALES
from stages import check_params
from tests.check.changed import SHIPPED, change
from tests.closure import ROOT


@pytest.fixture
def values() -> dict:
    return copy.deepcopy(SHIPPED)


def test_the_shipped_parameters_are_valid(values):
    assert find_faults(values) == []


def test_every_block_has_all_sections_in_one_order(values):
    assert set(values) == {"norm", "scale", *SCALES}
    assert [list(values[scale]) for scale in SCALES] == [list(SECTIONS)] * len(SCALES)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_wrong_value_of_any_key_is_reported_with_key_value_and_remedy(values, scale, section):
    keys = list(values[scale][section])
    values[scale][section] = {key: {"no": key} for key in keys}
    faults = find_faults(values)
    for key in keys:
        # Of a key whose value is a map, the fault is of the map's own keys.
        starts = (f"{scale}.{section}.{key} = {{'no': '{key}'}}: ", f"{scale}.{section}.{key}.no = '{key}': ")
        (fault,) = [line for line in faults if line.startswith(starts)]
        assert "; change it in params.yaml" in fault


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_misspelt_key_and_an_absent_section_are_named(values, scale, section):
    key = next(iter(values[scale][section]))
    values[scale][section][f"{key}_"] = values[scale][section].pop(key)
    assert any(
        f"{scale}.{section}.{key}_ = " in line and f"did you mean {key}?" in line for line in find_faults(values)
    )
    del values[scale][section]
    assert any(f"lacks the section {scale}.{section}; copy it" in line for line in find_faults(values))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train.max_steps": 0}, ("tiny.train.max_steps = 0", "greater than 0", "change it in")),
        ({"train.max_lr": "6e-4"}, ("tiny.train.max_lr = '6e-4'", "valid number", "change it in")),
        ({"train.epochs": 1.0}, ("max_steps=300", "epochs=1.0", "set the other to null")),
        ({"train.warmup_steps": 400}, ("warmup_steps=400", "less than max_steps=300", "shorten")),
        ({"train.min_lr": 1.0}, ("min_lr=1.0", "max_lr=0.016", "lower min_lr")),
        ({"train.tokens_per_step": 5000}, ("train.tokens_per_step = 5000", "multiple of 2048", "4096, 6144")),
        ({"model.n_head": 7}, ("n_head=7", "multiple", "nearest")),
        ({"model.norm": "preln"}, ("tiny.model", "norm", "remove it")),
        ({"model.vocab_size": 50257}, ("tiny.model", "vocab_size", "remove it")),
        ({"tokenize.encoding": "p50k"}, ("tiny.tokenize.encoding = 'p50k'", "bpe_N", "change it in")),
        ({"tokenize.encoding": "bpe_0512"}, ("'bpe_0512'", "bpe_N", "change it in")),
        ({"tokenize.encoding": "bpe_256"}, ("'bpe_256'", "at least 257", "change it in")),
        ({"tokenize.encoding": "bpe_65537"}, ("'bpe_65537'", "at most 65536", "change it in")),
        ({"prepare.val_percent": 99.5}, ("val_percent=99.5", "test_percent=1.0", "lower them")),
        ({"prepare.packages": []}, ("source=docs", "packages", "set it to")),
        ({"prepare.language": "en"}, ("source=docs", "language", "set it to null")),
        ({"hardware.nproc": 0}, ("tiny.hardware.nproc = 0", "from 1 on", "gpu")),
        ({"hardware.nnodes": 2}, ("nnodes=2", "rdzv_endpoint", "host:port")),
        ({"vocabulary_runs.budgets": [1e6, 1e11]}, ("vocabulary_runs.budgets=1e+06", "0 steps", "raise it to")),
    ],
)
def test_a_value_against_a_rule_is_reported_with_rule_and_remedy(changes, expected):
    (fault,) = find_faults(change("tiny", changes))
    for part in expected:
        assert part in fault


@pytest.mark.parametrize("near", [4096, 6144])
def test_the_values_that_a_message_offers_are_valid(near):
    assert find_faults(change("tiny", {"train.tokens_per_step": near})) == []


@pytest.mark.parametrize("name", ["gpt2", "bpe_257", "bpe_65536"])
def test_an_encoding_that_can_be_made_is_accepted(name):
    assert find_faults(change("tiny", {"tokenize.encoding": name})) == []


@pytest.mark.parametrize(("nproc", "processes"), [(2, 6), ("gpu", 3)])
def test_the_processes_of_all_machines_share_a_step(nproc, processes):
    hardware = {"hardware.nproc": nproc, "hardware.nnodes": 3, "hardware.rdzv_endpoint": "a:29400"}
    assert find_faults(change("tiny", {**hardware, "train.tokens_per_step": processes * 1024})) == []
    (fault,) = find_faults(change("tiny", {**hardware, "train.tokens_per_step": (processes + 1) * 1024}))
    assert f"multiple of {processes * 1024}" in fault


def test_pretrained_weights_need_preln_and_no_step_that_divides(values):
    values["tiny"]["train"] |= {"init_from": "exported", "tokens_per_step": 130}
    assert find_faults(values) == []
    values["norm"] = "deepnorm"
    (fault,) = find_faults(values)
    for part in ("tiny: train.init_from = 'exported'", "norm = 'deepnorm'", "set norm to preln"):
        assert part in fault


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"norm": "pre_ln"}, "norm = 'pre_ln'"),
        ({"norm": None}, "norm = None"),
        ({"scale": "medium"}, "scale='medium' must name one of"),
        ({"tiny": None}, "tiny must be a block with the sections hardware"),
        ({"huge": {}}, "huge: not a key of params.yaml"),
        ({"short": {**SHIPPED["short"], "optimizer": {}}}, "short.optimizer: not a section"),
    ],
)
def test_a_fault_outside_of_the_sections_is_named(values, changes, expected):
    assert any(line.startswith(expected) for line in find_faults({**values, **changes}))


def test_an_absent_norm_is_named(values):
    del values["norm"]
    assert any(line.startswith("norm is missing; change it in") for line in find_faults(values))


def test_faults_of_all_scales_are_reported_at_once(values):
    values["norm"], values["tiny"]["model"]["n_head"] = "none", 7
    values["short"]["train"]["max_steps"], values["full"]["prune"]["shares"] = 0, 0.5
    faults = "\n".join(find_faults(values))
    for part in ("norm = 'none'", "n_head=7", "short.train.max_steps = 0", "full.prune.shares = 0.5"):
        assert part in faults


def test_the_stage_writes_its_output_only_for_valid_parameters(tmp_path, monkeypatch):
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(text.replace("max_steps:", "max_step:", 1), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"(?s)^check-params: \n.*max_step = \d+ is not a known key"):
        check_params.main()
    assert not (tmp_path / "data").exists()
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    check_params.main()
    assert (tmp_path / "data/params.valid").is_file()
