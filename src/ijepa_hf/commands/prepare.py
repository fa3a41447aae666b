"""Runs `ijepa-hf prepare`: writes the images of any source as parquet shards."""

from collections.abc import Sequence

from ijepa_hf.data.prepare.rewriting import DEFAULT_QUALITY, IMAGE_FORMATS
from ijepa_hf.recipes.parsing import CommandParser, command_parser, parse_flags


def build_parser() -> CommandParser:
    """Returns the parser of the command, whose values are source, folder and `PrepareSettings`."""
    parser = command_parser(
        "prepare",
        "Write the images of any source as parquet shards, shrunk once instead of in every epoch. If the command was "
        "stopped, the same command goes on. Images that cannot be read are skipped, and listed with the reason in "
        "OUT/manifest.json. Other columns are kept as they are: boxes and maps in pixels are not rescaled when their "
        "pictures shrink.",
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="Images, as for --dataset_name of ijepa-hf pretrain: a folder, file or Hub id.",
    )
    add("out", metavar="OUT", help="Folder to write; missing, empty, or written by this command.")
    add("--dataset_config_name", help="Configuration of the Hub data set.")
    add("--split_name", default="train", help="Split to write; another call can add another split to the same OUT.")
    add("--image_column_name", help="Column of the images; found automatically if there is only one.")
    add(
        "--shortest_side",
        type=int,
        help="Pixels. Images whose shortest side is longer are shrunk to it; no image is shrunk if not given.",
    )
    add(
        "--image_format",
        choices=IMAGE_FORMATS,
        default="keep",
        help="How pictures are written. keep: files that need no shrinking are copied unchanged; shrunk JPEG and WebP "
        "keep their format; everything else becomes PNG, which loses nothing. bmp: uncompressed, six times the bytes "
        "of JPEG, decoded in a quarter of the time. 16-bit pictures are always PNG.",
    )
    add("--quality", type=int, help=f"Quality of JPEG and WebP, 1 to 100; {DEFAULT_QUALITY} if not given.")
    add(
        "--channel_axis",
        type=int,
        choices=(0, -1),
        help="Axis of the channels of arrays that are shrunk: 0 for [channels, height, width], -1 for [height, width, "
        "channels]; the shortest axis if not given.",
    )
    add("--shard_size", default="100MB", help="Largest size of a shard, with a unit: KB, MB or GB.")
    add(
        "--num_workers",
        type=int,
        default=0,
        help="Processes that read and write pictures; their number does not change what is written.",
    )
    add("--max_samples", type=int, help="Write only the first N images of the source.")
    add(
        "--max_broken_share",
        type=float,
        default=0.05,
        help="Share of images, 0 to 1, that may be unreadable and are skipped; with more, stop and list them.",
    )
    add("--overwrite", action="store_true", help="Delete what OUT holds of this split, and start again.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: What follows `ijepa-hf prepare`.

    Returns:
        The exit code.

    Raises:
        OSError: If the source is missing, or OUT cannot be written.
        ValueError: If a flag is bad, or too many images cannot be read.
    """
    from ijepa_hf.data.prepare.prepare import PrepareSettings, prepare

    flags = vars(parse_flags(build_parser(), argv))
    print(prepare(flags.pop("source"), flags.pop("out"), PrepareSettings(**flags)))
    return 0
