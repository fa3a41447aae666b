"""Runs `ijepa-hf convert`: turns a published checkpoint into a model folder, or a model folder into such a file."""

from collections.abc import Sequence

from ijepa_hf.recipes.parsing import CommandParser, command_parser, parse_flags


def build_parser() -> CommandParser:
    """Returns the parser of the command."""
    parser = command_parser(
        "convert",
        "Turn a published I-JEPA checkpoint (.pth.tar) into a model folder, or a model folder into such a file.",
    )
    add = parser.add_argument
    add("source", help="The .pth.tar file, which is read without running any code in it; or a model folder.")
    add("target", help="The folder to write, empty or missing; or the .pth.tar file to write.")
    add(
        "--to",
        choices=["transformers", "official"],
        default="transformers",
        help="transformers: write a model folder; official: write a file that the published code loads.",
    )
    add(
        "--with_optimizer",
        action="store_true",
        help="Also convert the optimiser's state, so that the run can go on from where it was.",
    )
    add(
        "--num_attention_heads",
        type=int,
        help="Attention heads of both networks; only needed for an encoder that is not of a published size.",
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: What follows `ijepa-hf convert`.

    Returns:
        The exit code.

    Raises:
        OSError: If a file or folder is missing, or the target is not empty.
        ValueError: If a flag is bad, or the source cannot be converted.
    """
    from ijepa_hf.weights.convert import convert
    from ijepa_hf.weights.convert_back import convert_to_official

    flags = vars(parse_flags(build_parser(), argv))
    source, target = flags.pop("source"), flags.pop("target")
    if flags.pop("to") == "transformers":
        print(convert(source, target, **flags))
        return 0
    if flags.pop("num_attention_heads") is not None:
        raise ValueError("num_attention_heads is for reading a published checkpoint; omit it with --to official.")
    print(convert_to_official(source, target, **flags))
    return 0
