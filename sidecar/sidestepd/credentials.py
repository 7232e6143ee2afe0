"""The W&B key as service managers and containers hand it on: a file that only the daemon can read.

`$CREDENTIALS_DIRECTORY/wandb_api_key` is systemd's LoadCredential; in a container the variable names the directory
where secrets are mounted. A key in the environment is stronger.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from pathlib import Path

logger = logging.getLogger(__name__)

NAME = "wandb_api_key"


def take(environ: MutableMapping[str, str]) -> str:
    """Put the key where wandb looks for it. An empty file is none; why one can not be read is returned."""
    folder = environ.get("CREDENTIALS_DIRECTORY")
    if not folder or environ.get("WANDB_API_KEY"):
        return ""
    path = Path(folder) / NAME
    try:
        key = path.read_text().strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        logger.warning("the W&B key in %s can not be read: %s", path, error)
        return f"that in {path} can not be read: {getattr(error, 'strerror', None) or error}"
    if key:
        environ["WANDB_API_KEY"] = key
    return ""
