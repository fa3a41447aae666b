"""The console command `ijepa-hf`: answers `--help` and a wrong command by itself, before anything heavy is imported.

It stands outside the package on purpose. Importing the package registers its model with `AutoModelForPreTraining`,
for which transformers imports torch and half of itself (seconds); a list of commands needs none of that. Whatever is a
command is handed to `ijepa_hf.commands.main`, which reads the names and texts from here.
"""

import argparse
import sys
from collections.abc import Sequence

COMMANDS = {
    "pretrain": "pretrain an I-JEPA model on your images, from nothing or from weights that exist",
    "estimate": "say what a run takes before it is started: parameters, FLOPs, memory, steps and hours",
    "finetune": "train an encoder with a classification head on labelled images",
    "diagnose": "judge whether a run or a model has collapsed, and what to try next",
    "evaluate": "score a model's frozen features, beside the untrained network's and raw pixels, with intervals",
    "prepare": "write images of any source as parquet shards, made small once instead of in every epoch",
    "visualize": "draw what a model has learnt and expects, a recipe's masks, or a run as one HTML file",
    "convert": "turn a published I-JEPA checkpoint (.pth.tar) into a model folder, or a model folder into such a file",
    "push": "upload a run's, a converted or a fine-tuned model's folder to the Hub",
}


def find_command(argv: Sequence[str]) -> str:
    """Finds the command in a command line.

    Args:
        argv: What follows `ijepa-hf`.

    Returns:
        A key of `COMMANDS`.

    Raises:
        SystemExit: With 0 after `--help`, with 2 where there is no or an unknown command; what is to be said is said.
    """
    parser = argparse.ArgumentParser(
        prog="ijepa-hf",
        description="Pretrain I-JEPA image encoders, and all that goes with it.",
        epilog="`ijepa-hf COMMAND --help` lists a command's flags.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser.parse_known_args(argv)[0].command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: What follows `ijepa-hf`; the process's own arguments if not given.

    Returns:
        The exit code, see `ijepa_hf.commands.main`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    find_command(argv)
    from ijepa_hf.commands.main import main as run_command

    return run_command(argv)


if __name__ == "__main__":
    raise SystemExit(main())
