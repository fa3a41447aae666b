"""Finds what a run begins with: its own checkpoint, weights that exist, or fresh weights.

In a run from weights, every setting of the model that neither recipe nor flag gives is taken from the weights. The
run's record (`run.json`, and each checkpoint) then holds the whole configuration. So the weights are needed only once:
a resumed run, also on another machine, reads its own record.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ijepa_hf.hub.push import fetch_checkpoint
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.encoder_ijepa import IJepaModel
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining, new_model
from ijepa_hf.recipes.arguments import DataArguments, ModelArguments, PretrainingArguments, differing_arguments
from ijepa_hf.runs.checkpoints import Checkpoint, find_latest, read_checkpoint
from ijepa_hf.runs.folder import check_begun, is_finished, read_run
from ijepa_hf.training.plan import Plan
from ijepa_hf.training.ranks import Ranks
from ijepa_hf.weights.start import check_fits, start_model
from ijepa_hf.weights.starting_weights import StartingWeights, open_starting_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Holds what a run begins with (a checkpoint, weights, or nothing) and the arguments that follow from it.

    Args:
        config: The model's configuration.
        model_arguments: With the configuration's values where they come from weights.
        data: With the normalisation of the weights, if none was given.
        run: With `predictor_warmup_steps`, the licence and the commit of the weights as in the run's record.
        checkpoint: The run goes on from it; `None` in a run that starts now.
        weights: The run starts from them; `None` in a run that goes on or starts from nothing.
    """

    config: IJepaConfig
    model_arguments: ModelArguments
    data: DataArguments
    run: PretrainingArguments
    checkpoint: Checkpoint | None = None
    weights: StartingWeights | None = None

    @property
    def step(self) -> int:
        """Optimiser steps already done."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def has_new_predictor(self) -> bool:
        """Whether the run starts now, with trained encoders and an untrained predictor."""
        return self.weights is not None and (self.run.new_predictor or not self.weights.has_predictor)

    def build_model(self) -> tuple[IJepaForPretraining, list[str]]:
        """Makes the model; `restore` later puts the values of a checkpoint in place.

        Returns:
            The model on the CPU, and a sentence for each thing that was changed, dropped or made new.
        """
        if self.weights is None:
            return new_model(self.config, self.run.seed), []
        return start_model(self.weights, self.config, self.run.seed, new_predictor=self.run.new_predictor)


def find_start(
    model_arguments: ModelArguments, data: DataArguments, run: PretrainingArguments, output_dir: Path
) -> Start:
    """Finds the checkpoint or weights that a run begins with, and checks that they fit the arguments.

    Args:
        model_arguments: The model.
        data: The images.
        run: Names a checkpoint, weights, or neither.
        output_dir: The run's folder; need not exist.

    Returns:
        The start; a finished run's has neither checkpoint nor weights.

    Raises:
        FileNotFoundError: If a checkpoint or weights that were named do not exist.
        ValueError: If they are damaged, or do not fit the arguments.
    """
    check_begun(output_dir, run)
    finished = is_finished(output_dir, run)
    checkpoint = None if finished else _find_checkpoint(run, output_dir)
    if run.model_name_or_path is None:
        if checkpoint is not None and run.license is None:
            run = dataclasses.replace(run, license=checkpoint.arguments.get("license"))
        return Start(model_arguments.to_config(), model_arguments, data, run, checkpoint)
    record = _record(checkpoint, run, output_dir)
    if record is not None:  # the weights are those that it began with, whatever the branch holds now
        run = dataclasses.replace(run, model_revision=record[0].get("model_revision"))
    weights = None
    if checkpoint is None and not finished:
        heads = model_arguments.num_attention_heads if "num_attention_heads" in model_arguments.given else None
        weights = open_starting_weights(
            str(run.model_name_or_path), revision=run.model_revision, num_attention_heads=heads
        )
        run = dataclasses.replace(run, model_revision=weights.commit)
    if record is not None:
        stored, base = record
    else:
        assert weights is not None  # no record, no checkpoint
        base = weights.config
        stored = {"license": weights.license, "image_mean": weights.image_mean, "image_std": weights.image_std}
    # arguments that are not given are taken from the record, or else from the weights
    kept: dict[str, Any] = {
        name: stored.get(name) for name in ("predictor_warmup_steps", "license") if getattr(run, name) is None
    }
    run = dataclasses.replace(run, **kept)
    moments: dict[str, Any] = {
        name: list(stored[name])
        for name in ("image_mean", "image_std")
        if name not in model_arguments.given and stored.get(name)
    }
    data = dataclasses.replace(data, **moments)
    config = model_arguments.to_config(base)
    if weights is not None:
        check_fits(weights, config, new_predictor=run.new_predictor)
    return Start(config, model_arguments.resolved(config), data, run, checkpoint, weights)


def load_starting_encoder(run: PretrainingArguments, config: IJepaConfig) -> IJepaModel | None:
    """Loads the encoder that a run from weights started with, to be scored beside the trained one.

    Args:
        run: Names the weights.
        config: The model's configuration.

    Returns:
        The encoder. `None` for a run that started from nothing, and, with a warning, where the weights have gone.
    """
    if run.model_name_or_path is None:
        return None
    try:
        weights = open_starting_weights(
            run.model_name_or_path, revision=run.model_revision, num_attention_heads=config.num_attention_heads
        )
        return start_model(weights, config, run.seed, new_predictor=run.new_predictor)[0].target_encoder
    except (OSError, ValueError) as error:  # the run is done; one row of its scores is not worth losing the others
        logger.warning("the weights that the run started from cannot be scored again: %s", error)
        return None


def check_checkpoint(checkpoint: Checkpoint, arguments: dict[str, Any], plan: Plan) -> None:
    """Refuses a checkpoint from beyond the run's end, and warns of arguments that differ from the checkpoint's.

    Args:
        checkpoint: The run is to go on from it.
        arguments: The run's.
        plan: The run's.

    Raises:
        ValueError: If the checkpoint's step is after the run's last.
    """
    if checkpoint.step > plan.num_steps:
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint.path)!r} is at step {checkpoint.step}, but this run ends at step "
            f"{plan.num_steps}; train for longer, or resume from an earlier checkpoint."
        )
    # a converted checkpoint knows some of its arguments only
    known = {name: value for name, value in arguments.items() if name in checkpoint.arguments}
    differing = differing_arguments(checkpoint.arguments, known)
    if differing:
        logger.warning("resuming with other arguments than the checkpoint's: %s.", "; ".join(differing))


def check_same_start(start: Start, ranks: Ranks) -> None:
    """Refuses processes that have found different checkpoints or weights.

    Args:
        start: This process's.
        ranks: The processes, which all call this.

    Raises:
        ValueError: On all of them, if steps or commits differ.
    """
    found = ranks.gather((start.step, start.run.model_revision))
    steps, commits = {step for step, _ in found}, {commit for _, commit in found}
    if len(steps) > 1:
        raise ValueError(
            f"the processes found checkpoints of different steps ({sorted(steps)}): output_dir must be on a disk that "
            "all share."
        )
    if len(commits) > 1:
        raise ValueError(
            f"the processes found different commits of model_name_or_path ({', '.join(map(str, commits))}); name one "
            "with --model_revision."
        )


def _find_checkpoint(run: PretrainingArguments, output_dir: Path) -> Checkpoint | None:
    name = run.resume_from_checkpoint
    if name is None or (run.overwrite_output_dir and name == "latest"):
        return None
    if name == "hub":
        return _newest_of_hub_and_folder(run, output_dir)
    if name != "latest":
        return read_checkpoint(Path(name))
    checkpoint = find_latest(output_dir)
    if checkpoint is None:
        logger.warning("resume_from_checkpoint=latest: %s holds no checkpoint; starting at step 0.", output_dir)
    return checkpoint


def _newest_of_hub_and_folder(run: PretrainingArguments, output_dir: Path) -> Checkpoint | None:
    """Finds the Hub's last checkpoint, or the folder's if that is as new; one command works on every machine."""
    assert run.hub_model_id is not None  # PretrainingArguments.check
    # a run that uploads makes its repository, so the first start finds none
    path = fetch_checkpoint(run.hub_model_id, revision=run.hub_revision, missing_ok=run.push_to_hub)
    remote = None if path is None else read_checkpoint(path)
    local = None if run.overwrite_output_dir else find_latest(output_dir)
    if local is not None and (remote is None or local.step >= remote.step):
        where = "has no checkpoint" if remote is None else f"is at step {remote.step}"
        logger.warning("resuming from %s; %s %s.", local.path, run.hub_model_id, where)
        return local
    if remote is None:
        logger.warning(
            "resume_from_checkpoint=hub: %s holds no checkpoint (runs with --hub_strategy checkpoint leave one); "
            "starting at step 0.",
            run.hub_model_id,
        )
    return remote


def _record(
    checkpoint: Checkpoint | None, run: PretrainingArguments, output_dir: Path
) -> tuple[dict[str, Any], IJepaConfig] | None:
    """Reads arguments and configuration that this run has begun with, if it has begun."""
    if checkpoint is not None:
        return checkpoint.arguments, IJepaConfig(**checkpoint.config)
    stored = None if run.overwrite_output_dir else read_run(output_dir, run)
    if stored is None or "config" not in stored:
        return None
    return stored["arguments"], IJepaConfig(**stored["config"])
