"""The console command `ijepa-hf`: answers `--help` and a wrong command before anything heavy is imported.

It stands outside the package on purpose. Importing the package registers its model with `AutoModelForPreTraining`,
for which transformers imports torch and half of itself (seconds); a list of commands needs none of that.
"""

import argparse
import sys
from collections.abc import Sequence

COMMANDS = {
    "pretrain": "pretrain an I-JEPA model on your images, from nothing or from existing weights",
    "estimate": "print what a run takes before it is started: parameters, FLOPs, memory, steps and hours",
    "finetune": "train an encoder with a classification head on labelled images",
    "diagnose": "judge whether a run or a model has collapsed, and what to try next",
    "evaluate": "score a model's frozen features, beside the untrained network's and raw pixels, with intervals",
    "prepare": "write images of any source as parquet shards, made small once instead of in every epoch",
    "visualize": "draw what a model has learnt and expects, a recipe's masks, or a run as one HTML file",
    "convert": "turn a published I-JEPA checkpoint (.pth.tar) into a model folder, or a model folder into such a file",
    "push": "upload the folder of a run, of a converted model or of a classifier to the Hub",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The command and its flags; the process's own arguments if not given.

    Returns:
        The exit code, see `ijepa_hf.commands.main`.

    Raises:
        SystemExit: With 0 after `--help`, with 2 where the command is missing or unknown; the message is printed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="ijepa-hf",
        description="Pretrain I-JEPA image encoders on your images; evaluate, fine-tune, inspect and publish them.",
        epilog="`ijepa-hf COMMAND --help` lists the flags of a command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    parser.parse_args(argv[:1])  # the flags that follow are the command's own
    from ijepa_hf.commands.main import main as run_command

    return run_command(argv)


if __name__ == "__main__":
    raise SystemExit(main())
