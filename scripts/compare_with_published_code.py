"""Compares a published checkpoint, as this package reads it, with a checkout of the published I-JEPA code.

    python scripts/compare_with_published_code.py IN1K-vit.h.14-300e.pth.tar path/to/ijepa

Both sides compute the same two random images and masks in float32. The published code is not part of this project. It
runs in a process of its own, with your rights and without environment variables that hold a token: name only a
checkout that you trust. Prints the comparison as JSON; ends with an error where values differ.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.masking import draw_masks
from ijepa_hf.weights.official_checkpoint import model_from_official, read_official_checkpoint

PARITY_TOLERANCE = 1e-4  # of the largest value: float32 sums in another order; a wrong head or layer is off by tenths
_PARITY_IMAGES = 2


def compare(source: Path, checkout: Path, *, num_attention_heads: int | None = None) -> dict[str, Any]:
    """Runs both networks of a checkpoint, ours and the published ones, on two random images.

    Args:
        source: The `.pth.tar` file.
        checkout: Folder of the published code. Its code is run.
        num_attention_heads: Heads of both networks; needed only where the encoder is no published size.

    Returns:
        `images` (their shape), `dtype`, and `outputs`: for the context encoder, of whole images and of the context
        only, the target encoder, and the predictor, `largest_difference`, the `tolerance` (`PARITY_TOLERANCE` of the
        largest value, or of 1 if that is smaller) and `largest_value`.

    Raises:
        FileNotFoundError: If there is no such file, or the checkout lacks the networks.
        ValueError: If the code cannot be run with this file, or an output has another shape or differs by more.
    """
    if not (checkout / "src" / "models" / "vision_transformer.py").is_file():
        raise FileNotFoundError(
            f"checkout={str(checkout)!r} has no src/models/vision_transformer.py; name the folder of a checkout of "
            "facebookresearch/ijepa."
        )
    model = model_from_official(read_official_checkpoint(source), num_attention_heads=num_attention_heads)
    config = model.config
    masks = draw_masks(config.mask_settings(), _PARITY_IMAGES, np.random.Generator(np.random.Philox(0)))
    shape = (_PARITY_IMAGES, config.num_channels, *config.image_shape)
    inputs = {
        "pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        "context_indices": masks.context_indices,
        "target_indices": masks.target_indices,
    }
    with tempfile.TemporaryDirectory() as scratch:
        theirs = _run_published_code(checkout.resolve(), source, config, inputs, Path(scratch))
    with torch.no_grad():
        context = model.context_encoder(inputs["pixel_values"], context_indices=inputs["context_indices"])
        ours = {
            "encoder": model.context_encoder(inputs["pixel_values"]).last_hidden_state,
            "encoder_of_context": context.last_hidden_state,
            "target_encoder": model.ijepa(inputs["pixel_values"]).last_hidden_state,
            "predictor": model.predict(context.last_hidden_state, inputs["context_indices"], inputs["target_indices"]),
        }
    outputs = {}
    for name, value in ours.items():
        if theirs[name].shape != value.shape:
            raise ValueError(f"{name}: the published code gives {list(theirs[name].shape)}, ours {list(value.shape)}.")
        largest = float(theirs[name].abs().max())
        difference = float((theirs[name] - value).abs().max())
        tolerance = PARITY_TOLERANCE * max(1.0, largest)
        outputs[name] = {"largest_difference": difference, "tolerance": tolerance, "largest_value": largest}
    wrong = [f"{name} by {it['largest_difference']:.3g}" for name, it in outputs.items() if not _within(it)]
    if wrong:
        raise ValueError(
            f"checkout={str(checkout)!r} computes other values than ours: {', '.join(wrong)}, where "
            f"{PARITY_TOLERANCE:g} of the largest value is allowed. Are num_attention_heads="
            f"{config.num_attention_heads} those of the model?"
        )
    return {"images": list(shape), "dtype": "float32", "outputs": outputs}


def _within(output: Mapping[str, float]) -> bool:
    return output["largest_difference"] <= output["tolerance"]  # False for NaN


def _run_published_code(
    checkout: Path, source: Path, config: IJepaConfig, inputs: dict[str, Tensor], scratch: Path
) -> dict[str, Tensor]:
    shared = {"qkv_bias": config.qkv_bias, "num_heads": config.num_attention_heads, "embed_dim": config.hidden_size}
    request = {
        "checkout": str(checkout),
        "source": str(source.resolve()),
        "mmap": zipfile.is_zipfile(source),
        "encoder": {
            **shared,
            "img_size": [config.image_shape[0]],
            "patch_size": config.patch_shape[0],
            "depth": config.num_hidden_layers,
            # rounded down there: half a unit more, so that the division cannot lose one
            "mlp_ratio": (config.intermediate_size + 0.5) / config.hidden_size,
        },
        "predictor": {
            **shared,
            "num_patches": config.num_patches,
            "predictor_embed_dim": config.predictor_hidden_size,
            "depth": config.predictor_num_hidden_layers,
        },
        "layer_norm_eps": config.layer_norm_eps,
    }
    (scratch / "request.json").write_text(json.dumps(request), "utf-8")
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, scratch / "inputs.safetensors")
    # other people's code gets no token
    environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name.upper()}
    program = f"{inspect.getsource(_published_side)}\nimport sys\n_published_side(sys.argv[1])\n"
    child = subprocess.run(
        [sys.executable, "-P", "-c", program, str(scratch)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(
            f"checkout={str(checkout)!r} could not be run with this checkpoint (exit status "
            f"{child.returncode}): {last}"
        )
    return {name: tensor.clone() for name, tensor in load_file(scratch / "outputs.safetensors").items()}


def _published_side(scratch: str) -> None:
    """Runs the published networks on given images, in a process of its own that gets this function as source.

    Imports nothing of this package, which would take seconds. The only place where code of the checkout is imported.

    Args:
        scratch: Folder with `request.json` (which checkout, file and sizes) and `inputs.safetensors`; gets
            `outputs.safetensors`.
    """
    import functools
    import importlib
    import json
    import pathlib
    import sys

    import torch
    from safetensors.torch import load_file, save_file

    folder = pathlib.Path(scratch)
    request = json.loads((folder / "request.json").read_text("utf-8"))
    inputs = load_file(folder / "inputs.safetensors")
    sys.path.insert(0, request["checkout"])
    published = importlib.import_module("src.models.vision_transformer")
    if not pathlib.Path(str(published.__file__)).is_relative_to(request["checkout"]):
        raise ImportError(f"another package named src hides the checkout: {published.__file__}")
    norm_layer = functools.partial(torch.nn.LayerNorm, eps=request["layer_norm_eps"])
    encoder = published.VisionTransformer(norm_layer=norm_layer, **request["encoder"]).eval()
    predictor = published.VisionTransformerPredictor(norm_layer=norm_layer, **request["predictor"]).eval()
    contents = torch.load(request["source"], map_location="cpu", weights_only=True, mmap=request["mmap"])

    def load(module: torch.nn.Module, part: str) -> None:
        state = {name.removeprefix("module."): tensor for name, tensor in contents[part].items()}
        module.load_state_dict(state, strict=True, assign=True)

    images, context_masks = inputs["pixel_values"], [inputs["context_indices"]]
    target_masks = list(inputs["target_indices"].unbind(1))
    outputs = {}
    with torch.no_grad():
        load(encoder, "encoder")
        load(predictor, "predictor")
        outputs["encoder"] = encoder(images)
        outputs["encoder_of_context"] = encoder(images, context_masks)
        rows = predictor(outputs["encoder_of_context"].clone(), context_masks, target_masks)  # all of block 1 first
        outputs["predictor"] = rows.unflatten(0, (len(target_masks), len(images))).transpose(0, 1)
        load(encoder, "target_encoder")
        outputs["target_encoder"] = encoder(images)
    save_file({name: value.contiguous() for name, value in outputs.items()}, folder / "outputs.safetensors")


def main(argv: list[str] | None = None) -> None:
    """Compares, and prints the differences as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="The published .pth.tar file.")
    parser.add_argument("checkout", type=Path, help="Folder of a checkout of facebookresearch/ijepa; it is run.")
    parser.add_argument("--num_attention_heads", type=int, help="Only for an encoder that is no published size.")
    named = parser.parse_args(argv)
    outcome = compare(named.checkpoint, named.checkout, num_attention_heads=named.num_attention_heads)
    print(json.dumps(outcome, indent=2))


if __name__ == "__main__":
    main()
