"""A model and runs small enough for tests: 32x32 images in an 8x8 grid, a few thousand parameters."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

from ijepa_hf import IJepaConfig, IJepaForPretraining, draw_masks
from ijepa_hf.randomness import keyed_generator
from ijepa_hf.recipes.parsing import parse_arguments
from ijepa_hf.training import loop
from ijepa_hf.training.pretrain import pretrain

NETWORKS = ("context_encoder", "ijepa", "predictor")
TINY = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "predictor_hidden_size": 16,
    "predictor_num_hidden_layers": 2,
}


def tiny_config(**changes: Any) -> IJepaConfig:
    return IJepaConfig(**{**TINY, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> IJepaForPretraining:
    torch.manual_seed(seed)
    return IJepaForPretraining(tiny_config(**changes))


def scrambled_model(seed: int = 0, **changes: Any) -> IJepaForPretraining:
    """Weights far from their initial values, so that nothing is equal by being zero; both encoders differ."""
    model = tiny_model(seed, **changes)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def tiny_batch(config: IJepaConfig, size: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    masks = draw_masks(config.mask_settings(), size, keyed_generator(seed))
    pixels = torch.randn(size, config.num_channels, *config.image_shape, generator=torch.Generator().manual_seed(seed))
    return {
        "pixel_values": pixels,
        "context_indices": masks.context_indices,
        "target_indices": masks.target_indices,
    }


def tiny_flags(output_dir: Path | str, **changes: Any) -> list[str]:
    """The command line of a run of a few seconds: 64 digits, batches of 8, six steps."""
    values = {
        "output_dir": output_dir,
        "dataset_name": "digits",
        **TINY,
        "predictor_num_attention_heads": 2,
        "min_crop_scale": 0.8,
        "max_train_samples": 64,
        "max_eval_samples": 60,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "max_train_steps": 6,
        "warmup_epochs": 0.25,
        "checkpointing_steps": 2,
        "logging_steps": 1,
        "diagnostics_steps": 0,  # rows and pictures cost as much as such a run
        **changes,
    }
    flags: list[str] = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return flags


def tiny_run(output_dir: Path | str, **changes: Any) -> Path:
    """Runs it in this process."""
    # accelerate keeps one state for a process; a run in a process of its own would start with none
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    return pretrain(*parse_arguments(tiny_flags(output_dir, **changes)))


def final_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    # copied, because the file is memory-mapped and tests overwrite it
    tensors = load_file(output_dir / "pretraining" / "model.safetensors")
    return {name: tensor.clone() for name, tensor in tensors.items()}


def logged(output_dir: Path, *names: str) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[name] for name in names) for row in rows]


def assert_same_run(one: Path, other: Path, *names: str) -> None:
    """Two runs end with the same bits, and have logged the same of `names`."""
    ours, theirs = final_weights(one), final_weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    if names:
        assert logged(one, *names) == logged(other, *names)


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest difference in each network; the same names in both."""
    assert ours.keys() == theirs.keys()
    largest = dict.fromkeys(NETWORKS, 0.0)
    for name, value in ours.items():
        network = name.partition(".")[0]
        largest[network] = max(largest[network], float((value - theirs[name]).abs().max()))
    return largest


def signal_in_step(monkeypatch: Any, step: int, number: int) -> None:
    """Sends this process a signal when a run begins a step, counted from 1."""
    take = loop._take_step

    def signalled(state: Any, done: int, *rest: Any) -> Any:
        if done + 1 == step:
            os.kill(os.getpid(), number)
        return take(state, done, *rest)

    monkeypatch.setattr(loop, "_take_step", signalled)


def sizes_of(config: IJepaConfig, batch: dict[str, torch.Tensor]) -> Any:
    """The sizes of a batch's masks, for the cost of a step."""
    blocks, target = batch["target_indices"].shape[1:]
    from ijepa_hf.estimation.cost import Sizes

    return Sizes(config.num_patches, config.num_context_sets, batch["context_indices"].shape[-1], blocks, target)
