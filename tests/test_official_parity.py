"""Values equal the published code's: numbers that it produced on a tiny model (see fixtures/golden), never its
code."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from ijepa_hf.model.encoder_ijepa import sincos_position_table
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining
from ijepa_hf.recipes.arguments import PretrainingArguments
from ijepa_hf.training.plan import StepValues, make_plan, values_at
from ijepa_hf.training.step import ReadyModel, StepResult, make_optimizer
from ijepa_hf.weights.official_checkpoint import model_from_official, read_official_checkpoint
from ijepa_hf.weights.official_names import PARTS, translate

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
CASES = ("c1", "c2", "c3")


@pytest.fixture(scope="module")
def model() -> IJepaForPretraining:
    return tiny_model()


def tiny_model() -> IJepaForPretraining:
    contents = read_official_checkpoint(GOLDEN / "official_checkpoint.pth.tar")
    return model_from_official(contents, num_attention_heads=4)


def golden_case(case: str) -> dict[str, torch.Tensor]:
    """A case in our layout; published rows are (m * C + c) * B + b, published masks [C, B, K] and [M, B, P]."""
    tensors = load_file(GOLDEN / "forward.safetensors")
    context_indices = tensors[f"{case}.masks_enc"].transpose(0, 1)  # [B, S, K]
    target_indices = tensors[f"{case}.masks_pred"].transpose(0, 1)  # [B, M, P]
    batch, sets, blocks = *context_indices.shape[:2], target_indices.shape[1]
    values = {
        name: tensors[f"{case}.{name}"].unflatten(0, (blocks, sets, batch)).permute(2, 1, 0, 3, 4)
        for name in ("predictions", "targets")
    }
    context = tensors[f"{case}.context"].unflatten(0, (sets, batch)).transpose(0, 1)
    return {
        "pixel_values": tensors["pixel_values"][:batch],
        "context_indices": context_indices,
        "target_indices": target_indices,
        "context": context,
        **values,
    }


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_forward_values_and_losses_equal_the_published_codes(model, case, backend):
    golden = golden_case(case)
    model.set_attn_implementation(backend)
    inputs = {name: golden[name] for name in ("pixel_values", "context_indices", "target_indices")}
    with torch.no_grad():
        output = model(**inputs)
        context = model.context_encoder(inputs["pixel_values"], context_indices=inputs["context_indices"])
    torch.testing.assert_close(context.last_hidden_state, golden["context"].flatten(0, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.predictions, golden["predictions"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.targets, golden["targets"][:, 0], atol=1e-5, rtol=0)
    losses = json.loads((GOLDEN / "forward.json").read_text())["cases"][case]
    assert float(output.loss) == pytest.approx(losses["loss_smooth_l1"], abs=1e-6)
    model.config.loss_type = "mse"
    try:
        assert float(model.compute_loss(output.predictions, output.targets)) == pytest.approx(
            losses["loss_mse"], abs=1e-6
        )
    finally:
        model.config.loss_type = "smooth_l1"


def test_one_context_set_without_its_axis_gives_the_same_values(model):
    golden = golden_case("c1")
    with torch.no_grad():
        output = model(golden["pixel_values"], golden["context_indices"][:, 0], golden["target_indices"])
    assert output.predictions.shape == golden["targets"][:, 0].shape
    torch.testing.assert_close(output.predictions, golden["predictions"][:, 0], atol=1e-5, rtol=0)


def test_full_encodings_equal_the_published_codes(model):
    tensors = load_file(GOLDEN / "forward.safetensors")
    with torch.no_grad():
        for name, encoder in (("encoder_full", model.context_encoder), ("target_encoder_full", model.target_encoder)):
            values = encoder(tensors["pixel_values"]).last_hidden_state
            torch.testing.assert_close(values, tensors[name], atol=1e-5, rtol=0)


def test_float64_values_equal_the_published_codes():
    tensors, golden = load_file(GOLDEN / "forward.safetensors"), golden_case("c1")
    model = tiny_model().double()
    model.set_attn_implementation("sdpa")  # eager softmax is float32, which stops at 5e-7
    with torch.no_grad():
        output = model(
            golden["pixel_values"][:1].double(), golden["context_indices"][:1, 0], golden["target_indices"][:1]
        )
        full = model.context_encoder(golden["pixel_values"][:1].double()).last_hidden_state
    torch.testing.assert_close(full, tensors["f64.encoder_full"], atol=1e-6, rtol=0)
    torch.testing.assert_close(output.predictions[0], tensors["f64.c1.predictions"].squeeze(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(output.targets[0], tensors["f64.c1.targets"].squeeze(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "width", "side"), [("g8d64", 64, 8), ("g14d192", 192, 14), ("g16d1280", 1280, 16)])
def test_position_tables_are_exact_in_float32(name, width, side):
    golden = load_file(GOLDEN / "pos_embed.safetensors")
    table = sincos_position_table(width, (side, side))[0]
    assert torch.equal(table[golden[f"{name}.rows"]], golden[f"{name}.table"])
    torch.testing.assert_close(table.abs().sum(1), golden[f"{name}.row_abs_sum"], rtol=1e-6, atol=0)


def published_run() -> tuple[PretrainingArguments, dict]:
    trace = json.loads((GOLDEN / "train_trace.json").read_text())
    settings = trace["settings"]
    run = PretrainingArguments(
        learning_rate=settings["lr"],
        start_learning_rate=settings["start_lr"],
        final_learning_rate=settings["final_lr"],
        warmup_epochs=settings["warmup"],
        weight_decay=settings["weight_decay"],
        final_weight_decay=settings["final_weight_decay"],
        ema_momentum=settings["ema"][0],
        final_ema_momentum=settings["ema"][1],
        schedule_scale=settings["ipe_scale"],
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=trace["batch"],
    )
    return run, trace


@pytest.fixture(scope="module")
def six_steps() -> tuple[IJepaForPretraining, list[tuple[StepValues, StepResult]]]:
    run, _ = published_run()
    tensors = load_file(GOLDEN / "train_trace.safetensors")
    model = tiny_model().train()
    ready = ReadyModel(Accelerator(cpu=True), model, model, make_optimizer(model, run))
    plan = make_plan(run, num_samples=12, num_ranks=1)  # 3 steps an epoch
    taken = []
    for step in range(6):
        batch = {
            "pixel_values": tensors["images"][tensors["image_indices"][step]],
            "context_indices": tensors[f"step{step + 1}.masks_enc"][0],
            "target_indices": tensors[f"step{step + 1}.masks_pred"].transpose(0, 1),
        }
        values = values_at(step, run, plan)
        taken.append((values, ready.step([batch], values)))
    return model, taken


def test_six_training_steps_follow_the_published_schedules_losses_and_gradients(six_steps):
    _, trace = published_run()
    for (values, result), golden in zip(six_steps[1], trace["steps"], strict=True):
        assert values.learning_rate == pytest.approx(golden["lr"], rel=1e-12)
        assert values.weight_decay == pytest.approx(golden["wd"], rel=1e-12)
        assert values.ema_momentum == pytest.approx(golden["momentum"], rel=1e-12)
        assert result.loss == pytest.approx(golden["loss"], abs=1e-6)
        assert result.grad_norm_encoder == pytest.approx(golden["grad_norm_encoder"], rel=1e-4)
        assert result.grad_norm_predictor == pytest.approx(golden["grad_norm_predictor"], rel=1e-4)


def test_weights_after_six_training_steps_equal_the_published_codes(six_steps):
    _, trace = published_run()
    state = six_steps[0].state_dict()
    assert len(trace["final"]) > 100
    for key, golden in trace["final"].items():
        part, _, name = key.partition(".")
        ours, names = PARTS[part]
        translated = translate(name, names)
        assert translated is not None, key
        value = torch.cat([state[f"{ours}.{piece}"] for piece in translated]).double()
        assert list(value.shape) == golden["shape"], key
        # fixtures' own rule: ten times the distance of the published fp32 run to its float64 run, at least 2e-6
        tolerance = max(10 * golden["fp32_vs_float64"], 2e-6)
        first = torch.tensor(golden["first8"], dtype=torch.float64)
        assert float((value.flatten()[: len(first)] - first).abs().max()) <= tolerance, key
        assert float(value.sum()) == pytest.approx(golden["sum"], abs=tolerance * value.numel()), key
        assert float(value.abs().sum()) == pytest.approx(golden["abs_sum"], abs=tolerance * value.numel()), key
