"""The model: equal to the stock encoder where it should be, right in what it adds, and a transformers model in all
else."""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from tiny import scrambled_model, tiny_batch, tiny_config, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_hf import IJepaConfig, IJepaForPretraining, IJepaModel
from ijepa_hf.model.encoder_ijepa import from_file_name, gather_patches, sincos_position_table, to_file_name
from ijepa_hf.model.modeling_ijepa import variance_and_covariance
from ijepa_hf.training.activation_checkpointing import enable_gradient_checkpointing


def stock_twin(model: IJepaModel, backend: str) -> transformers.IJepaModel:
    """The stock class with the same weights."""
    fields = {name: getattr(model.config, name) for name in transformers.IJepaConfig.__dataclass_fields__}
    stock = transformers.IJepaModel(transformers.IJepaConfig(**fields, attn_implementation=backend))
    stock.load_state_dict(model.state_dict())
    return stock.to(model.dtype).eval()


# -- against the stock class -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dtype", "image_size"),
    [("sdpa", torch.float32, 32), ("sdpa", torch.bfloat16, [32, 64]), ("eager", torch.float32, [32, 64])],
)
def test_encoder_without_indices_equals_the_stock_model_bit_for_bit(backend, dtype, image_size):
    model = scrambled_model(image_size=image_size).target_encoder.to(dtype)
    model.set_attn_implementation(backend)
    pixels = tiny_batch(model.config)["pixel_values"].to(dtype)
    with torch.no_grad():
        ours, stock = model(pixels), stock_twin(model, backend)(pixels)
    assert torch.equal(ours.last_hidden_state, stock.last_hidden_state)


def test_interpolated_position_table_equals_the_stock_models_and_serves_rectangular_grids():
    model = scrambled_model().target_encoder
    larger = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        ours = model(larger, interpolate_pos_encoding=True).last_hidden_state
        stock = stock_twin(model, "sdpa")(larger, interpolate_pos_encoding=True).last_hidden_state
        wide = model(torch.randn(2, 3, 16, 64), interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(ours, stock)
    assert wide.shape == (2, 4 * 16, 32)


def test_an_image_of_another_size_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="48x32 pixels, the model was made for 32x32.*interpolate_pos_encoding"):
        tiny_model().target_encoder(torch.randn(1, 3, 48, 32))


def test_encoder_adds_no_parameter_to_the_stock_one():
    ours, stock = IJepaModel(tiny_config()), transformers.IJepaModel(transformers.IJepaConfig())
    assert {name for name, _ in ours.named_parameters()} | {"embeddings.position_embeddings"} == {
        name.replace("layers.2.", "layers.0.") for name, _ in stock.named_parameters() if "layers." not in name
    } | {name for name, _ in ours.named_parameters() if "layers." in name}
    assert set(ours.state_dict()) == {
        name for name in stock.state_dict() if "layers." not in name or name.split(".")[1] in "01"
    }


def test_under_autocast_sums_and_norms_stay_float32_as_in_the_stock_model():
    model = scrambled_model()
    batch = tiny_batch(model.config)
    seen: list[torch.dtype] = []
    for part in (model.ijepa, model.context_encoder, model.predictor):
        for layer in (*part.layers, part.layernorm):
            layer.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        output = model(**batch)
        ours = model.target_encoder(batch["pixel_values"]).last_hidden_state
        stock = stock_twin(model.target_encoder, "sdpa")(batch["pixel_values"]).last_hidden_state
    assert set(seen) == {torch.float32}
    assert len(seen) == 4 * 3  # two encoders, a predictor, and the target encoder again
    assert output.loss.dtype == output.targets.dtype == ours.dtype == torch.float32
    assert torch.equal(ours, stock)


def test_under_autocast_query_key_and_value_share_one_copy_of_their_input():
    model = scrambled_model().train()
    batch = tiny_batch(model.config)
    given: dict[str, list[int]] = {}
    for name, module in model.context_encoder.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            layer = name.rsplit(".", 1)[0]
            module.register_forward_pre_hook(
                lambda _module, inputs, layer=layer: given.setdefault(layer, []).append(inputs[0].data_ptr())
            )
            module.register_forward_pre_hook(lambda _module, inputs: kinds.add(inputs[0].dtype))
    kinds: set[torch.dtype] = set()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    assert kinds == {torch.bfloat16}
    assert len(given) == 2
    assert all(len(pointers) == 3 and len(set(pointers)) == 1 for pointers in given.values())


# -- what enters the encoder -----------------------------------------------------------------------------------------


# -- work that is spared, value by value against the whole of it ------------------------------------------------------


def whole_encoder(model: IJepaModel, pixel_values: torch.Tensor, context_indices: torch.Tensor | None = None):
    """The convolution over the whole image, then the visible rows, then stock layers on all of them."""
    hidden = model.embeddings.patch_embeddings(pixel_values) + model.embeddings.position_embeddings
    if context_indices is not None:
        hidden = gather_patches(hidden, context_indices)
        hidden = hidden.flatten(0, 1) if hidden.dim() == 4 else hidden
    for layer in model.layers:
        hidden = layer(hidden, None)
    return model.layernorm(hidden)


def whole_predictor(predictor: nn.Module, context: torch.Tensor, context_indices, target_indices):
    """Every layer on all rows of every block; the rows of targets are taken at the end."""
    batch, sets = context_indices.shape[:2]
    table = predictor.position_embeddings.expand(batch, -1, -1)
    visible = predictor.embed(context.unflatten(0, (batch, sets))) + gather_patches(table, context_indices)
    blocks = []
    for indices in target_indices.unbind(1):
        queries = (predictor.mask_token + gather_patches(table, indices))[:, None].expand(-1, sets, -1, -1)
        rows = torch.cat([visible, queries], dim=2).flatten(0, 1)
        for layer in predictor.layers:
            rows = layer(rows, None)
        rows = predictor.project(predictor.layernorm(rows))[:, -indices.shape[1] :]
        blocks.append(rows.unflatten(0, (batch, sets)))
    return torch.stack(blocks, dim=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_context_sets": 2},
        {"num_target_blocks": 6, "image_size": [32, 64]},
        {"predictor_num_hidden_layers": 1, "num_hidden_layers": 1, "num_channels": 2},
        {"patch_size": [4, 8], "normalize_targets": False},
        {"num_target_blocks": 9, "context_keep_ratio": 0.1},  # 81 rows of 64 patches
    ],
)
def test_a_step_that_spares_work_has_the_values_and_gradients_of_the_whole_one(changes):
    model = scrambled_model(**changes).double().train()
    batch = tiny_batch(model.config)
    batch["pixel_values"] = batch["pixel_values"].double()
    context_indices, target_indices = batch["context_indices"], batch["target_indices"]
    sets = context_indices if context_indices.dim() == 3 else context_indices[:, None]

    targets = whole_encoder(model.target_encoder, batch["pixel_values"]).detach()
    if model.config.normalize_targets:
        targets = nn.functional.layer_norm(targets, targets.shape[-1:], eps=1e-5)
    targets = gather_patches(targets, target_indices)
    context = whole_encoder(model.context_encoder, batch["pixel_values"], context_indices)
    predictions = whole_predictor(model.predictor, context, sets, target_indices)
    loss = nn.functional.smooth_l1_loss(predictions, targets[:, None].expand_as(predictions))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    expected = torch.autograd.grad(loss, list(trained.values()))

    output = model(**batch)
    actual = torch.autograd.grad(output.loss, list(trained.values()))

    def close(one, other):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)

    close(output.targets, targets)
    close(output.predictions if context_indices.dim() == 3 else output.predictions[:, None], predictions)
    close(output.loss, loss)
    for name, one, other in zip(trained, actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_output_indices_give_those_rows_of_the_whole_result_in_their_order():
    model = scrambled_model().target_encoder
    pixels = tiny_batch(model.config)["pixel_values"]
    wanted = torch.tensor([[5, 0, 63], [1, 1, 2], [63, 62, 61], [10, 20, 30]])
    with torch.no_grad():
        whole, rows = model(pixels), model(pixels, output_indices=wanted)
    expected = gather_patches(whole.last_hidden_state, wanted)
    torch.testing.assert_close(rows.last_hidden_state, expected, atol=2e-6, rtol=0)


def test_output_indices_count_the_visible_patches_where_only_some_are_seen():
    model = scrambled_model(num_context_sets=2).context_encoder
    batch = tiny_batch(model.config)
    pixels, context = batch["pixel_values"], batch["context_indices"]
    wanted = torch.tensor([[2, 0]]).expand(8, -1)  # of each of the two sets of four images
    with torch.no_grad():
        whole = model(pixels, context_indices=context).last_hidden_state
        rows = model(pixels, context_indices=context, output_indices=wanted).last_hidden_state
        with pytest.raises(ValueError, match=r"output_indices have shape \[4, 2\]; for 8 images .*\[B, T\]"):
            model(pixels, context_indices=context, output_indices=wanted[:4])
    torch.testing.assert_close(rows, whole[:, [2, 0]], atol=2e-6, rtol=0)


def test_context_sets_are_encoded_as_if_each_were_alone():
    model = scrambled_model(num_context_sets=3).eval()
    batch = tiny_batch(model.config)
    with torch.no_grad():
        together = model(**batch)
        for number in range(3):
            alone = model(batch["pixel_values"], batch["context_indices"][:, number], batch["target_indices"])
            torch.testing.assert_close(together.predictions[:, number], alone.predictions, atol=1e-6, rtol=0)
            assert torch.equal(together.targets, alone.targets)
        losses = [
            model(batch["pixel_values"], batch["context_indices"][:, number], batch["target_indices"]).loss
            for number in range(3)
        ]
    assert together.loss.item() == pytest.approx(float(torch.stack(losses).mean()), abs=1e-6)


def test_gather_patches_picks_rows_of_any_index_shape():
    features = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    indices = torch.tensor([[[0, 4], [2, 2]], [[1, 3], [4, 0]]])
    expected = torch.stack([features[b][indices[b]] for b in range(2)])
    assert torch.equal(gather_patches(features, indices), expected)


def test_position_table_of_a_rectangular_grid_encodes_columns_first_then_rows():
    table = sincos_position_table(8, (2, 3))[0]
    for row in range(2):
        for column in range(3):
            angles = [column, column / 100], [row, row / 100]  # frequencies 1 and 10000^(-1/2)
            expected = [f(a) for axis in angles for f in (math.sin, math.cos) for a in axis]
            torch.testing.assert_close(table[row * 3 + column], torch.tensor(expected), atol=1e-7, rtol=0)


# -- loss ------------------------------------------------------------------------------------------------------------


def test_losses_are_means_over_everything_of_their_closed_forms():
    model = tiny_model()
    predictions, targets = torch.randn(2, 4, 5, 32) * 2, torch.randn(2, 4, 5, 32)
    difference = (predictions - targets).abs()
    smooth = torch.where(difference < 1, difference**2 / 2, difference - 0.5).mean()
    assert float(model.compute_loss(predictions, targets)) == pytest.approx(float(smooth), rel=1e-6)
    model.config.loss_type = "mse"
    per_block = difference.pow(2).sum((2, 3))  # the paper's figure: P*D times ours
    assert float(model.compute_loss(predictions, targets)) == pytest.approx(
        float(per_block.mean()) / (5 * 32), rel=1e-6
    )


def test_targets_are_layer_normalised_without_affine_unless_switched_off():
    model = scrambled_model()
    batch = tiny_batch(model.config)
    raw = gather_patches(model.target_encoder(batch["pixel_values"]).last_hidden_state, batch["target_indices"])
    centred = raw - raw.mean(-1, keepdim=True)
    expected = centred / (raw.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model(**batch).targets, expected.detach(), atol=1e-6, rtol=0)
    model.config.normalize_targets = False
    torch.testing.assert_close(model(**batch).targets, raw.detach(), atol=1e-6, rtol=0)


def test_targets_that_are_pixels_are_each_patchs_own_normalised_by_itself():
    model = scrambled_model(target_type="pixels", patch_size=[4, 8])
    batch = tiny_batch(model.config)
    output = model(**batch)
    assert output.predictions.shape == output.targets.shape == (*batch["target_indices"].shape, 3 * 4 * 8)
    for image, block, place in ((0, 0, 0), (1, 2, 3), (3, 3, -1)):
        row, column = divmod(int(batch["target_indices"][image, block, place]), 4)
        patch = batch["pixel_values"][image, :, 4 * row : 4 * row + 4, 8 * column : 8 * column + 8].flatten().numpy()
        expected = (patch - patch.mean()) / np.sqrt(patch.var() + 1e-5)
        np.testing.assert_allclose(output.targets[image, block, place].numpy(), expected, atol=1e-5)
    model.config.normalize_targets = False
    np.testing.assert_array_equal(model(**batch).targets[3, 3, -1].numpy(), patch)


def test_a_model_that_predicts_pixels_differs_in_the_read_out_alone_and_trains_the_same_encoder():
    pixels, features = tiny_model(target_type="pixels"), tiny_model()
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (pixels, features)]
    assert {name for name in shapes[0] if shapes[0][name] != shapes[1].get(name)} == {
        "predictor.project.weight", "predictor.project.bias",
    }  # fmt: skip
    assert shapes[0].keys() == shapes[1].keys()
    pixels(**tiny_batch(pixels.config)).loss.backward()
    assert all(parameter.grad is not None for parameter in pixels.context_encoder.embeddings.parameters())
    assert all(parameter.grad is None for parameter in pixels.target_encoder.parameters())


def test_what_the_target_encoder_says_of_a_patch_is_asked_for_alone_or_with_all_others():
    model = scrambled_model(target_type="pixels")
    batch = tiny_batch(model.config)
    whole = model.represent(batch["pixel_values"])
    features = model.target_encoder(batch["pixel_values"]).last_hidden_state
    torch.testing.assert_close(whole, nn.functional.layer_norm(features, features.shape[-1:]).detach())
    rows = batch["target_indices"][:, 0]
    some = model.represent(batch["pixel_values"], output_indices=rows)
    torch.testing.assert_close(some, gather_patches(whole, rows), atol=1e-5, rtol=0)


# -- VICReg ---------------------------------------------------------------------------------------------------------


def test_vicregs_terms_are_their_closed_forms():
    features = torch.randn(40, 6, dtype=torch.float64) * torch.tensor([0.1, 0.5, 0.9, 1.5, 2.0, 0.0])
    covariance = np.cov(features.numpy(), rowvar=False)
    hinge = np.maximum(0, 1 - np.sqrt(covariance.diagonal() + 1e-4)).mean()
    expected = 25 * hinge + (covariance**2).sum() / 6 - (covariance.diagonal() ** 2).sum() / 6
    assert float(variance_and_covariance(features)) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="at least 2 images"):
        variance_and_covariance(features[:1])


def test_vicregs_terms_are_added_with_their_weight_and_reach_the_context_encoder():
    plain, model = scrambled_model(), scrambled_model(vicreg_weight=0.3)
    batch = tiny_batch(plain.config)
    context = plain.context_encoder(batch["pixel_values"], context_indices=batch["context_indices"]).last_hidden_state
    loss = model(**batch).loss
    added = float(loss.detach() - plain(**batch).loss.detach())
    assert added == pytest.approx(0.3 * float(variance_and_covariance(context.mean(dim=1)).detach()), rel=1e-4)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.target_encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.context_encoder.parameters())


def test_without_loss_there_are_still_predictions():
    output = tiny_model()(**tiny_batch(tiny_config()), return_loss=False)
    assert output.loss is None
    assert output.predictions.shape == output.targets.shape


# -- drawing its own masks -------------------------------------------------------------------------------------------


def test_one_line_on_a_batch_works_and_is_governed_by_torchs_seed():
    model = tiny_model()
    pixels = tiny_batch(model.config)["pixel_values"]
    torch.manual_seed(5)
    first = model(pixels)
    torch.manual_seed(5)
    second = model(pixels)
    third = model(pixels)
    first.loss.backward()
    assert torch.equal(first.context_indices, second.context_indices)
    assert first.loss.item() == second.loss.item()
    assert not torch.equal(first.context_indices, third.context_indices)
    assert first.context_indices.shape == (4, 16)
    assert model.predictor.mask_token.grad.abs().sum() > 0


# -- initial weights -------------------------------------------------------------------------------------------------


def test_initial_weights_are_the_stated_ones():
    model = tiny_model(hidden_size=64, intermediate_size=256, predictor_hidden_size=64)
    conv = model.context_encoder.embeddings.patch_embeddings.projection
    assert float(conv.weight.detach().std()) == pytest.approx(1 / math.sqrt(48), rel=0.1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "layernorm" in name:
            assert bool((parameter == 1).all()), name
        elif "projection" not in name:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.25), name


def test_published_patch_init_std_is_used_where_it_is_set():
    conv = tiny_model(patch_init_std=0.02).context_encoder.embeddings.patch_embeddings.projection
    assert float(conv.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_target_encoder_starts_as_a_copy_of_the_context_encoder():
    model = tiny_model()
    for one, other in zip(model.ijepa.parameters(), model.context_encoder.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one is not other


# -- as any transformers model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"num_channels": 1}, {"num_channels": 12}, {"image_size": [24, 40], "patch_size": [4, 8]}]
)
def test_any_number_of_channels_and_rectangular_images_and_patches_train(changes):
    model = tiny_model(**changes)
    output = model(**tiny_batch(model.config))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert model.context_encoder.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0


class CountOperators(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


def operators_of_a_step(model: IJepaForPretraining) -> Counter[str]:
    with CountOperators() as counted:
        model(**tiny_batch(model.config)).loss.backward()
    return counted.calls


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_selective_checkpointing_repeats_norms_and_activations_but_no_product_of_matrices(backend):
    plain, selective, full = (scrambled_model(num_hidden_layers=3).train() for _ in range(3))
    enable_gradient_checkpointing(selective, selective=True)
    enable_gradient_checkpointing(full)
    for model in (plain, selective, full):
        model.set_attn_implementation(backend)
    once, again, all_again = map(operators_of_a_step, (plain, selective, full))
    trained_layers = 3 + 2
    for name in ("mm", "addmm", "_scaled_dot_product_flash_attention_for_cpu"):
        assert again[name] == once[name], name
    assert all_again["addmm"] > once["addmm"]
    assert again["gelu"] == once["gelu"] + trained_layers
    assert again["native_layer_norm"] == once["native_layer_norm"] + 2 * trained_layers


@pytest.mark.parametrize("selective", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_in_encoder_and_predictor(selective):
    plain, saving = scrambled_model().train(), scrambled_model().train()
    enable_gradient_checkpointing(saving, selective=selective)
    assert all(layer.gradient_checkpointing for layer in (*saving.context_encoder.layers, *saving.predictor.layers))
    batch = tiny_batch(plain.config)
    for model in (plain, saving):
        model(**batch).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if one.grad is not None:
            assert torch.equal(one.grad, other.grad), name


def test_backends_agree_and_switching_reaches_every_part():
    model = scrambled_model()
    batch = tiny_batch(model.config)
    losses = {}
    for backend in ("sdpa", "eager"):
        model.set_attn_implementation(backend)
        for part in (model, model.ijepa, model.context_encoder, model.predictor):
            assert part.config._attn_implementation == backend
        losses[backend] = model(**batch).loss.item()
    assert losses["sdpa"] == pytest.approx(losses["eager"], abs=1e-6)


def test_hidden_states_and_attentions_are_the_context_encoders():
    model = scrambled_model()
    batch = tiny_batch(model.config)
    with pytest.raises(
        ValueError, match="output_attentions=True: the attention backend 'sdpa' computes no attention maps.*eager"
    ):
        model(**batch, output_attentions=True)
    model.set_attn_implementation("eager")
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(4, 16, 32)] * 3
    assert [map_.shape for map_ in output.attentions] == [(4, 2, 16, 16)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(4, 2, 16))


def test_return_dict_false_gives_the_same_values_as_a_tuple():
    model = scrambled_model()
    batch = tiny_batch(model.config)
    named, plain = model(**batch), model(**batch, return_dict=False)
    assert isinstance(plain, tuple)
    assert plain[0].item() == named.loss.item()
    assert torch.equal(plain[1], named.predictions)
    assert isinstance(model.target_encoder(batch["pixel_values"], return_dict=False), tuple)


def test_bfloat16_weights_give_nearly_the_same_loss_and_keep_the_position_tables_in_float32(tmp_path):
    model = scrambled_model()
    model.save_pretrained(tmp_path)
    half = IJepaForPretraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.predictor.embed.weight.dtype == torch.bfloat16
    for part in (half.ijepa.embeddings, half.context_encoder.embeddings, half.predictor):
        assert part.position_embeddings.dtype == torch.float32
    batch = tiny_batch(model.config)
    output = half(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()})
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(model(**batch).loss.item(), rel=0.02)


def test_autocast_to_bfloat16_trains():
    model = scrambled_model().train()
    batch = tiny_batch(model.config)
    reference = model(**batch).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(reference, rel=0.02)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_compiles_without_graph_breaks_in_the_encoder():
    model = scrambled_model().target_encoder
    pixels = tiny_batch(model.config)["pixel_values"]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels).last_hidden_state, model(pixels).last_hidden_state)


# -- files -----------------------------------------------------------------------------------------------------------


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_saved_model_loads_with_equal_weights_and_a_frozen_target(tmp_path):
    model = scrambled_model()
    model.save_pretrained(tmp_path)
    for loaded in (
        IJepaForPretraining.from_pretrained(tmp_path),
        IJepaForPretraining.from_pretrained(tmp_path, device_map="cpu"),
        transformers.AutoModelForPreTraining.from_pretrained(tmp_path),
    ):
        assert type(loaded) is IJepaForPretraining
        assert_same_weights(loaded, model)
        assert not any(parameter.requires_grad for parameter in loaded.ijepa.parameters())
        assert all(parameter.requires_grad for parameter in loaded.context_encoder.parameters())


def test_a_subfolder_that_was_asked_for_is_the_one_that_is_loaded(tmp_path):
    root, other = scrambled_model(0), scrambled_model(1)
    for folder, model in ((tmp_path, root), (tmp_path / "sub", other)):
        model.target_encoder.save_pretrained(folder)
        model.save_pretrained(folder / "pretraining")
    assert_same_weights(IJepaForPretraining.from_pretrained(tmp_path), root)
    assert_same_weights(IJepaForPretraining.from_pretrained(tmp_path, subfolder="sub"), other)


def test_overrides_and_loading_info_work_as_in_transformers(tmp_path):
    scrambled_model().save_pretrained(tmp_path)
    model, info = IJepaForPretraining.from_pretrained(
        tmp_path, loss_type="mse", attn_implementation="eager", output_loading_info=True
    )
    assert (model.config.loss_type, model.predictor.config._attn_implementation) == ("mse", "eager")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not any(parameter.requires_grad for parameter in model.ijepa.parameters())


def test_an_encoder_only_folder_starts_both_encoders_and_says_that_the_predictor_is_new(tmp_path, caplog):
    encoder = scrambled_model().target_encoder
    encoder.save_pretrained(tmp_path)
    transformers.utils.logging.get_logger("transformers").propagate = True
    try:
        model = IJepaForPretraining.from_pretrained(tmp_path)
    finally:
        transformers.utils.logging.get_logger("transformers").propagate = False
    assert "the predictor is new" in caplog.text
    assert_same_weights(model.ijepa, encoder)
    assert_same_weights(model.context_encoder, encoder)
    assert float(model.predictor.embed.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    assert not any(parameter.requires_grad for parameter in model.ijepa.parameters())


def test_a_stock_encoders_folder_starts_a_model_too(tmp_path):
    torch.manual_seed(0)
    stock = transformers.IJepaModel(
        transformers.IJepaConfig(
            image_size=32,
            patch_size=4,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        )
    )
    stock.save_pretrained(tmp_path)
    model = IJepaForPretraining.from_pretrained(tmp_path, predictor_hidden_size=16, predictor_num_hidden_layers=1)
    for name, value in stock.state_dict().items():
        assert torch.equal(model.context_encoder.state_dict()[name], value), name
    assert model.predictor.config.hidden_size == 16


def test_the_stock_class_reads_the_encoder_out_of_a_full_model_file(tmp_path):
    model = scrambled_model()
    model.save_pretrained(tmp_path)
    encoder = IJepaModel.from_pretrained(tmp_path)
    assert_same_weights(encoder, model.target_encoder)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        IJepaForPretraining.from_pretrained(str(tmp_path / "nowhere"))


def test_file_names_translate_back_and_forth_without_clashes():
    names = list(tiny_model().state_dict())
    files = [to_file_name(name) for name in names]
    assert len(set(files)) == len(names)
    assert [from_file_name(name) for name in files] == names
    assert [from_file_name(name) for name in names] == names


def test_a_state_dict_with_file_names_loads_without_strictness_losing_a_tensor():
    source, target = scrambled_model(0), scrambled_model(7)
    result = target.load_state_dict(
        {to_file_name(name): value for name, value in source.state_dict().items()}, strict=False
    )
    assert not result.missing_keys
    assert_same_weights(source, target)


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_integer_pixels_are_refused():
    model = tiny_model()
    for part in (model, model.target_encoder):
        with pytest.raises(ValueError, match=r"dtype torch.uint8; the model needs normalised floats"):
            part(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_indices_of_a_wrong_kind_are_refused():
    model = tiny_model()
    batch = tiny_batch(model.config)
    pixels, context, target = batch.values()
    for arguments, message in (
        ((pixels, context), "context_indices were given without target_indices"),
        ((pixels, None, target), "target_indices were given without context_indices"),
        ((pixels, context.int(), target), "context_indices have dtype torch.int32"),
        ((pixels, torch.ones(4, 64, dtype=torch.bool), target), "a boolean mask is turned into positions"),
        ((pixels, context[:2], target), r"context_indices have shape \[2, 16\]; for 4 images"),
        ((pixels, context, target[:, 0]), r"target_indices have shape .* \[B, M, P\]"),
        ((pixels, context[:, :0], target), "not empty"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match="bool_masked_pos is not used"):
        model.target_encoder(pixels, bool_masked_pos=torch.zeros(4, 64))


def test_momentum_outside_zero_and_one_is_refused():
    for momentum in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="momentum="):
            tiny_model().update_target_encoder(momentum)


def test_a_model_can_be_copied_and_pickled_free_of_hooks():
    model = scrambled_model()
    twin = copy.deepcopy(model)
    assert_same_weights(model, twin)
    assert isinstance(twin.config, IJepaConfig)
