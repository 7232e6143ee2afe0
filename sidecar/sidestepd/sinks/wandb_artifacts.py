"""An artifact as wandb has it, out of files that lie in the run directory.

- its files stay where they are, and are not copied into wandb's staging: nobody changes them, and a run's
  checkpoints may be larger than the disk of its user's home
- its client id is ours, which is how it is known again in a `.wandb` file
- an address is written down as it is; wandb would go and look at what is there, with its user's rights
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import wandb
from wandb.sdk.artifacts._internal_artifact import InternalArtifact
from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
from wandb.sdk.lib.paths import LogicalPath

from sidestep.media.base import Files
from sidestepd.rows import Version

MOST_NAME_CHARS = 128
CODE = "code"
"""A type that is wandb's own for what `log_code` makes."""


def made(version: Version, run: str, show: Callable[[Any, Files], Any]) -> wandb.Artifact:
    """The artifact, not logged yet. Raises ValueError, or wandb's own errors, for what wandb does not take."""
    facts = version.facts or {}
    name = f"run-{run}-{facts['name']}"[:MOST_NAME_CHARS] if facts.get("of_run") else facts["name"]
    new = InternalArtifact if facts["type"] == CODE else wandb.Artifact
    artifact = new(name, facts["type"], description=facts.get("description"), metadata=facts.get("metadata"))
    artifact._client_id = version.id
    if facts.get("ttl_s"):
        artifact.ttl = timedelta(seconds=int(facts["ttl_s"]))
    for content in version.contents:
        if content.media is not None:
            artifact.add(show(content.media, version.files), content.path)
        elif content.file is not None:
            artifact.add_file(str(content.file), content.path, policy="immutable", skip_cache=True)
        else:
            entry = ArtifactManifestEntry(path=LogicalPath(content.path), ref=content.ref, digest=content.ref)
            artifact.manifest.add_entry(entry)
    return artifact


def save(run: wandb.Run, version: Version) -> None:
    """Put files among the run's own, under their paths."""
    folder = Path(run.settings.files_dir)
    for content in version.contents:
        if content.file is None:
            raise ValueError(f"{content.path!r:.200} is no file")
        path = folder / content.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        _link(content.file, path)
        run.save(str(path), base_path=str(folder), policy="now", glob=False)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        import shutil

        shutil.copyfile(source, target)
