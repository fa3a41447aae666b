"""Translates names of parameters between published checkpoints and ours."""

import re
from collections.abc import Mapping

from torch import Tensor

from ijepa_hf.model.configuration_ijepa import IJepaConfig

PUBLISHED_LICENSE = "cc-by-nc-4.0"

PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # encoder width -> heads

PUBLISHED_LAYER_NORM_EPS = 1e-6

PUBLISHED_PATCH_INIT_STD = 0.02

PUBLISHED_MASKING_STRATEGY = "multi_block_official"

Networks = Mapping[str, Mapping[str, Tensor]]  # part of the checkpoint -> name, without its prefix -> tensor

_BLOCK = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}


def _with_weight_and_bias(modules: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {
        f"{theirs}.{kind}": tuple(f"{name}.{kind}" for name in ours)
        for theirs, ours in modules.items()
        for kind in ("weight", "bias")
    }


# published name -> ours, in the order of the published files; three names on the right: the tensor is cut in three
# along its first axis; `*` stands for the layer's number
ENCODER_NAMES: dict[str, tuple[str, ...]] = {
    "pos_embed": ("embeddings.position_embeddings",),
    **_with_weight_and_bias(
        {
            "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
            **{f"blocks.*.{theirs}": tuple(f"layers.*.{name}" for name in ours) for theirs, ours in _BLOCK.items()},
            "norm": ("layernorm",),
        }
    ),
}

PREDICTOR_NAMES: dict[str, tuple[str, ...]] = {
    "mask_token": ("mask_token",),
    "predictor_pos_embed": ("position_embeddings",),
    **_with_weight_and_bias(
        {
            "predictor_embed": ("embed",),
            **{
                f"predictor_blocks.*.{theirs}": tuple(f"layers.*.{name}" for name in ours)
                for theirs, ours in _BLOCK.items()
            },
            "predictor_norm": ("layernorm",),
            "predictor_proj": ("project",),
        }
    ),
}

# part of the checkpoint -> part of our model, and its names
PARTS = {
    "encoder": ("context_encoder", ENCODER_NAMES),
    "predictor": ("predictor", PREDICTOR_NAMES),
    "target_encoder": ("ijepa", ENCODER_NAMES),
}

TRAINED_PARTS = ("encoder", "predictor")

# the numbers beside the networks
SCALARS = ("epoch", "loss", "batch_size", "world_size", "lr")

NAME_PREFIX = "module."  # of every published name: the networks were wrapped for distributed training

FROZEN_NAMES = ("pos_embed", "predictor_pos_embed")  # in the optimiser's groups, but never given a gradient or a state

ADAMW_SLOTS = ("step", "exp_avg", "exp_avg_sq")


def translate(name: str, names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Translates the published name of a tensor into ours.

    Args:
        name: E.g. `blocks.3.attn.qkv.weight`.
        names: `ENCODER_NAMES` or `PREDICTOR_NAMES`.

    Returns:
        One or three names, or `None` if the table has none.
    """
    layer = re.search(r"\.([0-9]+)\.", name)
    pattern = name.replace(layer[0], ".*.", 1) if layer else name
    if pattern not in names or (layer is None and "*" in name):
        return None
    return tuple(ours.replace("*", layer[1] if layer else "") for ours in names[pattern])


def our_names(part: str, name: str) -> list[str]:
    """Returns our full names of a published tensor.

    Args:
        part: Of the file: `encoder`, `predictor` or `target_encoder`.
        name: In that part, without the `module.` prefix.

    Returns:
        Full names, such as `context_encoder.layernorm.bias`: one, three where the tensor is cut, none where the table
        has none.
    """
    ours, names = PARTS[part]
    return [f"{ours}.{key}" for key in translate(name, names) or ()]


def official_names(config: IJepaConfig) -> dict[str, list[str]]:
    """Returns the names in a published file of this architecture, in the order of its modules and optimiser.

    Args:
        config: The architecture.

    Returns:
        For each part of the file its names, without the `module.` prefix.
    """
    depths = {"encoder": config.num_hidden_layers, "target_encoder": config.num_hidden_layers}
    depths["predictor"] = config.predictor_num_hidden_layers
    found = {}
    for part, (_, names) in PARTS.items():
        patterns = [name for name in names if config.qkv_bias or not name.endswith("qkv.bias")]
        blocks = [name for name in patterns if "*" in name]
        first = patterns.index(blocks[0])
        layers = [name.replace("*", str(layer)) for layer in range(depths[part]) for name in blocks]
        found[part] = patterns[:first] + layers + patterns[first + len(blocks) :]
    return found


def optimizer_groups(networks: Networks) -> list[list[tuple[str, str]]]:
    """Returns the tensors of each group of the published optimiser; its state numbers them in this order.

    Encoder decayed, predictor decayed, encoder not decayed, predictor not decayed; biases and 1-D tensors do not
    decay. The frozen position tables take part in the numbering and have no state.

    Args:
        networks: As `read_official_checkpoint` returns them; order and dimensions count, values do not.

    Returns:
        Four lists of (part, name).
    """

    def members(part: str, decays: bool) -> list[tuple[str, str]]:
        return [
            (part, name)
            for name, tensor in networks[part].items()
            if decays == ("bias" not in name and tensor.ndim != 1)
        ]

    return [members(part, decays) for decays in (True, False) for part in TRAINED_PARTS]
