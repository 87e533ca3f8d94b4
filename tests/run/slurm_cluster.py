"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd of Debian's packages, in one folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from copd_megatron.supervision.ports import free_ports

PACKAGES = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
NODES = ("n1", "n2")

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}({first})
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
KillWait=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=9
"""
"""`config_overrides` lets both nodes claim the machine's cores. A requeued job waits for as long as
`cred_expire`, two minutes by default."""


def why_not() -> str | None:
    """What is missing for such a cluster, None if it can be started."""
    if os.geteuid() != 0:
        return "the test cluster's daemons need root"
    missing = sorted({package for program, package in PACKAGES.items() if shutil.which(program) is None})
    return f"not installed: {' '.join(missing)} (apt-get install)" if missing else None


class SlurmCluster:
    """The cluster while the `with` block lasts; `environment` is what its commands need."""

    def __init__(
        self,
        root: Path,
        addresses: Sequence[str] = ("127.0.0.1", "127.0.0.2"),
        within: Sequence[Sequence[str]] = ((), ()),
    ) -> None:
        """`within`: for each node a command that starts others there; the controller and the rest are on the first."""
        self._addresses = dict(zip(NODES, addresses, strict=True))
        self.within = dict(zip(NODES, within, strict=True))
        self.root = root.resolve()  # the daemons change their folder
        self.environment = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf"), "COLUMNS": "120"}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def command(self, *words: str, check: bool = True) -> str:
        """The output of one of Slurm's commands."""
        result = subprocess.run(
            [*self.within["n1"], *words], env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert not check or result.returncode == 0, f"{' '.join(words)}: {result.stderr}{result.stdout}"
        return result.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job: {"JobState": "RUNNING", …}."""
        words = self.command("scontrol", "--oneliner", "show", "job", number).split()
        return {key: value for key, _, value in (word.partition("=") for word in words)}

    def wait_for(self, number: str, states: set[str], seconds: float) -> dict[str, str]:
        """The job when it has come to one of `states`."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is still {job['JobState']} ({job['Reason']})"
            time.sleep(0.2)
        return job

    def preempt(self) -> None:
        """Have both nodes taken, for a second, by a job that is more urgent."""
        options = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        self.command("sbatch", *options)

    def stop(self) -> None:
        """End every daemon, and with them all that they have started."""
        if len(self._daemons) > 1:
            self.command("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 30
            while self.command("squeue", "--noheader", check=False) and time.monotonic() < deadline:
                time.sleep(0.2)
            self.command("scontrol", "shutdown", check=False)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10 if daemon is not self._daemons[0] else 0.1)
            except subprocess.TimeoutExpired:
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        self._daemons = []
        for left in self._processes():  # a step whose end nobody was there to hear of stays for good
            left.kill()

    def _processes(self) -> list[psutil.Process]:
        """Whatever else belongs to this cluster: all of it has inherited where its configuration is."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _start(self) -> None:
        for folder in ("state", "n1", "n2", "log"):
            (self.root / folder).mkdir(parents=True)
        self.root.chmod(0o755)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        ports = free_ports("127.0.0.1", 3)
        lines = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr={address} Port={port} "
            "CPUs=2 RealMemory=4000 State=UNKNOWN"
            for (name, address), port in zip(self._addresses.items(), ports[1:], strict=True)
        ]
        (self.root / "slurm.conf").write_text(
            _CONFIGURATION.format(
                host=socket.gethostname(),
                first=self._addresses["n1"],
                controller=ports[0],
                root=self.root,
                nodes="\n".join(lines),
            )
        )
        munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.root}/munge.socket"]
        files = [f"--{name}-file={self.root}/munge.{name}" for name in ("pid", "log", "seed")]
        self._daemon([*munge, *files])
        self._until(lambda: (self.root / "munge.socket").exists(), "munged")
        self._daemon([*self.within["n1"], "slurmctld", "-D"])
        for name in NODES:
            self._daemon([*self.within[name], "slurmd", "-D", "-N", name])
        self._until(
            lambda: self.command("sinfo", "-h", "-o", "%T %D", check=False).split()[:2] == ["idle", "2"], "nodes"
        )

    def _daemon(self, words: list[str]) -> None:
        with open(self.root / "log" / "daemons.txt", "ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    words,
                    env=self.environment,
                    stdout=output,
                    stderr=output,
                    stdin=subprocess.DEVNULL,
                    cwd=self.root,
                    start_new_session=True,
                )
            )

    def _until(self, ready, what: str) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            logs = "".join(file.read_text(errors="replace")[-2000:] for file in (self.root / "log").iterdir())
            assert not dead, f"{dead} ended\n{logs}"
            assert time.monotonic() < deadline, f"{what} did not come up\n{logs}"
            time.sleep(0.1)
