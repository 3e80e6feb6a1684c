"""The job array of a study on a real SLURM: one machine, daemons of the test's own, as root."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jax_lora.study import runner, slurm
from tests.conftest import REPOSITORY
from tests.study.test_runner import CELLS, names, ran

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def checked(*arguments: str, **more) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch) -> Iterator[None]:
    """A SLURM of one node; its tools find it through SLURM_CONF."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        pytest.skip(f"SLURM is not installed here: no {', '.join(missing)}")
    if os.geteuid():
        pytest.skip("a SLURM of the test's own needs root")
    # munged wants a place that only its user can write to, all the way up.
    folder = Path("/run") / f"jax_lora-{os.getpid()}-{tmp_path_factory.mktemp('slurm').name}"
    folder.mkdir()
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "key").write_bytes(os.urandom(64))
    (folder / "key").chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    config = CONFIG.format(host=host, folder=folder, ports=free_ports(2))
    (folder / "slurm.conf").write_text(config)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    try:
        options = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        options |= {"key-file": "key", "seed-file": "seed"}
        checked("munged", "--force", *(f"--{k}={folder / v}" for k, v in options.items()))
        checked("slurmctld")
        checked("slurmd")
        yield
    finally:
        for name in ("slurmd", "slurmctld", "munge"):
            pid = folder / f"{name}.pid"
            if pid.is_file():
                number = pid.read_text().strip()
                os.kill(int(number), signal.SIGTERM)
                subprocess.run(["tail", f"--pid={number}", "-f", "/dev/null"], timeout=30)
        shutil.rmtree(folder)


WORKER = """
import sys
from pathlib import Path
from jax_lora.study import runner
from tests.study.test_runner import CELLS, fake

print("worker")
runner.run_cells(CELLS, Path(sys.argv[1]), fake)
"""


def test_the_tasks_of_a_job_array_share_the_cells(cluster, tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    command = [sys.executable, "-c", WORKER, str(folder)]
    text = slurm.script(command, 3, [f"--chdir={REPOSITORY}", "--comment=it's ours"], folder)
    job = slurm.submit(text, folder)
    checked("sbatch", "--wait", f"--dependency=afterany:{job}", "--output=/dev/null", "--wrap=:")
    logs = sorted((folder / "slurm").iterdir())
    assert [log.name for log in logs] == [f"{job}_{i}.txt" for i in range(3)]
    assert [log.read_text() for log in logs] == ["worker\n"] * 3
    assert sorted(ran(folder)) == sorted(names())
    assert set(runner.states(folder, CELLS).values()) == {"done"}


TEAM = """
import sys
from pathlib import Path
import jax
from jax_lora import distributed
from jax_lora.study import runner
from jax_lora.study.team import Team
from tests.study.test_runner import CELLS, fake

distributed.initialize(sys.argv[2])
folder, process = Path(sys.argv[1]), jax.process_index()

def train(name):
    (folder / f"{name}.{process}").touch()

def run(cell, own):
    with team.together(cell.id, sys.exit):
        train(cell.id)
    return fake(cell, own)

with Team(distributed.key_value_store(), process, jax.process_count()) as team:
    if team.leads:
        runner.run_cells(CELLS, folder, run)
    else:
        team.follow(train)
"""


def test_a_task_of_several_processes_is_one_worker(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    folder = tmp_path / "study"
    folder.mkdir()
    command = [sys.executable, "-c", TEAM, str(folder), "auto"]
    one = ["--nodes=1", "--ntasks=2"]  # there is one node here, and the last word counts
    text = slurm.script(command, 1, [f"--chdir={REPOSITORY}", *one], folder, hosts=2)
    job = slurm.submit(text, folder)
    checked("sbatch", "--wait", f"--dependency=afterany:{job}", "--output=/dev/null", "--wrap=:")
    log = (folder / "slurm" / f"{job}_0.txt").read_text()
    assert ran(folder) == names(), log
    trained = sorted(path.name for path in folder.glob("*.[0-9]"))
    assert trained == sorted(f"{name}.{process}" for name in names() for process in (0, 1))


def test_a_worker_on_several_hosts(tmp_path):
    lines = slurm.script(["a", "b c"], 4, ["--gpus-per-node=8"], tmp_path, hosts=2).splitlines()
    assert lines[-1] == "exec srun a 'b c'"
    assert {"#SBATCH --nodes=2", "#SBATCH --array=0-3", "#SBATCH --gpus-per-node=8"} <= set(lines)
    one = slurm.script(["a"], 4, [], tmp_path)
    assert one.endswith("exec a\n") and "--nodes" not in one
    with pytest.raises(ValueError, match="--hosts: found 0"):
        slurm.script(["a"], 1, [], tmp_path, hosts=0)


def test_what_sbatch_refuses(cluster, tmp_path):
    text = slurm.script(["true"], 1, ["--partition=none-such"], tmp_path)
    with pytest.raises(ValueError, match=r"sbatch: .*partition"):
        slurm.submit(text, tmp_path)


def test_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="sbatch: no such program"):
        slurm.submit("", tmp_path)
    for workers, options, words in ((0, [], "--workers"), (1, ["gpu"], "--sbatch: found 'gpu'")):
        with pytest.raises(ValueError, match=words):
            slurm.script(["true"], workers, options, tmp_path)
