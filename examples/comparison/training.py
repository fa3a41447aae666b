"""The training that all families share: order of images, AdamW, schedules, moving average, clock, memory."""

import copy
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from family import Family
from torch import Generator, Tensor
from torch.profiler import ProfilerActivity, profile

from ijepa_hf.training.schedules import ema_momentum_at, learning_rate_at, weight_decay_at


@dataclass(frozen=True)
class TrainingSettings:
    """What is the same for all families.

    Args:
        batch_size: Images in a step.
        learning_rate: After the warm-up.
        start_learning_rate: At the beginning of the warm-up.
        final_learning_rate: At the end.
        warmup_share: Share of the steps in which the learning rate rises.
        weight_decay: At the beginning; biases and 1-D parameters have none.
        final_weight_decay: At the end.
        ema_momentum: Of moving averages, at the beginning.
        final_ema_momentum: At the end.
    """

    batch_size: int
    learning_rate: float
    start_learning_rate: float
    final_learning_rate: float
    warmup_share: float
    weight_decay: float
    final_weight_decay: float
    ema_momentum: float
    final_ema_momentum: float


@dataclass(frozen=True)
class TrainingResult:
    """What a training says of itself.

    Args:
        num_steps: Steps made.
        loss: Mean over the last tenth of the steps.
        seconds: Of all steps, of `clock`.
    """

    num_steps: int
    loss: float
    seconds: float


def train(
    family: Family, pixels: Tensor, labels: Tensor, num_steps: int, settings: TrainingSettings, seed: int
) -> TrainingResult:
    """Trains a family in place, on images in memory.

    Args:
        family: On its device.
        pixels: uint8 `[n, 3, size, size]`, on the same device.
        labels: int64 `[n]`, on the same device.
        num_steps: Optimiser steps, at least 1; schedules are as long as this.
        settings: The same for all families.
        seed: Of the order of images and of all that is drawn in a step.

    Returns:
        Loss and time.

    Raises:
        ValueError: If there are fewer images than a batch has.
        ArithmeticError: If the loss becomes NaN or infinite.
    """
    steps_per_epoch = len(pixels) // settings.batch_size
    if not steps_per_epoch:
        raise ValueError(f"batch_size={settings.batch_size} must be at most {len(pixels)}, the training images.")
    order, draws = torch.Generator().manual_seed(2 * seed), torch.Generator().manual_seed(2 * seed + 1)
    optimizer = make_optimizer(family)
    losses = []
    family.train()
    begun = clock(pixels.device)
    for step in range(1, num_steps + 1):
        if (step - 1) % steps_per_epoch == 0:
            batches = iter(torch.randperm(len(pixels), generator=order).split(settings.batch_size))
        chosen = next(batches).to(pixels.device)
        values = step_values(step, num_steps, settings)
        losses.append(training_step(family, optimizer, pixels[chosen], labels[chosen], draws, *values))
        if not math.isfinite(losses[-1]):
            raise ArithmeticError(f"the loss of {type(family).__name__} is {losses[-1]} in step {step}.")
    tail = losses[-max(1, num_steps // 10) :]
    return TrainingResult(num_steps, statistics.fmean(tail), clock(pixels.device) - begun)


def step_times(
    families: Mapping[str, Family], pixels: Tensor, labels: Tensor, settings: TrainingSettings, rounds: int = 40
) -> dict[str, float]:
    """Seconds of a training step of each family, measured side by side: in each round every family makes one step.

    Whatever slows the machine down for a while slows all families, so that the ratios hold.

    Args:
        families: By name; left as they are.
        pixels: uint8 `[n, 3, size, size]`, at least a batch, on the families' device.
        labels: int64 `[n]`, on the same device.
        settings: The same for all families.
        rounds: Steps of each family that count, at least 1; two more go before, to warm up.

    Returns:
        Medians over the rounds, of `clock`.
    """
    copies = {name: copy.deepcopy(family).train() for name, family in families.items()}
    optimizers = {name: make_optimizer(family) for name, family in copies.items()}
    pixels, labels = pixels[: settings.batch_size], labels[: settings.batch_size]
    draws, seconds = torch.Generator().manual_seed(0), defaultdict(list)
    for number in range(rounds + 2):
        for name, family in copies.items():
            begun = clock(pixels.device)
            training_step(family, optimizers[name], pixels, labels, draws, settings.learning_rate, 0.0, 1.0)
            if number >= 2:
                seconds[name].append(clock(pixels.device) - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def make_optimizer(family: Family) -> torch.optim.AdamW:
    """AdamW on all that `requires_grad`, in the groups of `ijepa_hf.training.step.make_optimizer`.

    Args:
        family: What is trained.

    Returns:
        The optimiser; learning rate and weight decay are set at each step.
    """
    trained = [(name, value) for name, value in family.named_parameters() if value.requires_grad]
    plain = [value for name, value in trained if value.ndim == 1 or name.endswith("bias")]
    decayed = [value for name, value in trained if not (value.ndim == 1 or name.endswith("bias"))]
    groups = [{"params": decayed, "decays": True}, {"params": plain, "decays": False, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def step_values(step: int, num_steps: int, settings: TrainingSettings) -> tuple[float, float, float]:
    """Learning rate, weight decay and momentum of a step, by the package's schedules.

    Args:
        step: 1 for the first one.
        num_steps: Length of the schedules.
        settings: Where they begin and end.

    Returns:
        The three values.
    """
    learning_rate = learning_rate_at(
        step,
        learning_rate=settings.learning_rate,
        start_learning_rate=settings.start_learning_rate,
        final_learning_rate=settings.final_learning_rate,
        warmup_steps=int(settings.warmup_share * num_steps),
        total_steps=num_steps,
    )
    weight_decay = weight_decay_at(
        step,
        weight_decay=settings.weight_decay,
        final_weight_decay=settings.final_weight_decay,
        total_steps=num_steps,
    )
    momentum = ema_momentum_at(
        step - 1,
        ema_momentum=settings.ema_momentum,
        final_ema_momentum=settings.final_ema_momentum,
        total_steps=num_steps,
    )
    return learning_rate, weight_decay, momentum


def training_step(
    family: Family,
    optimizer: torch.optim.Optimizer,
    pixels: Tensor,
    labels: Tensor,
    draws: Generator,
    learning_rate: float,
    weight_decay: float,
    momentum: float,
) -> float:
    """One optimiser step, then the moving averages.

    Args:
        family: What is trained.
        optimizer: From `make_optimizer`.
        pixels: uint8 `[B, 3, size, size]`.
        labels: int64 `[B]`.
        draws: The source of all draws.
        learning_rate: Of this step.
        weight_decay: Of this step.
        momentum: Of this step.

    Returns:
        The loss before the step.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        if group["decays"]:
            group["weight_decay"] = weight_decay
    loss = family.loss(pixels, labels, draws)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    family.update_average(momentum)
    return loss.item()


def clock(device: torch.device) -> float:
    """Seconds: of a GPU by the wall clock; else of this process's work, which other processes cannot lengthen.

    With one thread, work is the wall clock of an idle core.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def peak_memory_bytes(family: Family, pixels: Tensor, labels: Tensor, settings: TrainingSettings) -> int:
    """The most that tensors take at one time in a training step: weights, averages, optimiser, activations, gradients.

    Counted by torch's allocator, so that it is the same on each machine; neither the images in memory nor the program
    are in it.

    Args:
        family: Left as it is.
        pixels: uint8 `[n, 3, size, size]`, at least a batch.
        labels: int64 `[n]`.
        settings: The batch's size.

    Returns:
        Bytes.
    """
    family = copy.deepcopy(family).train()
    optimizer, draws = make_optimizer(family), torch.Generator().manual_seed(0)
    pixels, labels = pixels[: settings.batch_size], labels[: settings.batch_size]

    def step() -> None:
        training_step(family, optimizer, pixels, labels, draws, settings.learning_rate, 0.0, 1.0)

    step()  # the first step makes the optimiser's state
    kept = [*family.parameters(), *family.buffers()]
    kept += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in kept) + peak_of(step, pixels.device)


def peak_of(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes of tensors, beyond those that were there before, while `work` ran."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    taken = peak = 0
    # every event has what it and nothing inside it took or gave back
    for event in sorted(profiler.events(), key=lambda event: event.time_range.end):
        taken += event.self_cpu_memory_usage
        peak = max(peak, taken)
    return peak
