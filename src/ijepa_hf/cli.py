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
from pathlib import Path

from ijepa_hf.escaping import printable
from ijepa_hf.training.signals import StoppedBySignal
from ijepa_hf_command import COMMANDS, find_command


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
    from ijepa_hf.diagnose import diagnose

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
    from ijepa_hf.data.prepare.prepare import build_prepare_parser, prepare

    print(prepare(**vars(build_prepare_parser().parse_args(argv))))
    return 0


def _visualize(argv: list[str]) -> int:
    from ijepa_hf.visualize import visualize

    print(visualize(argv))
    return 0


def _convert(argv: list[str]) -> int:
    from ijepa_hf.weights.convert import convert
    from ijepa_hf.weights.convert_back import convert_to_official

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
    from ijepa_hf.hub.push import push_folder

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
    from ijepa_hf.data.prepare.prepare import build_prepare_parser
    from ijepa_hf.diagnose import build_diagnose_parser
    from ijepa_hf.estimation.estimate import build_estimate_parser
    from ijepa_hf.evaluation.arguments import build_evaluate_parser
    from ijepa_hf.finetuning.arguments import build_finetune_parser
    from ijepa_hf.recipes.parsing import build_parser
    from ijepa_hf.visualize import visualize_flags

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
