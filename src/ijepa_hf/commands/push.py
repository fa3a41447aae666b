"""Runs `ijepa-hf push`: uploads a folder to the Hub."""

from collections.abc import Sequence
from pathlib import Path

from ijepa_hf.recipes.parsing import CommandParser, command_parser, parse_flags


def build_parser() -> CommandParser:
    """Returns the parser of the command."""
    parser = command_parser(
        "push",
        "Upload the folder of a run, of a converted model or of a classifier to the Hub.",
        epilog="The token is read from HF_TOKEN, or from what `hf auth login` has saved.",
    )
    add = parser.add_argument
    add("folder", help="A folder that `ijepa-hf pretrain`, `convert` or `finetune` has written.")
    add("repo", help="Repository on the Hub, such as me/my-ijepa; made if it is missing.")
    add("--hub_private_repo", action="store_true", help="Make the repository private if it has to be made.")
    add("--hub_revision", help="Branch to upload to; main if not given.")
    add(
        "--hub_strategy",
        choices=["end", "checkpoint"],
        default="end",
        help="end: upload the model; checkpoint: also upload the newest training state, from which a run can resume.",
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: What follows `ijepa-hf push`.

    Returns:
        The exit code.

    Raises:
        OSError: If the folder is missing, or the Hub cannot be reached.
        ValueError: If a flag is bad, or the folder cannot be pushed.
    """
    from ijepa_hf.hub.push import push_folder

    named = parse_flags(build_parser(), argv)
    address = push_folder(
        Path(named.folder),
        named.repo,
        private=named.hub_private_repo,
        revision=named.hub_revision,
        with_checkpoint=named.hub_strategy == "checkpoint",
    )
    print(f"{named.folder} is at {address}")
    return 0
