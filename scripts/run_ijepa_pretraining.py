"""Pretraining for `accelerate launch` and `torchrun`: the same program as `ijepa-hf pretrain`.

Example: `accelerate launch --num_processes 4 scripts/run_ijepa_pretraining.py in1k-vitb16 --dataset_name FOLDER`.
"""

import sys

from ijepa_hf.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main(["pretrain", *sys.argv[1:]]))
