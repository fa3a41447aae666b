"""Finds where numbers first became NaN or infinite, by watching the failed step once more."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def first_non_finite(
    model: nn.Module,
    micro_batches: Sequence[Mapping[str, Tensor]],
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> str | None:
    """Finds the first numbers of a step that are not finite.

    The search follows the order in which such numbers spread: inputs, weights, outputs of modules as they are
    computed, then gradients as the backward pass reaches them. The forward pass is taken again, without gradients; the
    gradients are those that the failed step left, so call it before they are cleared. With a sharded model all
    processes call it, and each looks at its parts.

    Args:
        model: The model of the step, with its gradients.
        micro_batches: Its inputs.
        autocast: Makes the context in which the step's forward pass runs.

    Returns:
        A name, such as "the output of predictor.layer.3.mlp"; `None` if all is finite.
    """
    found = [f"the input {name}" for batch in micro_batches for name, value in batch.items() if not _is_finite(value)]
    found += [f"the weight {name}" for name, parameter in model.named_parameters() if not _is_finite(parameter)]
    order: list[str] = []
    broken: list[str] = []
    with _watching(model, order, broken), torch.no_grad(), autocast():
        for batch in micro_batches:  # all of them, whatever was found: other processes may need this one's parts
            model(**batch)
    found += [f"the output of {name}" for name in broken]
    if found:
        return found[0]
    gradients = {
        name.rpartition(".")[0]: name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not _is_finite(parameter.grad)
    }
    for module in reversed(order):  # the backward pass goes the other way
        if module in gradients:
            return f"the gradient of {gradients[module]}"
    return f"the gradient of {next(iter(gradients.values()))}" if gradients else None


@contextlib.contextmanager
def _watching(model: nn.Module, order: list[str], broken: list[str]) -> Iterator[None]:
    """Records the names of modules as they finish, and of those whose output is not finite."""

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            order.append(name)
            if not all(map(_is_finite, _tensors(output))):
                broken.append(name)

        return note

    handles = [module.register_forward_hook(watch(name or "the model")) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _is_finite(tensor: Tensor) -> bool:
    mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not mine.is_floating_point() or bool(torch.isfinite(mine.detach()).all())
