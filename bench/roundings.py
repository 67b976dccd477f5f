"""Whole runs that differ in rounding alone: do they come to the same verdicts?

python -m bench.roundings FOLDER [--settings avx2 default] [--cores 16] [--committed]

FOLDER takes a copy of the project for each setting, with the corpus, benchmark and tokens of this one, in which every
other stage runs without DVC. A setting restricts the instruction sets that torch, oneDNN and MKL may use, or changes
the number of threads of the main line, and with either the order in which sums are added. Finished stages are not run
again. The table of verdicts goes to bench/results/roundings.md, with what `make verify` would say of each run against
the committed metrics.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
from ruamel.yaml import YAML

from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import UserError, read_json, write_text
from gpt2.report.verdicts import VERDICTS
from tools.comparison import SUMMARY, VERDICT, list_deviations
from tools.processor import describe_processor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results/roundings.md"
CODE = ("gpt2", "stages", "tools", "params.yaml")
INPUTS = ("data/corpus", "data/hellaswag.jsonl", "data/tokens", "metrics/prepare.json", "metrics/tokens.json")
# Text has no rounding, so its times stand for those of the copies.
TIMES = ("prepare", "benchmark", "tokenize")
# Chains of stages that run at the same time; the report follows.
CHAINS = (
    ("tokenizer_study", "norm_study"),
    ("train", "hellaswag", "generate", "head_similarity", "prune", "replicates"),
)
# Environment, then processes and threads of the main line.
SETTINGS: dict[str, tuple[dict[str, str], int, int]] = {
    "as it is": ({}, 2, 2),
    "avx2": (
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}, 2, 2,
    ),
    "default": ({"ATEN_CPU_CAPABILITY": "default"}, 2, 2),
    "one thread": ({}, 1, 1),
    "three threads": ({}, 1, 3),
}  # fmt: skip
HEADLINES = ("train_val_loss", "prune_perplexity_rise_percent_at_15", "prune_taylor_perplexity_rise_percent_at_15")


def run_setting(folder: Path, setting: str, workers: int) -> None:
    """Run the stages of one setting in its folder. Raises UserError if one fails."""
    if not (folder / "params.yaml").exists():
        for name in (*CODE, *INPUTS, *(f"metrics/speed/{stage}.json" for stage in TIMES)):
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    with ThreadPoolExecutor(len(CHAINS)) as chains:
        list(chains.map(lambda chain: run_chain(folder, setting, chain, workers), CHAINS))
    run_chain(folder, setting, ["report"], workers)


def run_chain(folder: Path, setting: str, stages: Iterable[str], workers: int) -> None:
    """Run stages one after another."""
    for stage in stages:
        run_stage(folder, setting, stage, workers)


def run_stage(folder: Path, setting: str, stage: str, workers: int) -> None:
    """Run one stage unless it is finished."""
    if (folder / f"metrics/speed/{stage}.json").exists():
        return
    environment, nproc, threads = SETTINGS[setting]
    if stage in ("replicates", *CHAINS[0]):
        # Each model has one thread, so the number of processes changes no bit.
        nproc, threads = 1, workers
    # Chains run at the same time, so each stage has its own copy of the parameters.
    place = folder / f"of_{stage}"
    if not place.exists():
        place.mkdir()
        for name in ("gpt2", "stages", "data", "metrics", "plots", "models", ".scratch"):
            (folder / name).mkdir(exist_ok=True)
            (place / name).symlink_to(folder.resolve() / name)
    yaml = YAML(typ="safe", pure=True)
    values = yaml.load(ROOT / "params.yaml")
    values[values["scale"]]["hardware"] |= {"nproc": nproc, "threads": threads}
    yaml.dump(values, place / "params.yaml")
    started = time.monotonic()
    with open(folder / f"{stage}.log", "w") as log:
        given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        code = subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=place, env=given, stdout=log, stderr=log)
    print(f"{setting}: {stage} ended with {code.returncode} after {time.monotonic() - started:.0f} s", flush=True)
    if code.returncode:
        raise UserError(f"{folder / f'{stage}.log'}: the stage failed; see its end, and run this again")


def read_metrics(folder: Path) -> dict[str, dict]:
    return {path.stem: read_json(path) for path in sorted((folder / "metrics").glob("*.json"))}


def tabulate(runs: dict[str, dict[str, dict]], recorded: dict[str, dict] | None) -> str:
    """The page: figures and number of verdicts of each run, the verdicts that are not the same, deviations."""
    first = next(iter(runs))
    reference = runs[first] if recorded is None else recorded
    rows: list[dict] = []
    verdicts: dict[str, dict[str, str]] = {}
    for setting, metrics in runs.items():
        summary, models = metrics[SUMMARY], metrics["replicates"]
        verdicts[setting] = {k.removeprefix(VERDICT): v for k, v in summary.items() if k.startswith(VERDICT)}
        deviations = list_deviations(reference, metrics)
        rows.append(
            {
                "Setting": setting,
                **{f"`{key}`": f"{models[f'{key}_mean']:.4g} ± {models[f'{key}_sd']:.2g}" for key in HEADLINES},
                **{verdict: summary[f"claims_{verdict.replace(' ', '_')}"] for verdict in VERDICTS},
                "Deviations": "; ".join(deviations) or "none",
            }
        )
    table = pd.DataFrame(verdicts)
    changed = table[table.nunique(axis=1) > 1].rename_axis("Claim").reset_index()
    names = [describe_processor().get(key, "") for key in ("vendor", "family", "model", "torch")]
    against = "the first one" if recorded is None else "the committed metrics"
    parts = [
        "# Whole runs under other roundings",
        f"{names[0]} family {names[1]} model {names[2]}, torch {names[3]}; `python -m bench.roundings FOLDER`. Scale "
        f"`tiny`: {len(table)} claims, {runs[first]['replicates']['models']} models in each run. Deviations are what "
        f"`make verify` would report of the run against {against}.",
        pd.DataFrame(rows).to_markdown(index=False),
        f"{len(changed)} of {len(table)} verdicts are not the same in all runs{':' if len(changed) else '.'}",
    ]
    return "\n\n".join([*parts, *([changed.to_markdown(index=False)] if len(changed) else [])]) + "\n"


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.roundings", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="shared by the settings, which run together")
    parser.add_argument("--committed", action="store_true", help="compare with the metrics of this checkout")
    arguments = parser.parse_args(argv)
    with reporting("roundings"):
        folders = {setting: arguments.folder / setting.replace(" ", "_") for setting in arguments.settings}
        workers = max(1, arguments.cores // (len(CHAINS) * len(folders)))
        with ThreadPoolExecutor(len(folders)) as pool:
            list(pool.map(lambda item: run_setting(item[1], item[0], workers), folders.items()))
        runs = {setting: read_metrics(folder) for setting, folder in folders.items()}
        page = tabulate(runs, read_metrics(ROOT) if arguments.committed else None)
        write_text(RESULTS, page)
        print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
