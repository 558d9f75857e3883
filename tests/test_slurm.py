"""A grid on a Slurm cluster: a real one, of this machine alone, started for these tests."""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

PARTS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")


def why_not():
    if missing := [part for part in PARTS if not shutil.which(part)]:
        return f"{missing[0]} is not installed (Debian: slurm-wlm, munge)"
    if os.getuid():
        return "only root can start slurmd"
    if not importlib.util.find_spec("submitit"):
        return "submitit is not installed"
    return ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


def until(happened, what, seconds=300):
    begun = time.monotonic()
    while not (found := happened()):
        assert time.monotonic() - begun < seconds, what
        time.sleep(0.05)
    return found


def said(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def free_ports(n):
    taken = [socket.socket() for _ in range(n)]
    for each in taken:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """munged, slurmctld and slurmd in a folder of their own; ended by their process ids."""
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o700)
    for name in ("run", "spool", "state", "log"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    host, (control, node) = socket.gethostname().split(".")[0], free_ports(2)
    conf = folder / "slurm.conf"
    conf.write_text(f"""
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldPort={control}
SlurmdPort={node}
MailProg=/bin/true
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
""")
    munge = folder / "run" / "munged.pid"
    flags = {
        "key-file": key,
        "socket": folder / "run" / "munge.socket",
        "pid-file": munge,
        "log-file": folder / "log" / "munged.log",
        "seed-file": folder / "run" / "seed",
    }
    said("munged", *(f"--{name}={value}" for name, value in flags.items()), "--force")
    until(munge.exists, "munged did not start")
    daemons = []
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(conf)
    try:
        with (folder / "log" / "out").open("wb") as out:
            for name in ("slurmctld", "slurmd"):
                daemons.append(subprocess.Popen([name, "-D"], stdout=out, stderr=out))
        look = ["sinfo", "--noheader", "--format=%T"]
        state = lambda: subprocess.run(look, capture_output=True, text=True).stdout.strip()  # noqa: E731
        until(lambda: state() == "idle", (folder / "log" / "out").read_text(), 120)
        yield folder
        subprocess.run(["scancel", "--user=root"], check=False)
        until(lambda: not queue(), "jobs outlive their cancellation")
    finally:
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(60)
        os.kill(int(munge.read_text()), signal.SIGTERM)


def queue():
    """Name of each job that has not ended -> its number and state."""
    lines = said("squeue", "--noheader", "--format=%j %A %T").splitlines()
    return {name: (int(job), state) for name, job, state in map(str.split, lines)}


def process_of(run):
    """The process that trains a run's job, None where there is none yet."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "submitit.core._submit" in words and any(f"/{run}.job" in word for word in words):
            return process
    return None


def start(log, path, folder, *arguments):
    with log.open("ab") as file:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "fcse.cli", "study", "--config", path),
                *("--output", folder, "--executor", "slurm", *arguments),
            ],
            stdout=file,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture
def study(cluster, tiny_model, small_corpus, tmp_path):
    """Tables of runs, and steps -> the file of a grid of a tiny model."""

    def write(runs, steps):
        path = tmp_path / "study.toml"
        path.write_text(f"""
encoder = "{tiny_model("bert")}"
corpus = "{small_corpus}"
batch_size = 8
steps = {steps}
max_length = 16
eval_steps = 10
precision = "float32"
{runs}""")
        return path

    return write


def test_jobs_that_end_early_go_on_where_they_were(study, tmp_path):
    """A job is killed, one requeued, one's input is wrong, the command itself is killed."""
    path = study(
        """
        [[runs]]
        objective = "info_nce"
        temperature = [0.05, 1e-38]
        [[runs]]
        objective = "focal_info_nce"
        [[runs]]
        objective = "hardness_info_nce"
        """,
        steps=400,
    )
    folder, log = tmp_path / "out", tmp_path / "log"
    process = start(log, path, folder, "--time=1:00:00", "--cpus-per-task=1", "--partition=main")

    def begun(kind):
        """The run of an objective, once it has a state to go on from."""
        assert process.poll() is None, log.read_text()
        found = list(folder.glob(f"runs/{kind}-*/resume/*[0-9]"))
        return found[0].parents[1] if found else None

    def remembered(run):
        """A second name of what a run has measured, which is another file where it begins anew."""
        name = tmp_path / f"{run.name}.jsonl"
        name.hardlink_to(run / "metrics.jsonl")
        return name

    killed = until(lambda: begun("info_nce"), "no run begins")
    assert {state for _, state in queue().values()} <= {"PENDING", "RUNNING", "COMPLETING"}
    first = queue()[killed.name][0]
    print(said("squeue"))
    process_of(killed.name).kill()
    known = {killed: remembered(killed)}

    requeued = until(lambda: begun("focal_info_nce"), "the second run does not begin")
    job = queue()[requeued.name][0]
    said("scontrol", "requeue", str(job))
    print(said("squeue"))
    known[requeued] = remembered(requeued)
    until(lambda: queue()[requeued.name] == (job, "PENDING"), "it is not put in again")
    said("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would wait for two minutes

    until(lambda: f"job {first} ended (FAILED), job" in log.read_text(), "the end is not seen")
    process.kill()
    process.wait()
    jobs = queue()
    print(said("squeue"))
    assert jobs, "no job outlives the command, so that nothing can be taken over"
    process = start(log, path, folder)
    assert process.wait(600) == 2
    print(log.read_text())
    *_, last = log.read_text().splitlines()
    assert last.startswith("fcse: 1 of 4 runs failed"), log.read_text()
    (wrong,) = folder.glob("runs/*.log")
    assert f"failed: {wrong.stem}: at step 1 the loss is" in log.read_text()
    assert f"{wrong.stem}: job" not in log.read_text(), "wrong input was tried again"

    table = pd.read_csv(folder / "results.csv")
    print(table[["run", "contestant", "steps", "wall_time_s", "Lee"]].to_string())
    assert sorted(table["objective"]) == ["focal_info_nce", "hardness_info_nce", "info_nce"]
    assert table["Lee"].notna().all()
    for run, name in known.items():
        assert (run / "metrics.jsonl").samefile(name), "a run was begun anew"
        lines = [json.loads(line) for line in name.read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, 401))
    assert {p.suffix for p in folder.glob("runs/*") if "." in p.name} == {".log"}
    assert not queue()


def test_a_job_that_dies_at_once_does_not_loop_and_ctrl_c_cancels(study, tmp_path):
    path, folder, log = study("[[runs]]", 100_000), tmp_path / "out", tmp_path / "log"
    process = start(log, path, folder)
    for _ in range(3):
        (name,) = until(queue, "no job is put in")
        found = until(lambda: process_of(name), "its job does not begin")  # noqa: B023
        found.kill()
        found.wait(60)
        until(lambda: found.pid not in psutil.pids(), "it does not end")  # noqa: B023
    assert process.wait(300) == 2
    assert (
        f"failed: {name}: 3 jobs ended (FAILED) and did not get any further (see" in log.read_text()
    )
    assert Path(folder / "runs" / f"{name}.log").exists()
    assert not queue()

    process = start(log, path, folder)
    until(lambda: process_of(name), "its job does not begin")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    until(lambda: not queue(), "a job outlives the command")
    assert not process_of(name)
    assert log.read_text().splitlines()[-1].startswith("fcse: interrupted")


def test_what_the_cluster_refuses_is_one_line(study, tmp_path):
    log = tmp_path / "log"
    process = start(log, study("[[runs]]", 4), tmp_path / "out", "--partition=nowhere")
    assert process.wait(120) == 2
    last = log.read_text().splitlines()[-1]
    assert last.startswith("fcse: the cluster refuses a job: sbatch: error: ")
    assert "partition" in last
