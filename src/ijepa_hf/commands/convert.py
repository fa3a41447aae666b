"""The command `ijepa-hf convert`."""

import argparse

from ijepa_hf_command import COMMANDS


def _convert(argv: list[str]) -> int:
    from ijepa_hf.weights.convert import convert
    from ijepa_hf.weights.convert_back import convert_to_official

    named = build_convert_parser().parse_args(argv)
    if named.to == "official":
        if named.num_attention_heads is not None:
            raise ValueError("num_attention_heads is for reading a published checkpoint; omit it with --to official.")
        print(convert_to_official(named.source, named.target, with_optimizer=named.with_optimizer))
        return 0
    print(
        convert(
            named.source,
            named.target,
            num_attention_heads=named.num_attention_heads,
            with_optimizer=named.with_optimizer,
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
    return parser
