"""A whole life on the Hub: pretrain and push, lose the machine, resume from the Hub elsewhere, finish, push, download
with stock transformers where this package is not, fine-tune, push again. Invariants 6, 9 and 12 through the network;
and the token is nowhere to be found afterwards."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from fakehub import TOKEN, FakeHub
from safetensors.torch import load_file
from tiny import final_weights, tiny_flags, tiny_run
from warm_python import warm_python

from ijepa_hf import IJepaForPretraining

STEPS = 120
CHANGES = {"max_train_steps": STEPS, "checkpointing_steps": 10, "logging_steps": 10, "eval_split_name": "test"}

DOWNLOAD = """
import sys
sys.modules["ijepa_hf"] = None  # importing it is now an ImportError
import torch
from transformers import AutoModel, AutoModelForPreTraining, IJepaModel
pixels = torch.load("pixels.pt", weights_only=True)
encoder = AutoModel.from_pretrained("me/tiny")
assert type(encoder) is IJepaModel
whole = AutoModelForPreTraining.from_pretrained("me/tiny", trust_remote_code=True)
with torch.no_grad():
    features = encoder(pixels).last_hidden_state
    assert torch.equal(whole.target_encoder(pixels).last_hidden_state, features)
    context = whole.context_encoder(pixels).last_hidden_state
torch.save({"features": features, "context": context}, "answer.pt")
"""

CLASSIFY = """
import sys
sys.modules["ijepa_hf"] = None
import torch
from transformers import AutoModelForImageClassification
model, info = AutoModelForImageClassification.from_pretrained("me/tiny-digits", output_loading_info=True)
assert not info["missing_keys"], info["missing_keys"]
with torch.no_grad():
    torch.save(model(torch.load("pixels.pt", weights_only=True)).logits, "logits.pt")
print(model.config.num_labels)
"""


class Machine:
    """A folder with a Hugging Face folder of its own, on which commands run; keeps all that they print."""

    def __init__(self, folder, hub, environment, warm=False):
        self.folder, self.warm = folder, warm
        folder.mkdir()
        self.environment = {**environment, **hub.environment(TOKEN), "HF_HOME": str(folder / "hf")}
        self.environment.pop("HF_MODULES_CACHE", None)
        self.printed = []

    def start(self, *program, package=True):
        python = warm_python(package) if self.warm else [sys.executable]
        command = [*python, *program]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *program, package=True):
        process = self.start(*program, package=package)
        text, _ = process.communicate(timeout=240)
        self.printed.append(text)
        assert process.returncode == 0, text[-4000:]
        return text

    def python(self, program):
        return self.run("-c", program, package=False)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("uninterrupted") / "tiny", **CHANGES)


def command(**changes):
    flags = tiny_flags("tiny", **CHANGES, hub_model_id="me/tiny", hub_strategy="checkpoint", **changes)
    return ["-m", "ijepa_hf.commands.main", "pretrain", *flags, "--push_to_hub"]


def run_until_killed(machine, hub):
    """Kills the run when its first state has arrived."""
    process = machine.start(*command())
    for _ in range(1200):
        if "last-checkpoint/checkpoint.json" in (hub.files("me/tiny") if "me/tiny" in hub.repos else {}):
            break
        assert process.poll() is None, process.stdout.read()[-4000:]
        time.sleep(0.05)
    process.kill()
    machine.printed.append(process.communicate(timeout=60)[0])
    assert process.returncode == -9, "the run had ended before it could be killed"


@pytest.mark.parametrize(
    "warm", [pytest.param(True, id="warm"), pytest.param(False, id="cold", marks=pytest.mark.slow)]
)
def test_pretrain_push_lose_the_machine_resume_elsewhere_finish_download_fine_tune(
    uninterrupted, tmp_path, child_environment, warm
):
    with FakeHub() as hub:
        first = Machine(tmp_path / "first", hub, child_environment, warm)
        run_until_killed(first, hub)
        step = json.loads(hub.files("me/tiny")["last-checkpoint/checkpoint.json"])["step"]
        assert 0 < step < STEPS
        assert "README.md" not in hub.files("me/tiny")  # no card before the end

        second = Machine(tmp_path / "second", hub, child_environment, warm)
        text = second.run(*command(resume_from_checkpoint="hub"))
        assert f"continuing at step      {step}" in text
        assert f"Step {STEPS} is on the Hub" in text
        finished = second.folder / "tiny"
        expected = final_weights(uninterrupted)
        weights = final_weights(finished)
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        # the log of both lives together is that of one
        steps = [json.loads(line)["step"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, *range(10, STEPS + 1, 10)]
        files = hub.files("me/tiny")
        assert 'model_id = "me/tiny"\n' in files["README.md"].decode()
        for name in ("report.json", "recipe.yaml", "figures/curves.png", "modeling_ijepa.py"):
            assert files[name] == (finished / name).read_bytes(), name
        assert json.loads(files["last-checkpoint/checkpoint.json"])["step"] == STEPS

        clean = Machine(tmp_path / "clean", hub, child_environment, warm)
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        torch.save(pixels, clean.folder / "pixels.pt")
        clean.python(DOWNLOAD)
        model = IJepaForPretraining.from_pretrained(uninterrupted)
        answer = torch.load(clean.folder / "answer.pt", weights_only=True)
        with torch.no_grad():
            assert torch.equal(answer["features"], model.target_encoder(pixels).last_hidden_state)
            assert torch.equal(answer["context"], model.context_encoder(pixels).last_hidden_state)

        third = Machine(tmp_path / "third", hub, child_environment, warm)
        third.run(
            "-m", "ijepa_hf.commands.main", "finetune", "me/tiny", "--dataset_name", "digits",
            "--output_dir", "classifier", "--max_train_samples", "64", "--max_eval_samples", "40",
            "--per_device_train_batch_size", "16", "--num_train_epochs", "1", "--num_cpu_threads", "1",
        )  # fmt: skip
        third.run("-m", "ijepa_hf.commands.main", "push", "classifier", "me/tiny-digits")
        assert clean.python(CLASSIFY).strip().splitlines()[-1] == "10"
        classifier = load_file(third.folder / "classifier" / "model.safetensors")
        logits = torch.load(clean.folder / "logits.pt", weights_only=True)
        assert logits.shape == (2, 10)
        assert bool(torch.isfinite(logits).all())
        assert "me/tiny" in hub.files("me/tiny-digits")["README.md"].decode()
        assert classifier["classifier.weight"].shape[0] == 10

        for machine in (first, second, clean, third):
            assert_token_is_nowhere(machine)
        for name, repo in hub.repos.items():
            for commit in repo.commits.values():
                for file, content in commit.files.items():
                    assert TOKEN.encode() not in content, (name, file)


def assert_token_is_nowhere(machine):
    assert not any(TOKEN in text for text in machine.printed)
    for path in machine.folder.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_a_hub_that_takes_nothing_costs_the_run_nothing_and_the_end_names_the_one_command(
    uninterrupted, tmp_path, child_environment
):
    with FakeHub() as hub:
        machine = Machine(tmp_path / "machine", hub, child_environment)
        hub.fail(
            match="/commit/", status=400, times=10_000
        )  # what is worth a retry is tried in tests/hub/test_uploader.py
        process = machine.start(*command())
        text, _ = process.communicate(timeout=280)
        machine.printed.append(text)
        assert process.returncode == 4, text[-4000:]
        weights, expected = final_weights(machine.folder / "tiny"), final_weights(uninterrupted)
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        assert "did not arrive on the Hub" in text
        advice = next(line.strip() for line in text.splitlines() if line.strip().startswith("ijepa-hf push"))
        assert hub.files("me/tiny").keys() <= {"README.md", ".gitattributes"}
        hub.clear_faults()
        pushed = machine.run("-m", "ijepa_hf.commands.main", *advice.split()[1:])
        assert hub.endpoint in pushed
        files = hub.files("me/tiny")
        assert files["model.safetensors"] == (machine.folder / "tiny" / "model.safetensors").read_bytes()
        assert json.loads(files["last-checkpoint/checkpoint.json"])["step"] == STEPS
        assert_token_is_nowhere(machine)


@pytest.mark.slow
def test_a_token_that_may_not_write_or_is_missing_is_said_before_the_run_starts(tmp_path, child_environment):
    with FakeHub() as hub:
        for token, message in (("", "there is no token"), ("hf_wrong" + "0" * 30, "HTTP 401")):
            machine = Machine(tmp_path / (token[:8] or "none"), hub, child_environment)
            machine.environment["HF_TOKEN"] = token
            process = machine.start(*command())
            text, _ = process.communicate(timeout=120)
            assert process.returncode == 2, text[-3000:]
            assert "hub_model_id='me/tiny' cannot be pushed to" in text
            assert message in text
            assert not token or token not in text
            assert not os.path.exists(machine.folder / "tiny")
