"""Damaged checkpoints and model folders: the bits that were written, or an error naming the file; never a pickle."""

import functools
import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import bounded, examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ijepa_hf import IJepaConfig, IJepaForPretraining
from ijepa_hf.runs.checkpoints import (
    DamagedCheckpointError,
    collect_state,
    config_fields,
    find_latest,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from ijepa_hf.runs.export import export_model

CONFIG = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "predictor_hidden_size": 8,
    "predictor_num_hidden_layers": 1,
}
ARGUMENTS = {"seed": 0, "learning_rate": 1e-3}
STATE_FILES = ("model.safetensors", "optimizer.safetensors", "checkpoint.json")
MODEL_FILES = (
    "config.json", "model.safetensors", "preprocessor_config.json", "pretraining/config.json",
    "pretraining/model.safetensors",
)  # fmt: skip
SHARES = st.floats(0, 1, exclude_max=True)
JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 2**70), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


def make(seed: int) -> tuple[IJepaForPretraining, torch.optim.AdamW]:
    """A model and an optimiser that has stepped, all of whose numbers differ from another seed's."""
    torch.manual_seed(seed)
    model = IJepaForPretraining(IJepaConfig(**CONFIG)).train()
    optimizer = torch.optim.AdamW([named for named in model.named_parameters() if named[1].requires_grad], lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    return model, optimizer


@functools.cache
def written() -> tuple[Path, dict[int, Any]]:
    """The folder of a run with two checkpoints and an exported model, and the tensors of both."""
    folder = Path(tempfile.mkdtemp(prefix="ijepa-hf-tests-"))
    states = {}
    for step in (1, 2):
        model, optimizer = make(step)
        states[step] = collect_state(model, optimizer)
        save_checkpoint(
            folder, step, states[step], config=config_fields(model.config), arguments=ARGUMENTS, total_limit=2
        )
        states[step] = ({name: value.clone() for name, value in states[step].model.items()},
                        {name: value.clone() for name, value in states[step].optimizer.items()})  # fmt: skip
    export_model(model, folder, step=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return folder, states


@pytest.fixture(scope="module", autouse=True)
def _removed_afterwards() -> Iterator[None]:
    yield
    if written.cache_info().currsize:
        shutil.rmtree(written()[0])
        written.cache_clear()


@contextmanager
def copy_of_run() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        shutil.copytree(written()[0], run)
        yield run


EXECUTED: list[str] = []


class Pickled:
    """Says when it is unpickled."""

    def __reduce__(self) -> Any:
        return EXECUTED.append, ("a pickle was read",)


def header_length(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


@st.composite
def damages(draw: Any, names: tuple[str, ...], in_data: bool) -> tuple[str, Callable[[Path], None]]:
    """What is done to some file of a folder, and its name.

    Args:
        draw: Hypothesis's.
        names: The files.
        in_data: Whether the numbers of a tensor may be changed, which only a digest tells.
    """
    name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    share, byte = draw(SHARES), draw(st.integers(1, 255))
    kind = draw(st.sampled_from(KINDS))
    value, more = draw(JSON_VALUES), draw(st.binary(min_size=1, max_size=9))

    def damage(folder: Path) -> None:
        path = folder / name
        content = bytearray(path.read_bytes())
        if kind == "flip":
            length = len(content) if in_data or path.suffix == ".json" else header_length(content)
            content[int(share * length)] ^= byte
            path.write_bytes(content)
        elif kind == "flip early":
            content[int(share * min(60, len(content)))] ^= byte
            path.write_bytes(content)
        elif kind == "cut":
            path.write_bytes(content[: int(share * len(content))])
        elif kind == "grow":
            path.write_bytes(content + more)
        elif kind == "random":
            path.write_bytes(more)
        elif kind == "delete":
            path.unlink()
        elif kind == "folder":
            path.unlink()
            path.mkdir()
        elif kind == "swap":
            swapped = (folder / other).read_bytes()
            (folder / other).write_bytes(content)
            path.write_bytes(swapped)
        elif kind == "json":
            path.write_text(json.dumps(value), "utf-8")
        elif kind == "pickle":
            path.write_bytes(pickle.dumps(Pickled()))
        elif kind == "torch pickle":
            torch.save({"x": Pickled()}, path)
        elif kind == "header":
            content[:8] = int(share * 2**64).to_bytes(8, "little")
            path.write_bytes(content)
        elif kind == "loop":
            path.unlink()
            path.symlink_to(path.name)
        elif kind == "link":  # what it points to is as it was
            moved = folder.parent / f"moved-{path.name}"
            os.replace(path, moved)
            path.symlink_to(moved)
        elif kind == "extra":
            (folder / "extra.safetensors").write_bytes(more)
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled()))
        elif kind == "field" and path.suffix == ".json":
            fields = json.loads(content)
            fields[sorted(fields)[int(share * len(fields))]] = value
            path.write_text(json.dumps(fields), "utf-8")
        elif kind == "tensors" and path.suffix == ".safetensors":
            tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}  # which maps the file
            keys = sorted(tensors)
            key = keys[int(share * len(keys))]
            changed = {
                0: {**tensors, key: torch.zeros(3)},
                1: {k: v for k, v in tensors.items() if k != key},
                2: {**tensors, "another": torch.zeros(2)},
                3: {f"x{k}": v for k, v in tensors.items()},
                4: {},
            }[byte % 5]
            save_file(changed, path, metadata={"format": "pt"})

    return f"{kind} {name}", damage


KINDS = (
    "flip", "flip", "flip", "flip early", "cut", "cut", "grow", "random", "delete", "folder", "swap", "json", "pickle",
    "torch pickle", "header", "loop", "link", "extra", "field", "field", "tensors", "tensors",
)  # fmt: skip


def same(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(
        tensors[name].dtype == others[name].dtype and torch.equal(tensors[name], others[name]) for name in tensors
    )


def outcome_of_checkpoint(damage: tuple[str, Callable[[Path], None]], is_unsealed: bool) -> str:
    EXECUTED.clear()
    _, states = written()
    with copy_of_run() as run, bounded(seconds=5, megabytes=300):
        folder = run / "checkpoint-2"
        if is_unsealed:  # as checkpoints were before their manifests had a digest of their own
            manifest = json.loads((folder / "checkpoint.json").read_text())
            manifest.pop("sha256", None)
            (folder / "checkpoint.json").write_text(json.dumps(manifest))
        damage[1](folder)
        latest = find_latest(run)
        assert latest is not None
        model, optimizer = make(7)
        config, kind = config_fields(model.config), "right"
        try:
            checkpoint = read_checkpoint(folder)
            if not is_unsealed:
                assert checkpoint.step == 2
                assert checkpoint.config == config
                assert checkpoint.arguments == ARGUMENTS
                assert latest.step == 2
            restore(checkpoint, model, optimizer, config)
            assert restored(model, optimizer, states[2])
        except (DamagedCheckpointError, ValueError, OSError) as error:
            message, kind = str(error), type(error).__name__
            assert any(name in message for name in (*STATE_FILES, "checkpoint-2")), message
            assert damage[0].split()[0] not in ("link", "extra")
            assert restored(model, optimizer, None)  # nothing was put in place before that was found
            assert latest.path.name == "checkpoint-1" or is_unsealed
        if latest.path.name == "checkpoint-1":
            model, optimizer = make(7)
            restore(latest, model, optimizer, config)
            assert restored(model, optimizer, states[1])
    assert not EXECUTED
    return kind


def restored(model: Any, optimizer: Any, expected: Any) -> bool:
    """Whether both have the expected state, or still the one that they were made with."""
    if expected is None:
        state = collect_state(*make(7))
        expected = state.model, state.optimizer
    found = collect_state(model, optimizer)
    return same(found.model, expected[0]) and same(found.optimizer, expected[1])


@examples(60, 1000)
@given(damage=damages(STATE_FILES, True), is_unsealed=st.sampled_from([False, False, True]))
def test_a_damaged_checkpoint_gives_its_bits_or_is_refused_by_file(damage, is_unsealed):
    outcome_of_checkpoint(damage, is_unsealed)


# -- model folders ---------------------------------------------------------------------------------------------------


def outcome_of_model_folder(damage: tuple[str, Callable[[Path], None]]) -> str:
    """A model folder has no digests, so what changes numbers inside a tensor is not drawn."""
    EXECUTED.clear()
    _, states = written()
    with copy_of_run() as run, bounded(seconds=5, megabytes=300):
        damage[1](run)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = IJepaForPretraining.from_pretrained(run)
        except (ValueError, TypeError, OSError) as error:
            message = str(error)
            names = ("config.json", ".safetensors", str(run), *CONFIG, *IJepaConfig.__dataclass_fields__)
            assert any(name in message for name in names), message
            assert not EXECUTED
            return type(error).__name__
        assert same(dict(model.state_dict()), states[2][0])
    assert not EXECUTED
    return "right"


@examples(50, 1000)
@given(damage=damages(MODEL_FILES, False))
def test_a_damaged_model_folder_gives_its_bits_or_is_refused_by_file(damage):
    outcome_of_model_folder(damage)
