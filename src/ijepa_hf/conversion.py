"""Published I-JEPA checkpoints (`*.pth.tar`) into this package's model folder.

One table of names (`NAMES`) says where each tensor goes; everything else follows from it. A checkpoint holds the
context encoder, the target encoder and the predictor; all three are carried over, nothing is loaded in part. The
file stores no architecture: width, depth, MLP width, patch and grid follow from shapes, the number of heads from the
published sizes.

The file is unpickled with `weights_only=True`: no code in it is run.
"""

import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from torch import Tensor

from ijepa_hf.arguments import IMAGENET_MEAN, IMAGENET_STD
from ijepa_hf.configuration_ijepa import IJepaConfig
from ijepa_hf.export import export_model, write_atomically
from ijepa_hf.modeling_ijepa import IJepaForPretraining, sincos_position_table

# published name -> ours, for `weight` and `bias` alike; three names on the right: the tensor is cut in three along its
# first axis; `*` stands for the layer's number
_BLOCK = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
ENCODER_NAMES: dict[str, tuple[str, ...]] = {
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "pos_embed": ("embeddings.position_embeddings",),
    **{f"blocks.*.{theirs}": tuple(f"layers.*.{name}" for name in ours) for theirs, ours in _BLOCK.items()},
    "norm": ("layernorm",),
}
PREDICTOR_NAMES: dict[str, tuple[str, ...]] = {
    "predictor_embed": ("embed",),
    "mask_token": ("mask_token",),
    "predictor_pos_embed": ("position_embeddings",),
    **{f"predictor_blocks.*.{theirs}": tuple(f"layers.*.{name}" for name in ours) for theirs, ours in _BLOCK.items()},
    "predictor_norm": ("layernorm",),
    "predictor_proj": ("project",),
}
# part of the checkpoint -> part of our model, and its names
PARTS = {
    "target_encoder": ("ijepa", ENCODER_NAMES),
    "encoder": ("context_encoder", ENCODER_NAMES),
    "predictor": ("predictor", PREDICTOR_NAMES),
}
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # encoder width -> heads
# Published training averages the (constant) target table too, which rounds: up to 2e-7 in six steps.
_POSITION_TOLERANCE = 1e-3


def convert(checkpoint: str | Path, output_dir: str | Path, *, num_attention_heads: int | None = None) -> str:
    """Converts a published checkpoint into a model folder that stock transformers loads.

    Args:
        checkpoint: The `.pth.tar` file.
        output_dir: Folder to write; must be missing or empty.
        num_attention_heads: Heads of both networks; needed only where the encoder is no published size.

    Returns:
        A few lines for the user: what was found and how to load it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not such a checkpoint, a tensor is missing, unexpected or of the wrong shape, or the
            folder is not empty. Nothing is written then.
    """
    source, target = Path(checkpoint), Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output_dir={str(target)!r} is not an empty folder; choose another.")
    contents = read_official_checkpoint(source)
    model = model_from_official(contents, num_attention_heads=num_attention_heads)
    export_model(model, target, step=0, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    write_atomically(target / "README.md", lambda path: path.write_text(_card(model.config, source), "utf-8"))
    config = model.config
    return (
        f"{source.name}: width {config.hidden_size}, depth {config.num_hidden_layers}, "
        f"{config.num_attention_heads} heads, "
        f"{config.image_size} px, patch {config.patch_size}; predictor {config.predictor_num_hidden_layers} x "
        f"{config.predictor_hidden_size}\n"
        f"encoder for everyone:  AutoModel.from_pretrained({str(target)!r})\n"
        f"both encoders and the predictor:  IJepaForPretraining.from_pretrained({str(target)!r})\n"
        "licence: weights of published checkpoints stay CC BY-NC 4.0"
    )


def read_official_checkpoint(path: Path) -> dict[str, dict[str, Tensor]]:
    """Reads the three networks of a checkpoint.

    Args:
        path: The `.pth.tar` file.

    Returns:
        `encoder`, `target_encoder` and `predictor`, each names to tensors, without the `module.` prefix.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read without running code, or a network is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={str(path)!r}: there is no such file.")
    try:
        # memory-mapped where the format allows it, so that optimiser state costs nothing
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"checkpoint={str(path)!r} cannot be read as a published I-JEPA checkpoint (damaged, or it holds code, "
            f"which is never run): {reason}"
        ) from error
    missing = [
        part for part in PARTS if not isinstance(contents, Mapping) or not isinstance(contents.get(part), Mapping)
    ]
    if missing:
        found = sorted(map(str, contents)) if isinstance(contents, Mapping) else type(contents).__name__
        raise ValueError(f"checkpoint={str(path)!r} lacks {', '.join(missing)}; it holds {found}.")
    return {
        part: {str(name).removeprefix("module."): tensor for name, tensor in contents[part].items()} for part in PARTS
    }


def model_from_official(
    contents: Mapping[str, Mapping[str, Tensor]], *, num_attention_heads: int | None = None
) -> IJepaForPretraining:
    """Makes a model of the three networks of a checkpoint.

    Args:
        contents: As `read_official_checkpoint` returns them.
        num_attention_heads: Heads of both networks; needed only where the encoder is no published size.

    Returns:
        The model in eval mode, every tensor equal to the checkpoint's.

    Raises:
        ValueError: If a tensor is missing, unexpected, or of the wrong shape; all are listed.
    """
    config = config_from_official(contents, num_attention_heads=num_attention_heads)
    state: dict[str, Tensor] = {}
    problems: list[str] = []
    for part, (ours, names) in PARTS.items():
        for name, tensor in contents[part].items():
            translated = translate(name, names)
            if translated is None:
                problems.append(f"{part}.{name} is unexpected")
                continue
            pieces = tensor.chunk(len(translated)) if len(translated) > 1 else (tensor,)
            state |= {f"{ours}.{key}": piece for key, piece in zip(translated, pieces, strict=True)}
    with torch.device("meta"):
        model = IJepaForPretraining(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    problems += [f"{name} is missing" for name in sorted(expected.keys() - state.keys())]
    problems += [f"{name} is unexpected" for name in sorted(state.keys() - expected.keys())]
    problems += [
        f"{name} has shape {list(tensor.shape)}, expected {list(expected[name])}"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name]
    ]
    problems += _misplaced_tables(state, config)
    if problems:
        raise ValueError("the checkpoint does not fit; nothing was loaded:\n  " + "\n  ".join(problems))
    model.load_state_dict(state, assign=True)
    for parameter in model.context_encoder.parameters():
        parameter.requires_grad_(True)
    model.ijepa.requires_grad_(False)
    return model.eval()


def config_from_official(
    contents: Mapping[str, Mapping[str, Tensor]], *, num_attention_heads: int | None = None
) -> IJepaConfig:
    """Reads the architecture off the shapes.

    Args:
        contents: As `read_official_checkpoint` returns them.
        num_attention_heads: Heads of both networks; looked up among the published sizes if not given.

    Returns:
        The configuration.

    Raises:
        ValueError: If a telling tensor is missing, the grid is no square, or the heads are not known.
    """
    encoder, predictor = contents["target_encoder"], contents["predictor"]
    telling = {
        "target_encoder": ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"),
        "predictor": ("predictor_embed.weight", "predictor_blocks.0.mlp.fc1.weight"),
    }
    lacking = [f"{part}.{name}" for part, names in telling.items() for name in names if name not in contents[part]]
    if lacking:
        raise ValueError(f"the checkpoint lacks {', '.join(lacking)}, which say what the architecture is.")
    width, channels, patch_height, patch_width = encoder["patch_embed.proj.weight"].shape
    side = math.isqrt(encoder["pos_embed"].shape[1])
    if side * side != encoder["pos_embed"].shape[1]:
        raise ValueError(f"the position table has {encoder['pos_embed'].shape[1]} rows, which is no square grid.")
    heads = num_attention_heads or PUBLISHED_HEADS.get(width)
    if heads is None:
        raise ValueError(
            f"an encoder of width {width} is no published size, and the file does not say its number of heads: add "
            "--num_attention_heads."
        )
    square = patch_height == patch_width
    predictor_width = predictor["predictor_embed.weight"].shape[0]
    return IJepaConfig(
        image_size=side * patch_height if square else [side * patch_height, side * patch_width],
        patch_size=patch_height if square else [patch_height, patch_width],
        num_channels=channels,
        hidden_size=width,
        num_hidden_layers=_depth(encoder, "blocks"),
        num_attention_heads=heads,
        intermediate_size=encoder["blocks.0.mlp.fc1.weight"].shape[0],
        qkv_bias="blocks.0.attn.qkv.bias" in encoder,
        predictor_hidden_size=predictor_width,
        predictor_num_hidden_layers=_depth(predictor, "predictor_blocks"),
        patch_init_std=0.02,
    )


def translate(name: str, names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Our names of a published tensor.

    Args:
        name: E.g. `blocks.3.attn.qkv.weight`.
        names: `ENCODER_NAMES` or `PREDICTOR_NAMES`.

    Returns:
        One or three names, or `None` where the table has none.
    """
    layer = re.search(r"\.(\d+)\.", name)
    pattern = name.replace(layer[0], ".*.", 1) if layer else name
    stem, _, kind = pattern.rpartition(".")
    if pattern in names:
        stem, suffix = pattern, ""
    elif stem in names and kind in ("weight", "bias"):
        suffix = f".{kind}"
    else:
        return None
    number = layer[1] if layer else ""
    return tuple(ours.replace("*", number) + suffix for ours in names[stem])


def _depth(state: Mapping[str, Tensor], blocks: str) -> int:
    return 1 + max(int(match[1]) for name in state if (match := re.match(rf"{blocks}\.(\d+)\.", name)))


def _misplaced_tables(state: Mapping[str, Tensor], config: IJepaConfig) -> Iterator[str]:
    """A table that is not the fixed sin-cos one means another layout, which loading would hide."""
    for name, table in state.items():
        if not name.endswith("position_embeddings"):
            continue
        expected = sincos_position_table(table.shape[-1], config.grid_size)
        if table.shape != expected.shape or float((table - expected).abs().max()) > _POSITION_TOLERANCE:
            yield f"{name} is not the fixed sin-cos table of a {config.grid_size[0]}x{config.grid_size[1]} grid"


def _card(config: IJepaConfig, source: Path) -> str:
    data = ModelCardData(
        license="cc-by-nc-4.0",
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["ijepa", "jepa", "self-supervised-learning", "vision"],
    )
    return f"""---
{data.to_yaml()}
---

# I-JEPA, converted from `{source.name}`

The target encoder (root), and both encoders with the predictor (`pretraining/`), of a checkpoint published with
[I-JEPA](https://arxiv.org/abs/2301.08243). Every tensor is the checkpoint's. Images of {config.image_shape[0]}x\
{config.image_shape[1]} pixels, patches of {config.patch_shape[0]}x{config.patch_shape[1]}, ImageNet mean and standard
deviation. The weights keep the licence of the original, CC BY-NC 4.0.
"""
