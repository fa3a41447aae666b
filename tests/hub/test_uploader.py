"""To and from the Hub: what is pushed, that it is whole, and what happens when the Hub is not well."""

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fakehub import OTHER_TOKEN, READ_TOKEN, TOKEN, FakeHub
from safetensors import safe_open
from tiny import scrambled_model
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification
from warm_python import warm_python

from ijepa_hf import IJepaForPretraining
from ijepa_hf.commands.main import main
from ijepa_hf.hub import client, push
from ijepa_hf.hub import process as hub_process
from ijepa_hf.hub import uploader as hub
from ijepa_hf.hub.push import fetch_checkpoint, push_folder
from ijepa_hf.hub.uploader import HubUploader, UploadIncompleteError
from ijepa_hf.recipes.arguments import argument_defaults
from ijepa_hf.runs.cards import address_line
from ijepa_hf.runs.checkpoints import (
    DamagedCheckpointError,
    collect_state,
    config_fields,
    read_checkpoint,
    save_checkpoint,
)
from ijepa_hf.runs.export import CODE_FILES, export_model

REPO = "me/model"
ARGUMENTS = {**argument_defaults(), "output_dir": "run", "dataset_name": "digits", "license": "mit"}
MODEL_FILES = {
    "config.json", "model.safetensors", "preprocessor_config.json", "pretraining/config.json",
    "pretraining/model.safetensors", *CODE_FILES,
}  # fmt: skip
CHECKPOINT_FILES = {
    f"last-checkpoint/{name}" for name in ("checkpoint.json", "model.safetensors", "optimizer.safetensors")
}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A Hub that `me` is logged in to, and waits short enough for tests."""
    for name, value in (("RETRY_WAITS", (0.01,) * 6), ("START_WAITS", (0.01,) * 2), ("REQUEST_TIMEOUT", 20.0)):
        for module in (client, hub, push):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hugging-face"))
    with FakeHub() as fake:
        for name, value in fake.environment().items():
            monkeypatch.setenv(name, value)
        yield fake


@pytest.fixture
def started(tmp_path):
    """Makes uploaders of `tmp_path / "run"`, and stops them at the end."""
    uploaders = []

    def start(strategy="checkpoint", *, repo_id=REPO, private=False, revision=None, step=0, replace=False, **changes):
        uploader = HubUploader(tmp_path / "run", repo_id, private=private, revision=revision, strategy=strategy)
        uploaders.append(uploader)
        uploader.start({**ARGUMENTS, **changes}, step, replace=replace)
        return uploader

    yield start
    for uploader in uploaders:
        uploader.stop()


def write_state(folder, step, total_limit=2):
    """A checkpoint and the two-part folder, as a run leaves them; the weights depend on the step."""
    model = scrambled_model(step)
    optimizer = torch.optim.AdamW([{"params": list(model.predictor.named_parameters())}])
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"arguments": ARGUMENTS}))
    tensors = collect_state(model, optimizer)
    save_checkpoint(folder, step, tensors, config=config_fields(model.config), arguments={}, total_limit=total_limit)
    export_model(model, folder, step=step, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
    return folder


@pytest.fixture
def run_folder(tmp_path):
    return write_state(tmp_path / "run", 2)


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def state_there(step, *, report=False, **changes):
    """What the repository has of a run that another machine had begun, small."""
    files = {"run.json": {"arguments": {**ARGUMENTS, **changes}}}
    files["report.json" if report else "last-checkpoint/checkpoint.json"] = {"step": step}
    return {"model.safetensors": b"there", **{name: json.dumps(record).encode() for name, record in files.items()}}


def local(folder, names):
    return {name: (folder / name.replace("last-checkpoint", "checkpoint-2")).read_bytes() for name in names}


def step_of(files, tmp_path, name="model.safetensors"):
    path = tmp_path / "read.safetensors"
    path.write_bytes(files[name])
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def checkpoint_step(files):
    return json.loads(files["last-checkpoint/checkpoint.json"])["step"]


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def processes_left():
    """The commands of the processes that this one has started and that still run."""
    listed = subprocess.run(["ps", "-o", "stat=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return [line for line in listed.stdout.splitlines() if hub_process.__file__ in line and not line.startswith("Z")]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # where there is one, it says whether only its parent has yet to notice the end
    return not stat.exists() or stat.read_text().split(")")[-1].split()[0] != "Z"


# -- what is pushed --------------------------------------------------------------------------------------------------


def test_a_runs_folder_is_pushed_byte_for_byte_in_one_commit_and_nothing_else_of_it(fake, run_folder):
    logs = {"metrics.jsonl", "evaluations.jsonl", "unreadable_images.jsonl", "run.json", "report.json", "recipe.yaml"}
    for name in logs - {"metrics.jsonl", "run.json"} | {"README.md", "conversion.json"}:
        (run_folder / name).write_text(f"of {name}\n")
    for name in ("figures/masks.png", "figures/curves.png", ".eval_results/digits.yaml"):
        (run_folder / name).parent.mkdir(exist_ok=True)
        (run_folder / name).write_text(f"of {name}")
    bystanders = [
        "trackers/events", "notes.txt", "secret.py", ".env", ".model.safetensors.partial", "figures/mine.txt",
        ".checkpoint-3.partial/model.safetensors", "pretraining/.config.json.partial", "data/img.png", "training.log",
    ]  # fmt: skip
    for name in bystanders:
        (run_folder / name).parent.mkdir(exist_ok=True)
        (run_folder / name).write_text("private")
    expected = MODEL_FILES | logs | CHECKPOINT_FILES | {
        "README.md", "conversion.json", "figures/masks.png", "figures/curves.png", ".eval_results/digits.yaml",
    }  # fmt: skip
    before = hidden(run_folder)
    assert push_folder(run_folder, REPO, with_checkpoint=True) == f"{fake.endpoint}/me/model"
    assert fake.files(REPO) == local(run_folder, expected)
    assert [commit.message for commit in fake.history(REPO)] == ["Step 2"]
    assert hidden(run_folder) == before


def test_pushing_the_same_again_changes_nothing_and_a_change_is_one_commit(fake, run_folder):
    push_folder(run_folder, REPO)
    fake.requests.clear()
    push_folder(run_folder, REPO)
    assert fake.count("POST", "/preupload/") == 1  # which asks for the permission; nothing is offered again
    assert [commit.message for commit in fake.history(REPO)] == ["Step 2"]
    write_state(run_folder, 4)
    push_folder(run_folder, REPO)
    assert [commit.message for commit in fake.history(REPO)] == ["Step 4", "Step 2"]
    assert fake.files(REPO)["model.safetensors"] == (run_folder / "model.safetensors").read_bytes()


def test_files_of_an_earlier_state_go_in_the_same_commit_and_other_peoples_files_stay(fake, run_folder):
    stale = {
        "last-checkpoint/scaler.pt", "pretraining/model-00001-of-00002.safetensors", "report.json",
        "model.safetensors.index.json", ".eval_results/old.yaml", "figures/curves.png",
    }  # fmt: skip
    others = {"LICENSE", "figures/theirs.txt", "train.py", "onnx/model.onnx"}
    fake.create(REPO, files=dict.fromkeys(stale | others | {"README.md"}, b"old"))
    push_folder(run_folder, REPO, with_checkpoint=True)
    pushed = MODEL_FILES | CHECKPOINT_FILES | {"metrics.jsonl", "run.json"}
    assert set(fake.files(REPO)) == pushed | others
    assert len(fake.history(REPO)) == 2
    fake.change(REPO, {"figures/theirs.png": b"theirs", ".eval_results/theirs.yaml": b"theirs"})
    others |= {"figures/theirs.png", ".eval_results/theirs.yaml"}  # which are about this run now
    push_folder(run_folder, REPO)  # without a checkpoint: one of another push would be of another state
    assert set(fake.files(REPO)) == (pushed | others) - CHECKPOINT_FILES


def test_a_model_of_another_kind_is_pushed_without_its_checkpoints(fake, tmp_path):
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    folder = tmp_path / "fine-tuned"
    ViTForImageClassification(config).save_pretrained(folder, max_shard_size="30KB")
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    for name in ("README.md", "finetune.json", "all_results.json", "figures/curves.png", "preprocessor_config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    for name in ("checkpoint-10/model.safetensors", "training_args.bin", "predictions.json", "run.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    fake.create(REPO, files={"model.safetensors": b"of an earlier model"})
    push_folder(folder, REPO)
    expected = {
        "config.json", "model.safetensors.index.json", "README.md", "finetune.json", "all_results.json",
        "figures/curves.png", "preprocessor_config.json",
    }  # fmt: skip
    assert fake.files(REPO) == local(folder, expected | shards)
    sorted(folder.glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(ValueError, match=r"model-00001-of-\d+\.safetensors missing"):
        push_folder(folder, REPO)


def test_a_folder_without_a_whole_model_is_refused_before_anything_is_sent(fake, run_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        push_folder(tmp_path / "nowhere", REPO)
    with pytest.raises(ValueError, match="config.json, .*missing|model.safetensors, config.json missing"):
        push_folder(tmp_path, REPO)
    shutil.copyfile(run_folder / "pretraining" / "model.safetensors", tmp_path / "kept")
    (run_folder / "pretraining" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no whole model"):
        push_folder(run_folder, REPO)
    export_model(scrambled_model(9), tmp_path / "other", step=9, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    shutil.copyfile(
        tmp_path / "other" / "pretraining" / "model.safetensors", run_folder / "pretraining" / "model.safetensors"
    )
    with pytest.raises(ValueError, match="of different steps"):
        push_folder(run_folder, REPO)
    shutil.copyfile(tmp_path / "kept", run_folder / "pretraining" / "model.safetensors")
    export_model(scrambled_model(9), run_folder, step=9, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with pytest.raises(ValueError, match="model of step 9, but its newest checkpoint is checkpoint-2"):
        push_folder(run_folder, REPO, with_checkpoint=True)
    shutil.rmtree(run_folder / "checkpoint-2")
    with pytest.raises(ValueError, match="no undamaged checkpoint"):
        push_folder(run_folder, REPO, with_checkpoint=True)
    assert fake.requests == []
    assert hidden(run_folder) == []


def test_a_file_that_the_repository_keeps_out_is_an_error(fake, run_folder):
    fake.create(REPO, files={".gitignore": b"metrics.jsonl\n"})
    with pytest.raises(ValueError, match=r"keeps out metrics\.jsonl; look at its \.gitignore"):
        push_folder(run_folder, REPO)


def test_a_branch_is_made_and_written_while_main_stays(fake, run_folder):
    push_folder(run_folder, REPO)
    before = fake.commit(REPO).sha
    write_state(run_folder, 4)
    assert push_folder(run_folder, REPO, revision="dev/two") == f"{fake.endpoint}/me/model/tree/dev/two"
    assert fake.commit(REPO).sha == before
    assert fake.files(REPO, "dev/two")["model.safetensors"] == (run_folder / "model.safetensors").read_bytes()
    write_state(run_folder, 6)
    push_folder(run_folder, REPO, revision="dev/two")  # which exists now
    assert fake.history(REPO, "dev/two")[0].message == "Step 6"


def test_a_name_without_owner_is_the_users_own(fake, run_folder):
    assert push_folder(run_folder, "model") == f"{fake.endpoint}/me/model"
    assert set(fake.files("me/model")) >= MODEL_FILES


def test_a_repository_is_private_where_asked_and_a_public_one_is_refused_then(fake, run_folder, monkeypatch):
    push_folder(run_folder, REPO, private=True)
    assert fake.repos[REPO].private
    push_folder(run_folder, "me/public")
    assert not fake.repos["me/public"].private
    with pytest.raises(ValueError, match="everybody can read it, but it was to be private"):
        push_folder(run_folder, "me/public", private=True)
    for token in (OTHER_TOKEN, ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ValueError, match="HTTP 40[14]"):
            fetch_checkpoint(REPO)


def test_a_new_branch_has_nothing_of_main(fake, run_folder):
    fake.create(REPO, files={**state_there(40, learning_rate=9.0), "README.md": b"of main", "LICENSE": b"of main"})
    push_folder(run_folder, REPO, revision="dev")
    assert set(fake.files(REPO, "dev")) == MODEL_FILES | {"metrics.jsonl", "run.json"}
    assert fake.files(REPO)["README.md"] == b"of main"


def test_a_model_of_another_kind_is_not_laid_over_pretraining(fake, run_folder, tmp_path):
    push_folder(run_folder, REPO)
    before = fake.commit(REPO)
    folder = tmp_path / "classifier"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shutil.copyfile(run_folder / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"'me/model' holds a pretrained model \(pretraining/config.json\), .* another"
    ):
        push_folder(folder, REPO)
    assert fake.commit(REPO) == before
    assert hidden(folder) == []
    assert push_folder(folder, "me/classifier") == f"{fake.endpoint}/me/classifier"


# -- cards -----------------------------------------------------------------------------------------------------------


def test_a_card_in_a_repository_without_a_model_stays_until_the_run_writes_its_own(fake, run_folder, started):
    kept = {"README.md": b"# Soon here\n", "figures/plan.png": b"a drawing", ".eval_results/theirs.yaml": b"theirs"}
    fake.create(REPO, files=kept)
    uploader = started()
    for step in (2, 4):
        write_state(run_folder, step)
        uploader.submit(step)
        wait_until(lambda: fake.history(REPO)[0].message == f"Step {step}")  # noqa: B023
        assert {name: fake.files(REPO)[name] for name in kept} == kept


def test_nothing_about_another_run_stays_beside_the_weights_of_this_one(fake, run_folder, started):
    about = dict.fromkeys((".eval_results/old.yaml", "figures/curves.png", "figures/masks.png"), b"old")
    for there in (state_there(40, learning_rate=9.0), state_there(40, report=True), {"pytorch_model.bin": b"old"}):
        fake.create(REPO, files={**there, **about, "README.md": b"of the old", "LICENSE": b"old"})
        uploader = started(replace=True)
        uploader.submit(2)
        assert uploader.stop(20) is None
        files = fake.files(REPO)
        assert not about.keys() & files.keys()
        assert "README.md" not in files
        assert files["LICENSE"] == b"old"
        assert "report.json" not in files


CARD = """---
license: mit
---

# tiny

```python
{python}
classify = pipeline("image-classification", model=model_id)
```

```bash
{shell}
ijepa-hf finetune "$MODEL" --dataset_name digits
```

I trained runs/tiny on my laptop: see from_pretrained("runs/tiny") and model_id = "runs/tiny".
"""


def test_a_card_names_the_repository_in_the_lines_made_for_it_and_all_else_in_it_stays(fake, run_folder):
    lines = {"python": address_line("runs/tiny"), "shell": address_line("runs/tiny", shell=True)}
    (run_folder / "README.md").write_bytes(CARD.format(**lines).encode())
    push_folder(run_folder, "model")
    there = {"python": 'model_id = "me/model"', "shell": "MODEL=me/model"}
    assert fake.files(REPO)["README.md"].decode() == CARD.format(**there)
    assert (run_folder / "README.md").read_text() == CARD.format(**lines)
    push_folder(run_folder, "model", revision="dev")
    on_branch = {name: f"{line}  # its branch dev" for name, line in there.items()}
    assert fake.files(REPO, "dev")["README.md"].decode() == CARD.format(**on_branch)


# -- a Hub that is not well ------------------------------------------------------------------------------------------

FAULTS = [
    ("status", "POST", "/objects/batch", 429),
    ("status", "POST", "/commit/", 500),
    ("drop_upload", "PUT", "/large/upload/", None),
    ("cut", "GET", "/tree/", None),
    ("lost", "POST", "/repos/create", None),
]


@pytest.mark.parametrize(("kind", "method", "match", "status"), FAULTS)
def test_a_fault_that_passes_is_waited_for_and_leaves_one_commit(
    fake, run_folder, caplog, kind, method, match, status
):
    fake.fail(kind, method=method, match=match, status=status or 0, times=2)
    push_folder(run_folder, REPO, with_checkpoint=True)
    expected = local(run_folder, MODEL_FILES | CHECKPOINT_FILES | {"metrics.jsonl", "run.json"})
    assert fake.files(REPO) == expected
    assert [commit.message for commit in fake.history(REPO)] == ["Step 2"]
    several_at_once = "/large/" in match  # files are sent side by side, so one try can meet both faults
    assert caplog.text.count("trying again in 0.01 s") in ((1, 2) if several_at_once else (2,))
    if status is not None:
        assert f"HTTP {status} at {method} " in caplog.text


def test_an_answer_that_is_lost_after_the_commit_is_no_second_commit_and_no_error(fake, run_folder):
    fake.fail("lost", method="POST", match="/commit/")
    push_folder(run_folder, REPO)
    assert fake.count("POST", "/commit/") == 1
    assert [commit.message for commit in fake.history(REPO)] == ["Step 2"]


def test_a_connection_that_stalls_is_given_up_and_tried_again(fake, run_folder, monkeypatch, caplog):
    monkeypatch.setattr(client, "REQUEST_TIMEOUT", 0.7)
    for method, match in (("GET", "/tree/"), ("PUT", "/large/upload/"), ("POST", "/commit/")):
        fake.fail("stall", method=method, match=match)
    push_folder(run_folder, REPO)
    assert caplog.text.count("ReadTimeout at ") == 3
    assert len(fake.history(REPO)) == 1


def test_a_fault_that_does_not_pass_is_given_up_after_six_retries_and_changes_nothing(fake, run_folder):
    push_folder(run_folder, REPO)
    before = fake.commit(REPO).sha
    write_state(run_folder, 4)
    fake.requests.clear()
    fake.fail("status", method="POST", match="/commit/", status=503, times=99)
    with pytest.raises(ConnectionError, match="HTTP 503 at POST /api/models/me/model/commit/main"):
        push_folder(run_folder, REPO)
    assert fake.count("POST", "/commit/") == 7
    assert fake.count("PUT", "/large/upload/") == 2  # what has arrived is not sent again
    assert fake.commit(REPO).sha == before
    assert hidden(run_folder) == []


@pytest.mark.parametrize("status", [400, 403])
def test_a_request_that_is_wrong_is_not_tried_again(fake, run_folder, status):
    fake.fail("status", method="POST", match="/commit/", status=status, times=99)
    with pytest.raises(ValueError, match=f"HTTP {status}"):
        push_folder(run_folder, REPO)
    assert fake.count("POST", "/commit/") == 1


def test_a_card_that_the_hub_refuses_is_named(fake, run_folder):
    (run_folder / "README.md").write_text("---\nlicense: [x]\n---\n")
    with pytest.raises(ValueError, match=r'Invalid metadata in README\.md.*"license" must be a string'):
        push_folder(run_folder, REPO)


def test_somebody_elses_commit_in_between_is_kept(fake, run_folder, monkeypatch):
    ask = fake._next_fault

    def meddle(method, path):
        if "/commit/" in path and not fake.count("POST", "/commit/"):
            fake.change(REPO, {"theirs.txt": b"theirs", "config.json": b"theirs too"})
        return ask(method, path)

    monkeypatch.setattr(fake, "_next_fault", meddle)
    push_folder(run_folder, REPO)
    assert fake.count("POST", "/commit/") == 2
    assert fake.files(REPO)["theirs.txt"] == b"theirs"
    assert fake.files(REPO)["config.json"] == (run_folder / "config.json").read_bytes()
    assert [commit.message for commit in fake.history(REPO)] == ["Step 2", "by hand"]


# -- beside the training ---------------------------------------------------------------------------------------------


def test_each_submitted_state_is_one_whole_revision_and_the_final_one_has_the_report(
    fake, run_folder, started, tmp_path
):
    uploader = started()
    uploader.submit(2)
    wait_until(lambda: len(fake.history(REPO)) == 1)
    write_state(run_folder, 4)
    uploader.submit(4)
    wait_until(lambda: len(fake.history(REPO)) == 2)
    (run_folder / "report.json").write_text("{}")
    assert uploader.finish(4) == f"Step 4 is on the Hub: {fake.endpoint}/me/model"
    for commit, step in zip(fake.history(REPO), (4, 4, 2), strict=True):
        assert commit.message == f"Step {step}"
        assert checkpoint_step(commit.files) == step
        for part in ("model.safetensors", "pretraining/model.safetensors"):
            assert step_of(commit.files, tmp_path, part) == step
    assert "report.json" in fake.files(REPO)
    assert hidden(run_folder) == []


def test_with_strategy_end_only_the_finished_model_is_pushed_without_checkpoint(fake, run_folder, started):
    uploader = started("end")
    uploader.submit(2)
    assert uploader.finish(2).endswith("/me/model")
    assert len(fake.history(REPO)) == 1
    assert set(fake.files(REPO)) == MODEL_FILES | {"metrics.jsonl", "run.json"}


def test_submitting_returns_at_once_and_the_newest_of_the_waiting_states_wins(fake, run_folder, started):
    uploader = started()
    fake.fail("stall", method="PUT", match="/large/upload/", times=2)
    uploader.submit(2)
    wait_until(lambda: fake.count("PUT", "/large/upload/"))
    for step in (4, 6, 8):
        write_state(run_folder, step)
        begin = time.monotonic()
        uploader.submit(step)
        assert time.monotonic() - begin < 1.0
    assert sorted(name for name in hidden(run_folder)) == [".push-2.partial", ".push-8.partial"]
    fake.release()
    wait_until(lambda: len(fake.history(REPO)) == 2)
    assert [commit.message for commit in fake.history(REPO)] == ["Step 8", "Step 2"]


def test_a_state_that_is_overwritten_and_pruned_on_its_way_arrives_as_it_was(fake, run_folder, started):
    expected = local(run_folder, MODEL_FILES | CHECKPOINT_FILES | {"metrics.jsonl", "run.json"})
    uploader = started()
    fake.fail("stall", method="POST", match="/objects/batch")
    uploader.submit(2)
    wait_until(lambda: fake.count("POST", "/objects/batch"))
    write_state(run_folder, 4, total_limit=1)
    assert not (run_folder / "checkpoint-2").exists()
    fake.release()
    wait_until(lambda: len(fake.history(REPO)) == 1)
    assert fake.files(REPO) == expected


def test_an_upload_that_is_given_up_is_a_warning_and_the_next_state_is_tried(fake, run_folder, started, caplog):
    uploader = started()
    fake.fail("status", method="POST", match="/commit/", status=500, times=7)
    uploader.submit(2)
    wait_until(lambda: "step 2 was not uploaded" in caplog.text)
    write_state(run_folder, 4)
    uploader.submit(4)
    wait_until(lambda: len(fake.history(REPO)) == 1)
    assert fake.history(REPO)[0].message == "Step 4"


def test_a_state_that_cannot_be_gathered_is_a_warning(fake, run_folder, started, caplog):
    uploader = started()
    uploader.submit(3)
    assert "step 3 is not uploaded: " in caplog.text
    assert "checkpoint-3" in caplog.text
    assert hidden(run_folder) == []


def test_a_process_that_is_killed_is_started_again_for_the_next_state(fake, run_folder, started, caplog):
    uploader = started()
    fake.fail("stall", method="POST", match="/commit/")
    uploader.submit(2)
    wait_until(lambda: fake.count("POST", "/commit/"))
    os.kill(uploader._process._process.pid, signal.SIGKILL)
    wait_until(lambda: "the process that uploads ended with status -9" in caplog.text)
    write_state(run_folder, 4)
    uploader.submit(4)
    wait_until(lambda: len(fake.history(REPO)) == 1)
    assert fake.history(REPO)[0].message == "Step 4"


def test_a_server_that_goes_away_for_good_is_said_with_the_command_that_finishes(fake, run_folder, started, tmp_path):
    uploader = started(private=True, revision="dev")
    uploader.submit(2)
    wait_until(lambda: len(fake.history(REPO, "dev")) == 1)
    write_state(run_folder, 4)
    fake.fail("die", method="POST", match="/commit/")
    with pytest.raises(UploadIncompleteError) as raised:
        uploader.finish(4)
    message = str(raised.value)
    assert "did not arrive on the Hub (ConnectError at " in message
    assert "me/model has step 2. This finishes" in message
    command = shlex.split(message.splitlines()[-1])
    assert command[:4] == ["ijepa-hf", "push", str(run_folder), "me/model"]
    assert hidden(run_folder) == []
    fake.start()
    assert main(command[1:]) == 0  # as it was printed
    assert checkpoint_step(fake.files(REPO, "dev")) == 4


def test_a_final_upload_that_fails_is_an_error_also_where_the_step_itself_has_arrived(
    fake, run_folder, started, tmp_path
):
    uploader = started()
    uploader.submit(2)
    wait_until(lambda: len(fake.history(REPO)) == 1)
    (run_folder / "report.json").write_text('{"step": 2}')
    fake.fail("status", method="POST", match="/commit/", status=400, times=99)
    with pytest.raises(UploadIncompleteError, match=r"HTTP 400 .*me/model has step 2 without its card and report\. "):
        uploader.finish(2)
    fake.clear_faults()
    started(step=2).finish(2)  # of the finished run, again
    (run_folder / "metrics.jsonl").write_text('{"step": 1}\n')
    fake.fail("status", method="POST", match="/commit/", status=400, times=99)
    with pytest.raises(UploadIncompleteError, match=r"me/model has step 2\. "):
        started(step=2).finish(2)


def test_a_run_that_stops_by_itself_waits_for_what_is_under_way_and_pending(fake, run_folder, started, caplog):
    uploader = started()
    fake.fail("status", method="POST", match="/commit/", status=503, headers={"Retry-After": "1"})
    uploader.submit(2)
    wait_until(lambda: fake.count("POST", "/commit/"))
    write_state(run_folder, 4)
    uploader.submit(4)
    assert uploader.stop(20) is None
    assert [commit.message for commit in fake.history(REPO)] == ["Step 4", "Step 2"]
    assert "waiting up to 20 s for step 4" in caplog.text
    assert hidden(run_folder) == []
    assert processes_left() == []


def test_stopping_waits_no_longer_than_it_was_told_and_says_what_is_missing(fake, run_folder, started):
    uploader = started(private=True, revision="dev")
    fake.fail("stall", method="POST", match="/commit/", times=9)
    uploader.submit(2)
    begin = time.monotonic()
    said = uploader.stop(0.4)
    assert 0.4 <= time.monotonic() - begin < 3
    assert "Step 2 did not arrive" in said
    fake.release()
    fake.clear_faults()
    assert main(shlex.split(said.splitlines()[-1])[1:]) == 0  # as it was printed
    assert checkpoint_step(fake.files(REPO, "dev")) == 2


def test_stopping_says_why_a_state_that_was_given_up_is_missing_unless_a_newer_one_arrived(
    fake, run_folder, started, caplog
):
    uploader = started()
    assert started("end").stop(20) is None  # nothing was submitted
    fake.fail("status", method="POST", match="/commit/", status=400)
    uploader.submit(2)
    wait_until(lambda: "step 2 was not uploaded" in caplog.text)
    write_state(run_folder, 4)
    uploader.submit(4)
    wait_until(lambda: len(fake.history(REPO)) == 1)
    uploader.submit(6)  # which there is not
    said = uploader.stop(20)
    assert "Step 6 did not arrive on the Hub (" in said
    assert "checkpoint-6" in said
    assert "me/model has step 4. " in said
    again = started(step=4)
    fake.fail("status", method="POST", match="/commit/", status=400)
    write_state(run_folder, 8)
    again.submit(8)
    wait_until(lambda: "step 8 was not uploaded" in caplog.text)
    assert "Step 8 did not arrive on the Hub (HTTP 400 at POST" in again.stop()


def test_interrupting_the_wait_of_stopping_ends_it(fake, run_folder, started, monkeypatch):
    uploader = started()
    fake.fail("stall", method="POST", match="/commit/")
    uploader.submit(2)
    wait_until(lambda: fake.count("POST", "/commit/"))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(uploader, "_wait_until_idle", interrupt)
    assert "Step 2 did not arrive" in uploader.stop(60)
    assert processes_left() == []


def test_finishing_is_given_up_when_nothing_moves(fake, run_folder, started, monkeypatch):
    monkeypatch.setattr(hub, "NO_NEWS_LIMIT", 0.5)
    uploader = started("end")
    fake.fail("stall", method="POST", match="/commit/")
    begin = time.monotonic()
    with pytest.raises(
        UploadIncompleteError, match=r"\(nothing arrived for 0.5 s\)\. me/model has nothing of this run\."
    ):
        uploader.finish(2)
    assert time.monotonic() - begin < 5


def test_interrupting_the_wait_at_the_end_gives_the_command(fake, run_folder, started, monkeypatch):
    uploader = started("end")
    fake.fail("stall", method="POST", match="/commit/")

    def interrupt(*_):
        if fake.count("POST", "/commit/"):
            raise KeyboardInterrupt

    monkeypatch.setattr(client, "show_progress", interrupt)
    with pytest.raises(UploadIncompleteError, match=r"\(interrupted\)"):
        uploader.finish(2)


def test_stopping_takes_no_time_and_leaves_neither_process_nor_files(fake, run_folder, started):
    uploader = started()
    pid = uploader._process._process.pid
    fake.fail("stall", method="PUT", match="/large/upload/", times=9)
    uploader.submit(2)
    wait_until(lambda: fake.count("PUT", "/large/upload/"))
    write_state(run_folder, 4)
    uploader.submit(4)
    begin = time.monotonic()
    said = uploader.stop()
    assert uploader.stop() == said
    assert time.monotonic() - begin < 2
    assert "Step 4 did not arrive on the Hub (it was under way when the run stopped). me/model has nothing" in said
    assert shlex.split(said.splitlines()[-1]) == [
        "ijepa-hf", "push", str(run_folder), REPO, "--hub_strategy", "checkpoint",
    ]  # fmt: skip
    assert not is_alive(pid)
    assert hidden(run_folder) == []
    assert fake.history(REPO) == []


def test_forked_workers_work_beside_an_upload(fake, run_folder, started):
    uploader = started()
    fake.fail("stall", method="PUT", match="/large/upload/", times=9)
    uploader.submit(2)
    wait_until(lambda: fake.count("PUT", "/large/upload/"))
    loader = DataLoader(list(range(8)), num_workers=2, multiprocessing_context="fork")
    assert sum(int(batch) for batch in loader) == 28


PROGRAM = """
import json, os, sys, time
from pathlib import Path
from ijepa_hf.hub.uploader import HubUploader
uploader = HubUploader(Path(sys.argv[1]), "me/model", private=False, revision=None, strategy="checkpoint")
uploader.start(json.loads(Path(sys.argv[1], "run.json").read_text())["arguments"], 2)
uploader.submit(4)
print(uploader._process._process.pid, flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
"""


def test_a_process_that_is_killed_while_uploading_leaves_the_previous_revision(fake, run_folder, started, tmp_path):
    push_folder(run_folder, REPO, with_checkpoint=True)
    before = fake.commit(REPO)
    model = scrambled_model(2)
    write_state(run_folder, 4)
    fake.fail("stall", method="PUT", match="/large/upload/", times=9)
    process = subprocess.Popen(
        [*warm_python(), "-c", PROGRAM, str(run_folder), "wait"], stdout=subprocess.PIPE, text=True
    )
    with process:
        uploading = int(process.stdout.readline())
        wait_until(lambda: fake.count("PUT", "/large/upload/") > 4)
        process.kill()
    wait_until(lambda: not is_alive(uploading), seconds=5)
    fake.release()
    assert fake.commit(REPO) == before
    for name, content in fake.files(REPO).items():
        (tmp_path / "again" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "again" / name).write_bytes(content)
    loaded = IJepaForPretraining.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert read_checkpoint(tmp_path / "again" / "last-checkpoint").step == 2
    assert hidden(run_folder) == [".push-4.partial"]
    assert started(step=2).finish(4).startswith("Step 4 is on the Hub")
    assert hidden(run_folder) == []


@pytest.mark.slow
def test_a_process_that_forgets_to_stop_ends_all_the_same(fake, run_folder):
    write_state(run_folder, 4)
    fake.fail("stall", method="PUT", match="/large/upload/", times=9)
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run_folder), "leave"], capture_output=True, text=True, timeout=60
    )
    assert (process.returncode, process.stderr) == (0, "")
    wait_until(lambda: not is_alive(int(process.stdout)), seconds=5)


# -- before a run starts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repo_id", "changes", "message"),
    [
        (REPO, {"HF_TOKEN": ""}, "there is no token: log in with `hf auth login`, or set HF_TOKEN"),
        (REPO, {"HF_TOKEN": "hf_wrong"}, "HTTP 401: the Hub does not take this token"),
        ("me/existing", {"HF_TOKEN": READ_TOKEN}, "HTTP 403: the token may not write to 'me/existing'"),
        ("somebody/existing", {}, "HTTP 403: the token may not write to 'somebody/existing'"),
        ("me/mo del", {}, "Write it as name/repository, such as me/my-ijepa"),
        (REPO, {"HF_HUB_OFFLINE": "1"}, "offline mode is on: unset HF_HUB_OFFLINE"),
    ],
)  # fmt: skip
def test_what_the_user_has_to_change_is_an_error_before_the_run(
    fake, started, monkeypatch, caplog, repo_id, changes, message
):
    fake.create("me/existing")
    fake.create("somebody/existing")
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^hub_model_id='{repo_id}' cannot be pushed to: .*{message}"):
        started(repo_id=repo_id)
    assert fake.count("POST", "/api/repos/create") <= 1
    assert set(fake.repos) == {"me/existing", "somebody/existing"}
    assert processes_left() == []


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (state_there(2, learning_rate=9.0),
         r"holds another run \(learning_rate is 9.0 there, None here\)\. Choose another --hub_model_id"),
        ({"run.json": b"{", "model.safetensors": b"x"}, r"holds another run, whose run\.json cannot be read"),
        ({"README.md": b"x", "onnx/model.onnx": b"x"}, r"weights of a model .* left there \(onnx/model\.onnx\)"),
        (state_there(40), "is at step 40 of this run already, .* step 20. Add --resume_from_checkpoint hub"),
        (state_there(40, report=True), "is at step 40 .* no checkpoint to go on from: .* --overwrite_output_dir"),
    ],
)  # fmt: skip
def test_a_repository_that_is_not_this_runs_or_is_further_is_not_overwritten(fake, started, there, message):
    fake.create(REPO, files=there)
    with pytest.raises(ValueError, match=f"^hub_model_id='me/model' .*{message}"):
        started(step=20)
    assert processes_left() == []


def test_a_run_goes_on_in_its_repository_and_another_one_on_a_branch_of_its_own(fake, run_folder, started):
    fake.create(REPO, files=state_there(20, license="apache-2.0", hub_strategy="end"))  # which change no weight
    uploader = started(step=20)
    fake.fail("status", method="POST", match="/commit/", status=400)
    with pytest.raises(UploadIncompleteError, match=r"me/model has step 20\. "):
        uploader.finish(2)
    started(step=0, revision="new", seed=7)
    push_folder(run_folder, REPO, revision="old")
    with pytest.raises(ValueError, match="^hub_model_id='me/model', branch 'old', holds another run"):
        started(revision="old", seed=7)


def test_what_could_not_be_looked_at_before_the_run_is_not_overwritten_later(fake, run_folder, started, caplog):
    fake.create(REPO, files=state_there(3))
    before = fake.commit(REPO)
    fake.stop()
    uploader = started()
    fake.start()
    uploader.submit(2)
    wait_until(lambda: "is at step 3 of this run already" in caplog.text)
    assert fake.commit(REPO) == before
    assert not uploader.stop(20).startswith("Step 2 did not arrive on the Hub (it was under way")
    write_state(run_folder, 4)
    fake.stop()
    uploader = started()
    fake.start()
    uploader.submit(4)  # is further than what is there
    assert uploader.stop(20) is None
    assert fake.history(REPO)[0].message == "Step 4"


def test_a_licence_that_the_hub_does_not_know_is_an_error_before_the_run(fake, started):
    with pytest.raises(ValueError, match=r"the Hub does not take license='free' .*license.* must be one of \[apache"):
        started(license="free")
    assert fake.repos == {}
    assert processes_left() == []
    started(license="other")
    started(license=None)


def test_a_private_run_does_not_start_into_a_public_repository(fake, started):
    fake.create(REPO)
    with pytest.raises(ValueError, match="everybody can read it"):
        started(private=True)


def test_an_unknown_strategy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="hub_strategy='sometimes' must be"):
        HubUploader(tmp_path, REPO, private=False, revision=None, strategy="sometimes")


def test_a_server_that_is_down_is_a_warning_and_uploads_begin_when_it_is_back(fake, run_folder, started, caplog):
    fake.stop()
    uploader = started(private=True, revision="dev")
    assert "The run starts all the same" in caplog.text
    fake.start()
    uploader.submit(2)
    wait_until(lambda: REPO in fake.repos and fake.repos[REPO].branches.get("dev") and fake.history(REPO, "dev"))
    assert fake.repos[REPO].private
    assert checkpoint_step(fake.files(REPO, "dev")) == 2


def test_the_token_is_found_where_logging_in_leaves_it(fake, run_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text(TOKEN + "\n")
    push_folder(run_folder, REPO)
    assert set(fake.files(REPO)) >= MODEL_FILES


# -- no token anywhere -----------------------------------------------------------------------------------------------


def test_the_token_is_in_nothing_that_is_said_or_written(fake, run_folder, started, caplog, capfd, tmp_path):
    caplog.set_level(logging.DEBUG)
    said = []
    echo = {"X-Error-Message": f"what is {TOKEN}?"}
    for fault in (
        {"status": 400, "match": "/commit/", "headers": echo},
        {"status": 401, "match": "/preupload/", "headers": echo},
        {"status": 403, "match": "/objects/batch", "headers": echo},
        {"status": 503, "match": "/commit/", "headers": echo, "times": 7},
        {"kind": "drop", "match": "/commit/", "times": 7},
    ):
        fake.fail(**fault)
        with pytest.raises((ValueError, ConnectionError)) as raised:
            push_folder(run_folder, REPO, with_checkpoint=True)
        said.append(repr(raised.value) + repr(raised.value.__cause__))
    assert "what is <token>?" in said[0]
    uploader = started()
    fake.fail("status", match="/commit/", status=400, headers=echo)
    uploader.submit(2)
    wait_until(lambda: "step 2 was not uploaded" in caplog.text)
    assert "Traceback" in caplog.text  # which is logged for whoever looks
    fake.fail("status", match="/commit/", status=400, headers=echo)
    with pytest.raises(UploadIncompleteError) as raised:
        uploader.finish(2)
    said.append(str(raised.value))
    push_folder(run_folder, REPO, with_checkpoint=True)
    output = capfd.readouterr()
    said += [caplog.text, output.out, output.err]
    assert all(TOKEN not in text for text in said)
    assert all(TOKEN.encode() not in content for content in fake.contents())
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert all(TOKEN.encode() not in path.read_bytes() for path in written)


# -- what comes back -------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_bit_for_bit_with_the_runs_log_beside_it(fake, run_folder):
    push_folder(run_folder, REPO, with_checkpoint=True)
    path = fetch_checkpoint(REPO)
    checkpoint = read_checkpoint(path)
    assert (path.name, checkpoint.step) == ("last-checkpoint", 2)
    assert path.parent.name == fake.commit(REPO).sha
    for name in ("model.safetensors", "optimizer.safetensors", "checkpoint.json"):
        assert (path / name).read_bytes() == (run_folder / "checkpoint-2" / name).read_bytes()
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["last-checkpoint", "metrics.jsonl", "run.json"]
    assert (path.parent / "metrics.jsonl").read_bytes() == (run_folder / "metrics.jsonl").read_bytes()


def test_the_newest_checkpoint_is_fetched_or_the_one_of_a_branch_or_commit(fake, run_folder):
    push_folder(run_folder, REPO, with_checkpoint=True)
    first = fake.commit(REPO).sha
    write_state(run_folder, 4)
    push_folder(run_folder, REPO, with_checkpoint=True)
    write_state(run_folder, 6)
    push_folder(run_folder, REPO, with_checkpoint=True, revision="dev")
    found = [read_checkpoint(fetch_checkpoint(REPO, revision=revision)).step for revision in (None, first, "dev")]
    assert found == [4, 2, 6]


def test_a_repository_without_checkpoint_has_none_and_a_missing_one_is_an_error(fake, run_folder):
    push_folder(run_folder, REPO)
    assert fetch_checkpoint(REPO) is None
    with pytest.raises(ValueError, match="HTTP 404: there is no repository 'me/nothing'"):
        fetch_checkpoint("me/nothing")
    with pytest.raises(ValueError, match="HTTP 404: there is .* no such revision"):
        fetch_checkpoint(REPO, revision="dev")


def test_a_repository_or_branch_that_may_be_missing_has_no_checkpoint(fake, run_folder, monkeypatch):
    push_folder(run_folder, REPO, with_checkpoint=True)
    assert fetch_checkpoint("me/nothing", missing_ok=True) is None
    assert fetch_checkpoint(REPO, revision="dev", missing_ok=True) is None
    assert read_checkpoint(fetch_checkpoint(REPO, missing_ok=True)).step == 2
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match="HTTP 401"):
        fetch_checkpoint("me/nothing", missing_ok=True)


def test_a_public_checkpoint_needs_no_token(fake, run_folder, monkeypatch):
    push_folder(run_folder, REPO, with_checkpoint=True)
    monkeypatch.setenv("HF_TOKEN", "")
    assert read_checkpoint(fetch_checkpoint(REPO)).step == 2


def test_a_checkpoint_that_is_damaged_on_the_hub_is_noticed(fake, run_folder):
    push_folder(run_folder, REPO, with_checkpoint=True)
    name = "last-checkpoint/optimizer.safetensors"
    content = bytearray(fake.files(REPO)[name])
    content[-1] ^= 1
    fake.change(REPO, {name: bytes(content)})
    with pytest.raises(DamagedCheckpointError, match="optimizer.safetensors is not what was written"):
        read_checkpoint(fetch_checkpoint(REPO))


def test_a_download_is_tried_again_and_what_the_cache_has_does_not_stand_in_for_a_server_that_is_down(
    fake, run_folder
):
    push_folder(run_folder, REPO, with_checkpoint=True)
    fake.fail("status", method="GET", match="/api/models/me/model", status=503, times=2)
    fake.fail("status", method="HEAD", match="/resolve/", status=500)
    fake.fail("drop", method="GET", match="/large/")
    fake.fail("cut", method="GET", match="/resolve/")
    assert read_checkpoint(fetch_checkpoint(REPO)).step == 2
    fake.fail("status", method="GET", match="/api/models/me/model", status=503, times=99)
    with pytest.raises(ConnectionError, match="HTTP 503"):
        fetch_checkpoint(REPO)
