"""The `sidestep` command. It belongs to the daemon; a worker's installation says how to get that."""

from __future__ import annotations

import sys

EX_UNAVAILABLE = 69
"""As in sysexits.h: a part that is needed is not there."""


def main() -> None:
    """Run the daemon's command line, or say what to install."""
    try:
        from sidestepd import cli
    except ImportError as error:
        missing = f" ({error.name} is missing)" if error.name else ""
        print(f"the daemon is not installed{missing}: pip install 'sidestep[daemon]'", file=sys.stderr)  # noqa: T201
        sys.exit(EX_UNAVAILABLE)
    cli.main()


if __name__ == "__main__":
    main()
