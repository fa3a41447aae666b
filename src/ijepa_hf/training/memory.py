"""Finds how many images of a micro-batch fit into memory, by trial forward and backward passes."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from ijepa_hf.model.mask_audit import trial_masks
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining
from ijepa_hf.training.setup import RunSetup
from ijepa_hf.training.step import choose_kernels

logger = logging.getLogger(__name__)


class DoesNotFitError(MemoryError):
    """A micro-batch does not fit into memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether an error means that memory ran out, of a GPU or of the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


def largest_micro_batch(
    model: IJepaForPretraining,
    batch_size: int,
    *,
    num_ranks: int = 1,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> int | None:
    """Finds the largest micro-batch that fits, among the divisors of the one that was asked for.

    A trial is a forward and backward pass with the largest masks of the first steps. During a trial, extra memory is
    allocated in the size of AdamW's two moments and, with several ranks, of the buffers in which gradients are
    averaged. Weights stay as they are; gradients are cleared.

    Args:
        model: On its device, not sharded; in training mode, with its checkpointing set.
        batch_size: Images asked for.
        num_ranks: Processes of the run.
        autocast: Makes the context of the forward pass.

    Returns:
        `batch_size` itself or a divisor of it; `None` if not even one image fits.
    """
    for size in (size for size in range(batch_size, 0, -1) if batch_size % size == 0):
        if _fits(model, _inputs(model, size), num_ranks, autocast):
            return size
    return None


def fit_batch(setup: RunSetup, model: IJepaForPretraining) -> RunSetup:
    """Cuts micro-batches until they fit into the memory of all processes, at the same global batch.

    Args:
        setup: The run, on all processes; says the batch that was asked for.
        model: Not sharded; moved to the run's device.

    Returns:
        The run, with more and smaller micro-batches if they did not fit.

    Raises:
        ValueError: If smaller micro-batches would change the run, or cannot be tried.
        DoesNotFitError: If not even one image fits.
    """
    run, accelerator, ranks = setup.run, setup.accelerator, setup.ranks
    if model.config.masking_strategy == "multi_block_official":
        raise ValueError(
            "fit_batch_to_memory=True would change the run: with masking_strategy='multi_block_official' the masks "
            "depend on the batch of each device. Leave it out, and choose --per_device_train_batch_size yourself."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "fit_batch_to_memory=True tries batches on the whole model, which FSDP2 never has in one process. Leave "
            "it out, and choose --per_device_train_batch_size with `ijepa-hf estimate`."
        )
    model = model.to(accelerator.device).train()
    choose_kernels(model, run, accelerator, setup.model_arguments.attn_implementation)
    asked = run.per_device_train_batch_size
    fitting = largest_micro_batch(model, asked, num_ranks=ranks.number, autocast=accelerator.autocast)
    parts = ranks.highest(asked // fitting if fitting else asked + 1)  # all take the same
    if parts > asked:
        raise DoesNotFitError(does_not_fit_message(asked, None, run.gradient_accumulation_steps, accelerator.device))
    if parts > 1:
        logger.warning(
            "per_device_train_batch_size=%d does not fit into memory: taking %d micro-batches of %d, which is the "
            "same global batch.", asked, parts * run.gradient_accumulation_steps, asked // parts,
        )  # fmt: skip
    run = dataclasses.replace(
        run,
        per_device_train_batch_size=asked // parts,
        gradient_accumulation_steps=run.gradient_accumulation_steps * parts,
    )
    return dataclasses.replace(setup, run=run)


def does_not_fit_message(batch_size: int, fitting: int | None, accumulation_steps: int, device: torch.device) -> str:
    """Says what to do where a micro-batch does not fit.

    Args:
        batch_size: Images asked for.
        fitting: What `largest_micro_batch` found.
        accumulation_steps: Micro-batches asked for.
        device: Whose memory it is.

    Returns:
        One line.
    """
    message = f"per_device_train_batch_size={batch_size} does not fit into the memory of {device}; "
    if fitting is None:
        message += "not even 1 image does: use a smaller model,"
    elif fitting == batch_size:  # another program may have had the memory
        message += "it did when tried again with nothing else in it: end what else uses that memory,"
    else:
        message += (
            f"{fitting} does. With --per_device_train_batch_size {fitting} --gradient_accumulation_steps "
            f"{accumulation_steps * batch_size // fitting} the global batch stays what it is; --fit_batch_to_memory "
            "finds both by itself. Or try"
        )
    return f"{message} --selective_checkpointing, --gradient_checkpointing, or --mixed_precision bf16."


def _inputs(model: IJepaForPretraining, size: int) -> dict[str, Tensor]:
    """Makes a micro-batch with the largest masks of some steps."""
    config, device = model.config, model.device
    drawn = trial_masks(config.mask_settings(), size)
    largest = max(drawn, key=lambda masks: masks.context_indices.shape[-1] + masks.target_indices[0].numel())
    pixels = torch.zeros(size, config.num_channels, *config.image_shape, device=device)
    indices = {name: getattr(largest, name).to(device) for name in ("context_indices", "target_indices")}
    return {"pixel_values": pixels, **indices}


def _fits(
    model: IJepaForPretraining,
    inputs: dict[str, Tensor],
    num_ranks: int,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> bool:
    held: list[Tensor] = []
    try:
        for parameter in model.parameters():
            if parameter.requires_grad:
                held += [torch.empty_like(parameter) for _ in range(2 if num_ranks == 1 else 3)]
        with autocast():
            loss = model(**inputs).loss
        loss.backward()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        held.clear()
        for parameter in model.parameters():
            parameter.grad = None
        clear_device_cache(garbage_collection=True)
    return True
