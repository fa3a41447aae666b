"""The command line: `ijepa-hf pretrain`, `finetune`, `prepare`, `visualize`, `convert` and `push`.

Exit codes: 0 done; 1 an unexpected error; 2 something the user can mend (a flag, a file, a folder), said in one line;
3 training stopped because the loss was NaN or infinite; 4 training is finished, but its upload did not arrive whole;
130 interrupted.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where they are used, so that --help answers at once
    from transformers import HfArgumentParser

    from ijepa_hf.arguments import DataArguments, ModelArguments
    from ijepa_hf.configuration_ijepa import IJepaConfig

COMMANDS = {
    "pretrain": "pretrain an I-JEPA model on your images, from nothing or from weights that exist",
    "finetune": "train an encoder with a classification head on labelled images",
    "prepare": "write images of any source as parquet shards, made small once instead of in every epoch",
    "visualize": "draw or measure the masks of a recipe before training with it",
    "convert": "turn a published I-JEPA checkpoint (.pth.tar) into a model folder, or a model folder into such a file",
    "push": "upload a run's, a converted or a fine-tuned model's folder to the Hub",
}
_IMAGES_SHOWN = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: What follows `ijepa-hf`; the process's own arguments if not given.

    Returns:
        The exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="ijepa-hf",
        description="Pretrain I-JEPA image encoders, and all that goes with it.",
        epilog="`ijepa-hf COMMAND --help` lists a command's flags.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_known_args(argv)[0].command
    rest = argv[argv.index(command) + 1 :]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return {
            "pretrain": _pretrain,
            "finetune": _finetune,
            "prepare": _prepare,
            "visualize": _visualize,
            "convert": _convert,
            "push": _push,
        }[command](rest)
    except KeyboardInterrupt:
        resumable = command in ("pretrain", "finetune")
        advice = "; the same command with --resume_from_checkpoint latest goes on" if resumable else ""
        print(f"\ninterrupted{advice}.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"ijepa-hf {command}: {error}", file=sys.stderr)
        return 2


def _pretrain(argv: list[str]) -> int:
    from ijepa_hf.arguments import parse_arguments
    from ijepa_hf.hub import UploadIncompleteError
    from ijepa_hf.training import NonFiniteLossError, pretrain

    try:
        pretrain(*parse_arguments(argv))
    except NonFiniteLossError as error:
        print(f"ijepa-hf pretrain: {error}", file=sys.stderr)
        return 3
    except UploadIncompleteError as error:
        print(f"ijepa-hf pretrain: {error}", file=sys.stderr)
        return 4
    return 0


def _finetune(argv: list[str]) -> int:
    from ijepa_hf.evaluation.finetune import finetune
    from ijepa_hf.evaluation.finetune_arguments import parse_finetune_arguments

    print(finetune(parse_finetune_arguments(argv)))
    return 0


def _prepare(argv: list[str]) -> int:
    from ijepa_hf.preparation import build_prepare_parser, prepare

    print(prepare(**vars(build_prepare_parser().parse_args(argv))))
    return 0


def _visualize(argv: list[str]) -> int:
    named, model, data = _parse_visualize(argv)
    config = model.to_config()
    output = Path(named.output or ("mask-audit.png" if named.audit else "masks.png"))
    if output.suffix != ".png":
        raise ValueError(
            f"output={str(output)!r} must end in .png, for example --output {output.stem or 'masks'}.png."
        )
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output={str(output)!r}: there is no folder {str(output.parent)!r}; make it first.")
    if named.audit:
        from ijepa_hf.mask_audit import audit_masks, render_audit
        from ijepa_hf.visualization import draw_audit_figure

        audit = audit_masks(config.mask_settings(), batch_size=named.batch_size, seed=named.seed)
        print(render_audit(audit))
        draw_audit_figure(audit, output)
    else:
        data.check(model)
        _draw_first_masks(config, data, named.batch_size, named.seed, output)
    print(f"\nfigure: {output}")
    return 0


def _draw_first_masks(config: "IJepaConfig", data: "DataArguments", batch_size: int, seed: int, output: Path) -> None:
    """Draws some training images, whole, with masks as a run might draw them."""
    from ijepa_hf.data import BatchMaker, CropReader, IJepaDataCollator
    from ijepa_hf.loading import open_training_images
    from ijepa_hf.visualization import draw_masks_figure

    images = open_training_images(data, config, num_ranks=1)
    crops = CropReader(
        images.column, config.image_shape, 1.0, seed, regions_column=images.regions_column, grid_size=config.grid_size
    )
    make_batch = BatchMaker(IJepaDataCollator(config, normalize=False, seed=seed, global_batch_size=batch_size))
    size = min(_IMAGES_SHOWN, batch_size, images.num_images)
    batch = images.first_batch(crops, make_batch, size=size, seed=seed).inputs
    draw_masks_figure(
        batch["pixel_values"], batch["context_indices"], batch["target_indices"], config.patch_shape, output
    )


def _parse_visualize(argv: list[str]) -> tuple[argparse.Namespace, "ModelArguments", "DataArguments"]:
    """The command's own flags, and the recipe's arguments with flags over them."""
    from ijepa_hf.arguments import as_flags, load_recipe, nearest_name
    from ijepa_hf.configuration_ijepa import MASK_FIELDS
    from ijepa_hf.masking import STRATEGY_FIELDS

    parser = build_visualize_parser()
    named, unknown = parser.parse_known_args(argv)
    known = command_flags()["visualize"]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no flag of ijepa-hf visualize{nearest_name(unknown[0].split('=')[0], known)}"
        )
    values = {name: value for name, value in load_recipe(named.masks).items() if f"--{name}" in known}
    if any(word.split("=")[0] == "--masking_strategy" for word in argv):
        # The recipe's numbers were meant for its own strategy; those that the new one has no use for go with it.
        used = ("masking_strategy", *STRATEGY_FIELDS.get(named.masking_strategy, MASK_FIELDS))
        values = {name: value for name, value in values.items() if name not in MASK_FIELDS or name in used}
    model, data, named = parser.parse_args_into_dataclasses(args=[*as_flags(values), *argv])
    return named, model, data


def build_visualize_parser() -> "HfArgumentParser":
    """Returns the parser of `ijepa-hf visualize`: its own flags and those of the model and the data."""
    from transformers import HfArgumentParser

    from ijepa_hf.arguments import DataArguments, ModelArguments, recipe_names

    parser = HfArgumentParser(
        (ModelArguments, DataArguments),
        prog="ijepa-hf visualize",
        allow_abbrev=False,
        description="Draw the first training images of a recipe with their masks, or with --audit measure the masks "
        "of many steps. Flags override the recipe; one that sets masking_strategy drops what only the recipe's needs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--masks",
        metavar="RECIPE",
        required=True,
        help=f"Whose masks: one of {', '.join(recipe_names())}, or the path of a YAML file.",
    )
    parser.add_argument(
        "--audit", action="store_true", help="Print what the masks are like, and draw that; needs no images."
    )
    parser.add_argument("--batch_size", type=int, default=64, help="Images that share a draw of masks.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of every draw; the recipe's if it has one.")
    parser.add_argument("--output", help="PNG to write; masks.png, or mask-audit.png with --audit, if not given.")
    return parser


def _convert(argv: list[str]) -> int:
    from ijepa_hf.conversion import convert, convert_to_official

    named = build_convert_parser().parse_args(argv)
    if named.to == "official":
        for name in ("num_attention_heads", "published_code"):
            if getattr(named, name) is not None:
                raise ValueError(f"{name} is about reading a published checkpoint; leave it out with --to official.")
        print(convert_to_official(named.source, named.target, with_optimizer=named.with_optimizer))
        return 0
    print(
        convert(
            named.source,
            named.target,
            num_attention_heads=named.num_attention_heads,
            with_optimizer=named.with_optimizer,
            published_code=named.published_code,
        )
    )
    return 0


def build_convert_parser() -> argparse.ArgumentParser:
    """Returns the parser of `ijepa-hf convert`."""
    parser = argparse.ArgumentParser(
        prog="ijepa-hf convert",
        description=COMMANDS["convert"],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", help="The .pth.tar file, read without running any code in it; or a model folder.")
    parser.add_argument("target", help="The folder to write, empty or missing; or the .pth.tar file.")
    parser.add_argument(
        "--to",
        choices=["transformers", "official"],
        default="transformers",
        help="transformers: a model folder; official: a file that the published code loads.",
    )
    parser.add_argument(
        "--with_optimizer",
        action="store_true",
        help="Carry the optimiser's state over too, so that the run goes on where it was.",
    )
    parser.add_argument(
        "--num_attention_heads",
        type=int,
        help="Heads of both networks; only needed for an encoder that is not a published size.",
    )
    parser.add_argument(
        "--published_code",
        help="Folder of the published code: it is run in a process of its own, and both outputs compared.",
    )
    return parser


def _push(argv: list[str]) -> int:
    from ijepa_hf.hub import push_folder

    named = build_push_parser().parse_args(argv)
    address = push_folder(
        Path(named.folder),
        named.repo,
        private=named.hub_private_repo,
        revision=named.hub_revision,
        with_checkpoint=named.hub_strategy == "checkpoint",
    )
    print(f"{named.folder} is at {address}")
    return 0


def build_push_parser() -> argparse.ArgumentParser:
    """Returns the parser of `ijepa-hf push`."""
    parser = argparse.ArgumentParser(
        prog="ijepa-hf push",
        description=COMMANDS["push"],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
        epilog="The token is read from HF_TOKEN, or from what `hf auth login` has saved.",
    )
    parser.add_argument("folder", help="What `ijepa-hf pretrain`, `convert` or `finetune` has written.")
    parser.add_argument("repo", help="Repository on the Hub, such as me/my-ijepa; made if it is missing.")
    parser.add_argument("--hub_private_repo", action="store_true", help="Make it private, where it is made.")
    parser.add_argument("--hub_revision", help="Branch to upload to; main if not given.")
    parser.add_argument(
        "--hub_strategy",
        choices=["end", "checkpoint"],
        default="end",
        help="checkpoint: upload the newest state to resume from too.",
    )
    return parser


def command_flags() -> dict[str, set[str]]:
    """Returns each command's flags, e.g. `{"convert": {"--num_attention_heads", ...}}`."""
    from ijepa_hf.arguments import build_parser
    from ijepa_hf.evaluation.finetune_arguments import build_finetune_parser
    from ijepa_hf.preparation import build_prepare_parser

    parsers: dict[str, argparse.ArgumentParser] = {
        "pretrain": build_parser(),
        "finetune": build_finetune_parser(),
        "prepare": build_prepare_parser(),
        "visualize": build_visualize_parser(),
        "convert": build_convert_parser(),
        "push": build_push_parser(),
    }
    return {
        name: {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
        for name, parser in parsers.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
