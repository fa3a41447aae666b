"""A row of numbers is what `diagnostics` says of the model's own features, and taking it changes nothing."""

from typing import Any

import pytest
import torch
from tiny import scrambled_model, tiny_batch, tiny_config, tiny_model

from ijepa_hf import IJepaForPretraining
from ijepa_hf.diagnosis.measures import (
    cross_image_gap,
    effective_rank,
    lidar,
    mean_pairwise_cosine,
    measure_matrix,
    position_share,
    rankme,
)
from ijepa_hf.diagnosis.monitor import (
    LIDAR_VIEWS,
    SPECTRUM_ROWS,
    CollapseMonitor,
    make_monitor_batch,
    measure_features,
)

PARTS, KINDS = ("target", "context", "prediction"), ("pooled", "patch")


def images(count: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def monitored(model: IJepaForPretraining, count: int = 8, **options: Any) -> dict[str, Any]:
    return CollapseMonitor(make_monitor_batch(model.config, images(count)), **options).measure(model)


def test_a_row_holds_what_diagnostics_say_of_the_models_own_outputs():
    model = scrambled_model()
    batch = make_monitor_batch(model.config, images())
    row = CollapseMonitor(batch).measure(model)
    with torch.no_grad():
        output = model(images(), batch.views[0], batch.target_indices)
        features = model.target_encoder(images()).last_hidden_state
        target = torch.nn.functional.layer_norm(features, features.shape[-1:], eps=1e-5)
        context = model.context_encoder(images()).last_hidden_state
        views = torch.stack(
            [model.context_encoder(images(), context_indices=view).last_hidden_state.mean(1) for view in batch.views],
            1,
        )
    places = torch.arange(64).repeat(8)
    assert row["loss"] == pytest.approx(float(output.loss), rel=1e-5)
    assert row["target_patch_rankme"] == pytest.approx(rankme(target.flatten(0, 1)), rel=1e-4)
    assert row["target_pooled_cosine"] == pytest.approx(mean_pairwise_cosine(target.mean(dim=1)), abs=1e-5)
    assert row["context_patch_effective_rank"] == pytest.approx(effective_rank(context.flatten(0, 1)), rel=1e-4)
    assert row["context_position_share"] == pytest.approx(position_share(context.flatten(0, 1), places), abs=1e-5)
    assert row["context_lidar"] == pytest.approx(lidar(views), rel=1e-3)
    predictions, blocks = output.predictions.flatten(0, 2), batch.target_indices.flatten()
    assert row["prediction_patch_rankme"] == pytest.approx(rankme(predictions), rel=1e-4)
    assert row["prediction_position_share"] == pytest.approx(position_share(predictions, blocks), abs=1e-5)
    others = torch.stack([target[index - 1][batch.target_indices[index]] for index in range(8)]).flatten(0, 2)
    targets = output.targets.flatten(0, 2)
    assert row["cross_image_gap"] == pytest.approx(cross_image_gap(predictions, targets, others), abs=1e-5)
    assert row["perfect_gap"] == pytest.approx(cross_image_gap(targets, targets, others), abs=1e-5)


def test_a_model_that_predicts_pixels_is_measured_by_its_features_and_has_the_loss_of_its_pixels():
    model = scrambled_model(target_type="pixels")
    batch = make_monitor_batch(model.config, images())
    row = CollapseMonitor(batch, chunk_size=3).measure(model)
    with torch.no_grad():
        output = model(images(), batch.views[0], batch.target_indices)
    assert row["loss"] == pytest.approx(float(output.loss), rel=1e-5)
    features = model.represent(images())
    assert row["target_patch_rankme"] == pytest.approx(rankme(features.flatten(0, 1)), rel=1e-4)
    assert "context_patch_rankme" in row
    assert not any(name.startswith("prediction") for name in row)


def test_every_number_is_taken_of_pooled_and_patch_features_of_each_part():
    row = monitored(tiny_model())
    metrics = measure_matrix(torch.randn(4, 3))
    assert len(metrics) == 7
    for part in PARTS:
        for kind in KINDS:
            assert all(isinstance(row[f"{part}_{kind}_{metric}"], int | float) for metric in metrics)
        assert f"{part}_position_share" in row


def test_measuring_changes_neither_weights_modes_gradients_nor_random_draws():
    model = scrambled_model(hidden_dropout_prob=0.1).train()
    model.context_encoder.layers[0].eval()
    loss = model(**tiny_batch(model.config)).loss
    loss.backward()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first, second = monitored(model), monitored(model)
    assert first == second  # dropout is off
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        before = gradients[name]
        assert parameter.grad is None if before is None else torch.equal(parameter.grad, before)


def test_numbers_do_not_depend_on_the_size_of_chunks():
    model = scrambled_model()
    whole, chunks = monitored(model), monitored(model, chunk_size=3)
    assert whole.pop("batch") == chunks.pop("batch")
    assert {name: value for name, value in whole.items() if value is not None} == pytest.approx(
        {name: value for name, value in chunks.items() if value is not None}, rel=1e-3, abs=1e-5
    )


def test_the_masks_are_always_the_same_and_lidar_has_several():
    first, second = (make_monitor_batch(tiny_config(), images()) for _ in range(2))
    assert len(first.views) == LIDAR_VIEWS
    assert all(torch.equal(a, b) for a, b in zip(first.views, second.views, strict=True))
    assert torch.equal(first.target_indices, second.target_indices)
    assert not torch.equal(first.views[0], first.views[1])


def test_a_collapsed_model_shows_it():
    model = tiny_model()
    with torch.no_grad():
        for encoder in (model.target_encoder, model.context_encoder):
            encoder.layernorm.weight.mul_(1e-4)
            encoder.layernorm.bias.copy_(torch.linspace(-1, 1, 32))
    row = monitored(model)
    assert row["target_patch_normalized_std"] < 0.01
    assert row["context_pooled_cosine"] > 0.999
    assert row["perfect_gap"] < 1e-3


def test_the_way_that_the_target_encoder_went_is_measured_between_rows():
    model = scrambled_model()
    monitor = CollapseMonitor(make_monitor_batch(model.config, images()))
    first = monitor.measure(model)
    assert first["target_moved"] is None
    assert first["target_distance"] > 0
    model.update_target_encoder(0.75)
    assert monitor.measure(model)["target_moved"] == pytest.approx(0.25, abs=1e-4)
    assert monitor.measure(model)["target_moved"] == pytest.approx(0, abs=1e-6)
    model.update_target_encoder(0.0)
    assert monitor.measure(model)["target_moved"] == pytest.approx(1, abs=1e-6)
    assert monitor.measure(model)["target_moved"] is None  # there is no way left
    assert monitor.measure(model)["target_distance"] == 0


def test_a_row_says_which_images_it_is_of():
    model = tiny_model()
    assert monitored(model)["batch"] == monitored(model)["batch"]
    other = CollapseMonitor(make_monitor_batch(model.config, images(seed=1))).measure(model)
    assert other["batch"] != monitored(model)["batch"]


def test_an_encoder_alone_gives_its_own_numbers():
    row = measure_features({"target": torch.randn(6, 16, 8)}, torch.empty(6, 0, 0, dtype=torch.int64))
    assert "target_position_share" in row
    assert not any(name.startswith(("context", "prediction", "cross")) for name in row)


def test_spectra_are_taken_of_some_rows_from_all_images():
    features = torch.zeros(40, 64, 8)
    features[:20, :, 0] = torch.randn(20, 64)
    features[20:, :, 1] = torch.randn(20, 64)  # a second direction in the second half of the images only
    row = measure_features({"target": features}, torch.empty(40, 0, 0, dtype=torch.int64))
    assert SPECTRUM_ROWS < 40 * 64
    assert row["target_patch_effective_rank"] == pytest.approx(2, abs=0.05)


def test_one_image_is_too_few():
    with pytest.raises(ValueError, match="1 image is too few"):
        make_monitor_batch(tiny_config(), images(1))


def test_features_that_are_not_finite_are_refused():
    model = tiny_model()
    with torch.no_grad():
        model.target_encoder.layernorm.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        monitored(model)
