"""Train a latent diffusion model, or go on with its training: the same command again resumes.

python train.py configs/digits_dcn.yaml [section.key=value ...]
accelerate launch train.py configs/digits_dcn.yaml
torchrun --standalone --nproc_per_node 2 train.py configs/digits_dcn.yaml
"""

from __future__ import annotations

import sys

from ldm_dcn.errors import Parser, exit_on_user_error, report


def main() -> int:
    parser = Parser(
        description=__doc__,
        usage="%(prog)s CONFIG [section.key=value ...] [--print-config] [--allow-change KEY ...] [--other-data]",
    )
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a YAML file, such as configs/digits_dcn.yaml"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings over those of the file"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and leave")
    parser.add_argument(
        "--allow-change", nargs="+", default=[], metavar="KEY", help="settings that may differ from the run's"
    )
    parser.add_argument(
        "--other-data",
        action="store_true",
        help="go on with the run although its images are others than they were: more, fewer, or replaced; of as many classes",
    )
    for argument in sys.argv[1:]:
        if argument.startswith("--") and "." in argument.partition("=")[0]:
            parser.error(f"{argument}: settings have no dashes; write {argument.lstrip('-')}")
    arguments = parser.parse_intermixed_args()
    if arguments.config is None:  # argparse itself would ask for overrides too
        parser.error("give a config, such as configs/digits_dcn.yaml")

    from ldm_dcn.config import check_keys, load_config  # Ctrl-C while this loads leaves no traceback either

    config = load_config(arguments.config, arguments.overrides)
    check_keys("--allow-change", arguments.allow_change)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return 0

    from ldm_dcn.trainer import (
        NON_FINITE,
        NonFinite,
        train,
    )  # takes seconds: not before the config is known to be right

    score = None
    if config.train.score_every:
        from eval.on_the_way import OnTheWay

        score = OnTheWay(config)
    try:
        return train(config, arguments.allow_change, score, arguments.other_data)
    except NonFinite as error:
        report(str(error))
        return NON_FINITE


if __name__ == "__main__":
    with exit_on_user_error():
        raise SystemExit(main())
