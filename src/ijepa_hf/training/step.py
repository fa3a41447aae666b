"""Sets a model up for training and takes one optimiser step: forward and backward pass, clipping, moving average."""

import contextlib
import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ijepa_hf.model.modeling_ijepa import IJepaForPretraining, IJepaForPretrainingOutput
from ijepa_hf.model.sharding import whole_tensor
from ijepa_hf.recipes.arguments import PretrainingArguments
from ijepa_hf.training.activation_checkpointing import enable_gradient_checkpointing
from ijepa_hf.training.plan import StepValues


class NonFiniteLossError(ArithmeticError):
    """Loss or gradient became NaN or infinite; the run stopped before it could spoil the weights."""


@dataclass
class StepResult:
    """Holds the numbers of one optimiser step.

    Args:
        loss: Mean over the global batch.
        grad_norm_encoder: Norm of the context encoder's gradient, before clipping.
        grad_norm_predictor: Norm of the predictor's gradient, before clipping.
        targets: `[B, M, P, D]` of this rank's last micro-batch.
    """

    loss: float
    grad_norm_encoder: float
    grad_norm_predictor: float
    targets: Tensor


# -- setting up ------------------------------------------------------------------------------------------------------


@dataclass
class ReadyModel:
    """Takes optimiser steps with a model that `set_up_model` has prepared.

    Args:
        accelerator: Runs the backward pass and averages over ranks.
        model: The model itself.
        prepared: The model as accelerate runs it: wrapped for DDP, else the model itself.
        optimizer: AdamW.
        max_grad_norm: The norm to which gradients are clipped; `None` clips nothing.
    """

    accelerator: Accelerator
    model: IJepaForPretraining
    prepared: nn.Module
    optimizer: torch.optim.Optimizer
    max_grad_norm: float | None = None

    def step(self, micro_batches: list[dict[str, Tensor]], values: StepValues) -> StepResult:
        """Takes one optimiser step: forward and backward of each micro-batch, AdamW, then the moving average.

        Args:
            micro_batches: `pixel_values` float, `context_indices`, `target_indices`, on the device, of equal size.
            values: Learning rate, weight decay and momentum of this step, and whether only the predictor learns.

        Returns:
            Loss, gradient norms and targets.

        Raises:
            NonFiniteLossError: If loss or gradient is NaN or infinite on any rank; the weights are as they were.
        """
        accelerator, model, optimizer = self.accelerator, self.model, self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = values.learning_rate
            if group["decays"]:
                group["weight_decay"] = values.weight_decay
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last else accelerator.no_sync(self.prepared):
                with accelerator.autocast():  # accelerate puts it around a model by itself, unless that is sharded
                    output: IJepaForPretrainingOutput = self.prepared(**batch)
                assert output.loss is not None
                loss = output.loss / len(micro_batches)
                accelerator.backward(loss)
                total += loss.detach()
        mean = float(accelerator.reduce(total, "mean"))
        if not math.isfinite(mean):
            raise NonFiniteLossError(f"the loss is {mean}")
        assert output.targets is not None
        norms = [float(whole_tensor(_grad_norm(part))) for part in (model.context_encoder, model.predictor)]
        if not all(map(math.isfinite, norms)):  # the same on every rank: gradients are averaged
            raise NonFiniteLossError(f"the gradient norm is {norms[0]} in the encoder, {norms[1]} in the predictor")
        if values.encoder_is_frozen:
            # DDP expects every gradient in every step, so the encoder takes part in the backward pass. Its gradients
            # are dropped afterwards: AdamW makes neither state nor step for a parameter without a gradient.
            for parameter in model.context_encoder.parameters():
                parameter.grad = None
        if self.max_grad_norm is not None:
            accelerator.clip_grad_norm_(self.prepared.parameters(), self.max_grad_norm)
        optimizer.step()
        if not values.encoder_is_frozen:
            model.update_target_encoder(values.ema_momentum)
        return StepResult(mean, norms[0], norms[1], output.targets)

    def release(self) -> None:
        """Frees the model's memory on the device and ends the processes' group, after the last step.

        DDP must not be the last that holds gloo's group. It would free the group with Python's lock held, for which
        gloo's own thread may be waiting, and the process would never end.
        """
        self.prepared = self.model
        self.accelerator.trackers.clear()  # finished by the log, whose end no failing tracker can prevent
        self.accelerator.free_memory()
        self.accelerator.end_training()


def set_up_model(
    model: IJepaForPretraining,
    run: PretrainingArguments,
    accelerator: Accelerator,
    attn_implementation: str | None = None,
) -> ReadyModel:
    """Makes a model ready for training: attention, activation checkpointing, optimiser, device, ranks, train mode.

    Args:
        model: The model, on any device; changed in place.
        run: Says which activations are kept, AdamW's numbers and the clipping.
        accelerator: Says device, precision and ranks.
        attn_implementation: See `choose_kernels`.

    Returns:
        The model with its optimiser, on the accelerator's device.
    """
    choose_kernels(model, run, accelerator, attn_implementation)
    optimizer: torch.optim.Optimizer = make_optimizer(model, run)
    if accelerator.distributed_type == DistributedType.FSDP:
        prepared, wrapped = accelerator.prepare(model, optimizer)  # shards in place; the optimiser gets the shards
        optimizer = wrapped.optimizer  # bare, because `ReadyModel.step` itself drives it
    else:
        prepared = accelerator.prepare(model)
    model.train()
    return ReadyModel(accelerator, model, prepared, optimizer, run.max_grad_norm)


def choose_kernels(
    model: IJepaForPretraining,
    run: PretrainingArguments,
    accelerator: Accelerator,
    attn_implementation: str | None = None,
) -> None:
    """Sets how a model computes attention, and which activations it keeps for the backward pass.

    Args:
        model: The model, changed in place.
        run: Says which activations are kept.
        accelerator: Says device and precision.
        attn_implementation: A name that transformers knows; `None` takes the fastest: `eager` where
            `eager_is_faster` says so, else `sdpa`.
    """
    if attn_implementation is None and eager_is_faster(accelerator.device.type, accelerator.mixed_precision):
        attn_implementation = "eager"
    if attn_implementation is not None:  # else as the model came: sdpa
        model.set_attn_implementation(attn_implementation)
    if run.gradient_checkpointing or run.selective_checkpointing:
        enable_gradient_checkpointing(model, selective=run.selective_checkpointing)


def eager_is_faster(device_type: str, mixed_precision: str) -> bool:
    """Says whether eager attention trains faster than torch's fused one, which it does on a CPU in bf16.

    There the fused backward pass is slow on short sequences; eager trained 1.3 to 1.5 times as fast on a processor
    with bf16 instructions.

    Args:
        device_type: `cpu`, `cuda`, ...
        mixed_precision: `no` or `bf16`.

    Returns:
        Whether it does.
    """
    return device_type == "cpu" and mixed_precision == "bf16"


def make_optimizer(model: IJepaForPretraining, run: PretrainingArguments) -> torch.optim.AdamW:
    """Makes AdamW in the published groups: biases and 1-D parameters do not decay; the (3-D) mask token does.

    Args:
        model: The model. Context encoder and predictor are trained; the target encoder is in no group.
        run: Says betas and epsilon.

    Returns:
        The optimiser. Its groups keep `param_names`; `ReadyModel.step` sets learning rate and decay.
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    plain: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim == 1 or name.endswith("bias")
            (plain if is_plain else decayed).append((name, parameter))
    groups = [{"params": decayed, "decays": True}, {"params": plain, "decays": False, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(run.adam_beta1, run.adam_beta2), eps=run.adam_epsilon, fused=True)


def _grad_norm(module: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
