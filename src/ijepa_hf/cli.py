"""The command line: `ijepa-hf pretrain` and `ijepa-hf convert`.

Exit codes: 0 done; 1 an unexpected error; 2 something the user can mend (a flag, a file, a folder), said in one line;
3 training stopped because the loss was NaN or infinite; 130 interrupted.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

COMMANDS = {
    "pretrain": "pretrain an I-JEPA model on your images",
    "convert": "turn a published I-JEPA checkpoint (.pth.tar) into a model folder",
}


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
        description="Pretrain and convert I-JEPA image encoders.",
        epilog="`ijepa-hf COMMAND --help` lists a command's flags.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_known_args(argv)[0].command
    rest = argv[argv.index(command) + 1 :]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return _pretrain(rest) if command == "pretrain" else _convert(rest)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume_from_checkpoint latest goes on.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"ijepa-hf {command}: {error}", file=sys.stderr)
        return 2


def _pretrain(argv: list[str]) -> int:
    from ijepa_hf.arguments import parse_arguments
    from ijepa_hf.training import NonFiniteLossError, pretrain

    try:
        pretrain(*parse_arguments(argv))
    except NonFiniteLossError as error:
        print(f"ijepa-hf pretrain: {error}", file=sys.stderr)
        return 3
    return 0


def _convert(argv: list[str]) -> int:
    from ijepa_hf.conversion import convert

    named = build_convert_parser().parse_args(argv)
    print(convert(named.checkpoint, named.output_dir, num_attention_heads=named.num_attention_heads))
    return 0


def build_convert_parser() -> argparse.ArgumentParser:
    """Returns the parser of `ijepa-hf convert`."""
    parser = argparse.ArgumentParser(
        prog="ijepa-hf convert",
        description=COMMANDS["convert"],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", help="The .pth.tar file; read without running any code in it.")
    parser.add_argument("output_dir", help="The folder to write; must be empty or missing.")
    parser.add_argument(
        "--num_attention_heads",
        type=int,
        help="Heads of both networks; only needed for an encoder that is not a published size.",
    )
    return parser


def command_flags() -> dict[str, set[str]]:
    """Returns each command's flags, e.g. `{"convert": {"--num_attention_heads", ...}}`."""
    from ijepa_hf.arguments import build_parser

    parsers: dict[str, argparse.ArgumentParser] = {"pretrain": build_parser(), "convert": build_convert_parser()}
    return {
        name: {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
        for name, parser in parsers.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
