"""Shards models with FSDP2, so that each process holds a part, and gathers whole tensors and models.

The units are fixed here and not in accelerate's configuration, because the model reads some weights directly: each
transformer layer is a unit that is gathered when it runs, and all else (embeddings, the last norms, the predictor's
projections) is one unit with the root.
"""

import os

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, is_torch_version, str_to_bool
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from ijepa_hf.model.encoder_ijepa import IJepaLayer
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining

# Settings of accelerate's launcher that would change what a run does, and what is there instead.
_REFUSED = {
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "use --gradient_checkpointing True instead"),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "the moving average and saving are not made for it"),
}


@torch.no_grad()
def whole_tensor(tensor: Tensor) -> Tensor:
    """Gathers a whole tensor; all processes that hold a part of a sharded one must call this together.

    Args:
        tensor: Any tensor.

    Returns:
        The tensor itself, detached; or a sharded one's values, gathered, on its device.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def is_sharded(model: nn.Module) -> bool:
    """Returns whether this process holds only parts of a model's parameters; the same in all processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def make_fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """Makes the plugin by which accelerate shards the model, if its launch configuration asks for sharding.

    Weights are gathered and gradients averaged in float32, and bf16 comes from autocast around the forward pass, as
    without sharding: so values do not depend on how a model is spread. accelerate's own way, weights gathered in bf16,
    halves the traffic, but would sum the residual stream, the gradients and the loss in bf16.

    Returns:
        The plugin, or `None` if the configuration does not ask for sharding.

    Raises:
        ValueError: If the configuration asks for what this package cannot do with a sharded model.
    """
    if not _is_on("ACCELERATE_USE_FSDP"):
        return None
    if is_torch_version("<", "2.7"):
        raise ValueError(
            f"FSDP2 needs torch 2.7 or newer, and this is {torch.__version__}; train with DDP, or upgrade."
        )
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"fsdp_version={version} in accelerate's configuration is not supported, because its parameters lose "
            "their names; write fsdp_version: 2, as in scripts/accelerate/fsdp2_1_node_8_gpus.yaml."
        )
    for variable, (name, reason) in _REFUSED.items():
        if _is_on(variable):
            raise ValueError(
                f"{name}=true in accelerate's configuration is not supported: {reason}; write {name}: false."
            )
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        # Not all of `_no_split_modules`: accelerate makes a unit of the input embedding by itself, and torch refuses
        # one inside another that was made before.
        transformer_cls_names_to_wrap=[IJepaLayer.__name__],
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_ram_efficient_loading=False,  # all processes draw or read the same weights
        state_dict_type="FULL_STATE_DICT",
    )


def whole_model(
    model: IJepaForPretraining, keep: bool, device: torch.device | str | None = None
) -> IJepaForPretraining | None:
    """Gathers a model with all its weights in one process, for scores, measurements and pictures.

    All processes that hold a part of a sharded model must call this together.

    Args:
        model: Sharded, or not.
        keep: Whether this process wants the whole; another only helps to gather it.
        device: Device of the copy; that of the model if not given.

    Returns:
        A copy that is not sharded, in the mode of the model (train or eval), its target encoder frozen; `None` where
        `keep` is false. A model that is not sharded is returned itself.
    """
    if not is_sharded(model):
        return model
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():  # one by one: a process that keeps none needs room for one
        whole = whole_tensor(tensor)
        if keep:
            weights[name] = whole.to(device) if isinstance(tensor, DTensor) else whole.to(device, copy=True)
    if not keep:
        return None
    with torch.device("meta"):  # no weights are drawn
        copy = IJepaForPretraining(model.config)
    copy.load_state_dict(weights, assign=True)
    copy.set_attn_implementation(model.config._attn_implementation)
    return copy.train(model.training)


def _is_on(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false")))
