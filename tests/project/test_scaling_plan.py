"""The plan of large runs: its formulas fit what is on disk and what ranks hold, and its tables are today's."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny import tiny_config, tiny_run

from ijepa_hf.commands import estimate
from ijepa_hf.data import streaming
from ijepa_hf.estimation.cost import Parameters, count_parameters, draw_sizes, estimate_memory, model_work
from ijepa_hf.estimation.timing import HARDWARE

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = Parameters(context_encoder=1000, target_encoder=1000, predictor=200)


@pytest.fixture(scope="module")
def plan():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("scaling_plan")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def found(plan):
    return plan.make_plan_of_all(plan.read_measured(), plan.Assumed())


def stored_bytes(path):
    """Bytes of the tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (it is no dictionary)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_a_checkpoint_on_disk_holds_as_many_bytes_as_are_planned(plan, tmp_path):
    run = tiny_run(tmp_path / "run", max_train_steps=4)
    planned = plan.checkpoint_tensor_bytes(tiny_config(predictor_num_attention_heads=2))
    assert planned == {name: stored_bytes(run / "checkpoint-4" / name) for name in planned}
    config = tiny_config()
    tables = 4 * config.num_patches * (2 * config.hidden_size + config.predictor_hidden_size)
    parameters = count_parameters(config)
    assert planned["model.safetensors"] == 4 * parameters.total + tables
    with safe_open(run / "checkpoint-4" / "optimizer.safetensors", framework="pt") as file:
        steps = [name for name in file.keys() if name.endswith("/step")]  # noqa: SIM118
    assert planned["optimizer.safetensors"] == 8 * parameters.trained + 4 * len(steps)


def test_what_all_ranks_of_a_sharded_run_hold_is_what_one_of_an_unsharded_run_does(plan):
    alone = plan.state_bytes(PARAMETERS)
    assert alone == 4 * (2200 + 1200 + 2 * 1200)
    for shards in (2, 8, 128):
        assert shards * plan.state_bytes(PARAMETERS, shards) == pytest.approx(alone)
    memory = estimate_memory(tiny_config(), draw_sizes(tiny_config(), 4)[0], PARAMETERS, 4)
    assert alone == memory.weights + memory.optimizer + memory.gradients


def test_what_is_gathered_at_once_is_a_layer_or_all_that_is_in_none(plan):
    config = tiny_config()
    units = plan.fsdp_units(config)
    width, hidden = config.hidden_size, config.intermediate_size
    layer = 4 * (width * width + width) + 2 * width * hidden + hidden + width + 4 * width
    narrow, inner = config.predictor_hidden_size, 4 * config.predictor_hidden_size
    narrow_layer = 4 * (narrow * narrow + narrow) + 2 * narrow * inner + inner + narrow + 4 * narrow
    assert units.largest_layer == max(layer, narrow_layer)
    rest = 2 * config.num_hidden_layers * layer + config.predictor_num_hidden_layers * narrow_layer
    assert units.root == count_parameters(config).total - rest


def test_exchanged_bytes_follow_the_rings(plan):
    assert plan.ddp_bytes(PARAMETERS, 1) == 0
    assert plan.ddp_bytes(PARAMETERS, 4) == 2 * 3 / 4 * 4 * 1200
    # a ring by hand: each of n ranks passes on n - 1 parts to sum them, and n - 1 parts of the sums
    for ranks in (2, 5, 16):
        part = 4 * 1200 / ranks
        assert plan.ddp_bytes(PARAMETERS, ranks) == pytest.approx(2 * (ranks - 1) * part)
        gathers = 4 * (2200 + 1200) / ranks * (ranks - 1)
        assert plan.fsdp_bytes(PARAMETERS, ranks) == pytest.approx(gathers + (ranks - 1) * part)
    assert plan.replica_bytes(PARAMETERS, 8, 8) == 0
    assert plan.replica_bytes(PARAMETERS, 1, 16) == plan.ddp_bytes(PARAMETERS, 16)
    assert plan.replica_bytes(PARAMETERS, 8, 16) == pytest.approx(4 * 1200 / 8)


def test_reading_follows_the_images_and_cores_their_seconds(plan, found):
    measured = plan.read_measured()
    for case in found["cases"]:
        run, data = case["run"], case["data"]
        gpus = case["case"]["gpus"]
        assert run["images_per_second"] == pytest.approx(run["global_batch_size"] / run["seconds_per_step"])
        assert data["bytes_per_second"] == pytest.approx(run["images_per_second"] * measured.prepared_bytes)
        assert data["bytes_per_second_per_gpu"] * gpus == pytest.approx(data["bytes_per_second"])
        assert data["bytes_per_second_per_node"] == pytest.approx(8 * data["bytes_per_second_per_gpu"])
        assert data["cores_per_gpu"] == pytest.approx(run["images_per_second"] / gpus * measured.prepared_seconds)
        assert data["bytes"] == case["case"]["num_images"] * measured.prepared_bytes
        size = {"100MB": 100e6, "1GB": 1e9}[case["case"]["shard_size"]]
        assert (data["shards"] - 1) * size < data["bytes"] <= data["shards"] * size
        assert data["shards"] >= data["readers"]
        streaming.check_readers(data["shards"], gpus, data["readers"] // gpus)
    assert plan.Assumed().requests_at_once == streaming._FOOTERS_AT_ONCE


def test_the_times_are_those_that_the_package_estimates(plan, found, capsys):
    for case, numbers in zip(plan.CASES, found["cases"], strict=True):
        flags = [case.recipe, *case.flags, "--hardware", case.hardware, "--num_processes", str(case.gpus)]
        assert estimate.run([*flags, "--num_images", str(case.num_images), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert numbers["run"]["seconds_per_step"] == pytest.approx(said["hardware"][0]["seconds_per_step"])
        assert numbers["run"]["steps"] == said["run"]["steps"]
        assert numbers["run"]["global_batch_size"] == said["run"]["global_batch_size"] == 2048
        assert numbers["run"]["parameters"]["total"] == said["parameters"]["total"]
        ddp = numbers["memory"]["DDP"]
        # all at once here, and only what is there at the fullest moment in the estimate
        assert said["memory"]["peak"] <= ddp["peak"]["none"] <= said["memory"]["peak"] + said["memory"]["gradients"]


def test_a_step_is_its_products_over_the_share_of_the_peak_and_the_update(plan, found):
    case, run = plan.CASES[0], found["cases"][0]["run"]
    model = plan.parse_case(case)[0]
    config = model.to_config()
    work = model_work(config, draw_sizes(config, 128))
    products = 128 * sum(part.total for part in work.values()) / (0.35 * 312e12)
    # AdamW reads four and writes three numbers of each trained weight, clipping reads one; the average moves three
    update = 4 * (8 * run["parameters"]["trained"] + 3 * run["parameters"]["target_encoder"]) / 2039e9
    assert run["seconds_per_step"] == pytest.approx(products + update)
    assert run["hours"] * 3600 > run["steps"] * run["seconds_per_step"]
    assert run["steps"] == 300 * (1_281_167 // 2048)


def test_saves_take_their_bytes_at_the_measured_rate(plan, found):
    measured = plan.read_measured()
    save = json.loads(plan.OUTPUT.read_text("utf-8"))["save"]
    writes, hashes = sorted(save["write_seconds"]), sorted(save["hash_seconds"])
    middle = (writes[2] + hashes[2]) / save["bytes"]
    assert measured.save_bytes_per_second == pytest.approx(1 / middle)
    for case in found["cases"]:
        saving, run = case["saving"], case["run"]
        assert saving["seconds"] == pytest.approx(saving["checkpoint_bytes"] * middle)
        assert saving["saves"] == run["steps"] // saving["interval_steps"]
        cycle = saving["interval_steps"] * run["seconds_per_step"] + saving["seconds"]
        assert saving["share_of_run"] == pytest.approx(saving["seconds"] / cycle)
        parameters = run["parameters"]
        known = 4 * parameters["total"] + 8 * parameters["trained"]  # position tables and step numbers are small
        assert known < saving["checkpoint_bytes"] < 1.01 * known


def test_exchange_that_takes_longer_than_the_work_is_what_a_run_takes(found):
    for case in found["cases"]:
        steps, work = case["run"]["steps"], case["run"]["seconds_per_step"]
        saves = case["saving"]["seconds"] / case["saving"]["interval_steps"]
        for row in case["exchange"].values():
            assert row["hours_hidden"] * 3600 == pytest.approx(steps * (max(work, row["seconds"]) + saves))
            assert row["hours_not_hidden"] * 3600 == pytest.approx(steps * (work + row["seconds"] + saves))


@pytest.mark.slow
def test_other_assumptions_change_what_they_are_about(plan):
    measured, assumed = plan.read_measured(), plan.Assumed()
    case = plan.CASES[0]
    usual = plan.plan_case(case, measured, assumed)
    slow = plan.plan_case(case, measured, dataclasses.replace(assumed, network_bytes_per_second=12.5e9))
    assert slow["exchange"]["DDP"]["seconds"] == pytest.approx(2 * usual["exchange"]["DDP"]["seconds"])
    assert slow["run"] == usual["run"]
    one_node = plan.plan_case(dataclasses.replace(case, gpus=8), measured, assumed)
    assert one_node["exchange"]["DDP"]["seconds"] == pytest.approx(
        2 * 7 / 8 * 4 * usual["run"]["parameters"]["trained"] / (0.7 * 300e9)
    )
    assert set(plan.LINKS) <= set(HARDWARE)


def test_the_committed_numbers_are_todays(plan, found):
    committed = json.loads(plan.OUTPUT.read_text("utf-8"))
    assert committed.pop("save")["bytes"] == plan.SAVED_BYTES
    today = json.loads(json.dumps(found))
    assert close(committed, today), "run benchmarks/scaling_plan.py --json benchmarks/results/scaling_plan.json"


def close(one, other):
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == other if isinstance(one, str) or one is None else one == pytest.approx(other, rel=1e-9)


def test_the_document_has_the_tables_that_the_script_prints(plan, found):
    text = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    assert plan.render_inputs(plan.read_measured(), plan.Assumed()) in text
    for case in found["cases"]:
        assert f"## {case['case']['name']}\n" in text
        assert plan.render_case(case) in text
    assert "not measured" in text


def test_measuring_a_save_times_every_part_of_it(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "SAVED_BYTES", 1_600_000)
    save = plan.measure_save()
    assert save["bytes"] == 1_600_000
    assert [len(save[name]) for name in ("write_seconds", "hash_seconds")] == [plan.SAVES] * 2
    assert min(save["write_seconds"] + save["hash_seconds"]) > 0
    assert list(tmp_path.iterdir()) == []
