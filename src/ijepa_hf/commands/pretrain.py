"""Runs `ijepa-hf pretrain`: pretrains a model, and returns a different exit code for each way in which it can stop."""

import sys
from collections.abc import Sequence

from ijepa_hf.escaping import printable
from ijepa_hf.recipes.parsing import build_parser, parse_arguments

__all__ = ["build_parser", "run"]


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: What follows `ijepa-hf pretrain`.

    Returns:
        The exit code, see `ijepa_hf.commands.main`.

    Raises:
        OSError: If the recipe, the images or the weights are missing.
        ValueError: If a flag is bad, or arguments, images and folder do not fit.
    """
    from ijepa_hf.data.loader import DataWorkerError
    from ijepa_hf.data.retrying import DataSourceError
    from ijepa_hf.diagnosis.run_monitor import CollapseError
    from ijepa_hf.files import SaveError
    from ijepa_hf.hub.uploader import UploadIncompleteError
    from ijepa_hf.training.memory import DoesNotFitError
    from ijepa_hf.training.pretrain import pretrain
    from ijepa_hf.training.ranks import LostRankError
    from ijepa_hf.training.step import NonFiniteLossError

    codes: dict[type[Exception], int] = {
        DoesNotFitError: 2,
        NonFiniteLossError: 3,
        UploadIncompleteError: 4,
        CollapseError: 5,
        DataSourceError: 7,
        DataWorkerError: 7,
        SaveError: 8,
        LostRankError: 9,
    }
    try:
        pretrain(*parse_arguments(argv))
    except tuple(codes) as error:
        print(f"ijepa-hf pretrain: {printable(str(error))}", file=sys.stderr)
        return next(code for kind, code in codes.items() if isinstance(error, kind))
    return 0
