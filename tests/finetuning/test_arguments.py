"""The flags of a fine-tuning: their names, and values that cannot be meant."""

import pytest

from ijepa_hf.finetuning.arguments import FinetuningArguments, build_finetune_parser, parse_finetune_arguments
from ijepa_hf.recipes.arguments import argument_names


def test_flags_have_the_names_of_pretraining_where_they_mean_the_same():
    flags = ["runs/digits", "--dataset_name", "digits", "--output_dir", "x", "--horizontal_flip"]
    arguments = parse_finetune_arguments(flags)
    assert (arguments.model, arguments.horizontal_flip, arguments.layer_decay) == ("runs/digits", True, 0.75)
    own = {
        "samples_per_class", "label_fraction", "layer_decay", "warmup_ratio", "label_smoothing", "horizontal_flip",
        "freeze_encoder", "from_scratch",
    }  # fmt: skip
    names = {action.dest for action in build_finetune_parser()._actions} - {"help", "model"}
    assert names - argument_names() == own
    with pytest.raises(
        ValueError, match="'--layer_deca' is no flag of ijepa-hf finetune; did you mean '--layer_decay'"
    ):
        parse_finetune_arguments([*flags, "--layer_deca", "1"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": None}, "dataset_name is not given"),
        ({"output_dir": None}, "output_dir is not given"),
        ({"samples_per_class": 2, "label_fraction": 0.1}, "give one"),
        ({"samples_per_class": 0}, "samples_per_class=0 must be at least 1"),
        ({"label_fraction": 1.5}, "label_fraction=1.5 must be greater than 0 and at most 1"),
        ({"layer_decay": 0.0}, "layer_decay=0.0 must be greater than 0"),
        ({"warmup_ratio": 1.0}, "warmup_ratio=1.0 must be at least 0 and less than 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be greater than 0"),
        ({"mixed_precision": "fp16"}, "mixed_precision='fp16' must be 'no' or 'bf16'"),
        ({"from_scratch": True, "freeze_encoder": True}, "leave one out"),
        ({"overwrite_output_dir": True, "resume_from_checkpoint": "latest"}, "goes on from; give one"),
    ],
)
def test_a_bad_value_is_named(changes, message):
    good = {"model": "runs/digits", "dataset_name": "digits", "output_dir": "x"}
    FinetuningArguments(**good).check()
    with pytest.raises(ValueError, match=message):
        FinetuningArguments(**good | changes).check()
