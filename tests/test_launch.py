"""The launchers: the local one with small fake programs, the cluster files by their syntax. Without jax."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from jaxrl_llm import errors

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
# Ten times the slowest test on an idle machine; the fake programs sleep 60 s, so a launcher that does not kill them fails.
SOON = 20.0


def start(tmp_path: Path, program: str, *options: str, arguments: tuple[str, ...] = (), **environment: str):
    script = tmp_path / "program.py"
    script.write_text(
        "import os, signal, sys, time\nme = int(os.environ['JAXRL_PROCESS_ID'])\n" + textwrap.dedent(program)
    )
    command = [sys.executable, LAUNCH / "local.py", "--module", script, "--log-dir", tmp_path / "logs", *options]
    return subprocess.Popen(
        [*map(str, command), "--", *arguments],
        env=os.environ | environment,
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(launcher: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = launcher.communicate(timeout=SOON)
    finally:
        launcher.kill()
    return launcher.returncode, out, err


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + SOON
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, [str(path) for path in paths if not path.exists()]
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A container whose first process does not reap keeps the dead as zombies.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_each_process_gets_its_environment_and_the_command(tmp_path):
    program = """
        import json
        json.dump({"env": dict(os.environ), "argv": sys.argv[1:]}, open(f"seen_{me}.json", "w"))
        print(f"process {me} speaks")
    """
    arguments = ("train", "c.yaml", "--mesh.fsdp", "8", "--", "-n")
    proxies = {"https_proxy": "http://proxy:1", "HTTP_PROXY": "http://proxy:1", "NO_PROXY": "localhost"}
    launcher = start(tmp_path, program, "--processes", "3", "--devices", "4", arguments=arguments, **proxies)
    code, out, err = finish(launcher)
    assert (code, out, err) == (0, "process 0 speaks\n", "")

    seen = [json.loads((tmp_path / f"seen_{i}.json").read_text()) for i in range(3)]
    assert [s["argv"] for s in seen] == [list(arguments)] * 3
    assert [s["env"]["JAXRL_PROCESS_ID"] for s in seen] == ["0", "1", "2"]
    for environment in (s["env"] for s in seen):
        assert environment["JAXRL_NUM_PROCESSES"] == "3"
        assert environment["JAX_NUM_CPU_DEVICES"] == "4"
        assert environment["JAX_PLATFORMS"] == "cpu"
        assert environment["OMP_NUM_THREADS"] == "1"
        assert not [name for name in environment if name.lower().endswith("_proxy")]
    (address,) = {s["env"]["JAX_COORDINATOR_ADDRESS"] for s in seen}
    host, port = address.split(":")
    assert host == "127.0.0.1" and 1024 <= int(port) <= 65535
    assert {s["env"]["JAX_COORDINATOR_BIND_ADDRESS"] for s in seen} == {address}
    assert (tmp_path / "logs" / "process_2.log").read_text() == "process 2 speaks\n"


def test_the_first_failure_ends_the_others_and_determines_the_exit_code(tmp_path):
    program = """
        if me == 1:
            print(*range(25), sep="\\n")
            sys.exit(3)
        time.sleep(60)
    """
    code, _, err = finish(start(tmp_path, program, "--processes", "3"))
    assert code == 3
    assert "process 1 of 3 failed first, with code 3" in err
    tail = err.split(f"of {tmp_path}/logs/process_1.log\n")[1].split("---")[0].split()
    assert tail == [str(i) for i in range(5, 25)]


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace_period(tmp_path):
    program = """
        if me == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            open("pid", "w").write(str(os.getpid()))
            open("deaf", "w")
            time.sleep(60)
        while not os.path.exists("deaf"):
            time.sleep(0.01)
        sys.exit(4)
    """
    code, _, _ = finish(start(tmp_path, program, "--grace", "0.3"))
    assert code == 4
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_death_by_signal_gives_the_exit_code_of_a_shell(tmp_path):
    code, _, err = finish(start(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", "--processes", "1"))
    assert code == 128 + 9
    assert "process 0 of 1 failed first, with signal 9" in err


SAVES_SLOWLY = """
    def save_and_leave(signum, frame):
        time.sleep(0.2 + 0.8 * me)
        open(f"saved_{me}", "w").write(str(signum))
        sys.exit(75)

    signal.signal(signal.SIGTERM, save_and_leave)
    signal.signal(signal.SIGINT, save_and_leave)
    open(f"ready_{me}", "w")
    time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_every_process_may_save(tmp_path, signum):
    # Process 1 saves for 0.8 s longer than process 0, far over the grace period: preemption must not cut it short.
    launcher = start(tmp_path, SAVES_SLOWLY, "--grace", "0.1")
    wait_for(tmp_path / "ready_0", tmp_path / "ready_1")
    launcher.send_signal(signum)
    code, _, err = finish(launcher)
    assert (code, err) == (75, "")
    assert [(tmp_path / f"saved_{i}").read_text() for i in range(2)] == [str(int(signum))] * 2


def test_a_second_signal_kills_at_once(tmp_path):
    program = """
        signal.signal(signal.SIGTERM, lambda *_: open(f"heard_{me}", "w"))
        open(f"ready_{me}", "w")
        while True:
            time.sleep(60)
    """
    launcher = start(tmp_path, program, "--grace", "60")
    wait_for(tmp_path / "ready_0", tmp_path / "ready_1")
    launcher.terminate()
    wait_for(tmp_path / "heard_0", tmp_path / "heard_1")
    launcher.terminate()
    assert finish(launcher)[0] == 128 + 9


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_killed_launcher_leaves_no_orphans(tmp_path):
    program = """
        open(f"pid_{me}.tmp", "w").write(str(os.getpid()))
        os.rename(f"pid_{me}.tmp", f"pid_{me}")
        time.sleep(60)
    """
    launcher = start(tmp_path, program)
    wait_for(tmp_path / "pid_0", tmp_path / "pid_1")
    launcher.kill()
    finish(launcher)
    pids = [int((tmp_path / f"pid_{i}").read_text()) for i in range(2)]
    deadline = time.monotonic() + SOON
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("arguments", [[], ["--processes", "0", "--", "train"], ["--devices", "-1", "--", "train"]])
def test_bad_usage_is_exit_code_2_without_a_traceback(arguments):
    done = subprocess.run([sys.executable, LAUNCH / "local.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_vm.sh"])
def test_shell_files_parse(name):
    done = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def run_with_stubs(script: Path, *arguments: str, tmp_path: Path, stubs: dict[str, str], **environment: str):
    """Run a shell file with fake cluster programs, each appending its name and arguments to `calls`."""
    for name, body in stubs.items():
        stub = tmp_path / name
        stub.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name} $*" >> {tmp_path}/calls\n{body}\n')
        stub.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", script, *arguments], env=os.environ | path | environment, capture_output=True, text=True
    )
    return done, (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (3, False), (4, False), (75, True)])
def test_slurm_requeues_only_after_a_save(tmp_path, code, requeued):
    stubs = {"srun": f"exit {code}", "scontrol": ""}
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    done, calls = run_with_stubs(LAUNCH / "slurm.sbatch", "train", "c.yaml", tmp_path=tmp_path, stubs=stubs, **job)
    assert done.returncode == code
    assert calls[0].endswith(".venv/bin/jaxrl train c.yaml")
    assert calls[1:] == (["scontrol requeue 7"] if requeued else [])


def test_tpu_vm_runs_the_quoted_command_on_all_workers(tmp_path):
    tpu = {"NAME": "t", "ZONE": "z"}
    arguments = ("run", "sample", "c.yaml", "--prompt", "<3+4+5>")
    done, calls = run_with_stubs(LAUNCH / "tpu_vm.sh", *arguments, tmp_path=tmp_path, stubs={"gcloud": ""}, **tpu)
    assert (done.returncode, done.stderr) == (0, "")
    command = "cd jaxrl_llm && exec env JAXRL_DISTRIBUTED=1 .venv/bin/jaxrl sample c.yaml --prompt \\<3+4+5\\>"
    assert calls == [f"gcloud compute tpus tpu-vm ssh t --zone=z --worker=all --command={command}"]


def test_tpu_vm_refuses_an_unknown_action(tmp_path):
    tpu = {"NAME": "t", "ZONE": "z"}
    done, calls = run_with_stubs(LAUNCH / "tpu_vm.sh", "strat", tmp_path=tmp_path, stubs={"gcloud": ""}, **tpu)
    assert (done.returncode, calls) == (2, [])
    assert "no action 'strat'" in done.stderr


def test_slurm_starts_one_process_per_gpu():
    # JAX under Slurm gives each process the one GPU that has its local number: fewer tasks than GPUs waste the rest.
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    header = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert header["ntasks-per-node"] == header["gpus-per-node"]
    assert header["signal"].startswith("TERM@")  # to the tasks; "B:" would send it to the batch shell alone
    assert "requeue" in header


def test_jobset_has_the_expected_keys():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) == {"failurePolicy", "replicatedJobs"}
    (slice_job,) = jobset["spec"]["replicatedJobs"]
    assert set(slice_job) == {"name", "replicas", "template"}

    job = slice_job["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips_per_host = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == rows * columns // chips_per_host
    assert job["backoffLimit"] == 0  # one lost host ends the SPMD program: JobSet restarts all of them together
    assert pod["restartPolicy"] == "Never"
    assert container["command"][:2] == ["jaxrl", "train"]


def test_jobset_does_not_restart_runs_that_would_fail_again():
    """Exit codes of errors that need a user fail the set; 75 and deaths by signal restart it."""
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    (slice_job,) = jobset["spec"]["replicatedJobs"]
    job = slice_job["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UserError)]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "In"
    assert rule["onExitCodes"]["values"] == sorted({kind.exit_code for kind in kinds}) == [2, 3, 4]
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    policy = jobset["spec"]["failurePolicy"]
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert policy["maxRestarts"] > 0
