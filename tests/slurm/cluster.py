"""A real two-node Slurm on this machine, for the tests: started, asked and stopped from here.

No systemd, cgroups, dbus or accounting. Each slurmd lives in a UTS and a mount namespace of its own, so that it has its
own host name and both names resolve, while nothing on the machine changes. Everything, the munge key included, is
under one short folder. Each node offers two fake GPUs (null devices): tasks see CUDA_VISIBLE_DEVICES as on a cluster.
"""

import contextlib
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

BINARIES = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo", "unshare")
NODES = ("node1", "node2")
CPUS_PER_NODE, GPUS_PER_NODE = 8, 2
SEARCH_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
CONF = """\
ClusterName=local
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge/socket
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
PlugStackConfig={base}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
MinJobAge=3600
KillWait=5
SlurmctldTimeout=10
SlurmdTimeout=10
GresTypes=gpu
NodeName=node[1-2] NodeAddr=127.0.0.[11-12] NodeHostname=node[1-2] Port=[{port1}-{port2}] CPUs={cpus} Boards=1 \
SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=ALL Default=YES MaxTime=UNLIMITED PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL MaxTime=UNLIMITED PriorityTier=10 PreemptMode=OFF State=UP
"""


class ClusterError(AssertionError):
    """The cluster did not do what was asked; the message ends with the daemons' logs."""


def missing_binaries() -> list[str]:
    """The Slurm and munge programs that this machine lacks."""
    return [name for name in BINARIES if shutil.which(name, path=SEARCH_PATH) is None]


class Cluster:
    """Two nodes and the clients to ask them. Use as a context manager."""

    def __init__(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))  # short: socket paths end at 107 characters
        self.env = os.environ | {"SLURM_CONF": str(self.base / "slurm.conf"), "PATH": SEARCH_PATH}
        for name in [name for name in self.env if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.env[name]
        self.namespace: list[str] = []

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- asking -------------------------------------------------------------------------------------------------

    def client(self, *command: str, check: bool = True, timeout_s: float = 30, **options: Any) -> str:
        """Runs one client (sbatch, ...); returns its output. A time-out, since srun waits for ever on drained nodes."""
        options = {"env": self.env, "cwd": self.base} | options
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, **options)
        if check and done.returncode:
            raise ClusterError(
                f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}{self.logs()}"
            )
        return done.stdout.strip()

    def submit(self, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> int:
        """sbatch with these arguments. Returns the job id."""
        printed = self.client("sbatch", "--parsable", *arguments, cwd=cwd or self.base, env=self.env | (env or {}))
        return int(printed.splitlines()[-1].split(";")[0])

    def job(self, job_id: int | str) -> dict[str, str]:
        """`scontrol show job` as a dict. Empty once Slurm has forgotten the job."""
        shown = self.client("scontrol", "--oneliner", "show", "job", str(job_id), check=False)
        first = shown.splitlines()[0] if shown else ""
        return dict(part.split("=", 1) for part in re.split(r"\s+(?=[A-Za-z/:]+=)", first) if "=" in part)

    def state(self, job_id: int | str) -> str:
        return self.job(job_id).get("JobState", "GONE")

    def wait(self, job_id: int | str, *states: str, timeout_s: float = 900) -> str:
        """Waits until the job's state is one of `states` (default: any end). A wrong end raises, with its log."""
        wanted = states or ENDED

        def reached() -> str | None:
            state = self.state(job_id)
            if state in wanted:
                return state
            if state in ENDED or state == "GONE":
                raise ClusterError(
                    f"job {job_id} ended {state}, waited for {wanted}\n{self.job_log(job_id)}{self.logs()}"
                )
            return None

        return self.poll(reached, f"job {job_id} to be {' or '.join(wanted)}", timeout_s, job_id)

    def wait_requeued(self, job_id: int, restarts: int = 1, timeout_s: float = 900) -> None:
        """Waits until Slurm counts so many restarts, and lets the job start at once instead of two minutes later."""

        def requeued() -> bool:
            job = self.job(job_id)
            state = job.get("JobState", "GONE")
            if state in ENDED and int(job.get("Restarts", "0")) < restarts:
                raise ClusterError(f"job {job_id} ended {state} before a requeue\n{self.job_log(job_id)}{self.logs()}")
            return int(job.get("Restarts", "0")) >= restarts

        self.poll(requeued, f"job {job_id} to be requeued", timeout_s, job_id)
        time.sleep(2.1)  # credentials are revoked by the second: a start in the same one is refused, the job FAILED
        self.release(job_id)

    def release(self, job_id: int | str) -> None:
        """Ends the wait that Slurm imposes on a requeued job."""
        self.client("scontrol", "update", f"jobid={job_id}", "StartTime=now", check=False)

    def wait_log(self, job_id: int, pattern: str, timeout_s: float = 900) -> str:
        """Waits until the job's log has a line that matches. Returns that line."""

        def found() -> str | None:
            state = self.state(job_id)  # before the log is read: its last lines come before its end
            match = re.search(rf"^.*(?:{pattern}).*$", self.job_log(job_id), re.MULTILINE)
            if not match and state in ENDED:
                raise ClusterError(f"job {job_id} ended {state} without {pattern!r}\n{self.job_log(job_id)}")
            return match.group(0) if match else None

        return self.poll(found, f"{pattern!r} in the log of job {job_id}", timeout_s, job_id)

    def poll(
        self, ask: Callable[[], Any], what: str, timeout_s: float, job_id: int | str | None = None, every_s: float = 0.3
    ) -> Any:
        """Asks until the answer is true. Returns it; raises ClusterError when time is out."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):  # of one client: no answer yet
                if answer := ask():
                    return answer
            time.sleep(every_s)
        shown = "" if job_id is None else f"\n{self.job(job_id)}\n{self.job_log(job_id)}"
        raise ClusterError(f"waited {timeout_s} s for {what}{shown}{self.logs()}")

    def job_log(self, job_id: int | str) -> str:
        path = self.job(job_id).get("StdOut", "")
        return Path(path).read_text(errors="replace") if path and Path(path).is_file() else ""

    def logs(self, lines: int = 15) -> str:
        """The tails of the daemons' logs."""
        tails = []
        for path in sorted((self.base / "log").glob("*")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            tails.append(f"--- {path.name}\n" + "\n".join(tail))
        return "\n" + "\n".join(tails)

    def tasks(self, marker: str) -> list[int]:
        """The living processes whose environment holds `marker`: what a job may have left behind."""
        return [pid for pid in _pids() if marker.encode() in read(f"/proc/{pid}/environ") and not _is_zombie(pid)]

    def tasks_on(self, node: str) -> list[int]:
        """The living processes of this cluster that believe themselves on `node`."""
        return [pid for pid in self.tasks(f"SLURM_CONF={self.base}/") if _hostname_of(pid) == node]

    # ---- breaking and repair --------------------------------------------------------------------------------------

    def node_down(self, node: str) -> None:
        self.client("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def node_up(self, node: str) -> None:
        self.client("scontrol", "update", f"nodename={node}", "state=resume", check=False)

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL to a node's slurmd: the node is lost to the controller, while its job steps live on."""
        os.kill(self._daemon_pid(f"slurmd.{node}"), signal.SIGKILL)

    def lose(self, node: str) -> None:
        """A node that is gone: its slurmd killed, and what it runs is stopped.

        srun is killed: a stopped one still has messages taken in for it, so that the other node's step waits for
        replies beyond UnkillableStepTimeout (60 s) and Slurm drains that node. To a dead host there is no connection.
        """
        self.kill_slurmd(node)
        pids = self.tasks_on(node)
        for pid in pids:
            send(pid, signal.SIGSTOP)
        for pid in pids:
            if read(f"/proc/{pid}/comm").strip() == b"srun":
                send(pid, signal.SIGKILL)

    def revive(self, node: str, wait: bool = True) -> None:
        """A slurmd for a node that lost it, after ending what the old one left running there."""
        for pid in self.tasks_on(node):
            _end(pid)
        self._start_slurmd(node)
        self.node_up(node)
        if wait:
            self.wait_idle()

    def wait_idle(self, timeout_s: float = 30) -> None:
        """Waits until both nodes are idle."""
        self.poll(
            lambda: self.client("sinfo", "-h", "-p", "main", "-o", "%D %t", check=False) == f"{len(NODES)} idle",
            "both nodes to be idle",
            timeout_s,
            every_s=0.1,
        )

    def clear(self) -> None:
        """Cancels every job and repairs every node, so that one test's ruins do not reach the next."""
        jobs = self.client("squeue", "-h", "-o", "%A", check=False).split()
        if jobs:
            self.client("scancel", *sorted(set(jobs)), check=False)
        self.poll(lambda: not self.client("squeue", "-h", check=False), "the queue to be empty", 60)
        for node in NODES:
            if not self._daemon_alive(f"slurmd.{node}"):
                self.revive(node)
            self.node_up(node)
        self.wait_idle()

    # ---- starting and stopping --------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.base.chmod(0o755)
        for name in ("munge", "state", "run", "log", "dev", "spool"):
            (self.base / name).mkdir(mode=0o755)
        port = _free_ports(1 + len(NODES))
        (self.base / "slurm.conf").write_text(
            CONF.format(
                base=self.base,
                user=getpass.getuser(),
                port=port,
                port1=port + 1,
                port2=port + len(NODES),
                cpus=CPUS_PER_NODE,
                gpus=GPUS_PER_NODE,
            )
        )
        (self.base / "plugstack.conf").touch()
        (self.base / "gres.conf").write_text(f"Name=gpu File={self._fake_gpus()}\n")
        hosts = Path("/etc/hosts").read_text() + "".join(f"127.0.0.{11 + i} {node}\n" for i, node in enumerate(NODES))
        (self.base / "hosts").write_text(hosts)
        self._choose_namespace()
        munge = self.base / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        self._spawn(
            "munged",
            f"--key-file={munge}/key",
            f"--socket={munge}/socket",
            f"--log-file={self.base}/log/munged.log",
            f"--pid-file={self.base}/run/munged.pid",
            f"--seed-file={munge}/seed",
        )
        self._spawn("slurmctld", "-f", self.env["SLURM_CONF"])
        for node in NODES:
            (self.base / "spool" / node).mkdir()
            self._start_slurmd(node)
        self.wait_idle()

    def _fake_gpus(self) -> str:
        """The devices of gres.conf: null devices where we may make them, terminals (never opened) elsewhere."""
        try:
            for index in range(GPUS_PER_NODE):
                os.mknod(self.base / "dev" / f"nvidia{index}", 0o20666, os.makedev(1, 3))
            return f"{self.base}/dev/nvidia[0-{GPUS_PER_NODE - 1}]"
        except PermissionError:
            return f"/dev/tty[0-{GPUS_PER_NODE - 1}]"

    def _choose_namespace(self) -> None:
        as_root = ["unshare", "--uts", "--mount"]
        as_user = ["unshare", "--user", "--map-current-user", "--keep-caps", "--uts", "--mount"]
        self.namespace = as_root if os.getuid() == 0 else as_user
        probe = subprocess.run([*self.namespace, "true"], capture_output=True, text=True, env=self.env)
        if probe.returncode:
            raise ClusterError(f"no namespaces for the nodes: {probe.stderr}")

    def _start_slurmd(self, node: str) -> None:
        enter = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        self._spawn(
            *self.namespace,
            "sh",
            "-c",
            enter,
            "_",
            node,
            f"{self.base}/hosts",
            "slurmd",
            "-N",
            node,
            "-f",
            self.env["SLURM_CONF"],
        )

    def _spawn(self, *command: str) -> None:
        """Starts a daemon. Its output goes to a file: an inherited pipe would keep its reader waiting for ever."""
        with (self.base / "log" / "start.log").open("a") as log:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env, timeout=30, close_fds=True
            )
        if done.returncode:
            raise ClusterError(f"{' '.join(command)}: status {done.returncode}{self.logs()}")

    def stop(self) -> None:
        """Cancels all jobs, ends exactly our daemons and what their steps left, removes the folder."""
        if self._daemon_alive("slurmctld"):
            jobs = self.client("squeue", "-h", "-o", "%A", check=False).split()
            if jobs:
                self.client("scancel", *sorted(set(jobs)), check=False)
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and self.client("squeue", "-h", check=False):
                time.sleep(0.1)
        for name in [*(f"slurmd.{node}" for node in NODES), "slurmctld", "munged"]:
            if self._daemon_alive(name):
                _end(self._daemon_pid(name))
        for pid in self.tasks(f"SLURM_CONF={self.base}/"):
            _end(pid)
        shutil.rmtree(self.base, ignore_errors=True)

    def _daemon_pid(self, name: str) -> int:
        text = read(str(self.base / "run" / f"{name}.pid"))
        return int(text) if text.strip() else 0

    def _daemon_alive(self, name: str) -> bool:
        """Whether the process of the pid file lives and is ours: the number may have passed to another."""
        pid = self._daemon_pid(name)
        return bool(pid) and not _is_zombie(pid) and str(self.base).encode() in read(f"/proc/{pid}/cmdline")


def _pids() -> Iterable[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a process that may have ended since it was listed."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def read(path: str) -> bytes:
    """A file of /proc, b"" for a process that has ended since it was listed."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _is_zombie(pid: int) -> bool:
    status = read(f"/proc/{pid}/status")
    return not status or b"\nState:\tZ" in status


def _hostname_of(pid: int) -> str:
    found = subprocess.run(["nsenter", "--target", str(pid), "--uts", "hostname"], capture_output=True, text=True)
    return found.stdout.strip()


def _end(pid: int) -> None:
    """TERM, then KILL after five seconds."""
    for signal_number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.kill(pid, signal_number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if _is_zombie(pid):
                return
            time.sleep(0.05)


def _free_ports(count: int) -> int:
    """The first of `count` consecutive free ports, below the ephemeral range."""
    while True:
        first = random.randrange(20000, 30000)
        listeners = [socket.socket() for _ in range(count)]
        try:
            for offset, listener in enumerate(listeners):
                listener.bind(("0.0.0.0", first + offset))
            return first
        except OSError:
            continue
        finally:
            for listener in listeners:
                listener.close()
