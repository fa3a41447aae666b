"""Recomputes activations in the backward pass, so that a step takes less memory."""

from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ijepa_hf.model.modeling_ijepa import IJepaForPretraining


def enable_gradient_checkpointing(model: IJepaForPretraining, *, selective: bool = False) -> None:
    """Recomputes activations in the backward pass, in the context encoder and the predictor.

    Args:
        model: The model; the target encoder has no backward pass.
        selective: Recompute only what is cheap (layer norms, the activation function, sums); keep the results of
            matrix products and of attention.

    Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", arXiv 2205.05198.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _choose_kept_results)
    # transformers renamed it on the way to version 6
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


_PRODUCTS = ("mm", "addmm")
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


def _choose_kept_results(_context: Any, operator: Any, *arguments: Any, **_keywords: Any) -> CheckpointPolicy:
    """Keeps query, key, value, the results of attention, and the MLP's inner rows before their activation."""
    name = str(operator).split(".")[1]  # such as "aten.addmm.default"
    keep = name in _ATTENTION
    if name in _PRODUCTS:
        rows, weight = arguments[-2:]
        keep = weight.shape[1] >= rows.shape[1]  # the MLP's narrowing product is not needed: its input is
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
