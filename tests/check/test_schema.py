"""A fault anywhere in params.yaml is reported with key, value, rule and remedy, and all faults at once."""

import copy

import pytest

from gpt2.check.schema import Sections, find_faults
from gpt2.pipeline.params import SCALES
from gpt2.tokenizer import encodings
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
    assert [list(values[scale]) for scale in SCALES] == [list(Sections.model_fields)] * len(SCALES)


@pytest.mark.parametrize("scale", SCALES)
def test_a_wrong_value_of_any_key_is_reported_with_key_value_and_remedy(values, scale):
    keys = [f"{scale}.{section}.{key}" for section, settings in values[scale].items() for key in settings]
    values[scale] = {section: {key: [None] for key in settings} for section, settings in values[scale].items()}
    faults = find_faults(values)
    for key in keys:
        # A key of a list has the fault of its item.
        assert any(line.startswith((f"{key} = [None]: ", f"{key}.0 = None: ")) for line in faults), key
    assert all("; change it in params.yaml" in line for line in faults)


@pytest.mark.parametrize("scale", SCALES)
def test_misspelt_keys_and_absent_sections_are_named(values, scale):
    first = {section: next(iter(settings)) for section, settings in values[scale].items()}
    for section, key in first.items():
        values[scale][section][f"{key}_"] = values[scale][section].pop(key)
    faults = find_faults(values)
    for section, key in first.items():
        (fault,) = [line for line in faults if line.startswith(f"{scale}.{section}.{key}_ = ")]
        assert f"did you mean {key}?" in fault
    values[scale] = {}
    assert {line.split(" is missing; ")[0] for line in find_faults(values)} == {f"{scale}.{name}" for name in first}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train.tokens_per_step": 5000}, ("tiny: train.tokens_per_step = 5000", "multiple of 2048", "4096, 6144")),
        ({"model.n_head": 7}, ("tiny.model: ", "n_head=7", "multiple", "nearest")),
        ({"model.norm": "preln"}, ("tiny.model.norm = 'preln'", "not a known key", "n_layer, n_head")),
        ({"tokenize.encoding": "p50k"}, ("tiny.tokenize.encoding = 'p50k'", "bpe_N", "change it in")),
        ({"tokenize.encoding": "bpe_0512"}, ("'bpe_0512'", "bpe_N", "change it in")),
        ({"tokenize.encoding": "bpe_256"}, ("'bpe_256'", "at least 257", "change it in")),
        ({"tokenize.encoding": "bpe_65537"}, ("'bpe_65537'", "at most 65536", "change it in")),
        ({"prepare.val_percent": 99.5}, ("val_percent=99.5", "test_percent=1.0", "lower them")),
        ({"prepare.packages": []}, ("source=docs", "packages", "set it to")),
        ({"prepare.language": "en"}, ("source=docs", "language", "set it to null")),
        ({"vocabulary_runs.budgets": [1e6, 1e11]}, ("vocabulary_runs.budgets=1e+06", "0 steps", "raise it to")),
    ],
)
def test_a_value_against_a_rule_is_reported_with_rule_and_remedy(changes, expected):
    (fault,) = find_faults(change("tiny", changes))
    for part in expected:
        assert part in fault


@pytest.mark.parametrize(
    "changes",
    [
        # The values that the message of tokens_per_step offers, and the limits of an encoding.
        *({"train.tokens_per_step": near} for near in (4096, 6144)),
        *({"tokenize.encoding": name} for name in ("gpt2", "bpe_257", "bpe_65536")),
    ],
)
def test_a_value_within_the_rules_is_accepted(changes):
    assert find_faults(change("tiny", changes)) == []


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


@pytest.mark.parametrize(("package", "message"), [("no_such_package", "vocab.bpe"), ("damaged", "1ce16647")])
def test_a_vocabulary_file_that_is_absent_or_damaged_is_named(values, package, message, tmp_path, monkeypatch):
    (tmp_path / "damaged/data").mkdir(parents=True)
    (tmp_path / "damaged/__init__.py").touch()
    (tmp_path / "damaged/data/vocab.bpe").write_text("#version: 0.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(encodings, "VOCABULARY_PACKAGE", package)
    encodings.load_encoding.cache_clear()
    try:
        faults = find_faults(values)
    finally:
        encodings.load_encoding.cache_clear()
    assert any(line.startswith("full: ") and package in line and message in line for line in faults)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"norm": "pre_ln"}, "norm = 'pre_ln': "),
        ({"norm": None}, "norm = None: "),
        ({"scale": "medium"}, "scale = 'medium': "),
        ({"tiny": None}, "tiny = None: "),
        ({"huge": {}}, "huge = {} is not a known key; known keys: norm, scale, tiny"),
        (
            {"short": {**SHIPPED["short"], "optimizer": {}}},
            "short.optimizer = {} is not a known key; known keys: hardw",
        ),
        ({"short": {**SHIPPED["short"], "traim": {}}}, "short.traim = {} is not a known key; did you mean train?"),
    ],
)
def test_a_fault_outside_of_the_sections_is_named(values, changes, expected):
    (fault,) = find_faults({**values, **changes})
    assert fault.startswith(expected) and "; change it in" in fault


def test_faults_of_all_scales_are_reported_at_once(values):
    del values["norm"]
    values["tiny"]["model"]["n_head"] = 7
    values["short"]["train"]["max_steps"], values["full"]["prune"]["shares"] = 0, 0.5
    faults = "\n".join(find_faults(values))
    for part in ("norm is missing", "n_head=7", "short.train.max_steps = 0", "full.prune.shares = 0.5"):
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
