"""Runs the commands of `ijepa-hf`, and turns errors and signals into exit codes.

Exit codes: 0 done; 1 an unexpected error; 2 something that the user can mend (a flag, a file, a folder), named in one
line; 3 training stopped because the loss was NaN or infinite; 4 training is finished, but its upload is incomplete;
5 the features have collapsed (`diagnose`, and `pretrain --on_collapse stop`); 6 `diagnose` has too few measurements;
7 the images cannot be read any more, or a loading process died, and the state is saved; 8 the state cannot be written;
9 another process of the run was lost; 130 interrupted; 129, 138 (on macOS 158) and 143 stopped by SIGHUP, SIGUSR1 and
SIGTERM, with the state saved. A launcher of several processes, such as `torchrun`, has exit codes of its own.
"""

import importlib
import logging
import sys
from collections.abc import Sequence

from ijepa_hf.escaping import printable
from ijepa_hf.training.signals import StoppedBySignal

# Each is a module of this package with `build_parser()` and `run(argv)`; imported only when it is asked for.
COMMANDS = ("pretrain", "estimate", "finetune", "diagnose", "evaluate", "prepare", "visualize", "convert", "push")

_AFTER_AN_INTERRUPTION = {
    "pretrain": "; the same command with --resume_from_checkpoint latest goes on",
    "finetune": "; the same command with --resume_from_checkpoint latest goes on",
    "evaluate": "; the same command goes on",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The command, one of `COMMANDS`, and its flags; the process's own arguments if not given.

    Returns:
        The exit code.
    """
    command, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if command not in COMMANDS:
        print(f"ijepa-hf: {printable(command)!r} is no command; choose {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, handlers=[_log_handler()])
    try:
        return importlib.import_module(f"ijepa_hf.commands.{command}").run(flags)
    except StoppedBySignal as stop:
        print(f"\nijepa-hf {command}: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print(f"\ninterrupted{_AFTER_AN_INTERRUPTION.get(command, '')}.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"ijepa-hf {command}: {printable(str(error))}", file=sys.stderr)
        return 2


def _log_handler() -> logging.Handler:
    """Writes log lines to standard error, with control characters escaped."""

    class Printable(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return printable(super().format(record))

    handler = logging.StreamHandler()
    handler.setFormatter(Printable("%(levelname)s: %(message)s"))
    return handler


if __name__ == "__main__":
    raise SystemExit(main())
