"""Train a latent diffusion model, or go on with its training: the same command again resumes.

python train.py configs/digits_dcn.yaml [section.key=value ...]
accelerate launch train.py configs/digits_dcn.yaml
torchrun --standalone --nproc_per_node 2 train.py configs/digits_dcn.yaml
"""

from __future__ import annotations

import argparse
import sys

from ldm_dcn.config import load_config
from ldm_dcn.errors import exit_on_user_error


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML file, such as configs/digits_dcn.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings over those of the file"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and leave")
    parser.add_argument(
        "--allow-change", nargs="+", default=[], metavar="KEY", help="settings that may differ from the run's"
    )
    arguments = parser.parse_intermixed_args()

    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return 0

    from ldm_dcn.trainer import (
        NON_FINITE,
        NonFinite,
        train,
    )  # takes seconds: not before the config is known to be right

    try:
        return train(config, arguments.allow_change)
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return NON_FINITE


if __name__ == "__main__":
    with exit_on_user_error():
        raise SystemExit(main())
