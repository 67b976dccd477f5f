"""Two machines to test with: namespaces of this one, each with a name, an address and a network of its own.

A cable (veth pair) joins them. Nothing is left behind: the namespaces have no entry in the file system and go with
their last process, which dies with the tests.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

NETWORK = "10.77.0"
# Everybody is root in a user namespace of his own, where the system allows one. Both machines share it.
USER = ("--user", "--preserve-credentials")
# Each machine has these namespaces of its own.
OWN = ("--net", "--uts", "--mount")


@dataclass
class Host:
    """A machine, and the process that holds its namespaces."""

    name: str
    address: str
    holder: subprocess.Popen

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs `arguments` on this machine."""
        return ["nsenter", f"--target={self.holder.pid}", *USER, *OWN, *arguments]

    def start(self, command: str, folder: Path, env: Mapping[str, str]) -> subprocess.Popen:
        """Start a shell command in a folder; what it prints is appended to log.txt there."""
        with open(folder / "log.txt", "a") as log:
            # Entering a mount namespace leads to its root folder.
            line = self.command("env", f"--chdir={folder}", "sh", "-c", command)
            return subprocess.Popen(line, env=env, stdout=log, stderr=subprocess.STDOUT)

    def processes(self) -> list[psutil.Process]:
        """All processes of this machine but the one that holds it."""
        namespace = _namespace(self.holder.pid)
        running = (process for process in psutil.process_iter() if process.status() != psutil.STATUS_ZOMBIE)
        return [p for p in running if p.pid != self.holder.pid and _namespace(p.pid) == namespace]

    def switch_off(self) -> None:
        """Kill every process on the machine, and so the machine."""
        while members := self.processes():
            for process in members:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(members)
        self.holder.kill()
        self.holder.wait()


def _namespace(pid: int) -> str | None:
    """The network namespace of the process; None if it has ended or is another user's."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None


@contextmanager
def joined_hosts(folder: Path, names: tuple[str, str] = ("node1", "node2")) -> Iterator[tuple[Host, Host]]:
    """Two machines that reach each other by name; skips the test where they cannot be made."""
    if missing := [tool for tool in ("ip", "nsenter", "setpriv", "unshare") if shutil.which(tool) is None]:
        pytest.skip(f"machines to test with need {', '.join(missing)}")
    addresses = [f"{NETWORK}.{number}" for number in (1, 2)]
    known = zip(("127.0.0.1", *addresses), ("localhost", *names), strict=True)
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in known))
    with ExitStack() as off:
        hosts: list[Host] = []
        for name, address in zip(names, addresses, strict=True):
            hosts.append(_switch_on(name, address, folder / "hosts", *hosts))
            off.callback(hosts[-1].switch_off)
        _join(*hosts)
        yield hosts[0], hosts[1]


def _switch_on(name: str, address: str, known: Path, neighbour: Host | None = None) -> Host:
    """A machine; the second one in the user namespace of the first, so that a cable can join them."""
    begin = ["unshare", "--user", "--map-root-user", *OWN]
    if neighbour:
        begin = ["nsenter", f"--target={neighbour.holder.pid}", *USER, "unshare", *OWN]
    setup = f"hostname {name} && mount --bind {known} /etc/hosts && echo ready"
    hold = "exec setpriv --pdeathsig KILL sleep infinity"
    holder = subprocess.Popen(
        [*begin, "sh", "-c", f"{setup} && {hold}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if (said := holder.stdout.readline()) != "ready\n":
        holder.wait()
        pytest.skip(f"this system allows no namespaces: {said.strip()}")
    return Host(name, address, holder)


def _join(first: Host, second: Host) -> None:
    cable = f"link add name eth0 type veth peer name eth0 netns {second.holder.pid}"
    subprocess.run(first.command("ip", *cable.split()), check=True)
    for host in (first, second):
        for line in ("link set lo up", f"address add {host.address}/24 dev eth0", "link set eth0 up"):
            subprocess.run(host.command("ip", *line.split()), check=True)
