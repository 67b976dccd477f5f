"""Rebuild the pipeline from scratch in a temporary clone and compare every result with the committed dvc.lock.

python -m tools.verify            # make verify
python -m tools.verify --record   # after dvc repro: write down on which processor dvc.lock was made

On a processor of the recorded kind every md5 must be equal, those of measured times left out. On another kind sums are
added in another order, which training magnifies to another model, as another seed does. There the stages that handle
text must be equal bit for bit, the verdicts on all claims equal (undecided aside), and the figures over all models
within the spread of the recorded ones; the last line says which of the two was shown.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tabulate import tabulate

from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import UserError, read_json, write_json
from gpt2.pipeline.params import read
from tools.comparison import (
    TEXT_STAGES,
    Row,
    compare_results,
    digest,
    list_deviations,
    list_stale_inputs,
    results_of,
)
from tools.processor import describe_processor, list_differences

ROOT = Path(__file__).resolve().parent.parent
LOCK, RECORD = Path("dvc.lock"), Path("dvc.lock.processor.json")


@dataclass(frozen=True)
class Run:
    """The stages of a dvc.lock, and its metrics by file name."""

    stages: Mapping[str, dict]
    metrics: Mapping[str, Mapping]


def read_run(root: Path) -> Run:
    """Read the lock and the metrics that do not show times. Raises UserError if there is no lock."""
    if not (root / LOCK).is_file():
        raise UserError(f"{LOCK} does not exist; run make repro and commit it")
    stages = read(root / LOCK)["stages"]
    paths = [Path(result.path) for result in results_of(stages) if result.path.startswith("metrics/")]
    return Run(stages, {path.stem: read_json(root / path) for path in paths})


def outputs_of(stages: Mapping[str, dict]) -> list[str]:
    """Paths of all outs and metrics, timed ones included."""
    return [out["path"] for entry in stages.values() for out in entry["outs"]]


def record(root: Path) -> bool:
    """Write the processor next to the lock unless the lock's results are already recorded; return whether it wrote."""
    found = digest(read_run(root).stages)
    if (root / RECORD).is_file() and read_json(root / RECORD).get("results_sha256") == found:
        return False
    write_json(root / RECORD, {"results_sha256": found, "processor": describe_processor()})
    return True


def read_record(root: Path, stages: Mapping[str, dict]) -> dict[str, str]:
    """The processor on which the lock was made. Raises UserError if it is not recorded."""
    remedy = "run make repro where the results were made, or python -m tools.verify --record there"
    if not (root / RECORD).is_file():
        raise UserError(f"{RECORD} does not exist; {remedy}")
    found = read_json(root / RECORD)
    if found["results_sha256"] != digest(stages):
        raise UserError(f"{RECORD} belongs to another {LOCK}; {remedy}")
    return found["processor"]


def require_committed(root: Path, results: Iterable[str]) -> None:
    """Raise UserError if a tracked file differs from the commit that would be cloned.

    `results` may differ: what a run on this machine wrote is neither rebuilt from nor compared with.
    """
    command = ["git", "status", "--porcelain", "--untracked-files=no"]
    changed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [PurePosixPath(line[3:].strip('"')) for line in changed]
    edited = [str(path) for path in paths if not any(path.is_relative_to(result) for result in results)]
    if edited:
        raise UserError(
            f"verify rebuilds the committed state, and these files differ from it: {', '.join(edited)}; commit them"
        )


def rebuild(folder: Path) -> None:
    """Remove every result of the clone `folder` and run its pipeline with a cache of its own."""
    for path in outputs_of(read_run(folder).stages):
        # What is not in Git is not in the clone; a folder in Git is the report's figures.
        subprocess.run(["git", "rm", "-r", "-q", "--ignore-unmatch", path], cwd=folder, check=True)
    (folder / LOCK).unlink()
    settings, foreign = folder / ".git" / "verify", ("DVC_", "GIT_", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "DVC_NO_ANALYTICS": "1",
        # A cache or remote in the user's own settings could hand over results instead of computing them.
        "DVC_GLOBAL_CONFIG_DIR": str(settings),
        "DVC_SYSTEM_CONFIG_DIR": str(settings),
        "DVC_SITE_CACHE_DIR": str(settings / "site"),
    }
    if subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=folder, env=environment).returncode:
        raise UserError("dvc repro failed in the clone, see above; nothing was compared")


def judge(recorded: Run, rebuilt: Run, recorded_on: Mapping[str, str], here: Mapping[str, str]) -> tuple[bool, str]:
    """Return whether the rebuilt run reproduces the recorded one, and the report: a table of results and a verdict."""
    rows = compare_results(recorded.stages, rebuilt.stages)
    equal = [row for row in rows if row.verdict == "equal"]
    count = f"{len(equal)} of {len(rows)} results are equal bit for bit"
    faults = [
        f"{stale} was edited after {LOCK} was written" for stale in list_stale_inputs(recorded.stages, rebuilt.stages)
    ]
    differences, verdict = list_differences(recorded_on, here), f"{count} (measured times left out)"
    if len(equal) < len(rows) and not differences:
        faults.append(f"only {count}, on the kind of processor that {LOCK} was made on")
    elif len(equal) < len(rows):
        faults += _faults_elsewhere(rows, recorded, rebuilt)
        verdict = (
            f"{count}; this is another kind of processor than {LOCK} was made on, where the bits of sums differ. Text "
            "and tokens are equal, verdicts agree, figures are within the spread of the models: reproduced, not bit "
            "for bit"
        )
    lines = [tabulate([(*result, verdict) for result, verdict in rows], tablefmt="plain"), ""]
    lines += [f"Another kind of processor. {difference}" for difference in differences]
    lines += faults or [verdict]
    lines += ["FAILED" if faults else "PASSED"]
    return not faults, "\n".join(lines)


def _faults_elsewhere(rows: list[Row], recorded: Run, rebuilt: Run) -> list[str]:
    """What must not differ even on another processor."""
    faults = []
    for (stage, path), verdict in rows:
        if verdict in ("missing", "unexpected"):
            faults.append(f"{stage}: {path} is {verdict}")
        elif verdict == "differs" and stage in TEXT_STAGES:
            faults.append(f"{stage}: {path} differs, and text must be equal on every processor")
    return faults + list_deviations(recorded.metrics, rebuilt.metrics)


def verify(root: Path) -> bool:
    """Rebuild `root` at its commit, print the comparison, and say whether it holds."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="verify-") as place:
        folder = Path(place, "clone")
        # What is not committed stays behind.
        subprocess.run(["git", "clone", "--quiet", str(root), str(folder)], check=True)
        recorded = read_run(folder)
        recorded_on = read_record(folder, recorded.stages)
        require_committed(root, [str(LOCK), str(RECORD), *outputs_of(recorded.stages)])
        rebuild(folder)
        rebuilt = read_run(folder)
    holds, report = judge(recorded, rebuilt, recorded_on, describe_processor())
    print(f"\n{report} after {time.monotonic() - started:.0f} s")
    return holds


def main(argv: list[str], root: Path = ROOT) -> None:
    parser = Parser(prog="python -m tools.verify", description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write down the processor that dvc.lock was made on")
    record_only = parser.parse_args(argv).record
    with reporting("verify"):
        if record_only:
            print(f"{RECORD} " + ("written" if record(root) else "is of this dvc.lock"))
        elif not verify(root):
            raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
