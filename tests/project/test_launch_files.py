"""scripts/accelerate and scripts/slurm: accelerate reads its files as meant; a job that is warned comes back."""

import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import _filter_args, prepare_multi_gpu_env
from tiny import final_weights, tiny_flags, tiny_model, tiny_run
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "scripts" / "accelerate").glob("*.yaml"))
SBATCH = ROOT / "scripts" / "slurm" / "pretrain.sbatch"
SCRIPT = "scripts/run_ijepa_pretraining.py"
AT_MOST = 120.0  # seconds that anything here is waited for


def parsed(config, *flags):
    """What `accelerate launch --config_file CONFIG FLAGS scripts/run_ijepa_pretraining.py in1k-vitb16` works with."""
    argv = ["--config_file", str(config), *flags, SCRIPT, "in1k-vitb16", "--seed", "1"]
    arguments = launch_command_parser().parse_args(argv)
    return _validate_launch_command(arguments)[0]


def test_there_is_a_file_for_each_way_and_size():
    names = {path.stem for path in CONFIGS}
    assert names == {f"{way}_{size}" for way in ("ddp", "fsdp2") for size in ("1_node_8_gpus", "several_nodes")}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_a_file_as_its_name_says(config):
    read = load_config_from_file(str(config))  # raises for a key that it does not know
    assert isinstance(read, ClusterConfig)
    shards, several = config.stem.startswith("fsdp2"), config.stem.endswith("several_nodes")
    assert read.distributed_type == (DistributedType.FSDP if shards else DistributedType.MULTI_GPU)
    assert (read.num_machines, read.num_processes) == ((2, 16) if several else (1, 8))
    assert (read.mixed_precision, read.use_cpu, read.gpu_ids) == ("bf16", False, "all")
    assert bool(read.fsdp_config) == shards
    # what is in fsdp_config is not looked at by the loader: each has to be a flag of the launcher
    known = vars(launch_command_parser().parse_args([SCRIPT]))
    assert set(read.fsdp_config) <= set(known)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_launching_with_a_file_starts_our_script_with_its_flags_on_eight_gpus_of_a_node(config):
    several = config.stem.endswith("several_nodes")
    flags = ["--machine_rank", "1", "--main_process_ip", "node7"] if several else []
    arguments = parsed(config, *flags, *(["--main_process_port", "29123"] if several else []))
    assert arguments.use_fsdp == config.stem.startswith("fsdp2")
    assert arguments.multi_gpu != arguments.use_fsdp
    environment = prepare_multi_gpu_env(arguments)
    for_torchrun = _filter_args(
        arguments,
        get_args_parser(),
        ["--training_script", SCRIPT, "--training_script_args", arguments.training_script_args],
    )
    assert for_torchrun.training_script == SCRIPT
    assert arguments.training_script_args == ["in1k-vitb16", "--seed", "1"]
    assert for_torchrun.nproc_per_node == "8"
    if several:
        assert (for_torchrun.nnodes, for_torchrun.node_rank) == ("2", 1)
        assert (for_torchrun.rdzv_backend, for_torchrun.rdzv_endpoint) == ("static", "node7:29123")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment.get("ACCELERATE_USE_FSDP") == ("true" if arguments.use_fsdp else None)


@pytest.mark.parametrize("config", [path for path in CONFIGS if "fsdp2" in path.stem], ids=lambda path: path.stem)
def test_a_sharding_file_asks_for_what_our_own_plugin_does(config, monkeypatch):
    from ijepa_hf.model.sharding import make_fsdp_plugin

    arguments = parsed(config, "--machine_rank", "1", "--main_process_port", "29123")
    environment = prepare_multi_gpu_env(arguments)
    for name, value in environment.items():
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(name, value)
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    plugin = make_fsdp_plugin()
    assert plugin.reshard_after_forward is True
    assert not plugin.activation_checkpointing
    named = environment["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")
    assert plugin.transformer_cls_names_to_wrap == named
    assert set(named) <= {type(module).__name__ for module in tiny_model().modules()}
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"


def test_both_files_of_a_way_differ_only_in_the_nodes():
    of_nodes = {
        "num_machines",
        "num_processes",
        "main_process_ip",
        "main_process_port",
        "rdzv_backend",
        "same_network",
    }
    for way in ("ddp", "fsdp2"):
        one, several = (yaml.safe_load(path.read_text()) for path in CONFIGS if path.stem.startswith(way))
        assert {name for name in one.keys() | several.keys() if one.get(name) != several.get(name)} <= of_nodes


# -- SLURM -----------------------------------------------------------------------------------------------------------

# `srun` starts the command once, hands a signal on to all processes of the step, as SLURM does, and ends as it does.
SRUN = """#!{python}
import os, psutil, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
task = subprocess.Popen(command, env=dict(os.environ, SLURM_NODEID="0"))
def hand_on(number, _):
    for process in [*psutil.Process(task.pid).children(recursive=True), task]:
        process.send_signal(number)
signal.signal(signal.SIGUSR1, hand_on)
signal.signal(signal.SIGTERM, hand_on)
print(os.getpid(), file=open(os.environ["STEP"], "w"))
sys.exit(task.wait() & 255)
"""
# `accelerate` keeps its command line and starts the script as it does on GPUs: through torchrun's agent, one rank.
ACCELERATE = """#!{python}
import os, sys
with open(os.environ["CALLS"], "a") as calls:
    print("accelerate", *sys.argv[1:], file=calls)
script = sys.argv[1:][sys.argv[1:].index("scripts/run_ijepa_pretraining.py"):]
script[0] = os.environ.get("SCRIPT", script[0])
agent = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone"]
os.execv(sys.executable, agent + script)
"""
SCONTROL = """#!/bin/sh
case "$1" in
show) echo node1; echo node2 ;;
*) echo "scontrol $*" >> "$CALLS" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path, child_environment):
    """The environment of a job on one node, with commands that stand for SLURM's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("accelerate", ACCELERATE), ("scontrol", SCONTROL)):
        (folder / name).write_text(text.replace("{python}", sys.executable))
        (folder / name).chmod(0o755)
    return {
        **child_environment,
        "PATH": f"{folder}{os.pathsep}{child_environment['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "STEP": str(tmp_path / "step"),
        "SLURM_JOB_ID": "4217",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "1",
    }


@contextlib.contextmanager
def job(environment, tmp_path, flags):
    """The batch script as SLURM starts it, its output added to `job.out`."""
    with (tmp_path / "job.out").open("a") as log:
        process = subprocess.Popen(
            ["bash", str(SBATCH), *flags], env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        for each in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            each.kill()
        process.wait()


def wait_for(true, process, log):
    deadline = time.monotonic() + AT_MOST
    while not true():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def send(number, process, tmp_path):
    """As SLURM does: what the script asked for goes to the script alone, SIGTERM to the processes of the step too."""
    if number == signal.SIGTERM:
        os.kill(int((tmp_path / "step").read_text()), number)
    os.kill(process.pid, number)


def num_lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_the_batch_script_is_sound_and_asks_slurm_for_a_warning_and_for_being_queued_again():
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    asked = re.findall(r"^#SBATCH (--[\w-]+)(?:=(\S+))?$", SBATCH.read_text(), re.MULTILINE)
    assert ("--requeue", "") in asked
    assert ("--signal", "B:USR1@300") in asked
    assert ("--ntasks-per-node", "1") in asked
    assert ("--open-mode", "append") in asked
    first_command = re.search(r"^(?!#|$)", SBATCH.read_text(), re.MULTILINE).start()
    assert SBATCH.read_text().rindex("#SBATCH") < first_command  # SLURM stops reading there


@pytest.mark.slow
def test_a_warned_job_saves_is_queued_again_and_goes_on_to_the_bits_of_an_uninterrupted_one(cluster, tmp_path):
    folder, log, calls = tmp_path / "run", tmp_path / "job.out", tmp_path / "calls"
    length = {"max_train_steps": 200, "checkpointing_steps": 200}
    flags = tiny_flags(folder, **length)
    with job(cluster, tmp_path, flags) as process:
        wait_for(lambda: num_lines(folder / "metrics.jsonl") >= 3, process, log)
        send(signal.SIGUSR1, process, tmp_path)
        assert process.wait(AT_MOST) == 0, log.read_text()
    (saved,) = folder.glob("checkpoint-*")
    assert 3 <= int(saved.name.split("-")[1]) < 200
    accelerate, scontrol = calls.read_text().splitlines()
    assert scontrol == "scontrol requeue 4217"
    words = shlex.split(accelerate)
    given = dict(itertools.pairwise(words))
    assert (given["--num_machines"], given["--num_processes"], given["--machine_rank"]) == ("2", "16", "0")
    assert (given["--main_process_ip"], given["--main_process_port"]) == ("node1", "24217")
    assert given["--config_file"] == "scripts/accelerate/ddp_several_nodes.yaml"
    assert words[-len(flags) - 3 :] == [SCRIPT, *flags, "--resume_from_checkpoint", "latest"]

    with job(cluster, tmp_path, flags) as process:  # its next life
        assert process.wait(AT_MOST) == 0, log.read_text()
    assert f"continuing at step      {saved.name.split('-')[1]}" in log.read_text()
    assert calls.read_text().count("requeue") == 1  # a finished run does not come back
    ours, theirs = final_weights(folder), final_weights(tiny_run(tmp_path / "whole", **length))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# A run of which only the end matters: says that it is there, and ends with a code at a signal, or at once.
STAND_IN = """#!{python}
import os, signal, sys, time
signalled = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    assert signal.getsignal(number) == signal.SIG_IGN  # the launcher would ignore them
    signal.signal(number, lambda number, _: signalled.append(number))
print("ready", file=open(os.environ["CALLS"], "a"), flush=True)
while not signalled and "AT_ONCE" not in os.environ:
    time.sleep(0.01)
time.sleep(0.2)  # writes its state
print("saved", len(signalled), file=open(os.environ["CALLS"], "a"), flush=True)
sys.exit(int(os.environ["CODE"]))
"""


@pytest.mark.parametrize(
    ("sent", "code", "expected", "queued_again"),
    [
        pytest.param(signal.SIGUSR1, 1, 0, True, id="warned"),
        pytest.param(signal.SIGUSR1, 0, 0, False, id="warned-when-it-was-done"),
        pytest.param(signal.SIGTERM, 1, 1, False, id="cancelled"),
        pytest.param(None, 3, 3, False, id="failed"),
        pytest.param(None, 0, 0, False, id="done"),
    ],
)
def test_only_a_run_that_was_warned_and_is_not_done_is_queued_again(
    cluster, tmp_path, sent, code, expected, queued_again
):
    (tmp_path / "bin" / "accelerate").write_text(STAND_IN.replace("{python}", sys.executable))
    log, calls = tmp_path / "job.out", tmp_path / "calls"
    environment = {**cluster, "CODE": str(code), **({} if sent else {"AT_ONCE": "1"})}
    with job(environment, tmp_path, ["digits"]) as process:
        if sent:
            wait_for(lambda: num_lines(calls) == 1, process, log)
            send(sent, process, tmp_path)
        assert process.wait(AT_MOST) == expected, log.read_text()
    said = ["ready", f"saved {1 if sent else 0}"]
    assert calls.read_text().splitlines() == said + ["scontrol requeue 4217"] * queued_again


def test_the_agent_of_torchrun_leaves_sigterm_to_the_run_and_does_not_repeat_it(cluster, tmp_path):
    script, log, calls = tmp_path / "script.py", tmp_path / "job.out", tmp_path / "calls"
    script.write_text(STAND_IN)
    environment = {**cluster, "SCRIPT": str(script), "CODE": "1"}
    with job(environment, tmp_path, ["digits"]) as process:
        wait_for(lambda: num_lines(calls) == 2, process, log)
        send(signal.SIGTERM, process, tmp_path)
        assert process.wait(AT_MOST) == 1, log.read_text()
    assert calls.read_text().splitlines()[1:] == ["ready", "saved 1"]
