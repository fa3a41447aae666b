"""Arguments: recipes, flags over recipes, and mistakes named before any work."""

import dataclasses

import pytest
import yaml

from ijepa_hf import IJepaConfig
from ijepa_hf.data.retrying import DEFAULT_RETRIES, RetryPolicy
from ijepa_hf.recipes.arguments import (
    ARGUMENT_CLASSES,
    DataArguments,
    ModelArguments,
    argument_names,
    argument_values,
    flag,
)
from ijepa_hf.recipes.parsing import build_parser, parse_arguments
from ijepa_hf.recipes.recipe_files import load_recipe, recipe_names

PUBLISHED = {
    # recipe: (image, patch, width, depth, heads, mlp, predictor depth, epochs, warmup, global batch)
    "in1k-vitb16": (224, 16, 768, 12, 12, 3072, 6, 600, 15, 2048),
    "in1k-vitl16": (224, 16, 1024, 24, 16, 4096, 12, 600, 15, 2048),
    "in1k-vith14": (224, 14, 1280, 32, 16, 5120, 12, 300, 40, 2048),
    "in1k-vith16-448": (448, 16, 1280, 32, 16, 5120, 12, 300, 40, 2048),
    "in22k-vitg16": (224, 16, 1408, 40, 16, 6144, 16, 44, 3, 2048),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_recipes_hold_the_published_numbers(name):
    image, patch, width, depth, heads, mlp, predictor_depth, epochs, warmup, batch = PUBLISHED[name]
    model, data, run = parse_arguments([name, "--dataset_name", "somewhere"])
    config = model.to_config()
    assert (config.image_size, config.patch_size, config.hidden_size) == (image, patch, width)
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (depth, heads, mlp)
    assert (config.predictor_num_hidden_layers, config.predictor_hidden_size) == (predictor_depth, 384)
    assert config.masking_strategy == "multi_block_official"
    assert config.patch_init_std == 0.02
    assert (run.num_train_epochs, run.warmup_epochs, run.learning_rate) == (epochs, warmup, 1e-3)
    assert (run.weight_decay, run.final_weight_decay) == (0.04, 0.4)
    assert (run.ema_momentum, run.final_ema_momentum, run.schedule_scale) == (0.996, 1.0, 1.0)
    assert (run.mixed_precision, run.final_learning_rate, data.min_crop_scale) == ("bf16", 1e-6, 0.3)
    header = (load_text(name)).split("\n\n")[0]
    assert str(batch) in header
    assert "accelerate launch" in header


def load_text(name):
    from importlib import resources

    return (resources.files("ijepa_hf") / "recipes" / f"{name}.yaml").read_text("utf-8")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_and_begins_with_what_it_reproduces_its_source_hardware_and_command(name):
    parse_arguments([name, *([] if load_recipe(name).get("dataset_name") else ["--dataset_name", "x"])])
    comments = [line for line in load_text(name).splitlines() if line.startswith("#")]
    header = "\n".join(comments)
    for word in ("Source", "Hardware", "Command"):
        assert word in header, f"{name} lacks {word}"


def test_flags_override_recipes_and_recipes_override_defaults():
    model, _, run = parse_arguments(["digits", "--seed", "7", "--hidden_size", "48"])
    assert (run.seed, model.hidden_size) == (7, 48)
    assert model.patch_size == [4]
    assert run.adam_beta1 == 0.9


def test_a_recipe_by_path_works_and_names_the_output_folder(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"dataset_name": "digits", "image_size": [32, 64], "learning_rate": 1e-3}))
    model, _, run = parse_arguments([str(path)])
    assert model.to_config().image_shape == (32, 64)
    assert run.output_dir == "runs/mine"


def test_numbers_that_yaml_reads_as_text_become_numbers(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("dataset_name: digits\nlearning_rate: 1e-3\n")  # YAML 1.1 reads 1e-3 as a string
    assert parse_arguments([str(path)])[2].learning_rate == 1e-3


def test_every_model_argument_is_a_config_field_with_the_same_default():
    config = IJepaConfig()
    for name in argument_values(ModelArguments()):
        if name != "attn_implementation":
            assert getattr(ModelArguments().to_config(), name) == getattr(config, name), name


def test_no_two_argument_groups_share_a_name_and_each_argument_has_a_help_text():
    names = [entry.name for cls in ARGUMENT_CLASSES for entry in dataclasses.fields(cls)]
    assert len(names) == len(set(names))
    for cls in ARGUMENT_CLASSES:
        for entry in (entry for entry in dataclasses.fields(cls) if entry.init):
            assert entry.metadata["help"].endswith("."), entry.name


def test_an_argument_says_what_it_changes():
    assert sorted(argument_names("place")) == [
        "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "output_dir", "overwrite_output_dir",
        "push_to_hub", "resume_from_checkpoint",
    ]  # fmt: skip
    assert sorted(argument_names("speed")) == [
        "attn_implementation", "dataloader_num_workers", "fit_batch_to_memory", "gradient_accumulation_steps",
        "gradient_checkpointing", "num_cpu_threads", "per_device_train_batch_size",
        "selective_checkpointing",
    ]  # fmt: skip
    assert sorted(argument_names("reporting")) == [
        "checkpointing_steps", "checkpoints_total_limit", "data_retry_seconds", "data_timeout_seconds",
        "diagnostics_steps", "eval_split_name", "eval_steps", "label_column_name", "license", "logging_steps",
        "max_broken_share", "max_eval_samples", "max_skipped_steps", "on_collapse", "on_save_error", "report_to",
    ]  # fmt: skip
    assert argument_names("place", "speed", "reporting", "result") == argument_names()
    with pytest.raises(ValueError, match="changes='weights' must be one of result, speed, place, reporting"):
        flag("weights", "A flag.")


def test_the_patience_with_a_source_is_that_of_whoever_reads_without_a_run():
    data = DataArguments()
    assert RetryPolicy(data.data_retry_seconds, data.data_timeout_seconds) == DEFAULT_RETRIES


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as exit_:
        build_parser().parse_args(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--ema_momentum" in text
    assert "default: 0.996" in text


def base_config(**changes):
    fields = {"image_size": 64, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
              "intermediate_size": 100, "layer_norm_eps": 1e-5, "qkv_bias": False, "predictor_hidden_size": 24,
              "context_keep_ratio": 0.4}  # fmt: skip
    return IJepaConfig(**{**fields, **changes})


def test_a_model_from_weights_is_as_they_are_but_for_what_recipe_and_flags_set(tmp_path):
    recipe = tmp_path / "adapt.yaml"
    recipe.write_text("dataset_name: digits\nlearning_rate: 1e-4\nmodel_name_or_path: somewhere\nmask_ratio: null\n")
    model, _, _ = parse_arguments([str(recipe), "--image_size", "96"])
    config = model.to_config(base_config())
    assert config.to_diff_dict() == {**base_config().to_diff_dict(), "image_size": 96}
    assert (config.layer_norm_eps, config.qkv_bias, config.context_keep_ratio) == (1e-5, False, 0.4)
    # the record then holds the values of the weights
    recorded = argument_values(model.resolved(config))
    assert (recorded["image_size"], recorded["patch_size"], recorded["hidden_size"]) == ([96], [8], 48)
    assert recorded["intermediate_size"] == 100
    assert recorded["context_scale"] == [0.85, 1.0]


def test_another_masking_strategy_does_not_inherit_the_numbers_of_the_weights_own():
    flags = ["--dataset_name", "digits", "--learning_rate", "1", "--model_name_or_path", "x"]
    model, _, _ = parse_arguments([*flags, "--masking_strategy", "rasterized"])
    config = model.to_config(base_config())
    assert (config.masking_strategy, config.context_keep_ratio) == ("rasterized", 0.25)


def test_a_token_on_the_command_line_is_refused_and_not_repeated():
    for words in (["--hub_token", "hf_canary"], ["--hub_token=hf_canary"]):
        with pytest.raises(ValueError, match="hf auth login.*HF_TOKEN") as error:
            parse_arguments(["digits", *words])
        assert "canary" not in str(error.value)


MISTAKES = [
    (["digits", "--lerning_rate", "1"], "'--lerning_rate' is no flag .* '--learning_rate'"),
    (["digits", "--learning_rate", "1e-3", "--base_learning_rate", "1e-3"], "both are given"),
    (["digits", "--gradient_checkpointing", "--selective_checkpointing"], "exclude each other; drop one"),
    (["--dataset_name", "digits"], "neither is given"),
    (["--learning_rate", "1e-3"], "dataset_name is not given"),
    (["digits", "--mixed_precision", "fp16"], "mixed_precision='fp16'"),
    (["digits", "--ema_momentum", "1.5"], "ema_momentum=1.5"),
    (["digits", "--adam_beta2", "1"], "adam_beta2=1.0"),
    (["digits", "--min_crop_scale", "0"], "min_crop_scale=0.0"),
    (["digits", "--keep_images_in_memory", "maybe"], "keep_images_in_memory='maybe' must be 'auto', 'yes' or 'no'"),
    (["digits", "--keep_images_in_memory", "yes", "--streaming"], "'yes' cannot be done with streaming=True"),
    (["digits", "--image_mean", "0.5"], "image_mean=.* has 1 values, but num_channels=3"),
    (["digits", "--image_std", "0.5", "0", "0.5"], "image_std"),
    (["digits", "--logging_steps", "0"], "logging_steps=0 must be at least 1"),
    (["digits", "--num_train_epochs", "0"], "num_train_epochs=0"),
    (["digits", "--weight_decay", "-1"], "weight_decay=-1"),
    (["digits", "--max_grad_norm", "0"], "max_grad_norm=0"),
    (["digits", "--push_to_hub"], "push_to_hub needs the repository's name; add --hub_model_id"),
    (["digits", "--resume_from_checkpoint", "hub"], "resume_from_checkpoint='hub' needs .* --hub_model_id"),
    (["digits", "--hub_strategy", "always"], "hub_strategy='always' must be 'end' or 'checkpoint'"),
    (["digits", "--hub_strategy", "checkpoint"], "hub_strategy='checkpoint' is about uploading, which is off"),
    (["digits", "--hub_model_id", "me/x"], "hub_model_id='me/x' is about uploading.*--push_to_hub"),
    (["digits", "--new_predictor"], "new_predictor=True is about weights to start from.*--model_name_or_path"),
    (["digits", "--predictor_warmup_steps", "3"], "predictor_warmup_steps=3 is about weights to start from"),
    (["digits", "--predictor_warmup_steps", "-3"], "predictor_warmup_steps=-3 must be at least 0"),
    (
        ["digits", "--vicreg_weight", "0.001", "--per_device_train_batch_size", "1"],
        "vicreg_weight=0.001 needs .* per_device_train_batch_size=1 has not; write 2 or more",
    ),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES)
def test_a_mistake_is_named_with_what_to_write_instead(argv, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(argv)


def test_an_unknown_recipe_and_an_unknown_recipe_key_name_the_nearest(tmp_path):
    with pytest.raises(FileNotFoundError, match="'digit' is neither shipped.*Did you mean 'digits'"):
        parse_arguments(["digit"])
    path = tmp_path / "bad.yaml"
    path.write_text("dataset_nam: digits\n")
    with pytest.raises(ValueError, match="'dataset_nam', which is no argument; did you mean 'dataset_name'"):
        parse_arguments([str(path)])
    path.write_text("model: {width: 3}\n")
    with pytest.raises(ValueError, match="flat mapping"):
        parse_arguments([str(path)])


def test_a_recipe_after_a_flag_and_a_recipe_that_is_no_yaml_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'digits' stands after a flag; the recipe comes first"):
        parse_arguments(["--seed", "1", "digits"])
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(ValueError, match="is not valid YAML"):
        parse_arguments([str(tmp_path / "bad.yaml")])


def test_base_learning_rate_on_the_command_line_replaces_a_recipes_learning_rate():
    run = parse_arguments(["digits", "--base_learning_rate", "2e-3"])[2]
    assert (run.learning_rate, run.base_learning_rate) == (None, 2e-3)


def test_a_bad_geometry_is_refused_when_the_config_is_made():
    model, _, _ = parse_arguments(["digits", "--image_size", "30"])
    with pytest.raises(ValueError, match="image_size=30"):
        model.to_config()
    assert "image_size" in argument_names()
