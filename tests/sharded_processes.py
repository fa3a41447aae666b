"""What tests/model/test_sharding.py has two processes do that share a model by FSDP2, and one process by itself."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from tiny import scrambled_model, tiny_batch, tiny_model
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ijepa_hf import IJepaForPretraining
from ijepa_hf.model.sharding import is_sharded, make_fsdp_plugin, whole_model, whole_tensor
from ijepa_hf.recipes.arguments import PretrainingArguments
from ijepa_hf.runs.checkpoints import collect_state, config_fields, read_checkpoint, restore, save_checkpoint
from ijepa_hf.training.activation_checkpointing import enable_gradient_checkpointing
from ijepa_hf.training.plan import StepValues
from ijepa_hf.training.step import ReadyModel, make_optimizer

STEPS, SAVED_AT, BATCH = 20, 10, 8
RUN = PretrainingArguments(learning_rate=1e-3)
# Clips in every step, so that the norm of sharded gradients decides the weights.
MAX_GRAD_NORM = 0.05
WAYS = ("plain", "full checkpointing", "selective checkpointing", "bf16", "eager", "context sets")


def shard_model(model: IJepaForPretraining, mesh: DeviceMesh | None = None) -> None:
    """Leaves each process its part of a model: what accelerate does with `make_fsdp_plugin`, which needs GPUs."""
    for part in (model.ijepa, model.context_encoder, model.predictor):
        for layer in part.layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def take_steps(
    accelerator: Accelerator,
    prepared: torch.nn.Module,
    model: IJepaForPretraining,
    optimizer: torch.optim.Optimizer,
    steps: range,
    accumulation: int = 1,
) -> list[tuple[float, float, float]]:
    """Trains on this process's share of batches that are a function of the step."""
    results = []
    for step in steps:
        whole = tiny_batch(model.config, BATCH, seed=step)
        size = BATCH // accumulation // accelerator.num_processes
        firsts = [
            (micro * accelerator.num_processes + accelerator.process_index) * size for micro in range(accumulation)
        ]
        batches = [{name: tensor[first : first + size] for name, tensor in whole.items()} for first in firsts]
        values = StepValues(1e-3 * min(1.0, (step + 1) / 5), 0.05, 0.9 + 0.005 * step)
        result = ReadyModel(accelerator, model, prepared, optimizer, MAX_GRAD_NORM).step(batches, values)
        results.append((result.loss, result.grad_norm_encoder, result.grad_norm_predictor))
    return results


def fresh_model(way: str) -> IJepaForPretraining:
    """A model with weights far from their first values, set up in one of the `WAYS`."""
    model = scrambled_model(num_context_sets=2 if way == "context sets" else 1).train()
    if way.endswith("checkpointing"):
        enable_gradient_checkpointing(model, selective=way.startswith("selective"))
    if way == "eager":
        model.set_attn_implementation("eager")
    return model


def one_pass(model: IJepaForPretraining, way: str, rank: int = 0, ranks: int = 1) -> dict[str, torch.Tensor]:
    """The loss of this process's share of a batch, and the whole gradients of a backward pass."""
    size = BATCH // ranks
    batch = {name: tensor[rank * size : (rank + 1) * size] for name, tensor in tiny_batch(model.config, BATCH).items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
        loss = model(**batch).loss
    loss.backward()
    gradients = {
        name: whole_tensor(parameter.grad).clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": loss.detach(), **gradients}


def _saved(folder: Path, name: str, tensors: dict[str, torch.Tensor], is_main: bool) -> None:
    if is_main:
        save_file({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, folder / name)


def share_a_model(folder: Path, checkpoint: Path) -> None:
    """As one of the ranks: trains, restores the checkpoint of one process, and leaves its results in the folder."""
    accelerator = Accelerator(cpu=True)
    rank, ranks, is_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    mesh = init_device_mesh("cpu", (ranks,))
    notes: dict[str, Any] = {"ranks": ranks}

    # torch alone: twenty steps, a checkpoint on the way
    model = tiny_model().train()
    shard_model(model, mesh)
    notes["is_sharded"] = is_sharded(model)
    notes["units"] = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    notes["share"] = sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    optimizer = make_optimizer(model, RUN)
    results = take_steps(accelerator, model, model, optimizer, range(SAVED_AT))
    tensors = collect_state(model, optimizer, keep=is_main)
    if is_main:
        save_checkpoint(folder, SAVED_AT, tensors, config=config_fields(model.config), arguments={}, total_limit=1)
    results += take_steps(accelerator, model, model, optimizer, range(SAVED_AT, STEPS))
    notes["results"] = results
    whole = whole_model(model, keep=is_main)
    notes["whole"] = None if whole is None else [is_sharded(whole), whole.training, whole.ijepa.training]
    if whole is not None:
        _saved(folder, "torch.safetensors", whole.state_dict(), is_main)
        features = whole.target_encoder(tiny_batch(whole.config)["pixel_values"]).last_hidden_state
        _saved(folder, "features.safetensors", {"features": features}, is_main)

    # another process's checkpoint, into parts
    model = tiny_model(seed=5).train()
    shard_model(model, mesh)
    optimizer = make_optimizer(model, RUN)
    restore(read_checkpoint(checkpoint), model, optimizer, config_fields(model.config))
    tensors = collect_state(model, optimizer, keep=is_main)
    _saved(folder, "restored_model.safetensors", tensors.model, is_main)
    _saved(folder, "restored_optimizer.safetensors", tensors.optimizer, is_main)
    take_steps(accelerator, model, model, optimizer, range(SAVED_AT, STEPS))
    _saved(folder, "continued.safetensors", collect_state(model, optimizer, keep=is_main).model, is_main)

    for way in WAYS:
        model = fresh_model(way)
        shard_model(model, mesh)
        passed = one_pass(model, way, rank, ranks)
        passed["loss"] = accelerator.reduce(passed["loss"], "mean")
        _saved(folder, f"{way}.safetensors", passed, is_main)

    # accelerate's own path, which it keeps for GPUs: told here that these processes are some
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    accelerator.state.fsdp_plugin = make_fsdp_plugin()
    accelerator.state.distributed_type = DistributedType.FSDP
    model = tiny_model().train()
    prepared, wrapped = accelerator.prepare(model, make_optimizer(model, RUN))
    notes["in_place"] = prepared is model
    notes["accelerate_units"] = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    take_steps(accelerator, prepared, model, wrapped.optimizer, range(STEPS), accumulation=2)
    _saved(folder, "accelerate.safetensors", collect_state(model, wrapped.optimizer, keep=is_main).model, is_main)

    (folder / f"rank{rank}.json").write_text(json.dumps(notes))
    accelerator.end_training()
