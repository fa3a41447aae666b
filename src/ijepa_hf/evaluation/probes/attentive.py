"""Classifies by an attentive probe: a small cross-attention block learns which frozen patches show the class.

A linear probe on the mean of the patches misses what only few patches show. Here one learned query attends to them.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from ijepa_hf.evaluation.probes.checks import ProbeTraining, check_classes, check_features, hold_out

logger = logging.getLogger(__name__)

TRAINING = ProbeTraining(20, 64, (3e-4, 1e-3, 3e-3), (0.01,))

_LEAST_LABELS = 5  # four to fit and one to choose on
_WARMUP_SHARE = 0.1  # of the steps
_HEAD_WIDTH = 64  # least columns of an attention head; the number of heads divides the width
_MLP_RATIO = 4


def predict_attentive(
    train_patches: np.ndarray,
    train_y: np.ndarray,
    test_patches: np.ndarray,
    *,
    seed: int = 0,
    training: ProbeTraining = TRAINING,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Predicts labels of test images by an attentive probe that is trained on frozen patch features.

    The probe, for patches s, a learned query q and layer norms: h = q + attention(q, norm(s)); h = h + mlp(norm(h)),
    two layers with GELU and four times the width between them; logits = linear(norm(h)). It is trained with AdamW
    (weight decay on matrices only); the learning rate rises for a tenth of the steps, then falls as a cosine. The rate
    is the one that gets most of a fifth of the *training* images right (the first of equals); the probe is then
    trained again on all of them. The patches are not normalised over the data set, only by the probe.

    Only batches are read and turned into float32, so memory-mapped and float16 arrays stay as they are.

    Args:
        train_patches: [n_train, N, D] patch features, finite; n_train at least 5.
        train_y: [n_train] labels of two classes or more.
        test_patches: [n_test, N, D] patch features, finite.
        seed: of the split, the initial weights and the order of the images.
        training: how the probe is trained; one weight decay, of matrices.
        device: where torch trains.

    Returns:
        [n_test] labels, of `train_y`'s dtype. On a CPU the same arguments always give the same labels.

    Raises:
        ValueError: a setting outside its range, fewer than five training images or two classes, shapes that do not
            agree, features that are not finite, or training that diverged with every learning rate.

    Source: the attentive probe of V-JEPA (arXiv 2404.08471), section 4 and appendix on evaluation. The settings of the
        optimiser are ours, for data sets much smaller than theirs.
    """
    check_features(
        train_patches, train_y, test_patches, layout="n, N, D", names=("train_patches", "train_y", "test_patches")
    )
    check_classes(train_y, _LEAST_LABELS)
    width, learning_rates, batch_size = train_patches.shape[2], training.learning_rates, training.batch_size
    num_heads = max(heads for heads in range(1, max(1, width // _HEAD_WIDTH) + 1) if width % heads == 0)
    labels, codes = np.unique(train_y, return_inverse=True)

    def trained(rows: np.ndarray, rates: Sequence[float]) -> nn.ModuleList:
        probes = _new_probes(len(rates), width, num_heads, len(labels), seed).to(device)
        _train(probes, train_patches, codes, rows, replace(training, learning_rates=rates), seed)
        return probes.eval()

    fit, held_out = hold_out(len(codes), seed=seed, labels=codes)
    scores = []
    for logits in _logits(trained(fit, learning_rates), train_patches, held_out, batch_size):
        # A probe that diverged has no score, although argmax gives a class for NaN.
        right = np.mean(logits.argmax(axis=1) == codes[held_out])
        scores.append(float(right) if np.isfinite(logits).all() else -1.0)
    best = int(np.argmax(scores))
    logger.info(
        "attentive probe: learning rate %g was chosen, %.4f on %d training images",
        learning_rates[best], scores[best], len(held_out),
    )  # fmt: skip
    everything = np.arange(len(codes))
    probes = trained(everything, [learning_rates[best]])
    (final,) = _logits(probes, test_patches, np.arange(len(test_patches)), batch_size)
    if scores[best] < 0 or not np.isfinite(final).all():
        raise ValueError(f"the attentive probe diverged with learning_rates={learning_rates}: give lower ones.")
    return labels[final.argmax(axis=1)]


class _AttentiveProbe(nn.Module):
    """Computes logits [B, classes] of patches [B, N, D]: one learned query, a cross-attention block, a linear head."""

    def __init__(self, width: int, num_heads: int, num_classes: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.patch_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, _MLP_RATIO * width), nn.GELU(), nn.Linear(_MLP_RATIO * width, width)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:  # by the inputs of a row, so that narrow features do not learn late
                nn.init.trunc_normal_(parameter, std=parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, patches: Tensor) -> Tensor:
        keys = self.patch_norm(patches)
        query = self.query.expand(len(patches), -1, -1)
        pooled = query + self.attention(query, keys, keys, need_weights=False)[0]
        pooled = pooled + self.mlp(pooled)
        return self.head(pooled[:, 0])


def _new_probes(count: int, width: int, num_heads: int, num_classes: int, seed: int) -> nn.ModuleList:
    """Probes with the same initial weights, a function of the seed; the global generator is left as it was."""
    probes = nn.ModuleList()
    for _ in range(count):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            probes.append(_AttentiveProbe(width, num_heads, num_classes))
    return probes


def _train(
    probes: nn.ModuleList,
    patches: np.ndarray,
    codes: np.ndarray,
    rows: np.ndarray,
    training: ProbeTraining,
    seed: int,
) -> None:
    """Trains a probe for each learning rate on the same batches; losses are summed, so none influences another."""
    groups, batch_size = [], training.batch_size
    for probe, rate in zip(probes, training.learning_rates, strict=True):
        for decays in (True, False):
            # The query is a token with a place of its own, and no matrix.
            chosen = [p for name, p in probe.named_parameters() if (p.ndim == 2) == decays]
            decay = training.weight_decays[0] if decays else 0.0
            groups.append({"params": chosen, "lr": rate, "initial_lr": rate, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups)
    steps = training.epochs * -(-len(rows) // batch_size)
    # The schedule starts at its second step and ends one step late: steps with a rate of 0 would be idle.
    schedule = get_cosine_schedule_with_warmup(optimizer, int(_WARMUP_SHARE * steps), steps + 1, last_epoch=0)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(training.epochs), desc=f"attentive probe, {len(probes)} at once", unit="epoch", disable=None):
        order = rows[torch.randperm(len(rows), generator=generator).numpy()]
        for start in range(0, len(order), batch_size):
            batch = np.sort(order[start : start + batch_size])  # in the order of a memory-mapped file
            features = _on_device(patches, batch, probes)
            targets = torch.as_tensor(codes[batch], device=features.device)
            optimizer.zero_grad()
            torch.stack([nn.functional.cross_entropy(probe(features), targets) for probe in probes]).sum().backward()
            optimizer.step()
            schedule.step()


def _logits(probes: nn.ModuleList, patches: np.ndarray, rows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Computes the logits of each probe, float32 [rows, classes]."""
    pieces: list[list[np.ndarray]] = [[] for _ in probes]
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            features = _on_device(patches, rows[start : start + batch_size], probes)
            for piece, probe in zip(pieces, probes, strict=True):
                piece.append(probe(features).cpu().numpy())
    yield from (np.concatenate(piece) for piece in pieces)


def _on_device(patches: np.ndarray, rows: np.ndarray, probes: nn.Module) -> Tensor:
    return torch.as_tensor(np.asarray(patches[rows], dtype=np.float32), device=next(probes.parameters()).device)
