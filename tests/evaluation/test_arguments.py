"""The flags of `ijepa-hf evaluate`: defaults, checks, the nearest name, and where the output goes."""

from pathlib import Path

import pytest

from ijepa_hf.evaluation.arguments import build_evaluate_parser, parse_evaluate_arguments
from ijepa_hf.evaluation.methods import METHODS


def parsed(*flags: str):
    return parse_evaluate_arguments(["runs/x", "--dataset_name", "digits", *flags])


def test_what_is_not_said_has_its_default():
    arguments = parsed()
    assert arguments.model == "runs/x"
    assert arguments.method == ["knn", "linear"]
    assert (arguments.pooling, arguments.layers, arguments.k, arguments.temperature) == ("mean", 1, 20, 0.07)
    assert (arguments.samples_per_class, arguments.label_fraction) == (None, 0.01)
    assert parsed("--samples_per_class", "5").label_fraction is None


def test_several_methods_are_given_after_one_flag():
    assert parsed("--method", *METHODS, "--target_columns", "a", "b").method == list(METHODS)


def test_numbers_of_shapes_need_no_naming():
    flags = ["runs/x", "--dataset_name", "shapes", "--method", "regression"]
    assert parse_evaluate_arguments(flags).target_columns == ["count", "nearest_distance"]
    assert parse_evaluate_arguments([*flags, "--target_columns", "count"]).target_columns == ["count"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--datset_name", "x"], "'--datset_name' is no flag of ijepa-hf evaluate; did you mean '--dataset_name'"),
        (["--method", "liner"], "method='liner' is not known; did you mean 'linear'"),
        (["--pooling", "max"], "pooling='max' must be 'mean' or 'cls'"),
        (["--layers", "2"], "layers=2 must be 1 or 4"),
        (["--k", "0"], "k=0 must be at least 1"),
        (["--temperature", "0"], "temperature=0.0 must be greater than 0"),
        (["--label_fraction", "1.5"], "label_fraction=1.5 must be greater than 0 and at most 1"),
        (["--label_fraction", "0.1", "--samples_per_class", "1"], "two ways to choose few labels; give one"),
        (["--num_label_draws", "0"], "num_label_draws=0 must be at least 1"),
        (["--batch_size", "0"], "batch_size=0 must be at least 1"),
        (["--seed", "-1"], "seed=-1 must be at least 0"),
        (["--num_train_epochs", "0"], "num_train_epochs=0.0 must be greater than 0"),
        (["--method", "regression"], "target_columns is not given: write --target_columns"),
        (["--update_card"], "update_card: model='runs/x' is no folder with a README.md"),
    ],
)
def test_a_bad_value_is_named_with_what_to_write_instead(flags, message):
    with pytest.raises(ValueError, match=message):
        parsed(*flags)


def test_a_missing_data_set_is_named():
    with pytest.raises(ValueError, match="dataset_name is not given: write --dataset_name"):
        parse_evaluate_arguments(["runs/x"])


def test_the_output_goes_to_a_folder_of_the_model_and_the_data(tmp_path):
    def folder(model, data):
        return parse_evaluate_arguments([model, "--dataset_name", data]).folder()

    assert folder("runs/x", "digits") == Path("evaluations/x/digits")
    assert folder("facebook/dinov2-base", "uoft-cs/cifar10") == Path("evaluations/dinov2-base/cifar10")
    (tmp_path / "my data").mkdir()
    assert folder(f"{tmp_path}/my data/", str(tmp_path / "my data")) == Path("evaluations/my-data/my-data")
    assert parsed("--output_dir", "here").folder() == Path("here")


def test_help_explains_every_flag():
    text = build_evaluate_parser().format_help()
    assert "95 % interval" in " ".join(text.split())
    for action in build_evaluate_parser()._actions:
        assert action.help, action.option_strings
