"""The machinery behind the table of speed: what it times, counts and calls reached is right."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark_module():
    sys.path.insert(0, str(BENCHMARKS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(threads)
    sys.path.remove(str(BENCHMARKS))


def test_sides_take_turns_and_another_one_begins_each_round(benchmark_module):
    take_turns = benchmark_module("side_by_side").take_turns
    order, now = [], iter(range(100))
    sides = {name: lambda name=name: order.append(name) for name in "abc"}
    times = take_turns(sides, 3, clock=lambda: float(next(now)))
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert times == {name: [1.0] * 3 for name in "abc"}


@pytest.mark.parametrize(
    ("ratio", "at_most", "verdict"),
    [(2.5, False, "stretch"), (2.0, False, "goal"), (1.99, False, "missed"), (0.5, True, "stretch")],
)
def test_a_row_is_held_against_its_goals_by_its_median(benchmark_module, ratio, at_most, verdict):
    module = benchmark_module("side_by_side")
    spread = module.Spread.of([ratio - 0.3, ratio, ratio + 0.9])
    goals = (0.7, 0.6) if at_most else (2.0, 2.5)
    row = module.Row("a step", *goals, at_most=at_most, ratio=spread)
    assert row.verdict == verdict
    assert module.Row("a step", *goals, not_measured="no GPU").verdict == "not measured"
    table = module.render_table([row, module.Row("a GPU", 2.0, not_measured="no GPU here")])
    assert verdict in table
    assert "- a GPU: no GPU here" in table


def test_the_floor_multiplies_as_much_as_the_step(benchmark_module):
    rows = benchmark_module("step_rows")
    # torch does not count a CPU's fused attention
    training = rows.make_training("digits", 4, attn_implementation="eager")
    with FlopCounterMode(display=False) as step:
        training.step()
    floor = rows.products_alone(training.step)
    with FlopCounterMode(display=False) as alone:
        floor()
    convolution = step.flop_counts["Global"][torch.ops.aten.convolution]
    assert alone.get_total_flops() == step.get_total_flops()
    assert convolution > 0


def test_the_floor_of_fused_attention_is_what_it_is_made_of(benchmark_module):
    rows = benchmark_module("step_rows")
    training = rows.make_training("digits", 4)
    fused = rows.products_alone(training.step)
    with FlopCounterMode(display=False) as counted:
        fused()
    training.ready.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as eager:
        training.step()
    # backwards the scores are computed once more
    assert eager.get_total_flops() < counted.get_total_flops() < 1.1 * eager.get_total_flops()


def test_peak_memory_counts_what_lives_at_one_time(benchmark_module):
    peak_mib = benchmark_module("step_rows").peak_mib
    held = torch.zeros(3 * 2**18)  # 3 MiB

    def step():
        first = torch.zeros(2**20)  # 4 MiB, gone before the next
        del first
        second = torch.zeros(2**19)  # 2 MiB
        third = second.view(-1)[: 2**10] + 1  # 4 KiB beside it; the view is no memory
        return third

    assert peak_mib(step, lambda: [held, held.view(3, -1)]) == 3 + 4


def test_both_sides_learn_from_the_same_batch(benchmark_module):
    rows = benchmark_module("step_rows")
    published = benchmark_module("published_step").PublishedStep
    training = rows.make_training("digits", 8, num_channels=3)
    reference = published(training.config, None)
    first = reference(training.batch)
    last = [reference(training.batch) for _ in range(20)][-1]
    assert last < first
    assert sum(
        p.numel() for network in reference.networks[:2] for p in network.parameters() if p.requires_grad
    ) == sum(p.numel() for p in training.ready.model.parameters() if p.requires_grad)


def test_rows_about_steps_have_their_numbers(benchmark_module):
    rows = benchmark_module("step_rows")
    found = rows.step_rows("digits", 4, 2, None, goals=(1.05, 1.2))
    found += [rows.update_share_row("digits", 4, 2), rows.half_patches_row("digits", 4, 2)]
    found += [rows.inference_row("digits", 4, 2), *rows.memory_rows("digits", 4, None)]
    assert len(found) == 8
    assert all(row.verdict in ("stretch", "goal", "missed") for row in found)
    assert "largest difference of the outputs: 0" in [row.note for row in found]


@pytest.mark.slow
def test_the_whole_table_is_drawn(benchmark_module, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--quick"])
    benchmark_module("speed").main()
    assert "end to end" in capsys.readouterr().out


def test_the_soak_lost_nothing_and_its_counts_are_those_in_the_document(benchmark_module):
    result = json.loads((BENCHMARKS / "results" / "soak.json").read_text("utf-8"))
    assert result["faults"] == sum(result["faults_by_kind"].values()) >= 200
    assert result["problems"] == []
    assert result["runs_with_the_bits_of_a_whole_one"] == result["runs"] == sum(result["runs_by_kind"].values())
    document = (BENCHMARKS.parent / "docs" / "reliability.md").read_text("utf-8")
    assert benchmark_module("soak").as_table(result) in document


@pytest.mark.parametrize("kind", ["map-style", "stream"])
def test_memory_open_files_and_log_lines_stayed_flat_over_thousands_of_steps(kind):
    result = json.loads((BENCHMARKS / "results" / "endurance.json").read_text("utf-8"))[kind]
    assert result["steps"] >= 5000
    early, late = result["third_fifth"], result["last_fifth"]
    for process in ("process", "loading_process"):
        assert late[process]["megabytes"] <= 1.01 * early[process]["megabytes"] + 1
        assert late[process]["open_files"] <= early[process]["open_files"] + 1
        assert late[process]["threads"] <= early[process]["threads"] + 0.1
    assert late["bytes_of_a_log_line"] <= early["bytes_of_a_log_line"] + 5
