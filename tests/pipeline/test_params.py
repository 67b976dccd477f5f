"""The strict door: every wrong value is refused before any work, with its key, its value and what to do."""

import math
import re
from datetime import date

import pytest
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from gpt2.pipeline import params
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import Config, build, load, read


class Sampling(Config):
    """Some section."""

    max_lr: PositiveFloat
    max_steps: PositiveInt
    warmup_steps: NonNegativeInt = 3
    name: str = "plain"
    compile: bool = False
    seeds: tuple[int, ...] = Field(default=(1,), min_length=1)


GOOD = {"max_lr": 0.5, "max_steps": 10}


def write(folder, text: str):
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-05", 1e-5), ("6e-4", 6e-4), ("1.0e-3", 1e-3), ("3", 3.0), ("0.25", 0.25), ("1E+2", 100.0)],
)
def test_every_spelling_of_a_number_is_a_number(tmp_path, text, value):
    values = read(write(tmp_path, f"scale: tiny\ntiny:\n  some: {{max_lr: {text}, max_steps: 10}}\n"))
    assert load("some", Sampling, values).max_lr == value


def test_a_section_becomes_a_frozen_value_with_its_defaults(tmp_path):
    values = read(write(tmp_path, "scale: short\nshort:\n  some: {max_lr: 0.5, max_steps: 10, seeds: [4, 5]}\n"))
    section = load("some", Sampling, values)
    assert section == Sampling(max_lr=0.5, max_steps=10, seeds=(4, 5))
    with pytest.raises(ValidationError, match="frozen"):
        section.max_lr = 1.0


def test_only_the_active_scale_is_read():
    values = {"scale": "full", "tiny": {"some": {**GOOD, "max_steps": 1}}, "full": {"some": {**GOOD, "max_steps": 2}}}
    assert load("some", Sampling, values).max_steps == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_step": 5}, "tiny.some.max_step = 5 is not a known key; did you mean max_steps?"),
        ({"zzz": None}, "tiny.some.zzz = None is not a known key; known keys: max_lr, max_steps, warmup_steps"),
        ({"max_lr": "0.5"}, "tiny.some.max_lr = '0.5': Input should be a valid number"),
        ({"max_lr": True}, "tiny.some.max_lr = True: Input should be a valid number"),
        ({"max_lr": None}, "tiny.some.max_lr = None"),
        ({"max_lr": 0}, "tiny.some.max_lr = 0: Input should be greater than 0"),
        ({"max_lr": -1.5}, "tiny.some.max_lr = -1.5: Input should be greater than 0"),
        ({"max_lr": math.inf}, "tiny.some.max_lr = inf: Input should be a finite number"),
        ({"max_lr": math.nan}, "tiny.some.max_lr = nan: Input should be"),
        ({"max_steps": 10.0}, "tiny.some.max_steps = 10.0: Input should be a valid integer"),
        ({"max_steps": "10"}, "tiny.some.max_steps = '10': Input should be a valid integer"),
        ({"max_steps": True}, "tiny.some.max_steps = True: Input should be a valid integer"),
        ({"max_steps": date(2020, 1, 1)}, "tiny.some.max_steps = '2020-01-01': Input should be a valid integer"),
        ({"warmup_steps": -1}, "tiny.some.warmup_steps = -1: Input should be greater than or equal to 0"),
        ({"compile": 1}, "tiny.some.compile = 1: Input should be a valid boolean"),
        ({"compile": "yes"}, "tiny.some.compile = 'yes': Input should be a valid boolean"),
        ({"name": 3}, "tiny.some.name = 3: Input should be a valid string"),
        ({"seeds": 3}, "tiny.some.seeds = 3: Input should be a valid"),
        ({"seeds": []}, "tiny.some.seeds = []"),
        ({"seeds": [1, "2"]}, "tiny.some.seeds.1 = '2': Input should be a valid integer"),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_rule(changed, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        load("some", Sampling, {"scale": "tiny", "tiny": {"some": {**GOOD, **changed}}})


def test_all_faults_of_a_section_are_reported_at_once_each_with_a_remedy():
    section = {"max_steps": "ten", "warmup": 3, "compile": 1}
    with pytest.raises(UserError) as raised:
        load("some", Sampling, {"scale": "tiny", "tiny": {"some": section}})
    lines = str(raised.value).splitlines()
    keys = [re.match(r"tiny\.some\.(\w+)", line)[1] for line in lines]
    assert sorted(keys) == ["compile", "max_lr", "max_steps", "warmup"]
    assert next(line for line in lines if ".max_lr" in line).startswith("tiny.some.max_lr is missing;")
    assert all(line.endswith("; change it in params.yaml or with `dvc exp run -S KEY=VALUE`") for line in lines)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(
            ({"scale": "tiny", "tiny": {"some": section}}, r"tiny\.some = .* map of max_lr")
            for section in (None, 3, [1])
        ),
        ({"scale": "tiny", "tiny": {"other": GOOD}}, r"lacks the section tiny\.some; copy it"),
        *(
            (values, r"scale=.* must name one of the blocks tiny, short, full")
            for values in (
                {},
                {"scale": "big", "big": {"some": GOOD}},
                {"scale": "short", "tiny": {}},
                {"scale": "tiny"},
            )
        ),
    ],
)
def test_an_absent_scale_or_section_is_named(values, message):
    with pytest.raises(UserError, match=message):
        load("some", Sampling, values)


def test_a_field_known_from_elsewhere_may_not_be_given_twice():
    values = {"scale": "tiny", "tiny": {"some": {"max_lr": 0.5}}}
    assert load("some", Sampling, values, max_steps=7).max_steps == 7
    with pytest.raises(UserError, match=r"tiny\.some must not set max_lr: it is given elsewhere; remove it"):
        load("some", Sampling, values, max_lr=0.5, max_steps=7)


def test_a_fault_of_a_field_known_from_elsewhere_is_not_put_on_the_section():
    with pytest.raises(UserError, match=r"^max_steps = 0: Input should be greater than 0"):
        build(Sampling, {"max_lr": 0.5}, "tiny.some", max_steps=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("a: [1, 2", "is not valid YAML"),
        ("a: 1\na: 2\n", "is not valid YAML"),
        ("- 1\n- 2\n", "must be a map with the keys norm, scale, tiny, short, full"),
        ("", "must be a map"),
    ],
    ids=["absent", "cut", "key given twice", "list", "empty"],
)
def test_a_file_that_is_no_map_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=rf"params\.yaml {message}"):
        read(tmp_path / "params.yaml" if text is None else write(tmp_path, text))


def test_a_key_at_the_top_is_read_or_named(tmp_path, monkeypatch):
    write(tmp_path, "norm: postln\n")
    monkeypatch.chdir(tmp_path)
    assert params.top("norm") == "postln"
    with pytest.raises(UserError, match=r"params\.yaml lacks the key scale"):
        params.top("scale")
