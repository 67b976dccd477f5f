"""The shipped params.yaml is sound, and a fault anywhere in it is told by its key, all faults at once."""

import copy
import re

import pytest

from gpt2.check.schema import SECTIONS, check
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import SCALES, read
from stages import check_params
from tests.closure import ROOT


@pytest.fixture(scope="module")
def shipped() -> dict:
    return read(ROOT / "params.yaml")


@pytest.fixture
def values(shipped) -> dict:
    """A copy of params.yaml to break."""
    return copy.deepcopy(shipped)


def test_the_shipped_parameters_are_sound(shipped):
    check(shipped)


def test_every_block_has_all_sections_and_no_other(shipped):
    assert set(shipped) == {"norm", "scale", *SCALES}
    for scale in SCALES:
        assert list(shipped[scale]) == list(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_misspelt_key_of_any_section_is_named_with_the_right_one(values, scale, section):
    key = next(iter(values[scale][section]))
    values[scale][section][f"{key}_"] = values[scale][section].pop(key)
    with pytest.raises(UserError, match=rf"\n{scale}\.{section}\.{key}_ = .* did you mean {key}\?"):
        check(values)


def test_loaded_weights_need_their_norm_and_no_step_that_divides(values):
    values["tiny"]["train"] |= {"init_from": "exported", "tokens_per_step": 130}
    check(values)
    values["norm"] = "deepnorm"
    message = (
        r"\ntiny: train\.init_from = 'exported' are weights of a Pre-LN model, norm = 'deepnorm'; set norm to preln"
    )
    with pytest.raises(UserError, match=message):
        check(values)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_an_absent_section_is_named(values, scale, section):
    del values[scale][section]
    with pytest.raises(UserError, match=rf"params\.yaml lacks the section {scale}\.{section}; copy it"):
        check(values)


def test_a_scale_that_is_not_in_use_is_checked_as_well(values):
    values["scale"] = "tiny"
    values["full"]["train"]["max_lr"] = "6e-4"
    with pytest.raises(UserError, match=r"full\.train\.max_lr = '6e-4': Input should be a valid number"):
        check(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "pre_ln"}, "norm = 'pre_ln': Input should be 'preln', 'postln' or 'deepnorm'"),
        ({"norm": None}, "norm = None"),
        ({"scale": "medium"}, "scale='medium' must name one of the blocks tiny, short, full"),
        ({"tiny": None}, "tiny must be a block with the sections hardware, prepare"),
        ({"huge": {}}, "huge: not a key of params.yaml; known: norm, scale, tiny, short, full"),
    ],
)
def test_a_fault_at_the_top_is_told(values, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check({**values, **change})


def test_an_absent_norm_is_told(values):
    del values["norm"]
    with pytest.raises(UserError, match=r"(?m)^norm is missing; change it in params\.yaml"):
        check(values)


def test_an_unknown_section_is_named(values):
    values["short"]["optimizer"] = {"lr": 1.0}
    with pytest.raises(UserError, match=r"short\.optimizer: not a section; known: hardware, prepare"):
        check(values)


@pytest.mark.parametrize(
    ("tokens_per_step", "nearest"),
    [(5000, [4096, 6144]), (2049, [2048, 4096]), (128, [2048]), (4992, [4096, 6144]), (6143, [4096, 6144])],
)
def test_a_step_that_does_not_divide_is_refused_with_the_nearest_that_do(values, tokens_per_step, nearest):
    values["tiny"]["hardware"]["nproc"] = 2
    values["tiny"]["model"]["block_size"] = 128
    values["tiny"]["train"] |= {"tokens_per_step": tokens_per_step, "micro_batch": 8}
    with pytest.raises(UserError) as raised:
        check(values)
    (fault,) = str(raised.value).strip().splitlines()
    assert fault.startswith(f"tiny: train.tokens_per_step = {tokens_per_step} must be a multiple of 2048 ")
    assert fault.endswith(f"nearest values: {', '.join(map(str, nearest))}")
    for value in nearest:
        values["tiny"]["train"]["tokens_per_step"] = value
        check(values)


@pytest.mark.parametrize(("nproc", "processes"), [(2, 6), ("gpu", 3)])
def test_the_processes_of_all_machines_share_a_step(values, nproc, processes):
    values["tiny"]["hardware"] |= {"nproc": nproc, "nnodes": 3, "rdzv_endpoint": "a:29400"}
    values["tiny"]["model"]["block_size"] = 128
    values["tiny"]["train"] |= {"tokens_per_step": processes * 1024, "micro_batch": 8}
    check(values)
    values["tiny"]["train"]["tokens_per_step"] += 1024
    with pytest.raises(UserError, match=rf"must be a multiple of {processes * 1024} \(.* = 128 × 8 × {processes}\)"):
        check(values)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("p50k", "must be gpt2, or bpe_N for a trained vocabulary of N tokens"),
        ("bpe_0512", "must be gpt2, or bpe_N"),
        ("bpe_256", "must have at least 257 tokens, all bytes and end-of-text"),
        ("bpe_65537", "at most 65536, since token files are uint16"),
    ],
)
def test_an_encoding_that_cannot_be_is_refused_in_any_scale(values, scale, name, rule):
    values[scale]["tokenize"]["encoding"] = name
    with pytest.raises(UserError, match=rf"{scale}\.tokenize\.encoding = '{name}': .*{rule}"):
        check(values)


@pytest.mark.parametrize("name", ["gpt2", "bpe_257", "bpe_65536"])
def test_an_encoding_that_can_be_is_accepted(values, name):
    values["tiny"]["tokenize"]["encoding"] = name
    check(values)


@pytest.mark.parametrize("key", ["norm", "vocab_size"])
def test_what_follows_from_elsewhere_may_not_stand_in_the_model(values, key):
    values["tiny"]["model"][key] = "preln" if key == "norm" else 50257
    with pytest.raises(UserError, match=rf"tiny\.model must not set {key}: it is given elsewhere"):
        check(values)


def test_faults_of_all_scales_are_told_at_once(values):
    values["norm"] = "none"
    values["tiny"]["model"]["n_head"] = 7
    values["short"]["train"]["max_steps"] = 0
    values["full"]["prune"]["shares"] = 0.5
    with pytest.raises(UserError) as raised:
        check(values)
    for part in ("norm = 'none'", "n_head=7", "short.train.max_steps = 0", "full.prune.shares = 0.5"):
        assert part in str(raised.value)


def test_the_stage_writes_its_mark_only_for_sound_parameters(tmp_path, monkeypatch):
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(text.replace("max_steps:", "max_step:", 1), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"(?s)^check-params: \n.*max_step = \d+ is not a known key"):
        check_params.main()
    assert not (tmp_path / "data").exists()
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    check_params.main()
    assert (tmp_path / "data" / "params.valid").is_file()


def test_a_budget_that_pays_for_no_training_is_refused_with_what_would_do(values):
    values["tiny"]["vocabulary_runs"]["budgets"] = [1e6, 1e11]
    with pytest.raises(
        UserError, match=r"tiny: vocabulary_runs\.budgets=1e\+06 pays for 0 steps .*of 50257, .*raise it to"
    ):
        check(values)
