"""The command `ijepa-hf push`."""

import argparse
from pathlib import Path

from ijepa_hf_command import COMMANDS


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
