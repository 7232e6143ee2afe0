"""Configurations that lie in files: `config-defaults.yaml`, `init(config="file.yaml")`, and the values of a sweep.

- the files are wandb's: YAML, each entry as `{value: ...}`
- YAML is read if a reader of it is installed, as it is wherever wandb is; a file that is JSON needs none
- under `sidestep run` the daemon's side reads the sweep's file, and hands its values on in the environment
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidestep.errors import UnsupportedValue

DEFAULTS = "config-defaults.yaml"
"""wandb's: read where a process stands, if it is there."""
SWEEP_VARIABLE = "SIDESTEP_SWEEP_CONFIG"
"""The sweep's values as JSON."""


def read(path: str) -> dict[str, Any]:
    """The entries of a file. Raises UnsupportedValue."""
    try:
        text = Path(path).read_text()
    except (OSError, ValueError) as error:
        raise UnsupportedValue(f"{path!r:.200} can not be read: {error}") from None
    loaded = _load(path, text)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UnsupportedValue(f"{path} holds no entries")
    return {
        str(name): entry["value"] if isinstance(entry, dict) and "value" in entry else entry
        for name, entry in loaded.items()
        if name != "wandb_version"
    }


def _load(path: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        raise UnsupportedValue(f"{path} is YAML, which needs `pip install pyyaml` here") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UnsupportedValue(f"{path} is no YAML: {str(error)[:200]}") from None


def of_sweep(environ: Mapping[str, str]) -> dict[str, Any]:
    """What the sweep chose for this run, if it is one of a sweep. Raises UnsupportedValue."""
    if not environ.get("WANDB_SWEEP_ID", "").strip():
        return {}
    if said := environ.get(SWEEP_VARIABLE, ""):
        try:
            values = json.loads(said)
        except ValueError:
            raise UnsupportedValue(f"{SWEEP_VARIABLE} is no JSON") from None
        return values if isinstance(values, dict) else {}
    path = environ.get("WANDB_SWEEP_PARAM_PATH", "").strip()
    return read(path) if path else {}


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the second where they differ, dicts in dicts likewise."""
    both = dict(base)
    for name, value in over.items():
        mine = both.get(name)
        both[name] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return both
