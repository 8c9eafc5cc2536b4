"""
Lists what killed runs left behind in a folder, and deletes it when told: copies of rows, which know what was to be
forgotten, and files that were not finished.

    python -m soul_trainer.clean OUTPUT_DIR                  # lists, and deletes nothing
    python -m soul_trainer.clean OUTPUT_DIR --delete

Finished results and checkpoints are left alone, and so is what a command that is at work writes. The next run into the
same folder deletes copies of rows and half-written files too.
"""

import sys
import time

from .command_line import PlainParser
from .leftovers import Leftover, delete_leftovers, find_leftovers


def _line(leftover: Leftover, now: float) -> str:
    hours = max(0.0, now - leftover.modified) / 3600
    age = f"{hours:.0f} hours ago" if hours < 48 else f"{hours / 24:.0f} days ago"
    kept = f", kept: {leftover.kept_because}" if leftover.kept_because else ""
    return f"{leftover.kind:<22} {leftover.num_bytes / 2**20:>9.2f} MiB {age:>13}  {leftover.path}{kept}"


def command(arguments: list[str] | None = None) -> None:
    """Does what the command line asks for; errors are those of [`find_leftovers`] and [`delete_leftovers`]."""
    parser = PlainParser(__doc__)
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="folder of a run, or one above several")
    parser.add_argument("--delete", action="store_true", help="delete what is listed; without, nothing is deleted")
    args = parser.parse_args(arguments)
    leftovers, now = find_leftovers(args.folder), time.time()
    for leftover in leftovers:
        print(_line(leftover, now))
    deletable = [leftover for leftover in leftovers if leftover.kept_because is None]
    if not deletable:
        print("There is nothing to delete.")
    elif args.delete:
        print(f"Deleted: {len(delete_leftovers(leftovers))}.")
    else:
        print(f"{len(deletable)} can be deleted: add --delete.")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        command(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
