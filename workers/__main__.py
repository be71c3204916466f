"""`python -m workers`, run by `farm worker`: one worker here, or with `--gpus` a supervised worker per GPU."""

import argparse
import os


def parser() -> argparse.ArgumentParser:
    """The options of `farm worker`."""
    parser = argparse.ArgumentParser(prog="farm worker", description="Render the jobs of the models it pins.")
    parser.add_argument("--env", metavar="FILE", help="File of settings, as written by `farm env` (FARM_ENV_FILE).")
    parser.add_argument(
        "--name",
        help="Name of the worker in Flower and `farm watch` (default: worker-PID). With --gpus or --workers, it "
        "precedes gpu0, cpu0 and so on.",
    )
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--gpus",
        metavar="all|N|0,2",
        help="GPUs to run a worker on each of: all, the first N, or a list of their positions.",
    )
    several.add_argument("--workers", type=int, metavar="N", help="Number of workers to run on the CPU.")
    parser.add_argument("--models", help="Models to serve, as name=source,… (FARM_MODELS).")
    parser.add_argument(
        "--device", help="Device to compute on: cuda, cuda:1 or cpu (FARM_DEVICE; default: cuda if available)."
    )
    parser.add_argument(
        "--dtype",
        help="Data type of the weights: float32, bfloat16 or float16 (FARM_DTYPE; default: the device's best).",
    )
    parser.add_argument("--slots", type=int, help="Number of requests to render at once (FARM_SLOTS).")
    return parser


def main() -> None:
    """Render until told to stop."""
    args = vars(parser().parse_args())
    name, gpus, workers, env_file = (args.pop(option) for option in ("name", "gpus", "workers", "env"))
    given = {option: value for option, value in args.items() if value is not None}
    if env_file is not None:
        os.environ["FARM_ENV_FILE"] = env_file
    # `serve` imports torch. The supervisor must not: torch would take memory on every GPU.
    if gpus is not None or workers is not None:
        from workers.service.supervisor import supervise

        supervise(name, given, gpus=gpus, workers=workers)
    else:
        from workers.consumer.serve import serve

        serve(name, given)


if __name__ == "__main__":
    main()
