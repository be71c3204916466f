"""Starts the embedded farm, submits a file of prompts, and downloads the pictures."""

import argparse
import contextlib
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from farm import Farm, FarmError, JobState
from farm.local import LocalFarm, running
from farm.settings import Settings
from farm.specs.sources import rows

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "prompts",
        nargs="?",
        type=Path,
        default=HERE / "prompts.txt",
        help="File of prompts: .txt, .csv or .jsonl (default: prompts.txt beside this program).",
    )
    parser.add_argument(
        "--home", type=Path, default=Path(".farm"), help="Folder of the embedded farm (default: %(default)s)."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="Folder for the pictures (default: %(default)s)."
    )
    args = parser.parse_args()
    console = Console(highlight=False)

    with contextlib.ExitStack() as stack:
        if running(args.home) is None:
            local = stack.enter_context(LocalFarm(args.home, console=console))
            console.print(local.table())
            settings = local.settings
        else:
            console.print(f"using the farm that runs in {args.home}")
            settings = Settings.load(home=args.home)
        farm = stack.enter_context(Farm(settings))
        # Fixed seeds, so that everyone sees the same pictures.
        prompts = [{"prompt": row.values, "seed": number} for number, row in enumerate(rows([str(args.prompts)]), 1)]
        batch = farm.submit(prompts, name="demo")
        ended = batch.wait(progress=True)
        pictures = batch.download(args.out, progress=True)
        sheet = args.out / "contact_sheet.png"
        batch.contact_sheet().save(sheet)

    def say(what: str, where: object) -> None:
        console.print(Text(f"{what:<15}{where}"), soft_wrap=True)

    say("pictures", f"{len(pictures)} in {args.out.absolute()}")
    say("contact sheet", sheet.absolute())
    say("Flower", f"{settings.flower_url} while the farm runs; the user and password are in {args.home / 'farm.json'}")
    say("next", '`make up` starts this farm again and keeps it running; then `.venv/bin/farm submit "…" --out out`')
    return 0 if ended.counts[JobState.SUCCEEDED] == ended.total else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FarmError as error:
        sys.exit(f"demo: {error}")
