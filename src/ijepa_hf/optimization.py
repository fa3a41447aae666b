"""One optimiser step: the groups of AdamW, forward and backward pass, clipping, the moving average."""

import contextlib
import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ijepa_hf.arguments import PretrainingArguments
from ijepa_hf.modeling_ijepa import IJepaForPretraining, IJepaForPretrainingOutput
from ijepa_hf.plan import StepValues
from ijepa_hf.sharding import whole_tensor


class NonFiniteLossError(ArithmeticError):
    """Loss or gradient became NaN or infinite; the run stopped before it could spoil the weights."""


def make_optimizer(model: IJepaForPretraining, run: PretrainingArguments) -> torch.optim.AdamW:
    """AdamW in the published groups: biases and 1-D parameters do not decay; the (3-D) mask token does.

    Args:
        model: Whose context encoder and predictor are trained; the target encoder is in no group.
        run: Betas and epsilon.

    Returns:
        The optimiser; its groups keep `param_names`, learning rate and decay are set at each step.
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    plain: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim == 1 or name.endswith("bias")
            (plain if is_plain else decayed).append((name, parameter))
    groups = [{"params": decayed, "decays": True}, {"params": plain, "decays": False, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(run.adam_beta1, run.adam_beta2), eps=run.adam_epsilon, fused=True)


@dataclass
class StepResult:
    """What came of one optimiser step.

    Args:
        loss: Mean over the global batch.
        grad_norm_encoder: Of the context encoder, before clipping.
        grad_norm_predictor: Of the predictor, before clipping.
        targets: `[B, M, P, D]` of this rank's last micro-batch.
    """

    loss: float
    grad_norm_encoder: float
    grad_norm_predictor: float
    targets: Tensor


def training_step(
    accelerator: Accelerator,
    prepared: nn.Module,
    model: IJepaForPretraining,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[dict[str, Tensor]],
    values: StepValues,
    *,
    max_grad_norm: float | None = None,
) -> StepResult:
    """One optimiser step: forward and backward of each micro-batch, AdamW, then the moving average.

    Args:
        accelerator: Runs the backward pass and averages over ranks.
        prepared: The model as `accelerator.prepare` returned it.
        model: The model inside.
        optimizer: From `make_optimizer`.
        micro_batches: `pixel_values` float, `context_indices`, `target_indices`, on the device, of equal size.
        values: Learning rate, weight decay and momentum of this step, and whether only the predictor learns.
        max_grad_norm: Clip to this norm; `None` is off.

    Returns:
        Loss, gradient norms and targets.

    Raises:
        NonFiniteLossError: If loss or gradient is NaN or infinite on any rank; the weights are as they were before.
    """
    for group in optimizer.param_groups:
        group["lr"] = values.learning_rate
        if group["decays"]:
            group["weight_decay"] = values.weight_decay
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        with contextlib.nullcontext() if last else accelerator.no_sync(prepared):
            with accelerator.autocast():  # accelerate puts it around a model by itself, but not around a sharded one
                output: IJepaForPretrainingOutput = prepared(**batch)
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
        # Dropped and not left out of the backward pass: DDP expects every gradient in every step, and with one it
        # drops out, AdamW makes no state and no step for a parameter.
        for parameter in model.context_encoder.parameters():
            parameter.grad = None
    if max_grad_norm is not None:
        accelerator.clip_grad_norm_(prepared.parameters(), max_grad_norm)
    optimizer.step()
    if not values.encoder_is_frozen:
        model.update_target_encoder(values.ema_momentum)
    return StepResult(mean, norms[0], norms[1], output.targets)


def _grad_norm(module: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def eager_is_faster(device_type: str, mixed_precision: str) -> bool:
    """Whether eager attention trains faster than torch's fused one: on a CPU in bf16.

    There the fused backward pass is slow on short sequences; eager trained 1.3 to 1.5 times as fast on a processor
    with bf16 instructions.

    Args:
        device_type: `cpu`, `cuda`, ...
        mixed_precision: `no` or `bf16`.

    Returns:
        The answer.
    """
    return device_type == "cpu" and mixed_precision == "bf16"


def set_attention(model: IJepaForPretraining, attn_implementation: str | None, accelerator: Accelerator) -> None:
    """Chooses how attention is computed.

    Args:
        model: The model.
        attn_implementation: As transformers names it; `None` takes what is fastest: `eager` where
            `eager_is_faster` says so, else `sdpa`.
        accelerator: Says device and precision.
    """
    if attn_implementation is None:
        if not eager_is_faster(accelerator.device.type, accelerator.mixed_precision):
            return  # as the model came: sdpa
        attn_implementation = "eager"
    model.set_attn_implementation(attn_implementation)
