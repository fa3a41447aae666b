"""The command line: `ijepa-hf pretrain`, `finetune`, `evaluate`, `prepare`, `convert` and all others.

Exit codes: 0 done; 1 an unexpected error; 2 something the user can mend (a flag, a file, a folder), said in one line;
3 training stopped because the loss was NaN or infinite; 4 training is finished, but its upload did not arrive whole;
5 the features have collapsed (`diagnose`, and `pretrain --on_collapse stop`); 6 `diagnose` has too little to judge;
7 the images cannot be read any more, or a loading process died, and the state is saved; 8 the state cannot be written;
9 another process of the run was lost; 130 interrupted; 129, 138 (on macOS 158) and 143 stopped by SIGHUP, SIGUSR1 and
SIGTERM, with the state saved. What launches several processes, such as `torchrun`, has exit codes of its own.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from ijepa_hf.commands.convert import _convert, build_convert_parser
from ijepa_hf.commands.pretrain import _pretrain
from ijepa_hf.commands.push import _push, build_push_parser
from ijepa_hf.escaping import printable
from ijepa_hf.training.signals import StoppedBySignal
from ijepa_hf_command import find_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: What follows `ijepa-hf`; the process's own arguments if not given.

    Returns:
        The exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = find_command(argv)
    rest = argv[argv.index(command) + 1 :]
    logging.basicConfig(level=logging.WARNING, handlers=[_log_handler()])
    try:
        return {
            "pretrain": _pretrain,
            "estimate": _estimate,
            "finetune": _finetune,
            "diagnose": _diagnose,
            "evaluate": _evaluate,
            "prepare": _prepare,
            "visualize": _visualize,
            "convert": _convert,
            "push": _push,
        }[command](rest)
    except StoppedBySignal as stop:
        print(f"\nijepa-hf {command}: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        with_flag = "; the same command with --resume_from_checkpoint latest goes on"
        advice = {"pretrain": with_flag, "finetune": with_flag, "evaluate": "; the same command goes on"}
        print(f"\ninterrupted{advice.get(command, '')}.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"ijepa-hf {command}: {printable(str(error))}", file=sys.stderr)
        return 2


def _log_handler() -> logging.Handler:
    """Log lines on standard error; names in them cannot reach the terminal as commands."""

    class Printable(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return printable(super().format(record))

    handler = logging.StreamHandler()
    handler.setFormatter(Printable("%(levelname)s: %(message)s"))
    return handler


def _estimate(argv: list[str]) -> int:
    from ijepa_hf.estimation.estimate import estimate

    print(estimate(argv))
    return 0


def _finetune(argv: list[str]) -> int:
    from ijepa_hf.finetuning.arguments import parse_finetune_arguments
    from ijepa_hf.finetuning.finetune import finetune

    print(finetune(parse_finetune_arguments(argv)))
    return 0


def _diagnose(argv: list[str]) -> int:
    from ijepa_hf.commands.diagnose import diagnose

    text, code = diagnose(argv)
    print(text)
    return code


def _evaluate(argv: list[str]) -> int:
    from ijepa_hf.evaluation.arguments import parse_evaluate_arguments

    arguments = parse_evaluate_arguments(argv)
    from ijepa_hf.evaluation.evaluate import evaluate_model

    print(evaluate_model(arguments))
    return 0


def _prepare(argv: list[str]) -> int:
    from ijepa_hf.commands.prepare import build_prepare_parser
    from ijepa_hf.data.prepare.prepare import PrepareSettings, prepare

    options = vars(build_prepare_parser().parse_args(argv))
    print(prepare(options.pop("source"), options.pop("out"), PrepareSettings(**options)))
    return 0


def _visualize(argv: list[str]) -> int:
    from ijepa_hf.commands.visualize import visualize

    print(visualize(argv))
    return 0


def command_flags() -> dict[str, set[str]]:
    """Returns each command's flags, e.g. `{"convert": {"--num_attention_heads", ...}}`."""
    from ijepa_hf.commands.diagnose import build_diagnose_parser
    from ijepa_hf.commands.prepare import build_prepare_parser
    from ijepa_hf.commands.visualize import visualize_flags
    from ijepa_hf.estimation.estimate import build_estimate_parser
    from ijepa_hf.evaluation.arguments import build_evaluate_parser
    from ijepa_hf.finetuning.arguments import build_finetune_parser
    from ijepa_hf.recipes.parsing import build_parser

    parsers: dict[str, argparse.ArgumentParser] = {
        "pretrain": build_parser(),
        "estimate": build_estimate_parser(),
        "finetune": build_finetune_parser(),
        "diagnose": build_diagnose_parser(),
        "evaluate": build_evaluate_parser(),
        "prepare": build_prepare_parser(),
        "convert": build_convert_parser(),
        "push": build_push_parser(),
    }
    flags = {
        name: {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
        for name, parser in parsers.items()
    }
    return {**flags, "visualize": visualize_flags()}


if __name__ == "__main__":
    raise SystemExit(main())
