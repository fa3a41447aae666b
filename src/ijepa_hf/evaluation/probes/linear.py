"""Classifies by linear probes on frozen features: logistic regression, and the paper's sweep of SGD."""

import itertools
import logging
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

from ijepa_hf.evaluation.probes.checks import (
    ProbeTraining,
    check_classes,
    check_features,
    check_test_labels,
    hold_out,
    share_correct,
)

logger = logging.getLogger(__name__)

# Inverse strengths of the L2 penalty (scikit-learn's C). On digits, raw or encoded, the best is 0.1 or 1.
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_PATIENCE = 2  # weaker penalties, each many times slower to fit, that may do no better before the search ends
_MAX_ITERATIONS = 5000
_LEAST_LABELS = 5  # four to fit and one to choose on
_REFERENCE_BATCH = 256  # of the learning rates, as in the paper's sources
_MOMENTUM = 0.9
TRAINING = ProbeTraining(50, _REFERENCE_BATCH, (0.01, 0.05, 0.001), (5e-4, 0.0))


def predict_linear(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Predicts labels of test images by a logistic regression on frozen features.

    Features are standardised with the training images' mean and deviation. The L2 penalty is chosen from six strengths
    on a fifth of the *training* images (drawn by class where every class has two or more), from strong to weak, until
    two in a row do no better than the best before them; the strongest wins a tie. The classifier is then fitted again
    on all training images. The fits run to convergence in float64; should one not converge, scikit-learn's
    ConvergenceWarning reaches the caller.

    Args:
        train_x: [n_train, D] features, finite; n_train at least 5.
        train_y: [n_train] labels of two classes or more.
        test_x: [n_test, D] features, finite.
        seed: of the split that chooses the penalty.

    Returns:
        [n_test] labels, of `train_y`'s dtype.

    Raises:
        ValueError: fewer than five training images or two classes, shapes that do not agree, or features that are not
            finite.

    Source: the linear protocol of the paper (arXiv 2301.08243), appendix A.2, with a convex solver in place of SGD.
    """
    check_features(train_x, train_y, test_x)
    check_classes(train_y, _LEAST_LABELS)
    train_x, train_y = np.asarray(train_x, dtype=np.float64), np.asarray(train_y)
    fit, held_out = hold_out(len(train_x), seed=seed, labels=train_y)

    def score(penalty: float) -> float:
        return _probe(penalty).fit(train_x[fit], train_y[fit]).score(train_x[held_out], train_y[held_out])

    best, most, waited = _PENALTIES[0], -1.0, 0
    for penalty in _PENALTIES:
        reached = score(penalty)
        best, most, waited = (penalty, reached, 0) if reached > most else (best, most, waited + 1)
        if waited == _PATIENCE:
            break
    logger.info("linear probe: C=%g was chosen on %d training images", best, len(held_out))
    return _probe(best).fit(train_x, train_y).predict(np.asarray(test_x, dtype=np.float64))


def linear_accuracy(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, *, seed: int = 0
) -> float:
    """Computes the share of test images that `predict_linear` gets right.

    Args:
        train_x: [n_train, D] features, finite; n_train at least 5.
        train_y: [n_train] labels of two classes or more.
        test_x: [n_test, D] features, finite.
        test_y: [n_test] labels; one that `train_y` lacks counts as wrong.
        seed: of the split that chooses the penalty.

    Returns:
        Top-1 accuracy, 0 to 1.

    Raises:
        ValueError: as `predict_linear`, and for test labels of another number than test images.
    """
    check_test_labels(test_x, test_y)
    return share_correct(predict_linear(train_x, train_y, test_x, seed=seed), test_y)


class _Setting(NamedTuple):
    batch_norm: bool
    learning_rate: float
    weight_decay: float


def predict_linear_sgd(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    *,
    seed: int = 0,
    training: ProbeTraining = TRAINING,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Predicts labels by the paper's linear probe: a sweep of heads trained by SGD, the best one chosen on train.

    Every combination of head (linear, or batch normalisation and linear), learning rate and weight decay is trained
    on four fifths of the training images. The combination that gets most of the other fifth right (the first of
    equals, in the order given, the plain linear head before the other) is trained again on all of them.

    As published: 50 epochs, learning rate divided by 10 after each 15 of them (at other lengths, after each 30 % of
    the epochs), the sweep of three learning rates and two weight decays, both heads. Otherwise than published: SGD
    with Nesterov momentum 0.9 at a batch of 256 instead of LARS at 16,384, because few data sets fill such a batch;
    the choice is made on training images, where the paper takes the best of its validation scores; the batch
    normalisation has no scale and offset of its own, which the linear layer makes superfluous.

    A learning rate is meant for 256 images a step and multiplied by batch size / 256. A step takes `batch_size`
    images, or all where there are fewer; what is left over at the end of an epoch waits for the next shuffle. On a
    few thousand images 50 epochs are few steps: the published protocol then stops early, where `predict_linear` runs
    to the end.

    Args:
        train_x: [n_train, D] features, finite; n_train at least 5.
        train_y: [n_train] labels of two classes or more.
        test_x: [n_test, D] features, finite.
        seed: of the split and of the order of the images.
        training: how heads are trained; `batch_size` 2 or more, learning rates for a batch of 256, weight decays of
            all weights.
        device: where torch trains.

    Returns:
        [n_test] labels, of `train_y`'s dtype. On a CPU the same arguments always give the same labels.

    Raises:
        ValueError: a setting outside its range, fewer than five training images or two classes, shapes that do not
            agree, features that are not finite, or training that diverged with every setting.

    Source: I-JEPA (arXiv 2301.08243), appendix A.2; the scaling by the batch is that of Goyal et al. (arXiv
        1706.02677), section 2.1.
    """
    check_features(train_x, train_y, test_x)
    check_classes(train_y, _LEAST_LABELS)
    if training.batch_size < 2:
        raise ValueError(f"batch_size={training.batch_size} must be at least 2.")
    labels, codes = np.unique(train_y, return_inverse=True)
    features = torch.as_tensor(np.asarray(train_x, dtype=np.float32), device=device)
    targets = torch.as_tensor(codes, device=device)
    settings = [
        _Setting(*made) for made in itertools.product((False, True), training.learning_rates, training.weight_decays)
    ]
    fit, held_out = (torch.as_tensor(rows, device=device) for rows in hold_out(len(codes), seed=seed, labels=codes))

    def trained(rows: Tensor, chosen: list[_Setting]) -> nn.ModuleList:
        return _train_heads(features[rows], targets[rows], len(labels), chosen, training, seed)

    logits = [head(features[held_out]) for head in trained(fit, settings)]
    # A head that diverged has no score, although argmax gives a class for NaN.
    scores = [
        (each.argmax(dim=1) == targets[held_out]).double().mean().item() if each.isfinite().all() else -1.0
        for each in logits
    ]
    best = settings[int(np.argmax(scores))]
    logger.info("linear probe: %s was chosen, %.4f on %d training images", best, max(scores), len(held_out))
    (head,) = trained(torch.arange(len(codes), device=device), [best])
    final = head(torch.as_tensor(np.asarray(test_x, dtype=np.float32), device=device))
    if max(scores) < 0 or not final.isfinite().all():
        raise ValueError(f"the linear probe diverged with learning_rates={training.learning_rates}: give lower ones.")
    return labels[final.argmax(dim=1).cpu().numpy()]


def _train_heads(
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    settings: list[_Setting],
    training: ProbeTraining,
    seed: int,
) -> nn.ModuleList:
    """Trains a head for each setting on the same batches; none influences another, for their losses are summed."""
    heads, groups = nn.ModuleList(), []
    batch_size, epochs = min(training.batch_size, len(features)), training.epochs
    for setting in settings:
        linear = nn.utils.skip_init(nn.Linear, features.shape[1], num_classes)
        nn.init.zeros_(linear.weight)  # the loss is convex: there is nothing to draw
        nn.init.zeros_(linear.bias)
        parts = [nn.BatchNorm1d(features.shape[1], affine=False)] if setting.batch_norm else []
        heads.append(nn.Sequential(*parts, linear))
        rate = setting.learning_rate * batch_size / _REFERENCE_BATCH
        groups.append({"params": linear.parameters(), "lr": rate, "weight_decay": setting.weight_decay})
    heads.to(features.device).train()
    optimizer = torch.optim.SGD(groups, momentum=_MOMENTUM, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.1 ** (10 * epoch // (3 * epochs)))
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(epochs), desc=f"linear probe, {len(settings)} heads", unit="epoch", disable=None):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for rows in order.split(batch_size)[: len(features) // batch_size]:
            batch, wanted = features[rows], targets[rows]
            optimizer.zero_grad()
            torch.stack([nn.functional.cross_entropy(head(batch), wanted) for head in heads]).sum().backward()
            optimizer.step()
        schedule.step()
    return heads.eval().requires_grad_(False)


def _probe(inverse_penalty: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=_MAX_ITERATIONS))
