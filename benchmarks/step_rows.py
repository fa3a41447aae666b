"""The rows about a training step: its time, its floor, its memory, its parts; and about inference.

Each function measures on the device it is given. On a CPU the published code's usual precision, bf16, only makes sense
where the processor multiplies it faster than float32; where it doesn't, `bf16_speed` says so and the row stays empty.
"""

import tempfile
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from published_step import PublishedStep, reference_name
from side_by_side import Row, Spread, ratios, scaled, take_turns
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel

from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.encoder_ijepa import IJepaModel
from ijepa_hf.model.masking import draw_masks
from ijepa_hf.model.modeling_ijepa import new_model
from ijepa_hf.randomness import keyed_generator
from ijepa_hf.recipes.parsing import as_flags, parse_arguments
from ijepa_hf.recipes.recipe_files import load_recipe
from ijepa_hf.training.plan import StepValues
from ijepa_hf.training.step import ReadyModel, set_up_model

MIB = 2**20
VALUES = StepValues(learning_rate=1e-4, weight_decay=0.04, ema_momentum=0.996, encoder_is_frozen=False)


# -- one training, ours ----------------------------------------------------------------------------------------------


@dataclass
class Training:
    """A model of a recipe, ready to take steps on one fixed batch."""

    config: IJepaConfig
    ready: ReadyModel
    batch: dict[str, Tensor]

    def step(self) -> None:
        """One optimiser step, as the training loop takes it."""
        self.ready.step([self.batch], VALUES)


def make_training(
    recipe: str, batch_size: int, *, device: str = "cpu", mixed_precision: str = "no", **changes: Any
) -> Training:
    """A training of a recipe with another batch size; `changes` are fields of the recipe."""
    flags = {**load_recipe(recipe), "output_dir": "unused", "mixed_precision": mixed_precision, **changes}
    model_arguments, _, run = parse_arguments(as_flags(flags))
    config = model_arguments.to_config()
    AcceleratorState._reset_state(reset_partial_state=True)  # else the precision of the first one stays
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device == "cpu")
    ready = set_up_model(new_model(config, 0), run, accelerator, model_arguments.attn_implementation)
    return Training(config, ready, make_batch(config, batch_size, device))


def make_batch(config: IJepaConfig, batch_size: int, device: str = "cpu") -> dict[str, Tensor]:
    """Random pixels, and masks as they are drawn for a step."""
    masks = draw_masks(config.mask_settings(), batch_size, keyed_generator(0))
    shape = (batch_size, config.num_channels, *config.image_shape)
    return {
        "pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device),
        "context_indices": masks.context_indices.to(device),
        "target_indices": masks.target_indices.to(device),
    }


def bf16_speed(device: str = "cpu") -> float:
    """How fast bf16 matrices are multiplied beside float32 ones: below 1 where a processor has to emulate it."""
    matrices = {dtype: torch.randn(1024, 1024, device=device).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    times = take_turns({str(dtype): lambda m=m: finished(m @ m, device) for dtype, m in matrices.items()}, 5)
    return ratios(times["torch.float32"], times["torch.bfloat16"]).median


def finished(_: object, device: str) -> None:
    """Waits until a device has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


# -- the floor -------------------------------------------------------------------------------------------------------


class _Products(TorchDispatchMode):
    """Notes the shapes of all products of matrices, attention's as the products that it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name in ("mm", "addmm", "bmm"):
            self._note(*args[-2:])
        elif name.startswith("_scaled_dot_product"):
            backward = "backward" in name
            query, key = args[1:3] if backward else args[:2]
            scores = query.new_empty((*query.shape[:-1], key.shape[-2]))
            self._note(query.flatten(0, 1), key.flatten(0, 1).mT)
            self._note(scores.flatten(0, 1), key.flatten(0, 1))
            if backward:  # scores again, then the gradients of value, scores, query and key
                for _ in range(2):
                    self._note(scores.flatten(0, 1).mT, query.flatten(0, 1))
                self._note(query.flatten(0, 1), key.flatten(0, 1).mT)
        elif name == "convolution":
            pixels, weight = args[:2]
            rows = len(pixels) * (pixels[0, 0].numel() // weight[0, 0].numel())
            self._note(pixels.new_empty(rows, weight[0].numel()), weight.flatten(1).mT)
        return func(*args, **(kwargs or {}))

    def _note(self, one: Tensor, other: Tensor) -> None:
        self.found.append(
            (tuple(one.shape), tuple(other.shape), one.dtype, not one.is_contiguous(), not other.is_contiguous())
        )


def products_alone(step: Callable[[], object], device: str = "cpu") -> Callable[[], None]:
    """The matrix products of a step at their shapes, types and layouts, and nothing else.

    Each shape has its matrices and its result ready, so that what is timed is the multiplying.
    """
    with _Products() as products:
        step()
    made: dict[Any, Callable[[], Tensor]] = {}

    def product(key: Any) -> Callable[[], Tensor]:
        one_shape, other_shape, dtype, one_turned, other_turned = key

        def matrix(shape: tuple[int, ...], turned: bool) -> Tensor:
            stored = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
            values = torch.randn(stored, device=device).to(dtype)
            return values.mT if turned else values

        one, other = matrix(one_shape, one_turned), matrix(other_shape, other_turned)
        out = one.new_empty((*one_shape[:-1], other_shape[-1]))
        multiply = torch.mm if len(one_shape) == 2 else torch.bmm
        return lambda: multiply(one, other, out=out)

    runs = []
    for key in products.found:
        if key not in made:
            made[key] = product(key)
        runs.append(made[key])

    def run() -> None:
        with torch.no_grad():
            for one in runs:
                one()
        finished(None, device)

    return run


# -- time ------------------------------------------------------------------------------------------------------------


def step_rows(
    recipe: str,
    batch_size: int,
    rounds: int,
    checkout: Path | None,
    *,
    device: str = "cpu",
    bf16: bool = False,
    goals: tuple[float, float] | None = None,
    reference_bf16: bool = False,
) -> list[Row]:
    """A step beside the published one, and beside its own products of matrices.

    Args:
        recipe: Its model and optimiser.
        batch_size: Of both sides.
        rounds: Timed rounds.
        checkout: The published code; `None` takes the restatement.
        device: `cpu` or `cuda`.
        bf16: Whether ours computes in bf16.
        goals: What the first row is held against.
        reference_bf16: Whether the other side does.

    Returns:
        Two rows.
    """
    ours = make_training(recipe, batch_size, device=device, mixed_precision="bf16" if bf16 else "no")
    reference = PublishedStep(
        ours.config, checkout, device=device, autocast_dtype=torch.bfloat16 if reference_bf16 else None
    )
    floor = products_alone(ours.step, device)
    times = take_turns(
        {
            "ours": lambda: finished(ours.step(), device),
            "reference": lambda: finished(reference(ours.batch), device),
            "floor": floor,
        },
        rounds,
    )
    name = f"train step, {device}, {_precision(bf16)}, {recipe}, batch {batch_size}"
    other = f"{reference_name(checkout)} {_precision(reference_bf16)}"
    goal, stretch = goals or (None, None)
    return [
        Row(
            name,
            goal,
            stretch,
            ours=scaled(times["ours"]),
            reference=scaled(times["reference"]),
            reference_name=other,
            ratio=ratios(times["reference"], times["ours"]),
            limit=scaled(times["floor"]),
            limit_name="its matrix products alone",
            share_of_limit=ratios(times["floor"], times["ours"]),
        ),
        Row(
            f"{name}, against its own products",
            1.5,
            1.3,
            at_most=True,
            ours=scaled(times["ours"]),
            reference=scaled(times["floor"]),
            reference_name="its matrix products alone",
            ratio=ratios(times["ours"], times["floor"]),
        ),
    ]


def update_share_row(recipe: str, batch_size: int, rounds: int, *, device: str = "cpu") -> Row:
    """AdamW and the moving average beside the whole step."""
    ours = make_training(recipe, batch_size, device=device)
    ours.step()
    gradients = [parameter.grad for parameter in ours.ready.model.parameters()]

    def update() -> None:
        for parameter, gradient in zip(ours.ready.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        ours.ready.optimizer.step()
        ours.ready.model.update_target_encoder(VALUES.ema_momentum)
        finished(None, device)

    times = take_turns({"step": lambda: finished(ours.step(), device), "update": update}, rounds)
    return Row(
        f"EMA + optimiser share of a step, {device}, {recipe}, batch {batch_size}",
        0.08,
        0.05,
        at_most=True,
        ours=scaled(times["update"]),
        reference=scaled(times["step"]),
        reference_name="the step",
        ratio=ratios(times["update"], times["step"]),
    )


def half_patches_row(recipe: str, batch_size: int, rounds: int, *, device: str = "cpu") -> Row:
    """The encoder on every second patch beside the encoder on all."""
    ours = make_training(recipe, batch_size, device=device)
    encoder = ours.ready.model.target_encoder
    half = torch.arange(0, ours.config.num_patches, 2, device=device).expand(batch_size, -1)
    pixels = ours.batch["pixel_values"]
    times = take_turns(
        {"half": lambda: _encode(encoder, pixels, context_indices=half), "all": lambda: _encode(encoder, pixels)},
        rounds,
    )
    return Row(
        f"IJepaModel with half the patches, {device}, {recipe}, batch {batch_size}",
        0.55,
        0.5,
        at_most=True,
        ours=scaled(times["half"]),
        reference=scaled(times["all"]),
        reference_name="all patches",
        ratio=ratios(times["half"], times["all"]),
    )


def inference_row(recipe: str, batch_size: int, rounds: int, *, device: str = "cpu") -> Row:
    """This package's encoder beside the stock one, both loaded from one saved folder."""
    ours = make_training(recipe, batch_size)
    with tempfile.TemporaryDirectory() as folder:
        ours.ready.model.target_encoder.save_pretrained(folder)
        encoder, stock = IJepaModel.from_pretrained(folder).to(device), AutoModel.from_pretrained(folder).to(device)
    pixels = ours.batch["pixel_values"].to(device)
    difference = float((_encode(encoder, pixels) - _encode(stock, pixels)).abs().max())
    times = take_turns({"ours": lambda: _encode(encoder, pixels), "stock": lambda: _encode(stock, pixels)}, rounds)
    return Row(
        f"inference of a saved encoder, {device}, {recipe}, batch {batch_size}",
        1.0,
        ours=scaled(times["ours"]),
        reference=scaled(times["stock"]),
        reference_name="stock AutoModel",
        ratio=ratios(times["stock"], times["ours"]),
        note=f"largest difference of the outputs: {difference:g}",
    )


@torch.inference_mode()
def _encode(encoder: nn.Module, pixels: Tensor, **inputs: Tensor) -> Tensor:
    features = encoder(pixels, **inputs).last_hidden_state
    finished(None, pixels.device.type)
    return features


def _precision(bf16: bool) -> str:
    return "bf16" if bf16 else "fp32"


# -- memory ----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The largest sum of bytes that tensors made inside hold at one time; each storage counts once."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._now -= self._live.pop(key, 0)


def peak_mib(step: Callable[[], object], held: Callable[[], Iterable[Tensor]], device: str = "cpu") -> float:
    """The most memory that a step needs, weights and optimiser included, in MiB.

    On a CPU live tensors are counted, which is the same in every run; on a GPU the allocator's own figure is taken.
    """
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / MIB
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held()}
    with LiveBytes() as counted:
        step()
    return (sum(storages.values()) + counted.peak) / MIB


def memory_rows(
    recipe: str, batch_size: int, checkout: Path | None, *, device: str = "cpu", bf16: bool = False
) -> list[Row]:
    """Peak memory of a step without, with selective and with full checkpointing, beside the published step."""
    precision = {"device": device, "mixed_precision": "bf16" if bf16 else "no"}
    config = make_training(recipe, 1).config
    reference = _published_peak(config, batch_size, checkout, device, bf16=bf16)
    rows = []
    for name, flags, goals in (
        ("without checkpointing", {}, (0.7, 0.6)),
        ("with selective checkpointing", {"selective_checkpointing": True}, (0.7, 0.6)),
        ("with gradient checkpointing", {"gradient_checkpointing": True}, (0.4, 0.3)),
    ):
        ours = make_training(recipe, batch_size, **precision, **flags)
        peak = peak_mib(ours.step, lambda ours=ours: held_by([ours.ready.model], ours.ready.optimizer), device)
        rows.append(
            Row(
                f"peak memory of a step {name}, {device}, {_precision(bf16)}, {recipe}, batch {batch_size}",
                *goals,
                at_most=True,
                unit="MiB",
                ours=Spread(peak, peak, peak),
                reference=Spread(reference, reference, reference),
                reference_name=reference_name(checkout),
                ratio=Spread(*[peak / reference] * 3),
            )
        )
    return rows


def _published_peak(config: IJepaConfig, batch_size: int, checkout: Path | None, device: str, *, bf16: bool) -> float:
    published = PublishedStep(config, checkout, device=device, autocast_dtype=torch.bfloat16 if bf16 else None)
    batch = make_batch(config, batch_size, device)
    return peak_mib(lambda: published(batch), lambda: held_by(published.networks, published.optimizer), device)


def held_by(networks: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    """The tensors that stay between steps: weights and the optimiser's state."""
    for network in networks:
        yield from network.parameters()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
