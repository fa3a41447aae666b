"""Runs `ijepa-hf evaluate`: scores a model's frozen features, those of the untrained network, and raw pixels."""

from collections.abc import Sequence

from ijepa_hf.evaluation.arguments import build_evaluate_parser as build_parser
from ijepa_hf.evaluation.arguments import parse_evaluate_arguments

__all__ = ["build_parser", "run"]


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: What follows `ijepa-hf evaluate`.

    Returns:
        The exit code.

    Raises:
        OSError: If the model or the images are missing.
        ValueError: If a flag is bad, or model and images do not fit.
    """
    arguments = parse_evaluate_arguments(argv)
    from ijepa_hf.evaluation.evaluate import evaluate_model  # after the check of the flags, since it takes seconds

    print(evaluate_model(arguments))
    return 0
