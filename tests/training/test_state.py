"""Between two steps: who stops whom, what is saved then, and what becomes of what cannot be written."""

import errno
import json
import os
import signal
from types import SimpleNamespace

import pytest
from tiny import scrambled_model

from ijepa_hf.data.loader import DataWorkerError
from ijepa_hf.data.retrying import DataSourceError
from ijepa_hf.files import SaveError
from ijepa_hf.recipes.arguments import DataArguments, ModelArguments, PretrainingArguments
from ijepa_hf.runs.checkpoints import find_latest
from ijepa_hf.runs.lock import OutputDirInUseError
from ijepa_hf.training import state as run_state
from ijepa_hf.training.ranks import Ranks
from ijepa_hf.training.setup import RunSetup
from ijepa_hf.training.signals import StoppedBySignal, StopSignals
from ijepa_hf.training.state import RunState
from ijepa_hf.training.step import NonFiniteLossError, ReadyModel, make_optimizer


class TwoRanks(Ranks):
    """This process and one that says what the test has it say."""

    def __init__(self, other_code=0, other_word=None, rank=0):
        super().__init__()
        self.number, self.rank, self.other_code, self.other_word = 2, rank, other_code, other_word

    def highest(self, code):
        return max(code, self.other_code)

    def gather(self, message):
        if isinstance(message, list):  # images that could not be read
            return [message, []]
        words = [message, self.other_word]
        return words if self.rank == 0 else words[::-1]


def written(folder):
    return [path.name for path in folder.iterdir() if path.name != "run.json"]


def make_state(folder, ranks=None, on_save_error="stop", lock=None):
    if folder.is_dir():
        (folder / "run.json").write_text("{}")
    model = scrambled_model()
    run = PretrainingArguments(learning_rate=1e-3, on_save_error=on_save_error)
    accelerator = SimpleNamespace(is_main_process=ranks is None or ranks.rank == 0)
    setup = RunSetup(
        folder,
        model.config,
        ModelArguments(),
        DataArguments(),
        run,
        plan=SimpleNamespace(num_steps=9, global_batch_size=4),
        images=SimpleNamespace(num_images=10),
        evaluation=None,
        accelerator=accelerator,
        ranks=ranks or Ranks(),
        signals=StopSignals(),
        lock=lock,
    )
    return RunState(setup, ReadyModel(accelerator, model, model, make_optimizer(model, run)))


def test_where_nobody_has_a_reason_to_stop_all_go_on_and_nothing_is_written(tmp_path):
    make_state(tmp_path).agree(4)
    make_state(tmp_path, TwoRanks()).agree(4)
    assert written(tmp_path) == []


@pytest.mark.parametrize("here", [True, False])
def test_a_signal_to_any_process_saves_the_step_and_stops_this_one(tmp_path, here):
    state = make_state(tmp_path, TwoRanks(0 if here else signal.SIGUSR1))
    state.setup.signals.received = signal.SIGUSR1 if here else 0
    with pytest.raises(StoppedBySignal, match=r"stopped by SIGUSR1 at step 4 of 9; the state is in .*checkpoint-4;"):
        state.agree(4)
    assert find_latest(tmp_path).step == 4


def test_a_step_that_is_saved_already_is_not_saved_again(tmp_path):
    state = make_state(tmp_path)
    state.save(4)
    written = (tmp_path / "checkpoint-4" / "checkpoint.json").stat().st_mtime_ns
    state.setup.signals.received = signal.SIGTERM
    with pytest.raises(StoppedBySignal):
        state.agree(4)
    assert (tmp_path / "checkpoint-4" / "checkpoint.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("kind", [DataSourceError, DataWorkerError, ValueError])
def test_what_stops_another_process_is_raised_here_too_with_its_type_and_number(tmp_path, kind):
    state = make_state(tmp_path, TwoRanks(run_state._FAILED, (kind, "the shard is gone.")))
    # the second gathering, after the save, is about saving alone
    told = iter([[None, (kind, "the shard is gone.")], [None, None]])
    state.setup.ranks.gather = lambda message: [message] if isinstance(message, list) else next(told)
    with pytest.raises(kind, match=r"stopped at step 4 of 9: process 1: the shard is gone\. The state is in"):
        state.agree(4)
    assert find_latest(tmp_path).step == 4


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), ValueError),
        (json.JSONDecodeError("expected", "x", 0), ValueError),
        (FileNotFoundError(errno.ENOENT, "gone", "x"), OSError),
        (DataSourceError("gone"), DataSourceError),
    ],
)
def test_an_error_whose_constructor_wants_more_than_words_is_told_as_one_that_does_not(tmp_path, error, kind):
    state = make_state(tmp_path)
    state.failure = error
    with pytest.raises(kind, match="stopped at step 4 of 9") as raised:
        state.agree(4)
    assert type(raised.value) is kind


def test_a_process_that_does_not_write_says_less_and_writes_nothing(tmp_path):
    state = make_state(tmp_path, TwoRanks(signal.SIGTERM, rank=1))
    with pytest.raises(StoppedBySignal, match="stopped by SIGTERM at step 4 of 9; the same command with"):
        state.agree(4)
    assert written(tmp_path) == []


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_what_cannot_be_written_stops_at_the_next_agreement_or_is_said(tmp_path, caplog, on_save_error):
    state = make_state(tmp_path, on_save_error=on_save_error)
    with state.writing():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if on_save_error == "continue":
        assert "No space left on device The run goes on (on_save_error=continue)" in caplog.text
        state.agree(4)
        return
    assert isinstance(state.failure, SaveError)
    with pytest.raises(SaveError, match=r"stopped at step 4 of 9: .*No space left .*No checkpoint has been written"):
        state.agree(4)
    assert written(tmp_path) == [], "what cannot be written is not tried again on the way out"


def test_a_weight_that_is_not_finite_is_never_written_and_a_bug_is_no_full_disk(tmp_path):
    state = make_state(tmp_path, on_save_error="continue")
    state.model.predictor.project.bias.data[0] = float("nan")
    state.save(4)
    assert isinstance(state.failure, NonFiniteLossError)
    assert find_latest(tmp_path) is None
    with pytest.raises(KeyError), state.writing():
        raise KeyError("x")


def test_a_folder_that_another_run_has_taken_over_is_left_to_it_whatever_was_asked(tmp_path):
    def check():
        raise OutputDirInUseError("output_dir is in use by process 7")

    state = make_state(tmp_path, on_save_error="continue", lock=SimpleNamespace(check=check))
    state.save(4)
    with pytest.raises(OutputDirInUseError, match="in use by process 7"):
        state.agree(5)
    assert written(tmp_path) == []


def test_the_end_of_a_run_is_tried_for_an_hour_and_then_given_up(tmp_path, monkeypatch):
    now = iter(range(0, 10**6, 1000))
    waited = []
    monkeypatch.setattr(run_state.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(run_state.time, "sleep", waited.append)
    state = make_state(tmp_path, on_save_error="continue")
    monkeypatch.setattr(state, "save", lambda step: None)  # a disk that stays full
    with pytest.raises(SaveError, match="the end of the run could not be written to"):
        state.save_at_the_end(9, None)
    assert len(waited) == 4
    assert set(waited) == {run_state.SAVE_AGAIN_SECONDS}


def test_what_cannot_be_saved_before_a_stop_is_said_beside_the_reason(tmp_path, caplog):
    state = make_state(tmp_path / "gone")
    with pytest.raises(NonFiniteLossError, match="the loss is nan"):
        state.stop_after_saving(4, NonFiniteLossError("the loss is nan"))
    assert str(tmp_path / "gone") in caplog.text
    assert not (tmp_path / "gone").exists()
