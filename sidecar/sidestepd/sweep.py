"""A run of a sweep: what the sweep chose, as `wandb agent` wrote it down, for workers that read no YAML."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from sidestep import configs
from sidestep.errors import UnsupportedValue

MOST_BYTES = 100_000
"""The kernel takes variables of 128 KiB; what is larger is read by the workers themselves."""

logger = logging.getLogger(__name__)


def exports(environ: Mapping[str, str]) -> dict[str, str]:
    """What a command's environment gets of the sweep that it is a run of."""
    try:
        values = configs.of_sweep(environ)
    except UnsupportedValue as error:
        logger.warning("the values of the sweep are not known: %s", error)
        return {}
    said = json.dumps(values, default=str) if values else ""
    return {configs.SWEEP_VARIABLE: said} if 0 < len(said) <= MOST_BYTES else {}
