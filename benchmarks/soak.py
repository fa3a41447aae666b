"""Runs under fault after fault, drawn at random, for a set time: is anything ever lost?

    python benchmarks/soak.py --minutes 40 --json benchmarks/results/soak.json

A campaign is a run of a few hundred steps that is started over and over, each time with a fault, until it has come to
its end; its final weights must then have the bits of a run that nothing happened to (on two processes those of two,
since sums in another order round differently). After each fault the exit code must be the documented one, the folder
must hold a whole checkpoint where one had been written, and not an older one than before unless the fault was damage
to it. The processes are real, see tests/forked_runs.py; what they meet is injected as the system would do it, or, for
what needs a disk or a GPU of its own, by a function that fails as that would.
"""

import argparse
import errno
import json
import logging
import os
import platform
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from forked_runs import alive, children_of, exit_code, newest_checkpoint, start_run, wait_until  # noqa: E402
from tiny import final_weights, tiny_flags  # noqa: E402

from ijepa_hf.data.prepare.prepare import PrepareSettings  # noqa: E402
from ijepa_hf.data.prepare.prepare import prepare as prepare_shards  # noqa: E402
from ijepa_hf.runs.checkpoints import find_latest  # noqa: E402

STEPS = 240
EVERY = 8  # steps between saves
SECONDS = 4.0  # that a whole run of a campaign takes, about: moments are drawn from it
LIMIT = 3  # checkpoints kept, so that damage to one leaves others


@dataclass
class Campaign:
    """One run, started over and over until it is finished.

    Args:
        kind: `map-style`, `stream` or `two processes`.
        flags: Of the command, without the folder.
        folder: Where it and its logs are.
        draw: Says which faults, and when.
        reference: Final weights of a run that nothing happened to.
    """

    kind: str
    flags: dict[str, Any]
    folder: Path
    draw: random.Random
    reference: dict[str, torch.Tensor]
    life: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    @property
    def log(self) -> Path:
        """Where the present life's output goes."""
        return self.folder / f"log-{self.life}"

    def start(self, prepare: Callable[[], None] | None = None, **changes: Any) -> list[BaseProcess]:
        """The processes of the next life of the run."""
        self.life += 1
        values = {**self.flags, "resume_from_checkpoint": "latest", "checkpoints_total_limit": LIMIT, **changes}
        flags = tiny_flags(self.output_dir, **values)
        if self.kind != "two processes":
            return [start_run(flags, self.log, prepare=prepare)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {
            "ACCELERATE_USE_CPU": "true",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        return [
            start_run(
                flags,
                self.log.with_suffix(f".{rank}"),
                {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                prepare,
            )
            for rank in (0, 1)
        ]

    def said(self) -> str:
        """What the last life has printed."""
        return "\n".join(path.read_text(errors="replace") for path in self.folder.glob(f"log-{self.life}*"))

    def wait_for_training(self, processes: list[BaseProcess]) -> bool:
        """Waits until the life has saved something, and a little longer; false where it ended before."""
        before = newest_checkpoint(self.output_dir)
        wait_until(lambda: newest_checkpoint(self.output_dir) > before or not processes[0].is_alive())
        processes[0].join(self.draw.uniform(0.0, 0.5))
        return all(process.is_alive() for process in processes)

    def check(self, ok: bool, what: str) -> None:
        """Notes what should have been and was not."""
        if not ok:
            self.problems.append(f"{self.kind}, life {self.life}: {what}\n{self.said()[-3000:]}")

    def end(self, processes: list[BaseProcess], *expected: int) -> None:
        """Waits for the processes; their exit codes must be among those expected, or 0 for a run that is finished.

        Of two processes one that stops before the first step, or after the last, leaves the other to find out: 9.
        """
        if self.kind == "two processes":
            expected = (*expected, 9)
        for process in processes:
            code = exit_code(process)
            self.check(code in (0, *expected), f"ended with {code}, not with one of {expected}")
            if code == 0:
                self.check((self.output_dir / "report.json").is_file(), "ended with 0 and has no report")


# -- faults: each starts a life, or harms what lies there, and says what it was --------------------------------------


def kill(campaign: Campaign) -> None:
    """`kill -9` of all processes at a random moment."""
    processes = campaign.start()
    processes[0].join(campaign.draw.uniform(0.0, SECONDS))
    for process in processes:
        process.kill()
    campaign.end(processes, -signal.SIGKILL)


def kill_while_training(campaign: Campaign) -> None:
    """`kill -9` of all processes in the midst of steps and saves."""
    processes = campaign.start()
    campaign.wait_for_training(processes)
    for process in processes:
        process.kill()
    campaign.end(processes, -signal.SIGKILL)


def _kill_in_a_save(call: int) -> None:
    """Kills this process at the `call`-th time that it moves a file or a folder into its place."""
    whole, count = os.replace, iter(range(1, 10**6))

    def replace(*arguments: Any, **options: Any) -> None:
        if next(count) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(*arguments, **options)

    os.replace = replace


def kill_inside_a_save(campaign: Campaign) -> None:
    """`kill -9` between two renames of a checkpoint or an export."""
    processes = campaign.start(prepare=partial(_kill_in_a_save, campaign.draw.randrange(1, 60)))
    campaign.end(processes, -signal.SIGKILL, 9)


def send_signal(number: signal.Signals, campaign: Campaign) -> None:
    """SIGTERM, SIGUSR1 or SIGINT to one process, in the midst of training."""
    processes = campaign.start()
    if campaign.wait_for_training(processes):
        os.kill(campaign.draw.choice(processes).pid, number)  # type: ignore[arg-type]
    begin = time.monotonic()
    campaign.end(processes, 128 + number)
    campaign.check(time.monotonic() - begin < 30, "took longer than 30 s to stop")
    latest = find_latest(campaign.output_dir)
    if f"stopped by {number.name} at step" in campaign.said():
        campaign.check(latest is not None and f"at step {latest.step} of" in campaign.said(), "saved another step")


def _disk_full(save: int) -> None:
    from ijepa_hf.runs import checkpoints

    whole, count = checkpoints.save_tensors, iter(range(1, 10**6))

    def save_tensors(tensors: Any, path: Path, *arguments: Any, **options: Any) -> None:
        if next(count) == save:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        whole(tensors, path, *arguments, **options)

    checkpoints.save_tensors = save_tensors


def fill_the_disk(campaign: Campaign) -> None:
    """The disk is full in the middle of a file."""
    processes = campaign.start(prepare=partial(_disk_full, campaign.draw.randrange(1, 20)))
    campaign.end(processes, 8)


def fill_the_disk_and_go_on(campaign: Campaign) -> None:
    """The disk is full at one save, with `--on_save_error continue`; then `kill -9`."""
    processes = campaign.start(prepare=partial(_disk_full, campaign.draw.randrange(1, 6)), on_save_error="continue")
    campaign.wait_for_training(processes)
    for process in processes:
        process.kill()
    campaign.end(processes, -signal.SIGKILL)


def _limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_files(campaign: Campaign) -> None:
    """The system refuses to write more than some bytes into a file."""
    processes = campaign.start(prepare=partial(_limit_file_size, campaign.draw.randrange(20_000, 200_000)))
    campaign.end(processes, 8)


def take_the_folder_away(campaign: Campaign) -> None:
    """The output folder vanishes in the midst of training, and is back for the next life."""
    processes, elsewhere = campaign.start(), campaign.folder / "elsewhere"
    if campaign.wait_for_training(processes):
        campaign.output_dir.rename(elsewhere)
    campaign.end(processes, 8)
    if elsewhere.exists():
        campaign.check(not campaign.output_dir.exists(), "made the folder again")
        shutil.rmtree(campaign.output_dir, ignore_errors=True)
        elsewhere.rename(campaign.output_dir)


def damage_a_checkpoint(campaign: Campaign) -> None:
    """A byte of the newest checkpoint is flipped, or a file of it cut short or deleted, between two lives."""
    latest = find_latest(campaign.output_dir)
    assert latest is not None
    path = campaign.draw.choice(sorted(latest.path.iterdir()))
    data = bytearray(path.read_bytes())
    way = campaign.draw.randrange(3)
    if way == 0:
        path.unlink()
    elif way == 1:
        path.write_bytes(data[: campaign.draw.randrange(len(data))])
    else:
        data[campaign.draw.randrange(len(data))] ^= 1 << campaign.draw.randrange(8)
        path.write_bytes(data)
    processes = campaign.start()
    campaign.wait_for_training(processes)
    for process in processes:
        process.kill()
    campaign.end(processes, -signal.SIGKILL)
    campaign.check("damaged" in campaign.said(), "nothing was said of the damage")


def cut_the_export(campaign: Campaign) -> None:
    """The exported weights are cut short between two lives; they are written again."""
    (campaign.output_dir / "model.safetensors").write_bytes(b"half")
    kill_while_training(campaign)


def cut_a_log_line(campaign: Campaign) -> None:
    """The log ends in the middle of a line, as after a crash of the machine."""
    path = campaign.output_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    kill_while_training(campaign)


def kill_a_worker(campaign: Campaign) -> None:
    """A loading process is killed, as for want of memory."""
    processes = campaign.start(dataloader_num_workers=2)
    if campaign.wait_for_training(processes):
        workers = sorted(alive(children_of(processes[-1].pid or 0)))
        if workers:
            os.kill(campaign.draw.choice(workers), signal.SIGKILL)
    campaign.end(processes, 7)


def _source_fails(read: int, times: int) -> None:
    from ijepa_hf.data import streaming

    whole, count = streaming._read_shard, iter(range(1, 10**6))

    def read_shard(*arguments: Any, **options: Any) -> Any:
        if read <= next(count) < read + times:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "shard")
        yield from whole(*arguments, **options)

    streaming._read_shard = read_shard


def fail_to_read_for_a_while(campaign: Campaign) -> None:
    """A shard cannot be read for a while (EIO); then `kill -9`."""
    processes = campaign.start(prepare=partial(_source_fails, campaign.draw.randrange(1, 12), 2))
    campaign.wait_for_training(processes)
    for process in processes:
        process.kill()
    campaign.end(processes, -signal.SIGKILL)


def fail_to_read_for_good(campaign: Campaign) -> None:
    """A shard cannot be read any more (EIO)."""
    prepare = partial(_source_fails, campaign.draw.randrange(2, 12), 10**6)
    campaign.end(campaign.start(prepare=prepare, data_retry_seconds=0.2), 7)


def _spoil(first: int) -> None:
    from ijepa_hf.training import loop

    whole, count = loop._take_step, iter(range(1, 10**6))

    def take(state: Any, step: int, micro_batches: Any, values: Any) -> Any:
        if next(count) >= first:
            pixels = micro_batches[0].inputs["pixel_values"].float()
            pixels[0, 0, 0, 0] = float("nan")
            micro_batches[0].inputs["pixel_values"] = pixels
        return whole(state, step, micro_batches, values)

    loop._take_step = take


def make_numbers_break(campaign: Campaign) -> None:
    """NaN in every step from a random one on; none may be skipped, since the next life has other numbers there."""
    prepare = partial(_spoil, campaign.draw.randrange(1, 60))
    campaign.end(campaign.start(prepare=prepare, max_skipped_steps=0), 3)


def _run_out_of_memory(first: int) -> None:
    from ijepa_hf.training.step import ReadyModel

    whole, count = ReadyModel.step, iter(range(1, 10**6))

    def step(*arguments: Any, **options: Any) -> Any:
        if next(count) == first:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(*arguments, **options)

    ReadyModel.step = step


def exhaust_memory(campaign: Campaign) -> None:
    """Memory runs out in a random step."""
    campaign.end(campaign.start(prepare=partial(_run_out_of_memory, campaign.draw.randrange(1, 60))), 2)


def start_twice(campaign: Campaign) -> None:
    """A second run is started in the folder of one that runs; then `kill -9` of the first."""
    processes = campaign.start()
    if campaign.wait_for_training(processes):
        flags = tiny_flags(campaign.output_dir, **{**campaign.flags, "resume_from_checkpoint": "latest"})
        second = start_run(flags, campaign.folder / "second", {"WORLD_SIZE": "1"})
        code = exit_code(second)
        campaign.check(code in (0, 2), f"the second run ended with {code}")
    for process in processes:
        process.kill()
    campaign.end(processes, -signal.SIGKILL)


def kill_one_process(campaign: Campaign) -> None:
    """One of two processes is killed; the other must end by itself, within a minute, with the reason."""
    processes = campaign.start()
    if campaign.wait_for_training(processes):
        campaign.draw.choice(processes).kill()
    begin = time.monotonic()
    campaign.end(processes, -signal.SIGKILL, 9)
    campaign.check(time.monotonic() - begin < 60, "the other took longer than a minute")


class _DownTracker:
    name = "down"

    def log(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("down")

    def finish(self) -> None:
        raise ConnectionError("down")


def _tracker_down() -> None:
    from accelerate import Accelerator

    from ijepa_hf.training import pretrain

    make = pretrain.make_accelerator
    Accelerator.init_trackers = lambda self, *_: setattr(self, "trackers", [_DownTracker()])
    pretrain.make_accelerator = lambda run, folder: make(type(run)(**{**vars(run), "report_to": []}), folder)


def lose_the_tracker(campaign: Campaign) -> None:
    """The tracker's server is down; then SIGTERM."""
    processes = campaign.start(prepare=_tracker_down, report_to=["tensorboard"])
    if campaign.wait_for_training(processes):
        os.kill(processes[0].pid, signal.SIGTERM)  # type: ignore[arg-type]
    campaign.end(processes, 128 + signal.SIGTERM)


EVERYWHERE: tuple[Callable[[Campaign], None], ...] = (
    kill, kill_while_training, kill_inside_a_save,
    partial(send_signal, signal.SIGTERM), partial(send_signal, signal.SIGUSR1), partial(send_signal, signal.SIGINT),
    fill_the_disk, fill_the_disk_and_go_on, limit_files, take_the_folder_away, damage_a_checkpoint, cut_the_export,
    cut_a_log_line, kill_a_worker, make_numbers_break,
)  # fmt: skip
FAULTS: dict[str, tuple[Callable[[Campaign], None], ...]] = {
    "map-style": (*EVERYWHERE, exhaust_memory, start_twice, lose_the_tracker),
    "stream": (*EVERYWHERE, fail_to_read_for_a_while, fail_to_read_for_good, lose_the_tracker),
    "two processes": (*EVERYWHERE, kill_one_process),
}
ON_ONE_PROCESS_ONLY = (exhaust_memory, kill_inside_a_save)
NEEDS_A_CHECKPOINT = (damage_a_checkpoint, cut_the_export, cut_a_log_line)


def name_of(fault: Callable[[Campaign], None]) -> str:
    """A fault's name, for the table."""
    if isinstance(fault, partial):
        return f"{fault.args[0].name} while training"
    return fault.__name__.replace("_", " ")


# -- campaigns -------------------------------------------------------------------------------------------------------


def campaign_flags(folder: Path) -> dict[str, dict[str, Any]]:
    """What the run of each kind of campaign is."""
    shards = folder / "shards"
    prepare_shards("digits", str(shards), PrepareSettings(shard_size="40KB"))
    common = {
        "max_train_steps": STEPS, "checkpointing_steps": EVERY, "hidden_dropout_prob": 0.1, "max_train_samples": 400,
        "logging_steps": 4,
    }  # fmt: skip
    stream = {"dataset_name": shards, "streaming": True, "dataloader_num_workers": 2, "shuffle_buffer_size": 50}
    return {
        "map-style": common,
        "stream": {**common, **stream},
        "two processes": {**common, "per_device_train_batch_size": 4},
    }


def run_campaign(campaign: Campaign, counts: Counter[str], until: float) -> bool:
    """Goes on with a run, a fault in each life, until it is finished or the time is over; whether it was finished."""
    while time.monotonic() < until and not (campaign.output_dir / "report.json").is_file():
        before = find_latest(campaign.output_dir)
        # a run that begins has nothing to damage
        choice = [fault for fault in FAULTS[campaign.kind] if before is not None or fault not in NEEDS_A_CHECKPOINT]
        fault = campaign.draw.choice(choice)
        fault(campaign)
        counts[name_of(fault)] += 1
        after = find_latest(campaign.output_dir)
        if before is not None and fault is not damage_a_checkpoint:
            campaign.check(after is not None and after.step >= before.step, f"{name_of(fault)} lost a checkpoint")
    for process in campaign.start():  # time is over, or it is finished: an undisturbed end
        campaign.check(exit_code(process, 300) == 0, "the last life did not end well")
    ours = final_weights(campaign.output_dir)
    equal = all(torch.equal(value, ours[name]) for name, value in campaign.reference.items())
    campaign.check(equal, "final weights differ from those of a run that nothing happened to")
    return equal


def as_table(result: dict[str, Any]) -> str:
    """The counts as docs/reliability.md shows them."""
    rows = ["| fault, drawn at random | times |", "| --- | --- |"]
    rows += [f"| {name} | {count} |" for name, count in result["faults_by_kind"].items()]
    runs = ", ".join(f"{count} {kind}" for kind, count in result["runs_by_kind"].items())
    rows.append(
        f"| **together**: {result['runs']} runs ({runs}) in {result['lives']} lives, {result['minutes']:g} minutes | "
        f"**{result['faults']}** |"
    )
    return "\n".join(rows)


def main() -> None:
    """Draws faults for a set time and writes down what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=40.0, help="How long to go on (default 40).")
    parser.add_argument("--seed", type=int, default=0, help="Of the draws (default 0).")
    parser.add_argument("--json", type=Path, help="Where to write the counts.")
    named = parser.parse_args()
    logging.disable(logging.WARNING)  # of this process, which looks at many damaged checkpoints
    torch.set_num_threads(1)
    begin, draw, counts, finished, problems, lives = time.monotonic(), random.Random(named.seed), Counter(), 0, [], 0
    counts_of_kind: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kinds = campaign_flags(root)
        references = {}
        for kind, flags in kinds.items():
            whole = Campaign(kind, flags, root / f"whole-{kind.replace(' ', '-')}", draw, {})
            whole.folder.mkdir()
            for process in whole.start():
                assert exit_code(process, 300) == 0, whole.said()[-3000:]
            references[kind] = final_weights(whole.output_dir)
        until = begin + 60 * named.minutes
        number = 0
        while time.monotonic() < until:
            kind = list(kinds)[number % len(kinds)]
            campaign = Campaign(kind, kinds[kind], root / f"campaign-{number}", draw, references[kind])
            campaign.folder.mkdir()
            finished += run_campaign(campaign, counts, until)
            counts_of_kind[kind] += 1
            lives, number = lives + campaign.life, number + 1
            problems += campaign.problems
            faults = sum(counts.values())
            print(
                f"{(time.monotonic() - begin) / 60:5.1f} min, {number} runs, {finished} with the bits of a whole one, "
                f"{faults} faults, {len(problems)} problems",
                flush=True,
            )
            for problem in campaign.problems:
                print(problem, flush=True)
            shutil.rmtree(campaign.folder)
    result = {
        "machine": f"{os.cpu_count()} cores, {platform.system()}",
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "seed": named.seed,
        "steps_of_a_run": STEPS,
        "runs": sum(counts_of_kind.values()),
        "runs_by_kind": dict(counts_of_kind),
        "runs_with_the_bits_of_a_whole_one": finished,
        "lives": lives,
        "faults": sum(counts.values()),
        "faults_by_kind": dict(sorted(counts.items())),
        "problems": problems,
    }
    print(as_table(result))
    if named.json:
        named.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    raise SystemExit(1 if problems or finished < result["runs"] else 0)


if __name__ == "__main__":
    main()
