"""`python -m workers`, run by `farm worker`: one worker here, or with `--gpus` a supervised worker per GPU."""

import argparse
import os


def main() -> None:
    """Render until told to stop."""
    parser = argparse.ArgumentParser(prog="farm worker", description="Render the jobs of the models it pins.")
    parser.add_argument("--env", metavar="FILE", help="where the farm is, as `farm env` wrote it (FARM_ENV_FILE)")
    parser.add_argument("--name", help="what Flower calls it (default: worker-PID; with --gpus: before gpu0, gpu1, …)")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--gpus", metavar="all|N|0,2", help="keep one worker running on each of these GPUs")
    several.add_argument("--workers", type=int, metavar="N", help="keep so many workers running on the CPU")
    parser.add_argument("--models", help="what to pin: name=source,… (FARM_MODELS)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (FARM_DEVICE; default: what is there)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (FARM_DTYPE; default: what fits the device)")
    parser.add_argument("--slots", type=int, help="requests rendered at once (FARM_SLOTS)")
    args = vars(parser.parse_args())
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
