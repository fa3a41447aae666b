"""The command `ijepa-hf pretrain`."""

import sys

from ijepa_hf.escaping import printable


def _pretrain(argv: list[str]) -> int:
    from ijepa_hf.data.loader import DataWorkerError
    from ijepa_hf.data.retrying import DataSourceError
    from ijepa_hf.diagnosis.run_monitor import CollapseError
    from ijepa_hf.files import SaveError
    from ijepa_hf.hub.uploader import UploadIncompleteError
    from ijepa_hf.recipes.parsing import parse_arguments
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
