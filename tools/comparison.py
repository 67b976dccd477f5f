"""Two runs of the pipeline compared: bit for bit by the md5 of every result, or within tolerances across processors."""

import hashlib
import json
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from ruamel.yaml import YAML

# Measured times, or pages that show them.
TIMED = ("metrics/speed/*", "plots/timed", "report.md", "report.html")
# Stages that count and cut text: integer work, the same on every processor.
TEXT_STAGES = ("check-params", "prepare", "benchmark", "tokenize")


class Result(NamedTuple):
    """An out or metric of a stage."""

    stage: str
    path: str


class Row(NamedTuple):
    """A result and how the rebuilt one compares: equal, differs, missing or unexpected."""

    result: Result
    verdict: str


@dataclass(frozen=True)
class Tolerance:
    """How far a metric may be from the recorded value: `absolute`, or `relative` to that value if it is more."""

    absolute: float = 0.0
    relative: float = 0.0

    def allows(self, recorded: float, found: float) -> bool:
        return math.isclose(found, recorded, abs_tol=max(self.absolute, self.relative * abs(recorded)), rel_tol=0)


ANY = Tolerance(absolute=math.inf)
# The first pattern that fits `file.key` decides; what fits none must be equal. A rounding difference grows over some
# hundred training steps to a different model of the same quality, so the tolerances are those of another seed.
TOLERANCES = {
    "train.unigram_entropy": Tolerance(relative=1e-9),
    "norm_study.unigram_*": Tolerance(relative=1e-9),
    "train.attention_backend": ANY,
    "tokenizer.*even_bits_per_byte": Tolerance(relative=1e-9),
    "tokenizer.*bits_per_byte": Tolerance(relative=0.05),
    "tokenizer.budget_*_best_vocab_size": ANY,
    # Where a norm fails is chaotic, and the study looks for where they fail.
    "norm_study.*_diverged*": ANY,
    "norm_study.*_stalled": ANY,
    "norm_study.*_spikes": ANY,
    "norm_study.*_best_max_lr": ANY,
    "norm_study.*_best_warmup_steps": ANY,
    "norm_study.*_settings_*": ANY,
    # The largest of a stalled run's gradients: 6 on one processor was 1,430 on another.
    "norm_study.*_max_grad_norm": ANY,
    "norm_study.*_val_loss": Tolerance(relative=0.1),
    "train.*_loss": Tolerance(relative=0.02),
    "train.val_bits_per_byte": Tolerance(relative=0.02),
    # 2 % of a loss of 5 nats, exponentiated.
    "*.*perplexity": Tolerance(relative=0.1),
    "train.loss_spikes": Tolerance(absolute=2),
    "train.max_grad_norm": Tolerance(relative=0.5),
    "*.*_stderr": Tolerance(absolute=0.005),
    "train.hellaswag_acc*": Tolerance(absolute=0.05),
    "hellaswag.*_acc*": Tolerance(absolute=0.05),
    "heads.*redundant_*percent": Tolerance(absolute=50),
    "heads.*redundant_*": Tolerance(absolute=10, relative=0.5),
    "heads.largest_cluster": Tolerance(absolute=6),
    "heads.*rank_correlation": Tolerance(absolute=0.5),
    "heads.*_threshold*": Tolerance(absolute=0.5),
    # The largest of all pairs is one pair's, which another model may not have.
    "heads.*max_*similarity*": Tolerance(absolute=0.5),
    "heads.*similarity*": Tolerance(absolute=0.1),
    "prune.*rise_percent*": Tolerance(absolute=5, relative=0.5),
    "prune.*max_pruned_percent*": Tolerance(absolute=25),
    "prune.*hellaswag*_p": ANY,
    "prune.*hellaswag*": Tolerance(absolute=0.05),
    "prune.*cheaper_random_sets*": ANY,
    "prune.*rank_correlation*": Tolerance(absolute=0.5),
    "prune.pruned_by_*": ANY,
    "prune.pruned_params": Tolerance(relative=0.05),
    "prune.pruned_*": Tolerance(absolute=25),
}


def read_lock(text: str) -> dict[str, dict]:
    """The stages of a dvc.lock."""
    return YAML(typ="safe", pure=True).load(text)["stages"]


def results_of(stages: Mapping[str, dict]) -> dict[Result, str]:
    """md5 of every out and metric that does not show times."""
    return {
        Result(stage, out["path"]): out["md5"]
        for stage, entry in stages.items()
        for out in entry.get("outs", ())
        if not is_timed(out["path"])
    }


def is_timed(path: str) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in TIMED)


def digest(stages: Mapping[str, dict]) -> str:
    """SHA-256 of the names and md5 of all results that do not show times."""
    listed = sorted([*result, md5] for result, md5 in results_of(stages).items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def compare_results(recorded: Mapping[str, dict], rebuilt: Mapping[str, dict]) -> list[Row]:
    """A row for every result of either lock, in the order of the recorded one."""
    old, new = results_of(recorded), results_of(rebuilt)
    rows = []
    for result in dict.fromkeys([*old, *new]):
        if result not in new:
            verdict = "missing"
        elif result not in old:
            verdict = "unexpected"
        else:
            verdict = "equal" if old[result] == new[result] else "differs"
        rows.append(Row(result, verdict))
    return rows


def list_stale_inputs(recorded: Mapping[str, dict], rebuilt: Mapping[str, dict]) -> list[str]:
    """Code and parameters that the recorded results were not made from: `stage: path`.

    An input that is a result of another stage is compared as that result.
    """
    stale = []
    outputs = {out["path"] for entry in [*recorded.values(), *rebuilt.values()] for out in entry.get("outs", ())}
    for stage in recorded.keys() & rebuilt.keys():
        old, new = _inputs(recorded[stage], outputs), _inputs(rebuilt[stage], outputs)
        stale += [f"{stage}: {name}" for name in old.keys() | new.keys() if old.get(name) != new.get(name)]
    return sorted(stale)


def _inputs(entry: Mapping, outputs: Container[str]) -> dict[str, object]:
    code = {dep["path"]: dep["md5"] for dep in entry.get("deps", ()) if dep["path"] not in outputs}
    params = {f"{file} {key}": value for file, keys in entry.get("params", {}).items() for key, value in keys.items()}
    return {**code, **params, "cmd": entry["cmd"]}


def list_deviations(name: str, recorded: Mapping, found: Mapping) -> list[str]:
    """Keys of the metric file `name` that are absent, new, or further from the recorded value than is allowed."""
    faults = [f"{name}.{key} is missing" for key in recorded.keys() - found.keys()]
    faults += [f"{name}.{key} is new" for key in found.keys() - recorded.keys()]
    for key in recorded.keys() & found.keys():
        old, new = recorded[key], found[key]
        tolerance = next((t for pattern, t in TOLERANCES.items() if fnmatchcase(f"{name}.{key}", pattern)), Tolerance())
        numbers = isinstance(old, int | float) and isinstance(new, int | float)
        if old != new and tolerance is not ANY and not (numbers and tolerance.allows(old, new)):
            faults.append(f"{name}.{key} = {new}, recorded {old}, allowed ± {_allowed(tolerance, old)}")
    return sorted(faults)


def _allowed(tolerance: Tolerance, recorded: object) -> str:
    if not isinstance(recorded, int | float):
        return "nothing"
    return f"{max(tolerance.absolute, tolerance.relative * abs(recorded)):.4g}"
