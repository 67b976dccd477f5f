"""Check that a run can start, and estimate its time, disk and memory. Needs no DVC lock.

python -m gpt2.check [--scale full]
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2.check import preflight
from gpt2.check.corpus_size import UNKNOWN, estimate_volume
from gpt2.check.estimate import RECORDED, Estimate, Rate, Record, device_rate, estimate_stages
from gpt2.check.machine import Machine, look
from gpt2.check.preflight import FAIL, WARNING, CheckResult
from gpt2.check.storage import CACHE, DEFAULT_LINKS, Links, disk_demands, find_links
from gpt2.check.workload import GIB, Plan, Workload, load_plan
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import PARAMS_FILE, SCALES, active_scale, read
from gpt2.pipeline.quantities import show_size, show_time
from gpt2.pipeline.stage import SPEED

HERE = Path(".")


@dataclass(frozen=True)
class Report:
    """Findings and, if params.yaml allows one, the forecast; `rate` is that of a device, where one was needed."""

    scale: str
    findings: list[CheckResult]
    estimates: list[Estimate]
    rate: Rate | None = None

    @property
    def failed(self) -> list[str]:
        return [finding.name for finding in self.findings if finding.mark == FAIL]


def examine(values: dict, scale: str, machine: Machine) -> Report:
    """All checks and the forecast of one scale of params.yaml as parsed, in the working directory."""
    findings = [preflight.check_parameters(values), preflight.check_versions(HERE)]
    try:
        plan = load_plan(values, scale)
    except UserError:
        # The first finding tells of it, and all that follows reads parameters.
        return Report(scale, findings, [])
    record = Record(values, HERE)
    try:
        volume, fault = record.volume(plan) or estimate_volume(plan.prepare), None
    except UserError as error:
        volume, fault = UNKNOWN, CheckResult("text", FAIL, f"{error}\n{UNKNOWN.basis} below")
    workload = Workload(plan, volume, machine)
    rate = functools.cache(lambda: device_rate(plan, machine))
    estimates = estimate_stages(workload, record.stages(machine), rate)
    findings += _check_machine(plan, machine, workload.processes, estimates)
    findings += _check_storage(workload)
    findings += [
        preflight.check_port(plan.hardware),
        preflight.check_tokenizer(plan.tokenize.encoding),
        fault or preflight.check_text(plan, volume, workload.steps),
    ]
    return Report(scale, findings, estimates, rate() if rate.cache_info().currsize else None)


def _check_machine(plan: Plan, machine: Machine, processes: int, estimates: Sequence[Estimate]) -> list[CheckResult]:
    trained = not plan.train.init_from
    compiles = machine.device_type == "cuda" or (plan.train.compile and trained)
    compiler = [preflight.check_compiler(machine.device_type)] if compiles else []
    weights = [] if trained else [preflight.check_weights(plan)]
    return [
        preflight.check_gpus(plan, machine, estimates),
        *compiler,
        *weights,
        preflight.check_batch(plan, processes),
        preflight.check_cores(plan, machine),
        preflight.check_memory(plan, machine, estimates),
    ]


def _check_storage(workload: Workload) -> list[CheckResult]:
    try:
        links, fault = find_links(HERE), None
    except UserError as error:
        links, fault = Links(HERE / CACHE, DEFAULT_LINKS, ()), CheckResult("links", FAIL, str(error))
    demands = disk_demands(workload, links, HERE)
    written = sum(need.written for need in workload.needs().values())
    return [*preflight.check_disk(demands, preflight.free_bytes), fault or preflight.check_links(links, written)]


def render_report(report: Report) -> str:
    """The report as text: a line for each finding and one for its remedy, the table of stages, the verdict."""
    lines = [f"Preflight of scale {report.scale}", ""]
    for finding in report.findings:
        # Faults of params.yaml are lines of their own.
        told = [*finding.text.strip().splitlines(), *([f"-> {finding.remedy}"] if finding.remedy else [])]
        lines.append(f"{finding.mark:<8} {finding.name:<11} " + f"\n{'':<21}".join(told))
    if report.estimates:
        lines += ["", *_table(report.estimates), "", *_notes(report)]
    return "\n".join([*lines, "", _verdict(report)]) + "\n"


def _table(estimates: Sequence[Estimate]) -> list[str]:
    on_gpu = any(e.need.gpu_memory for e in estimates)
    header = ["stage", "time", "writes", "memory", *["GPU memory"] * on_gpu, "time from"]
    rows = [
        [
            e.stage,
            show_time(e.seconds),
            show_size(e.need.written),
            *(f"{n / GIB:.1f} GiB" if n else "" for n in [e.need.memory] + [e.need.gpu_memory] * on_gpu),
            e.basis,
        ]
        for e in estimates
    ]
    peaks = [max(e.need.memory for e in estimates)] + [max(e.need.gpu_memory for e in estimates)] * on_gpu
    written = show_size(sum(e.need.written for e in estimates))
    rows.append(["in all", show_time(_seconds(estimates)), written, *(f"{n / GIB:.1f} GiB" for n in peaks), ""])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]


def _seconds(estimates: Sequence[Estimate]) -> float:
    return sum(e.seconds or 0.0 for e in estimates)


def _notes(report: Report) -> list[str]:
    notes = []
    if any(e.basis.startswith(RECORDED) for e in report.estimates):
        notes.append(f"{RECORDED}: seconds in {SPEED}/, by the work of a stage then and now; another machine differs")
    if report.rate:
        notes.append(f"FLOP/s: {report.rate.basis}")
        notes.append("start-up, compiling and downloads come on top")
    return notes


def _verdict(report: Report) -> str:
    marks = [finding.mark for finding in report.findings]
    warnings = f"; warnings: {marks.count(WARNING)}" if WARNING in marks else ""
    if report.failed:
        return f"NOT READY for {report.scale}: {', '.join(report.failed)}{warnings}"
    unknown = [e.stage for e in report.estimates if e.seconds is None]
    without = f" without {', '.join(unknown)}" if unknown else ""
    return f"READY for {report.scale}: about {show_time(_seconds(report.estimates))}{without}{warnings}"


def main(argv: list[str] | None = None) -> None:
    """The command line above; exits with 1 if a check fails."""
    parser = Parser(prog="python -m gpt2.check", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, help=f"block of {PARAMS_FILE}; default: the one in use")
    scale = parser.parse_args(argv).scale
    with reporting("check"):
        values = read()
        report = examine(values, scale or active_scale(values), look())
    sys.stdout.write(render_report(report))
    if report.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
