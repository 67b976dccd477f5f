"""Comparison of two runs: bit for bit by the md5 of every result, or by verdicts and the spread over models."""

import hashlib
import json
from collections.abc import Container, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from scipy.stats import ttest_ind_from_stats

# Measured times, or pages that show them.
TIMED = ("metrics/speed/*", "plots/timed", "report.md", "report.html")
# Stages that count and cut text: integer work, the same on every processor.
TEXT_STAGES = ("check-params", "prepare", "benchmark", "tokenize")


# Metrics file of the spread over models, and of the verdicts.
SPREAD, SUMMARY = "replicates", "summary"
VERDICT = "verdict_"
# A verdict that the models leave open may be given on another processor.
OPEN = "undecided"
# Chance, over all figures, that two groups of models of the same distribution are called different.
SIGNIFICANCE = 0.05


class Result(NamedTuple):
    """An out or metric of a stage."""

    stage: str
    path: str


class Row(NamedTuple):
    """A result and how the rebuilt one compares: equal, differs, missing or unexpected."""

    result: Result
    verdict: str


def results_of(stages: Mapping[str, dict]) -> dict[Result, str]:
    """md5 of every out and metric that does not show times."""
    return {
        Result(stage, out["path"]): out["md5"]
        for stage, entry in stages.items()
        for out in entry.get("outs", ())
        if not any(fnmatchcase(out["path"], pattern) for pattern in TIMED)
    }


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


def list_deviations(recorded: Mapping[str, Mapping], found: Mapping[str, Mapping]) -> list[str]:
    """What another processor must not change in the metrics: their keys, the verdicts, and the models.

    Training magnifies a difference in rounding to another model, as another seed does. So a verdict may differ only
    from or to undecided, and the figures over all models may differ as far as those of other seeds would.
    """
    faults = []
    for name in sorted(recorded.keys() & found.keys()):
        old, new = recorded[name], found[name]
        faults += [f"{name}.{key} is missing" for key in sorted(old.keys() - new.keys())]
        faults += [f"{name}.{key} is new" for key in sorted(new.keys() - old.keys())]
    old, new = recorded.get(SUMMARY, {}), found.get(SUMMARY, {})
    faults += [
        f"{key.removeprefix(VERDICT)}: {new[key]}, recorded {old[key]}"
        for key in sorted(old.keys() & new.keys())
        if key.startswith(VERDICT) and old[key] != new[key] and OPEN not in (old[key], new[key])
    ]
    return faults + list_other_models(recorded.get(SPREAD, {}), found.get(SPREAD, {}))


def list_other_models(recorded: Mapping, found: Mapping) -> list[str]:
    """Figures of metrics/replicates.json in which two groups of models differ by more than chance.

    Welch's test of the means, with Bonferroni's correction for the number of figures. Figures that do not vary in
    either group must be equal.
    """
    names = [key.removesuffix("_sd") for key in sorted(recorded.keys() & found.keys()) if key.endswith("_sd")]
    faults = []
    for name in names:
        (mean, sd, n), (other_mean, other_sd, other_n) = (
            (run[f"{name}_mean"], run[f"{name}_sd"], run["models"]) for run in (recorded, found)
        )
        if sd == other_sd == 0:
            differ = mean != other_mean
        else:
            test = ttest_ind_from_stats(mean, sd, n, other_mean, other_sd, other_n, equal_var=False)
            differ = not test.pvalue >= SIGNIFICANCE / len(names)
        if differ:
            faults.append(f"{name} = {other_mean:.4g} ± {other_sd:.4g}, recorded {mean:.4g} ± {sd:.4g}")
    return faults
