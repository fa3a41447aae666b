"""The command `ijepa-hf prepare`."""

from ijepa_hf.data.prepare.rewriting import DEFAULT_QUALITY, IMAGE_FORMATS
from ijepa_hf.recipes.parsing import CommandParser, command_parser


def build_prepare_parser() -> CommandParser:
    """Returns the parser of `ijepa-hf prepare`, whose values are the arguments of `prepare`."""
    parser = command_parser(
        "prepare",
        "Write the images of any source as parquet shards, shrunk once instead of in every epoch. The "
        "same command goes on where an earlier one was stopped. Images that cannot be read are skipped, and listed "
        "with the reason in OUT/manifest.json. Other columns are kept as they are: boxes and maps in pixels are not "
        "rescaled when their pictures shrink.",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="What --dataset_name of ijepa-hf pretrain takes: a folder, file or Hub id.")
    add("out", metavar="OUT", help="Folder to write; missing, empty, or written by this command.")
    add("--dataset_config_name", help="Configuration of the Hub data set.")
    add("--split_name", default="train", help="Split to write; another call may add another split to the same OUT.")
    add("--image_column_name", help="Column of the images; found by itself if there is only one.")
    add(
        "--shortest_side", type=int, help="Shrink images whose shortest side has more pixels; sizes stay if not given."
    )
    add(
        "--image_format",
        choices=IMAGE_FORMATS,
        default="keep",
        help="How pictures are written. keep: those that need no shrinking stay the very files they are, shrunk JPEG "
        "and WebP keep their format, all else becomes PNG, so that nothing lossless becomes lossy. bmp: uncompressed, "
        "six times the bytes of JPEG, decoded in a quarter of the time. 16-bit pictures are PNG in any case.",
    )
    add("--quality", type=int, help=f"Of JPEG and WebP, 1 to 100; {DEFAULT_QUALITY} if not given.")
    add(
        "--channel_axis",
        type=int,
        choices=(0, -1),
        help="For arrays to be shrunk: 0 if they are [channels, height, width], -1 if [height, width, channels]; the "
        "shortest axis if not given.",
    )
    add("--shard_size", default="100MB", help="Bytes of a shard at most, with a unit: KB, MB or GB.")
    add(
        "--num_workers",
        type=int,
        default=0,
        help="Processes that read and write pictures; what is written is the same.",
    )
    add("--max_samples", type=int, help="Write only the first N images of the source.")
    add(
        "--max_broken_share",
        type=float,
        default=0.05,
        help="Stop, and list them, when more than this share of the images cannot be read; others are skipped.",
    )
    add("--overwrite", action="store_true", help="Delete what OUT holds of this split, and start again.")
    return parser
