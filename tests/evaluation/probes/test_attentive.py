"""The attentive probe on planted problems, and what it may not look at."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa_hf.evaluation.probes import attentive as attentive_probe
from ijepa_hf.evaluation.probes.attentive import TRAINING, predict_attentive
from ijepa_hf.evaluation.probes.linear import predict_linear


def one_telling_patch(n: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One patch of 12, anywhere, carries a flag and the class; the others carry classes without the flag.

    The mean over the patches says next to nothing, for eleven of twelve patches mislead.
    """
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 3, n)
    shown = generator.integers(0, 3, (n, 12))
    place = generator.integers(0, 12, n)
    shown[np.arange(n), place] = y
    flag = np.zeros((n, 12, 1))
    flag[np.arange(n), place] = 1
    x = np.concatenate([np.eye(3)[shown], flag, np.zeros((n, 12, 4))], axis=2) * 2
    return (x + 0.1 * generator.normal(size=x.shape)).astype(np.float32), y


def trained(**changes) -> dict:
    """The defaults with changes, as an argument."""
    return {"training": replace(TRAINING, **changes)}


FAST = {"epochs": 40, "batch_size": 50, "learning_rates": (1e-2,)}


def test_it_finds_the_telling_patch_which_the_mean_over_patches_hides():
    x, y = one_telling_patch(1000)
    attentive = predict_attentive(x[:500], y[:500], x[500:], **trained(**FAST))
    linear = predict_linear(x[:500].mean(axis=1), y[:500], x[500:].mean(axis=1))
    assert np.mean(attentive == y[500:]) > 0.95
    assert np.mean(linear == y[500:]) < 0.65


def test_shuffled_labels_give_chance():
    x, y = one_telling_patch(800)
    shuffled = np.random.default_rng(1).permutation(y[:300])
    predicted = predict_attentive(x[:300], shuffled, x[300:], **trained(**{**FAST, "epochs": 10}))
    assert abs(np.mean(predicted == y[300:]) - 1 / 3) < 4 * np.sqrt(2 / 9 / 500)


def test_the_block_is_the_formula_of_its_description():
    probe = attentive_probe._new_probes(1, 8, 2, 3, seed=0)[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    patches = torch.randn(5, 6, 8, generator=generator)

    def norm(x: torch.Tensor, layer: torch.nn.LayerNorm) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    keys, query = norm(patches, probe.patch_norm), probe.query[0, 0]
    weight, bias = probe.attention.in_proj_weight, probe.attention.in_proj_bias
    q, k, v = (
        rows @ weight[i * 8 : i * 8 + 8].T + bias[i * 8 : i * 8 + 8] for i, rows in enumerate([query, keys, keys])
    )
    heads = []
    for columns in (slice(0, 4), slice(4, 8)):
        attention = torch.softmax(k[..., columns] @ q[columns] / 2, dim=1)  # 2 = sqrt(4 columns)
        heads.append((attention[..., None] * v[..., columns]).sum(dim=1))
    h = query + torch.cat(heads, dim=1) @ probe.attention.out_proj.weight.T + probe.attention.out_proj.bias
    inner = norm(h, probe.mlp[0]) @ probe.mlp[1].weight.T + probe.mlp[1].bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    h = h + inner @ probe.mlp[3].weight.T + probe.mlp[3].bias
    logits = norm(h, probe.head[0]) @ probe.head[1].weight.T + probe.head[1].bias
    torch.testing.assert_close(probe(patches), logits, rtol=1e-5, atol=1e-5)
    assert inner.shape == (5, 32)


def test_probes_trained_together_are_those_trained_alone():
    x, y = one_telling_patch(60)
    rows = np.arange(60)
    together = attentive_probe._new_probes(2, 8, 1, 3, seed=0)
    training = replace(TRAINING, epochs=2, batch_size=16, learning_rates=(1e-3, 1e-2))
    attentive_probe._train(together, x, y, rows, training, 0)
    for probe, rate in zip(together, [1e-3, 1e-2], strict=True):
        alone = attentive_probe._new_probes(1, 8, 1, 3, seed=0)
        attentive_probe._train(alone, x, y, rows, replace(training, learning_rates=[rate]), 0)
        for mine, theirs in zip(probe.parameters(), alone[0].parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_the_learning_rate_that_does_best_on_held_out_training_images_is_chosen(caplog):
    caplog.set_level(logging.INFO)
    x, y = one_telling_patch(400)
    settings = {"epochs": 30, "batch_size": 50}
    chosen = predict_attentive(x[:200], y[:200], x[200:], **trained(learning_rates=(1e-6, 1e-2), **settings))
    assert "learning rate 0.01 was chosen" in caplog.text
    np.testing.assert_array_equal(
        chosen, predict_attentive(x[:200], y[:200], x[200:], **trained(learning_rates=(1e-2,), **settings))
    )


def test_the_rate_rises_for_a_tenth_of_the_steps_and_then_falls(monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def recording(optimizer, closure=None):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    x, y = one_telling_patch(60)
    predict_attentive(x, y, x[:2], **trained(learning_rates=(0.01,), epochs=5, batch_size=15))
    final = rates[-20:]  # of the probe that is trained on all 60 images
    np.testing.assert_allclose(final[:2], [0.005, 0.01])
    np.testing.assert_allclose(final[2:], [0.005 * (1 + np.cos(np.pi * i / 19)) for i in range(1, 19)])


def test_weight_decay_acts_on_matrices_only(monkeypatch):
    groups = []
    make = torch.optim.AdamW

    def recording(parameters):
        groups.extend(parameters)
        return make(parameters)

    monkeypatch.setattr(torch.optim, "AdamW", recording)
    x, y = one_telling_patch(20)
    predict_attentive(x, y, x, **trained(epochs=1, learning_rates=(1e-3,), weight_decays=(0.3,)))
    decayed = [p for group in groups for p in group["params"] if group["weight_decay"] == 0.3]
    spared = [p for group in groups for p in group["params"] if group["weight_decay"] == 0]
    assert {p.ndim for p in decayed} == {2}
    assert {p.ndim for p in spared} == {1, 3}
    assert len(decayed) + len(spared) == 2 * len(list(attentive_probe._AttentiveProbe(8, 1, 3).parameters()))


def test_memory_mapped_half_precision_is_read_in_batches_and_gives_the_same_labels(tmp_path: Path, monkeypatch):
    x, y = one_telling_patch(300)
    x = x.astype(np.float16)
    np.save(tmp_path / "patches.npy", x)
    mapped = np.load(tmp_path / "patches.npy", mmap_mode="r")
    sizes = []
    read = attentive_probe._on_device

    def recording(patches, rows, probes):
        assert isinstance(patches, np.memmap)
        sizes.append(len(rows))
        return read(patches, rows, probes)

    monkeypatch.setattr(attentive_probe, "_on_device", recording)
    settings = trained(**{"epochs": 3, "batch_size": 32, "learning_rates": (1e-3, 1e-2)})
    predicted = predict_attentive(mapped[:200], y[:200], mapped[200:], **settings)
    assert max(sizes) == 32
    monkeypatch.undo()
    plain = predict_attentive(x[:200].astype(np.float32), y[:200], x[200:].astype(np.float32), **settings)
    np.testing.assert_array_equal(predicted, plain)


def test_labels_are_a_function_of_the_seed_alone_and_the_global_generator_is_left_alone():
    x, y = one_telling_patch(400)
    settings = trained(**{"epochs": 6, "batch_size": 32, "learning_rates": (1e-2,)})
    state = torch.get_rng_state()
    first = predict_attentive(x[:200], y[:200], x[200:], seed=1, **settings)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(77)
    np.testing.assert_array_equal(first, predict_attentive(x[:200], y[:200], x[200:], seed=1, **settings))
    assert not np.array_equal(first, predict_attentive(x[:200], y[:200], x[200:], seed=2, **settings))
    torch.set_rng_state(state)


def test_neither_the_order_of_the_patches_nor_other_test_images_matter():
    x, y = one_telling_patch(120)
    settings = trained(**{"epochs": 3, "batch_size": 32, "learning_rates": (1e-2,)})
    together = predict_attentive(x[:80], y[:80], x[80:], **settings)
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_array_equal(predict_attentive(x[:80], y[:80], x[80:][:, order], **settings), together)
    np.testing.assert_array_equal(predict_attentive(x[:80], y[:80], x[85:86], **settings), together[5:6])


def test_labels_may_be_words():
    x, y = one_telling_patch(60)
    words = np.array(["ant", "bee", "cat"])[y]
    settings = trained(**{"epochs": 2, "learning_rates": (1e-3,)})
    np.testing.assert_array_equal(
        predict_attentive(x, words, x, **settings),
        np.array(["ant", "bee", "cat"])[predict_attentive(x, y, x, **settings)],
    )


def test_divergence_is_said_and_not_chosen():
    x, y = one_telling_patch(60)
    # NaN looks like class 0 to argmax, which is nearly always right here.
    rare = np.arange(60) % 20 == 0
    assert predict_attentive(x, rare, x, **trained(epochs=20, batch_size=16, learning_rates=(1e30, 1e-2))).mean() < 0.3
    with pytest.raises(ValueError, match=r"diverged with learning_rates=\(1e\+30,\): give lower ones"):
        predict_attentive(x, y, x, **trained(epochs=3, batch_size=16, learning_rates=(1e30,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_y": np.zeros(20)}, "20 labels of 1 classes"),
        ({"test_patches": np.zeros((2, 11, 8))}, "train_patches has 12 x 8 N x D and test_patches has 11 x 8"),
        ({"test_patches": np.zeros((2, 8))}, r"test_patches of shape \(2, 8\) must be \[n, N, D\]"),
        ({"train_patches": np.full((20, 12, 8), np.nan)}, "train_patches holds NaN"),
    ],
)
def test_impossible_arguments_are_named(change: dict, message: str):
    x, y = one_telling_patch(20)
    with pytest.raises(ValueError, match=message):
        predict_attentive(**{"train_patches": x, "train_y": y, "test_patches": x, **change})
