"""Reads the AdamW state of a published checkpoint."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.recipes.arguments import ModelArguments, argument_values
from ijepa_hf.weights.official_checkpoint import all_finite, cut, finite_number, format_problems, unlike_published
from ijepa_hf.weights.official_names import (
    ADAMW_SLOTS,
    FROZEN_NAMES,
    TRAINED_PARTS,
    Networks,
    official_names,
    optimizer_groups,
    our_names,
)


@dataclass(frozen=True)
class OptimizerState:
    """Holds AdamW's state under our names.

    Args:
        step: Optimiser steps done, the same for every tensor.
        steps_per_epoch: Optimiser steps of an epoch; `None` if they are no whole number, or no epoch is done.
        tensors: Of each trained parameter, `step`, `exp_avg` and `exp_avg_sq`.
        arguments: What the file says of the run, under our names.
    """

    step: int
    steps_per_epoch: int | None
    tensors: dict[str, dict[str, Tensor]]
    arguments: dict[str, Any]


def read_optimizer_state(
    contents: Mapping[str, Any], networks: Networks, config: IJepaConfig, path: Path
) -> OptimizerState:
    """Reads AdamW's state, finds the tensor of each number in it, and cuts joined tensors as the model's are cut.

    Args:
        contents: As `read_contents` returns them.
        networks: As `networks_of` returns them, in the order of the file: that is what the numbers mean.
        config: As `config_from_official` reads it off the networks.
        path: The file, for messages.

    Returns:
        The state. Its moments are the checkpoint's own memory, not copies.

    Raises:
        ValueError: If there is no state; the tensors' order or the optimiser's groups are not the published ones; a
            moment is missing, of the wrong shape or type, or impossible; or the steps do not agree with each other or
            with the epoch. All that is wrong with the state is listed.
    """
    groups = optimizer_groups(networks)
    _check_numbering(contents.get("opt"), groups, networks, config, path)
    opt = contents["opt"]
    members = [member for group in groups for member in group]
    problems: list[str] = []
    steps: dict[float, str] = {}
    owners: dict[int, str] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for number, (part, name) in enumerate(members):
        entry = opt["state"].get(number)
        if name in FROZEN_NAMES:
            problems += [f"{part}.{name} has a state, but is never trained"] if entry is not None else []
            continue
        found = list(_state_problems(entry, networks[part][name], owners))
        problems += [f"{part}.{name}: {problem}" for problem in found]
        if not found:
            steps[float(entry["step"])] = f"{part}.{name}"
            keys = our_names(part, name)
            moments = {slot: cut(entry[slot], len(keys)) for slot in ("exp_avg", "exp_avg_sq")}
            for place, key in enumerate(keys):
                step = torch.tensor(float(entry["step"]))
                tensors[key] = {"step": step, **{slot: pieces[place] for slot, pieces in moments.items()}}
    problems += [
        f"state {number!r} belongs to no tensor" for number in opt["state"] if number not in range(len(members))
    ]
    if len(steps) > 1:
        problems.append("; ".join(f"{name} is at step {step:g}" for step, name in sorted(steps.items())))
    if problems:
        raise ValueError(f"the optimiser's state in {path} does not fit:\n  " + format_problems(problems))
    done = int(next(iter(steps)))
    steps_per_epoch = _steps_per_epoch(contents.get("epoch"), done, path)
    return OptimizerState(done, steps_per_epoch, tensors, _run_arguments(contents, config))


def _check_numbering(
    opt: Any, groups: list[list[tuple[str, str]]], networks: Networks, config: IJepaConfig, path: Path
) -> None:
    """Refuses a file whose tensors or optimiser groups are not in the published order, which the numbers refer to."""
    if not isinstance(opt, Mapping) or not isinstance(opt.get("state"), Mapping) or not opt["state"]:
        raise ValueError(f"{path} holds no state of an optimiser to go on from; convert it without with_optimizer.")
    names = official_names(config)
    if any(list(networks[part]) != names[part] for part in TRAINED_PARTS):
        raise ValueError(
            f"the tensors in {path} are not in the order in which published code writes them, so it is not known "
            "which of them a numbered state belongs to; convert it without with_optimizer."
        )
    sizes = [len(group) for group in groups]
    expected = [list(range(sum(sizes[:place]), sum(sizes[: place + 1]))) for place in range(len(sizes))]
    found = opt.get("param_groups")
    if (
        not isinstance(found, list)
        or [group.get("params") if isinstance(group, Mapping) else None for group in found] != expected
    ):
        raise ValueError(
            f"the optimiser in {path} does not have the published groups (sizes {sizes}: encoder and predictor "
            "decayed, encoder and predictor not decayed); convert it without with_optimizer."
        )


def _state_problems(entry: Any, weight: Tensor, owners: dict[int, str]) -> Iterator[str]:
    if not isinstance(entry, Mapping) or set(entry) != set(ADAMW_SLOTS):
        found = ", ".join(map(str, entry)) if isinstance(entry, Mapping) else "no state"
        yield f"has {found}, where AdamW keeps {', '.join(ADAMW_SLOTS)}"
        return
    step = entry["step"]
    is_number = isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel() == 1)
    if not is_number or not float(step) >= 1 or float(step) != round(float(step)):
        yield "step is no positive whole number"
    for slot in ("exp_avg", "exp_avg_sq"):
        problem = unlike_published(entry[slot], owners)
        if problem is not None:
            yield f"{slot} {problem}"
        elif entry[slot].shape != weight.shape:
            yield f"{slot} has shape {list(entry[slot].shape)}, the weight {list(weight.shape)}"
        elif not all_finite(entry[slot]) or (slot == "exp_avg_sq" and float(entry[slot].min()) < 0):
            yield f"{slot} has NaN, infinite or impossible values"
        else:
            owners[entry[slot].untyped_storage().data_ptr()] = slot


def _steps_per_epoch(epoch: Any, step: int, path: Path) -> int | None:
    """Returns the optimiser steps in an epoch; `None` if they are no whole number, or no epoch is done.

    `epoch` in a file is the number of epochs that are done (the number in the file's *name* is one higher). A file
    that `convert_to_official` made of a run before its first epoch's end has 0. Under a gradient scaler some steps
    may have been skipped, which the optimiser does not count.
    """
    if not isinstance(epoch, int) or isinstance(epoch, bool) or not 0 <= epoch <= step:
        raise ValueError(
            f"{path} says epoch={epoch!r}, but its optimiser is at step {step}; an epoch has at least one step, so "
            "the two do not belong together."
        )
    return step // epoch if epoch and step % epoch == 0 else None


def _run_arguments(contents: Mapping[str, Any], config: IJepaConfig) -> dict[str, Any]:
    model = argument_values(ModelArguments().resolved(config))
    group = contents["opt"]["param_groups"][0]
    batch_size, world_size = finite_number(contents.get("batch_size")), finite_number(contents.get("world_size"))
    betas = group.get("betas")
    known = {
        "learning_rate": finite_number(contents.get("lr")),
        "per_device_train_batch_size": batch_size,
        "global_batch_size": batch_size * world_size if batch_size and world_size else None,
        "adam_beta1": finite_number(betas[0]) if isinstance(betas, list | tuple) and len(betas) == 2 else None,
        "adam_beta2": finite_number(betas[1]) if isinstance(betas, list | tuple) and len(betas) == 2 else None,
        "adam_epsilon": finite_number(group.get("eps")),
    }
    return model | {name: value for name, value in known.items() if value is not None}
