"""Runs `ijepa-hf finetune`: trains an encoder with a classification head on labelled images."""

from collections.abc import Sequence

from ijepa_hf.finetuning.arguments import build_finetune_parser as build_parser
from ijepa_hf.finetuning.arguments import parse_finetune_arguments

__all__ = ["build_parser", "run"]


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: What follows `ijepa-hf finetune`.

    Returns:
        The exit code.

    Raises:
        OSError: If the model or the images are missing.
        ValueError: If a flag is bad, or model and images do not fit.
    """
    from ijepa_hf.finetuning.finetune import finetune

    print(finetune(parse_finetune_arguments(argv)))
    return 0
