"""Attacks: files, names and servers that would run code, read secrets or write elsewhere. None of them gets its way.

Each attack is first shown to work against the plain way of doing the same thing, so that a test here can fail. Its
harm is a canary: a file or folder that the attack makes, or words of a secret file that it carries off.
"""

import ast
import builtins
import csv
import io
import json
import os
import pickle
import re
import runpy
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tiny import tiny_config, tiny_model
from transformers import AutoConfig, ViTConfig, ViTModel
from warm_python import warm_python

from ijepa_hf import escaping
from ijepa_hf.commands.main import main
from ijepa_hf.data.decoding import decode_image
from ijepa_hf.data.prepare.prepare import PrepareSettings, prepare
from ijepa_hf.data.sources.opening import ImageSource, load_split, open_stream
from ijepa_hf.diagnosis.figures import draw_diagnostics_figure
from ijepa_hf.evaluation.backbones import load_backbone
from ijepa_hf.evaluation.results import Score, render_scores
from ijepa_hf.hub.contents import StagedFolder
from ijepa_hf.recipes.arguments import ModelArguments, argument_values
from ijepa_hf.recipes.recipe_files import load_recipe
from ijepa_hf.runs.cards import loading_lines, render_classifier_card, render_converted_card, render_run_card
from ijepa_hf.runs.checkpoints import find_latest
from ijepa_hf.runs.export import export_model, exported_step, image_processor_fields
from ijepa_hf.weights.official_checkpoint import read_official_checkpoint
from ijepa_hf.weights.starting_weights import open_starting_weights

ROOT = Path(__file__).resolve().parent.parent
SECRET = "words-of-a-secret-file"
# Line breaks, what ends a YAML head, a code block, a code span, a string and a template, HTML, a formula, and what a
# terminal obeys: a colour, a title, a change of direction.
EVIL = (
    "\n---\nlicense: mit\n---\n# Run this\n```\n`<img src=x onerror=alert(1)>` \"'{{ 7 * 7 }} "
    "$\\bad{$ \x1b[31m\x1b]0;x\x07\u202e|"
)


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text(SECRET)
    return path


def works(canary):
    """Says whether an attack has had its way, and makes ready for the next."""
    done = canary.exists()
    if done:
        canary.rmdir() if canary.is_dir() else canary.unlink()
    return done


def png(seed=0):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def harmless(text):
    """Whether a terminal would obey nothing in a text."""
    return text == escaping.printable(text)


def bytes_below(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


# -- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_a_published_checkpoint_that_holds_code_does_not_run_it(form, tmp_path, canary):
    path = tmp_path / "published.pth.tar"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps({"encoder": Harm(canary)}, protocol=2))
        pickle.loads(path.read_bytes())
    else:
        torch.save({"encoder": Harm(canary)}, path, _use_new_zipfile_serialization=form == "zip")
        torch.load(path, weights_only=False)
    assert works(canary)
    with pytest.raises(ValueError, match="holds code, which is never run"):
        read_official_checkpoint(path)
    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    assert not works(canary)
    assert not (tmp_path / "out").exists()


def test_what_a_published_checkpoint_calls_its_code_does_not_reach_the_terminal(tmp_path):
    path = tmp_path / "published.pth.tar"
    path.write_bytes(b"\x80\x02c\x1b[31mevil\nname\x1b]0;x\x07\n.")
    with pytest.raises(ValueError, match="never run") as raised:
        read_official_checkpoint(path)
    assert harmless(str(raised.value))


def test_a_pickle_under_the_name_of_safe_weights_is_not_unpickled(tmp_path, canary):
    model = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4))
    model.save_pretrained(tmp_path / "vit")
    export_model(tiny_model(), tmp_path / "ijepa", step=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    torch.save({"x": Harm(canary)}, tmp_path / "harm")
    for folder in ("vit", "ijepa", "ijepa/pretraining"):
        (tmp_path / folder / "model.safetensors").write_bytes((tmp_path / "harm").read_bytes())
    torch.load(tmp_path / "harm", weights_only=False)
    assert works(canary)
    with pytest.raises(ValueError, match="damaged"):
        load_backbone(str(tmp_path / "vit"), (8, 8))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_starting_weights(str(tmp_path / "ijepa"))
    assert exported_step(tmp_path / "ijepa") is None
    assert not works(canary)


def test_arrays_of_objects_are_refused_as_a_file_and_in_an_archive(tmp_path, canary):
    np.save(tmp_path / "images.npy", np.array([Harm(canary)], dtype=object), allow_pickle=True)
    np.load(tmp_path / "images.npy", allow_pickle=True)
    assert works(canary)
    harm = (tmp_path / "images.npy").read_bytes()
    write_tar(tmp_path / "images.tar", [("a.png", png(0)), ("a.npy", harm), ("b.png", png(1)), ("b.npy", harm)])
    for name in ("images.npy", "images.tar"):
        with pytest.raises(ValueError, match="cannot be read: .*(allow_pickle=False|Python objects)"):
            load_split(ImageSource(str(tmp_path / name)), "train")
    with pytest.raises(ValueError, match="cannot be read"):
        open_stream(ImageSource(str(tmp_path / "images.tar")), "train")
    assert not works(canary)


@pytest.mark.parametrize("suffix", ["pickle", "pkl", "pyd", "pt"])
def test_pickles_in_an_archive_of_images_stay_bytes(suffix, tmp_path, canary):
    harm = pickle.dumps(Harm(canary))
    pickle.loads(harm)
    assert works(canary)
    members = [(f"{name}.{kind}", png() if kind == "png" else harm) for name in "ab" for kind in ("png", suffix)]
    name = str(write_tar(tmp_path / "images.tar", members))
    assert load_split(ImageSource(name), "train")[0][suffix] == harm
    assert next(iter(open_stream(ImageSource(name), "train").rows))[suffix] == harm
    assert not works(canary)


def test_torch_files_in_an_archive_of_images_are_read_without_their_code(tmp_path, canary):
    stream = io.BytesIO()
    torch.save({"x": Harm(canary)}, stream)
    torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    assert works(canary)
    members = [
        (f"{name}.{kind}", png() if kind == "png" else stream.getvalue()) for name in "ab" for kind in ("png", "pth")
    ]
    with pytest.raises(ValueError, match="cannot be read"):
        load_split(ImageSource(str(write_tar(tmp_path / "images.tar", members))), "train")
    assert not works(canary)


def test_a_pickled_type_in_the_head_of_a_parquet_file_is_not_unpickled(tmp_path, canary):
    harm = pickle.dumps(Harm(canary), protocol=0)
    pickle.loads(harm)
    assert works(canary)
    pair = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": png(), "path": None}] * 2, pair)
    named = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": harm}
    field = pa.field("image", pair, metadata=named)
    pq.write_table(pa.table([images], schema=pa.schema([field])), tmp_path / "images.parquet")
    assert harm.split(b"\n")[0] in pq.read_schema(tmp_path / "images.parquet").serialize().to_pybytes()
    rows = load_split(ImageSource(str(tmp_path / "images.parquet")), "train")
    assert rows[0]["image"].size == (16, 16)
    assert not works(canary)


def test_a_recipe_makes_no_objects(tmp_path, canary):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"seed: !!python/object/apply:builtins.open [{str(canary)!r}, w]\n")
    yaml.unsafe_load(recipe.read_text())["seed"].close()
    assert works(canary)
    with pytest.raises(ValueError, match="python/object/apply"):
        load_recipe(str(recipe))
    assert not works(canary)


@pytest.mark.parametrize("length", [2**62, 99_000_000, 2**31])
def test_a_safetensors_file_that_claims_an_absurd_head_takes_no_memory(length, tmp_path):
    export_model(tiny_model(), tmp_path, step=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (tmp_path / "pretraining" / "model.safetensors").write_bytes(struct.pack("<Q", length) + b'{"x":')
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b'{"x":')
    assert exported_step(tmp_path) is None
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_starting_weights(str(tmp_path))


def test_a_checkpoint_that_names_files_outside_of_its_folder_is_none(tmp_path, secret):
    folder = tmp_path / "run" / "checkpoint-1"
    folder.mkdir(parents=True)
    record = {"version": 1, "step": 1, "files": {"../../secret.txt": "0" * 64}}
    (folder / "checkpoint.json").write_text(json.dumps(record))
    assert find_latest(tmp_path / "run") is None
    assert secret.read_text() == SECRET


# -- code ------------------------------------------------------------------------------------------------------------


def foreign_model(folder, canary):
    """A model folder of a kind that transformers does not know, with code that says what it is."""
    ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(folder)
    (folder / "evil.py").write_text(
        f"from transformers import PretrainedConfig\nopen({str(canary)!r}, 'w').close()\n"
        "class Config(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "command",
    [
        ["diagnose", "MODEL", "--dataset_name", "digits"],
        ["evaluate", "MODEL", "--dataset_name", "digits", "--output_dir", "OUT"],
        ["finetune", "MODEL", "--dataset_name", "digits", "--output_dir", "OUT"],
        ["visualize", "MODEL", "--figure", "error", "--dataset_name", "digits", "--output", "OUT.png"],
        ["pretrain", "digits", "--model_name_or_path", "MODEL", "--output_dir", "OUT"],
    ],
    ids=lambda command: command[0],
)
def test_a_model_that_brings_code_is_refused_without_a_question(command, tmp_path, canary, monkeypatch, capsys):
    foreign_model(tmp_path / "model", canary)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *words: asked.append(words) or "y")
    AutoConfig.from_pretrained(tmp_path / "model")
    assert works(canary)
    assert asked.pop()
    named = [word.replace("MODEL", str(tmp_path / "model")).replace("OUT", str(tmp_path / "out")) for word in command]
    assert main(named) == 2
    assert not works(canary)
    assert asked == []
    assert re.search(r"trust_remote_code|'evil' model", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["evaluate", "finetune"])
def test_a_model_whose_attention_is_code_of_the_hub_is_refused(command, tmp_path, capsys):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        json.dumps(image_processor_fields((32, 32), [0.5] * 3, [0.5] * 3))
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "attn_implementation": "evil/kernel"}))
    assert AutoConfig.from_pretrained(tmp_path / "model")._attn_implementation == "evil/kernel"  # would be fetched
    flags = ["--dataset_name", "digits", "--output_dir", str(tmp_path / "out")]
    assert main([command, str(tmp_path / "model"), *flags]) == 2
    assert "'evil/kernel' as its attention, which is code of the Hub" in capsys.readouterr().err


def test_a_script_beside_a_data_set_is_not_run(tmp_path, canary):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "pictures.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    (folder / "a.png").write_bytes(png())
    runpy.run_path(str(folder / "pictures.py"))
    assert works(canary)
    assert len(load_split(ImageSource(str(folder)), "train")) == 1
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*.png'\n---\n")
    with pytest.raises(RuntimeError, match="no longer supported"):
        load_split(ImageSource(str(folder)), "train")
    assert not works(canary)


def test_a_picture_in_postscript_starts_no_program(tmp_path, canary, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {canary}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # not looked for yet
    picture = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    with pytest.raises(OSError, match="cannot identify"):  # what the program should have written
        Image.open(io.BytesIO(picture)).load()
    assert works(canary)
    with pytest.raises(ValueError, match="PostScript"):
        decode_image(picture, 3)
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture)
    (folder / "b.png").write_bytes(png())
    said = prepare(str(folder), tmp_path / "out", PrepareSettings(image_format="png", max_broken_share=1.0))
    assert "PostScript" in said
    assert not works(canary)


# -- paths -----------------------------------------------------------------------------------------------------------


def test_members_of_an_archive_cannot_leave_the_folder_of_what_is_prepared(tmp_path):
    names = ["../../up.png", "/tmp/absolute-canary.png", "a/../../up.png", "line\nbreak.png", "x" * 300 + ".png"]
    source = write_tar(tmp_path / "images.tar", [(name, png(seed)) for seed, name in enumerate(names)])
    naive = tmp_path / "naive" / "deep"
    naive.mkdir(parents=True)
    with tarfile.open(source) as archive:
        archive.extract("../../up.png", naive, filter="fully_trusted")
    assert (tmp_path / "up.png").exists()
    (tmp_path / "up.png").unlink()

    def outside():
        here = {path for path in tmp_path.rglob("*") if tmp_path / "out" not in (path, *path.parents)}
        return here | {Path("/tmp/absolute-canary.png")} if Path("/tmp/absolute-canary.png").exists() else here

    before = outside()
    said = prepare(str(source), tmp_path / "out")
    assert outside() == before
    assert "5 images" in said
    shard = tmp_path / "out" / "data" / "train-00000-of-00001.parquet"
    assert {path for path in (tmp_path / "out").rglob("*") if path.is_file()} == {
        shard,
        tmp_path / "out/manifest.json",
    }
    stored = [row["path"] for row in pq.read_table(shard).column("png").to_pylist()]
    assert [name for name in stored if "/" in name or name in ("", ".", "..")] == []


def test_links_and_devices_in_an_archive_are_passed_over(tmp_path, secret):
    source = write_tar(tmp_path / "images.tar", [("a.png", png(0)), ("b.png", png(1))])
    with tarfile.open(source, "a") as archive:
        kinds = {"soft.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "fifo.png": tarfile.FIFOTYPE}
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
    prepare(str(source), tmp_path / "out")
    assert len(load_split(ImageSource(str(tmp_path / "out")), "train")) == 2
    assert SECRET.encode() not in bytes_below(tmp_path / "out")


def test_of_a_file_that_a_table_names_nothing_but_pixels_is_taken(tmp_path, secret):
    (tmp_path / "table").mkdir()
    (tmp_path / "a.png").write_bytes(png())
    with (tmp_path / "table" / "images.csv").open("w") as file:
        csv.writer(file).writerows([["image"], [tmp_path / "a.png"], [secret], ["../secret.txt"], ["/etc/passwd"]])
    said = prepare(
        str(tmp_path / "table"), tmp_path / "out", PrepareSettings(image_column_name="image", max_broken_share=1.0)
    )
    assert "skipped: 3 of 4" in said
    written = bytes_below(tmp_path / "out") + said.encode()
    assert SECRET.encode() not in written
    assert b"root:" not in written


@pytest.mark.parametrize("form", ["picture", "audio", "in a list", "in a dictionary"])
def test_a_file_that_another_column_names_is_taken_only_if_it_is_a_picture(form, tmp_path, secret):
    pair = {"bytes": None, "path": str(secret)}
    kind = datasets.Audio() if form == "audio" else datasets.Image()
    value = {"in a list": [pair], "in a dictionary": {"deep": pair}}.get(form, pair)
    feature = {"in a list": datasets.List(kind), "in a dictionary": {"deep": kind}}.get(form, kind)
    features = datasets.Features({"image": datasets.Image(), "other": feature})

    def source(name, value):
        rows = {"image": [{"bytes": png(seed), "path": None} for seed in range(3)], "other": [value] * 3}
        pq.write_table(pa.table(rows, schema=features.arrow_schema), tmp_path / name)
        return str(tmp_path / name)

    table = pq.read_table(source("evil.parquet", value))
    assert SECRET in str(datasets.table.embed_table_storage(table).column("other").to_pylist())
    with pytest.raises(ValueError, match="another column than 'image' cannot be read"):
        prepare(source("evil.parquet", value), tmp_path / "out")
    assert SECRET.encode() not in bytes_below(tmp_path / "out")
    (tmp_path / "mask.png").write_bytes(png(9))
    pair["path"] = str(tmp_path / "mask.png")
    prepare(source("good.parquet", value), tmp_path / "good")
    shard = tmp_path / "good" / "data" / "train-00000-of-00001.parquet"
    assert png(9) in [inner["bytes"] for inner in pairs(pq.read_table(shard).column("other").to_pylist())]


def test_a_pipe_that_a_table_names_keeps_nobody_waiting(tmp_path):
    (tmp_path / "table").mkdir()
    (tmp_path / "a.png").write_bytes(png())
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "table" / "images.csv").open("w") as file:
        csv.writer(file).writerows([["image"], [tmp_path / "a.png"], [tmp_path / "pipe.png"]])
    said = prepare(str(tmp_path / "table"), tmp_path / "out", PrepareSettings(max_broken_share=1.0))
    assert "skipped: 1 of 2" in said
    assert "pipe or device" in said


def pairs(value):
    """Pairs of `bytes` and `path` at any depth."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return [pair for entry in inner for pair in pairs(entry)]


def test_a_link_that_leads_out_of_a_folder_is_not_pushed(tmp_path, secret):
    folder = tmp_path / "run"
    export_model(tiny_model(), folder, step=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (folder / "figures").mkdir()
    (folder / "figures" / "key.png").symlink_to(secret)
    assert (folder / "figures" / "key.png").read_text() == SECRET
    with pytest.raises(ValueError, match=r"key\.png.* leads out of"):
        StagedFolder.of(folder, "0", None)
    assert list(folder.glob("*.partial")) == []


def test_a_link_inside_a_folder_and_one_into_the_hubs_cache_are_pushed(tmp_path):
    snapshot, blobs = tmp_path / "models--me--x" / "snapshots" / "0abc", tmp_path / "models--me--x" / "blobs"
    export_model(tiny_model(), snapshot, step=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    blobs.mkdir()
    os.replace(snapshot / "config.json", blobs / "1234")
    (snapshot / "config.json").symlink_to(Path("../../blobs/1234"))
    os.replace(snapshot / "model.safetensors", snapshot / "weights")
    (snapshot / "model.safetensors").symlink_to("weights")
    staged = StagedFolder.of(snapshot, "0", None)
    assert (staged.path / "config.json").read_bytes() == (blobs / "1234").read_bytes()
    staged.remove()


# -- names -----------------------------------------------------------------------------------------------------------


def cards(name, tmp_path):
    """Every card that the package writes, with a name wherever a name goes."""
    report = json.loads((ROOT / "benchmarks" / "results" / "digits_report.json").read_text())
    names = argument_values(ModelArguments())
    config = ModelArguments(**{key: report["arguments"][key] for key in names}).to_config()
    asked = ("dataset_name", "output_dir", "train_split_name", "eval_split_name", "model_name_or_path", "license")
    arguments = {**report["arguments"], **dict.fromkeys(asked, name)}
    yield (
        "run",
        render_run_card({**report, "arguments": arguments, "hub_dataset": name, "hub_base_model": name}, config),
    )
    published = {"source": {"name": name}}
    yield "conversion", render_converted_card(tiny_config(), published, name, "cc-by-nc-4.0")
    values = {**dict.fromkeys(("dataset_name", "model", "output_dir", "eval_split_name"), name)}
    result = {
        "accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "num_eval_images": 10, "num_train_images": 10,
        "classes": [name], "license": name, "license_is_known": False,
        "arguments": {**values, "from_scratch": False, "freeze_encoder": False, "note": name},
    }  # fmt: skip
    yield "fine-tuning", render_classifier_card(result)


def skeleton(text):
    """What Markdown makes of a text: its headings, blocks of code, tables and HTML, without their words."""
    body = text.split("\n---\n", 1)[1]
    lines, inside = [], False
    for line in body.splitlines():
        is_fence = re.match(r"```[^`]*$", line) is not None  # CommonMark 0.31, section 4.5
        inside ^= is_fence
        lines.append("code" if inside or is_fence else (re.match(r"#+|\||-|!", line) or [""])[0])
    return [line for line in lines if line]


def code_of(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("card", ["run", "conversion", "fine-tuning"])
def test_a_name_cannot_change_what_a_card_says(card, tmp_path):
    plain, evil = (dict(cards(name, tmp_path))[card] for name in ("plain", EVIL))
    assert f"{EVIL}\n" in f"# {EVIL}\n"  # as it would stand there unescaped:
    assert skeleton(plain.replace("plain", EVIL)) != skeleton(plain)
    assert skeleton(evil) == skeleton(plain)
    ours, theirs = ModelCard(plain), ModelCard(evil)
    assert ours.data.to_dict().keys() == theirs.data.to_dict().keys()
    assert theirs.data.license in (EVIL, "cc-by-nc-4.0")
    assert harmless(theirs.text)
    inert = r"^```[^`\n]*$.*?^```$|\\[^\n]|(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)"  # blocks, escaped letters, spans of code
    outside = re.sub(inert, "", theirs.text, flags=re.MULTILINE | re.DOTALL)
    assert [mark for mark in "<`" if mark in outside] == []
    assert "49" not in evil.replace(plain, "")  # no template is filled twice
    assert "{{ 7 * 7 }}" in evil


@pytest.mark.parametrize("card", ["run", "conversion", "fine-tuning"])
def test_the_code_on_a_card_is_the_same_code_whatever_the_names_are(card, tmp_path, canary):
    attack = f'x"); open({str(canary)!r}, "w").close(); str("'
    exec(f'str("{attack}")')
    assert works(canary)
    plain, evil = (dict(cards(name, tmp_path))[card] for name in ("plain", attack))
    for ours, theirs in zip(code_of(plain), code_of(evil), strict=True):
        shapes = [
            ast.dump(ast.parse(text)).replace(repr(name), "NAME") for text, name in ((ours, "plain"), (theirs, attack))
        ]
        assert shapes[0] == shapes[1]


def test_the_commands_on_a_card_pass_a_name_as_one_word(tmp_path, canary):
    attack = f"x; touch {canary}; $(touch {canary}) `touch {canary}`"
    subprocess.run(["sh", "-c", f"true {attack}"], check=True, stderr=subprocess.DEVNULL)
    assert works(canary)
    seen = 0
    for _, text in cards(attack, tmp_path):
        for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            program = block.replace("pip install ijepa-hf\n", "").replace("ijepa-hf ", "printf '%s\\n' ")
            words = subprocess.run(["sh", "-c", program], check=True, capture_output=True, text=True)
            seen += words.stdout.splitlines().count(attack)
    assert seen == 4
    assert not works(canary)


def test_names_do_not_reach_the_terminal_as_commands(tmp_path, capsys):
    assert not harmless(EVIL)
    name = EVIL.replace("/", "")
    score = Score("knn", "model", name, "top-1", 0.5, (0.4, 0.6), 10, 10, {"column": name})
    assert harmless(render_scores([score]))
    assert len(render_scores([score]).splitlines()) == 2
    assert all(harmless(line) and "\n" not in line for line in loading_lines(name))
    members = [(f"{number}{name}.png", b"broken") for number in range(3)] + [("good.png", png())]
    source = write_tar(tmp_path / "images.tar", [(n.replace(".", "", n.count(".") - 1), b) for n, b in members])
    said = prepare(str(source), tmp_path / "out", PrepareSettings(max_broken_share=1.0))
    assert "skipped: 3 of 4" in said
    assert harmless(said)
    with pytest.raises(ValueError, match="3 of the 4") as raised:
        prepare(str(source), tmp_path / "other", PrepareSettings(max_broken_share=0.0))
    assert harmless(str(raised.value))


def test_what_the_command_line_says_of_a_failure_holds_nothing_that_a_terminal_obeys(tmp_path, capsys):
    for name in ("train", "test", "x\x1b[31m\x07"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / "a.png").write_bytes(png())
    with pytest.raises(ValueError, match="outside of them") as raised:
        load_split(ImageSource(str(tmp_path / "pictures")), "train")
    assert not harmless(str(raised.value))
    assert main(["prepare", str(tmp_path / "pictures"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "outside of them (x" in said
    assert harmless(said)


def test_a_name_in_a_figure_is_no_formula(tmp_path):
    name = "$\\bad{$"
    with pytest.raises(ValueError, match="ParseException|Unknown symbol"):
        Figure().text(0, 0, name).get_window_extent(FigureCanvasAgg(Figure()).get_renderer())
    row = {"loss": 0.2, "progress": 0.5, "target_patch_cosine": 0.5, "context_patch_normalized_std": 0.9, "step": 10}
    rows = [{**row, "target_patch_normalized_std": 0.9}]
    draw_diagnostics_figure({name: rows}, tmp_path / "figure.png", title=name)
    assert (tmp_path / "figure.png").is_file()


# -- servers ---------------------------------------------------------------------------------------------------------


_REDIRECT = """
import json, sys, threading, urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
sys.path.insert(0, {source!r})
seen = []

class Elsewhere(BaseHTTPRequestHandler):
    def do_GET(self):
        seen.append(self.headers.get("authorization"))
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
    def log_message(self, *_): pass

class Hub(Elsewhere):
    def do_GET(self):
        self.send_response(302); self.send_header("location", f"http://127.0.0.1:{{other.server_port}}/x")
        self.send_header("content-length", "0"); self.end_headers()

other, hub = HTTPServer(("127.0.0.1", 0), Elsewhere), HTTPServer(("127.0.0.1", 0), Hub)
for server in (other, hub):
    threading.Thread(target=server.serve_forever, daemon=True).start()
address, headers = f"http://localhost:{{hub.server_port}}/x", {{"authorization": "Bearer hf_canary"}}
urllib.request.urlopen(urllib.request.Request(address, headers=headers))
from huggingface_hub import get_session
from ijepa_hf.hub.process import bound_requests
bound_requests(5.0)
assert get_session().get(address, headers=headers).status_code == 200
print(json.dumps(seen))
"""


def test_a_server_that_sends_us_elsewhere_does_not_make_us_show_the_token_there():
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    done = subprocess.run(
        [*warm_python(), "-c", _REDIRECT.format(source=str(ROOT / "src"))],
        capture_output=True, text=True, env={**environment, "HF_HUB_OFFLINE": "0"}, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["Bearer hf_canary", None]


# -- the sources -----------------------------------------------------------------------------------------------------

RUNS_WORDS = {"eval", "exec", "compile", "os.system", "os.popen", "runpy.run_path", "evaluate.load", "torch.hub.load"}
UNPACKS = {"extractall", "extract", "unpack_archive"}


def dangers(source):
    """Calls that run what they are given, load code by default, or unpack archives; one sentence each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, options = (
            ast.unparse(node.func),
            {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords},
        )
        owner, _, method = called.rpartition(".")
        is_auto = owner.split(".")[-1].startswith("Auto") and method in ("from_pretrained", "from_config")
        uses_shell = owner == "subprocess" and options.get("shell", "False") != "False"
        if called in RUNS_WORDS or method in UNPACKS or uses_shell:
            found.append(f"line {node.lineno}: {called}")
        if called.startswith("yaml.") and method in ("load", "load_all", "unsafe_load", "full_load"):
            found.append(f"line {node.lineno}: {called} instead of safe_load")
        if options.get("trust_remote_code", "False") != "False":
            found.append(f"line {node.lineno}: {called} with trust_remote_code")
        elif is_auto and "trust_remote_code" not in options:
            found.append(f"line {node.lineno}: {called} asks whether to run code; write trust_remote_code=False")
    return found


def test_dangerous_calls_are_seen():
    for line in (
        "eval(x)", "os.system(x)", "subprocess.run(x, shell=True)", "yaml.load(x, Loader=L)", "archive.extractall(x)",
        "evaluate.load('accuracy')", "AutoModel.from_pretrained(x)", "transformers.AutoConfig.from_pretrained(x)",
        "load_dataset(x, trust_remote_code=True)",
    ):  # fmt: skip
        assert len(dangers(line)) == 1, line
    for line in (
        "model.eval()", "yaml.safe_load(x)", "AutoModel.from_pretrained(x, trust_remote_code=False)",
        "subprocess.run([x])", "IJepaModel.from_pretrained(x)", "metrics.evaluate(x)",
    ):  # fmt: skip
        assert dangers(line) == [], line


def test_no_source_runs_words_loads_code_or_unpacks_archives():
    files = sorted((ROOT / "src").rglob("*.py"))
    assert len(files) > 50
    found = {str(path.relative_to(ROOT)): dangers(path.read_text("utf-8")) for path in files}
    assert {name: problems for name, problems in found.items() if problems} == {}
