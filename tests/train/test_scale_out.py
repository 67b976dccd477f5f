"""Two machines train as one, and one may die and return: the results are those of a single machine, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from gpt2.pipeline.params import read
from tests.closure import ROOT
from tests.declared import STAGES
from tests.hosts import Host, joined_hosts
from tests.training_run import checkpoint_steps, finish, kill, outcome, prepare_folder, wait_for_checkpoint

COMMAND = STAGES["train"]["cmd"]
SLURM_SCRIPT = ROOT / "docs" / "train.slurm"


@pytest.fixture
def one_machine(whole_pair) -> dict[str, bytes]:
    """The results of two processes on one machine."""
    return outcome(whole_pair)


@pytest.fixture
def hosts(tmp_path) -> Iterator[tuple[Host, Host]]:
    """Two machines; processes still running on them at the end are killed."""
    with joined_hosts(tmp_path) as pair:
        yield pair


def make_environment(temporary: Path) -> dict[str, str]:
    """The variables of a shell in which the project's environment is activated."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    own = {key: str(temporary / "dvc") for key in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR")}
    return env | own | {"DVC_NO_ANALYTICS": "1"}


class Cluster:
    """The stage on two machines, each with a folder of its own. DVC waits on `keeper`, where the two also meet.

    c10d numbers machines by address, so the keeper's process is not rank 0.
    """

    def __init__(self, hosts: tuple[Host, Host], folder: Path):
        self.helper, self.keeper = hosts
        meeting = {"nnodes": 2, "rdzv_endpoint": f"{self.keeper.name}:29400", "max_restarts": 1}
        self.folders = {
            host.name: prepare_folder(folder / host.name, hardware={**meeting, "local_addr": host.address})
            for host in hosts
        }

    def start(self, host: Host) -> subprocess.Popen:
        """Run the command of the stage, on the keeper as DVC does."""
        folder = self.folders[host.name]
        env = {**make_environment(folder.parent), "PYTHONPATH": str(ROOT)}
        return host.start(COMMAND, folder, {**env, "DVC_STAGE": "train"} if host is self.keeper else env)

    def finish(self, host: Host, process: subprocess.Popen) -> str:
        """Wait for the process to end well; return all that was written on the machine."""
        return finish(process, self.folders[host.name])

    def outcome(self) -> dict[str, bytes]:
        """The results, which only the keeper has, like the resume state."""
        assert {path.name for path in self.folders[self.helper.name].iterdir()} == {"data", "params.yaml", "log.txt"}
        return outcome(self.folders[self.keeper.name])


def test_two_machines_train_as_one(one_machine, hosts, tmp_path):
    cluster = Cluster(hosts, tmp_path)
    for host, process in [(host, cluster.start(host)) for host in hosts]:
        cluster.finish(host, process)
    assert cluster.outcome() == one_machine


def test_a_machine_that_dies_and_returns_changes_no_bit(one_machine, hosts, tmp_path):
    cluster = Cluster(hosts, tmp_path)
    survivor, victim = cluster.start(cluster.keeper), cluster.start(cluster.helper)
    wait_for_checkpoint(survivor, cluster.folders[cluster.keeper.name])
    kill(victim)
    returned = cluster.start(cluster.helper)
    assert "resuming after step" in cluster.finish(cluster.keeper, survivor)
    cluster.finish(cluster.helper, returned)
    assert cluster.outcome() == one_machine


# Slurm's two commands, as far as the script uses them. The options of srun end where bash begins.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec nsenter --target={pid} --net --uts --mount env --chdir="$PWD" "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf '%s\\n' {names} ;;
    requeue) echo "$2" >> requeued ;;
esac
"""


class Batch:
    """A job of two nodes in a clone that both see, under stand-ins of `srun` and `scontrol`."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path):
        self.first, other = hosts
        self.folder, commands = folder / "clone", folder / "bin"
        self._clone()
        commands.mkdir()
        names = " ".join(host.name for host in hosts)
        for name, text in (("srun", SRUN.format(pid=other.holder.pid)), ("scontrol", SCONTROL.format(names=names))):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        given = {"SUBMIT_DIR": self.folder, "JOB_ID": 7, "JOB_NODELIST": "node[1-2]", "CPUS_PER_TASK": 1}
        self.env = make_environment(folder) | {f"SLURM_{key}": str(value) for key, value in given.items()}
        self.env["PATH"] = f"{commands}:{self.env['PATH']}"

    def _clone(self) -> None:
        # Here the tokens are no stage's output, so `dvc repro train` runs that stage alone.
        values = read(prepare_folder(self.folder) / "params.yaml")
        for name, content in (("params.yaml", values), ("dvc.yaml", {"stages": {"train": STAGES["train"]}})):
            with open(self.folder / name, "w", encoding="utf-8") as file:
                YAML().dump(content, file)
        for package in ("gpt2", "stages"):
            shutil.copytree(ROOT / package, self.folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        for command in ("git init --quiet", "dvc init --quiet"):
            subprocess.run(command.split(), cwd=self.folder, env=make_environment(self.folder.parent), check=True)

    def submit(self) -> subprocess.Popen:
        """Run the script as Slurm does, on the first node."""
        return self.first.start(f"exec bash {SLURM_SCRIPT}", self.folder, self.env)


def test_the_slurm_script_saves_at_a_signal_and_resumes_when_requeued(one_machine, hosts, tmp_path):
    batch = Batch(hosts, tmp_path)
    job = batch.submit()
    wait_for_checkpoint(job, batch.folder)
    # As `--signal=B:TERM` does, to the script alone.
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=120) not in (0, -signal.SIGTERM), (batch.folder / "log.txt").read_text()
    assert (batch.folder / "requeued").read_text() == "7\n"
    assert checkpoint_steps(batch.folder) and not (batch.folder / "models" / "gpt2").exists()
    assert [host.processes() for host in hosts] == [[], []]
    assert "resuming after step" in finish(batch.submit(), batch.folder)
    assert outcome(batch.folder) == one_machine
    assert (batch.folder / "requeued").read_text() == "7\n"


def test_the_slurm_script_refuses_parameters_that_it_cannot_set(hosts, tmp_path):
    batch = Batch(hosts, tmp_path)
    parameters = batch.folder / "params.yaml"
    parameters.write_text(parameters.read_text().replace("    nnodes: 1\n", "    'nnodes': 1\n"))
    job = batch.submit()
    assert job.wait(timeout=60) == 1
    assert "params.yaml lacks nnodes and rdzv_endpoint in the block tiny" in (batch.folder / "log.txt").read_text()
    assert [host.processes() for host in hosts] == [[], []]


def test_the_slurm_script_runs_the_command_of_the_stage():
    assert f" {COMMAND}\n" in SLURM_SCRIPT.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", SLURM_SCRIPT]).returncode == 0
