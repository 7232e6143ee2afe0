"""The server's process.

    python -m tests.support.wandb_server DIRECTORY

Writes its port to `DIRECTORY/port` once it listens; takes the same one when it is started there again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.support.wandb_server.http import serve


def main() -> None:
    """Until it is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--key", required=True)
    parser.add_argument("--entities", required=True)
    options = parser.parse_args()
    serve(options.directory, key=options.key, entities=tuple(options.entities.split(",")))


if __name__ == "__main__":
    main()
