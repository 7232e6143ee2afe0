"""The part of `Run` that keeps files: artifacts, models, code, and files of the run itself.

- each call takes its files as they are then, says one record, and returns; the bytes follow, and what becomes of
  them is in the run's status
- an artifact is logged whole or not at all
- a file that was saved and has not changed since is not sent again; one whose policy is `live` or `end` is looked
  at once more when the run is finished
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sidestep.errors import UnsupportedValue
from sidestep.outbox import DropReason
from sidestep.session import Refusal, Session
from sidestep.snapshot import Signature, signature
from sidestep.wire import MAX_RECORD_BYTES, Kind

if TYPE_CHECKING:
    from sidestep.artifacts import Artifact

Saved = tuple[str, Signature, str]
"""The name of a saved file in the run, what it was when it was sent, and its policy."""
POLICIES = ("live", "now", "end")
MOST_WATCHED = 10_000
"""Files of `save` whose changes are looked for at the end."""
OF_THE_DAEMON = ("spool.", "delivery.", "intake.", "horizon", "run.json", "about.json", "config.json")
"""Files in a run's directory that `save` passes over."""
WANDBS = (".wandb", "wandb", "sidestep-runs")
"""Directories that are not code."""


class Outputs:
    """What a run makes beside metrics."""

    __slots__ = ()

    _session: Session
    _saved: dict[str, Saved]
    _keywords: Mapping[str, Any]
    _told: Callable[..., Any]

    def log_artifact(
        self,
        artifact_or_path: Any,
        name: str | None = None,
        type: str | None = None,  # noqa: A002 - wandb's name for it
        aliases: Sequence[str] | str | None = None,
        tags: Sequence[str] | str | None = None,
    ) -> Artifact:
        """Log a version of an artifact: an `Artifact`, or what is at a path or address.

        Its name is then `run-ID-FILE` unless one is given. What is wrong with it is said, and nothing is logged.
        """
        from sidestep.artifacts import Artifact  # only who logs one needs it

        artifact = artifact_or_path
        if not isinstance(artifact, Artifact):
            artifact = self._of_path(artifact_or_path, name, type)
        self._session.guard(lambda: self._log_artifact(artifact, aliases, tags))
        return artifact

    def log_model(self, path: Any, name: str | None = None, aliases: Sequence[str] | str | None = None) -> None:
        """Log a model: a file or a directory, as an artifact of the type `model`."""
        self.log_artifact(path, name=name, type="model", aliases=aliases)

    def save(
        self,
        glob_str: Any,
        base_path: Any = None,
        policy: str = "live",
        glob: bool = True,
    ) -> list[str]:
        """Keep files with the run, under their paths below `base_path`; returns the files that were found.

        `policy`: `now` is once; `live` and `end` are looked at once more when the run is finished. (`live` is not
        watched in between: call it again.) Without `base_path`, relative paths are the run's, what is in `run.dir`
        is named as it is there, and of another absolute path the last directory is kept, as in wandb.
        """
        found: list[str] = []
        self._session.guard(lambda: found.extend(self._save(glob_str, base_path, policy, pattern=glob)))
        return found

    def save_artifact(self, name: str, data: bytes | bytearray | memoryview | str) -> Artifact:
        """Log bytes, or text, as an artifact with one file of this name."""
        from sidestep.artifacts import Artifact, safe_name

        artifact = Artifact(safe_name(str(name)), "artifact")
        content = data.encode() if isinstance(data, str) else data

        def write() -> None:
            with artifact.new_file(str(name), "wb") as file:
                file.write(content)

        artifact._guard(write)
        return self.log_artifact(artifact)

    def save_json_artifact(self, name: str, obj: Any) -> Artifact:
        """The same for a value as JSON; numpy's and torch's become Python's."""
        import json

        from sidestep.logger.python_types import to_python_types

        return self.save_artifact(name, json.dumps(to_python_types(obj), indent=2))

    def log_code(
        self,
        root: str | None = ".",
        name: str | None = None,
        include_fn: Callable[..., bool] | None = None,
        exclude_fn: Callable[..., bool] | None = None,
    ) -> Artifact | None:
        """Log the code below a directory as an artifact of the type `code`; by default Python files and the like.

        The two functions are given a path, and the root if they take two arguments.
        """
        from sidestep.artifacts import CodeArtifact, safe_name

        program = os.path.basename(sys.argv[0] or "program")
        project = self._session.sender.run.get("project") if self._session.sender is not None else None
        called = name or f"source-{project or self._keywords.get('project') or 'uncategorized'}-{program}"
        artifact = CodeArtifact(safe_name(called), "code")

        def gather() -> None:
            folder = os.path.abspath(root or ".")
            for path in _files_below(folder):
                if _asked(include_fn or _is_code, path, folder) and not _asked(
                    exclude_fn or _is_kept, path, folder
                ):
                    artifact.add_file(path, os.path.relpath(path, folder))

        if root is not None:
            artifact._guard(gather)
        if not artifact.file_count and not artifact._wrong:
            self._session.notices.once("log_code", f"log_code({root!r}): there is no code; nothing is logged")
            return None
        return self.log_artifact(artifact)

    # How

    def _own_folder(self) -> str | None:
        """The run's directory, if it is known and on this machine."""
        folder = self._told("dir", self._session.settings.run_dir, wait=False)
        return os.path.abspath(folder) if isinstance(folder, str) and os.path.isdir(folder) else None

    def _of_path(self, given: Any, name: str | None, type: str | None) -> Artifact:  # noqa: A002 - as above
        from sidestep.artifacts import Artifact, safe_name

        path = os.fspath(given) if isinstance(given, str | os.PathLike) else ""
        artifact = Artifact(name or safe_name(os.path.basename(path.rstrip("/"))), type or "unspecified")
        artifact._is_named_after_run = name is None
        if not path:
            why = f"log_artifact takes an Artifact of sidestep, or a path, not a {given.__class__.__name__}"
            artifact._wrong = artifact._wrong or why
        elif os.path.isdir(path):
            artifact.add_dir(path)
        elif "://" in path:
            artifact.add_reference(path)
        else:
            artifact.add_file(path)
        return artifact

    def _log_artifact(self, artifact: Artifact, aliases: Any, tags: Any) -> None:
        from sidestep.artifacts import checked_aliases, checked_tags

        if self._session.silent:
            artifact.release()
            return
        try:
            data = artifact.pack(self._session.lane, checked_aliases(aliases), checked_tags(tags))
        except UnsupportedValue as error:
            artifact.release()
            raise Refusal(DropReason.UNSUPPORTED, f"the artifact {artifact.name!r:.140}: {error}") from None
        self._offer(data)

    def _offer(self, data: dict[str, Any]) -> None:
        session = self._session
        try:
            session.offer(session.pack(int(Kind.ARTIFACT), None, data, None))
        except Refusal as refusal:
            session.lane.give_up(data)
            if refusal.reason is DropReason.TOO_LARGE:
                refusal.detail = f"an artifact's record has {MAX_RECORD_BYTES} bytes at most: {refusal.detail}"
            raise

    def _save(self, given: Any, base_path: Any, policy: str, *, pattern: bool) -> list[str]:
        import glob as globs

        if policy not in POLICIES:
            raise Refusal(DropReason.UNSUPPORTED, f"save(policy={policy!r:.40}): live, now or end")
        said, own = os.fsdecode(given), self._own_folder()
        if said.startswith(("gs://", "s3://")):
            raise Refusal(DropReason.UNSUPPORTED, f"save({said!r:.200}): what is in a cloud's store is not copied")

        def found_as(wanted: str) -> list[str]:
            return sorted(globs.glob(wanted)) if pattern else [wanted] if os.path.exists(wanted) else []

        wanted = os.path.abspath(said)
        if base_path is not None:
            base = os.path.abspath(os.fspath(base_path))
        elif own and not os.path.isabs(said) and not found_as(wanted) and os.path.isfile(os.path.join(own, said)):
            wanted, base = os.path.join(own, said), own
        elif own and os.path.commonpath([wanted, own]) == own:
            base = own
        else:
            base = os.path.dirname(os.path.dirname(wanted)) if os.path.isabs(said) else os.getcwd()
        if os.path.commonpath([wanted, base]) != base:
            raise Refusal(DropReason.UNSUPPORTED, f"save({said!r:.200}): it is not below {base!r:.200}")
        paths = found_as(wanted)
        theirs = tuple(os.path.join(own, name) for name in OF_THE_DAEMON) if own else ()
        found = [path for path in paths if os.path.isfile(path) and not path.startswith(theirs)]
        if not found:
            self._session.notices.once(("save", said), f"save({said!r:.200}): there is no such file")
        self._send({path: os.path.relpath(path, base) for path in found}, policy, now=policy != "end")
        return found

    def _send(self, paths: dict[str, str], policy: str, *, now: bool = True) -> None:
        """Send those of some files that changed since they were sent, under their names in the run."""
        from sidestep.artifacts import RunFiles

        files, sent = RunFiles(), dict[str, Saved]()
        for path, name in paths.items():
            is_now = signature(os.stat(path))
            known = self._saved.get(path)
            if known is not None and known[:2] == (name, is_now):
                continue
            sent[path] = (name, is_now if now else (), policy)
            if now:
                files.add_file(path, name)
        if self._session.silent:
            files.release()
            return
        if files.file_count or files._wrong:
            try:
                self._offer(files.pack(self._session.lane))
            except UnsupportedValue as error:
                raise Refusal(DropReason.UNSUPPORTED, f"save: {error}") from None
        if len(self._saved) < MOST_WATCHED:
            self._saved.update(sent)

    def _save_last(self) -> None:
        """What changed of the files that are saved to the end."""
        last = {path: name for path, (name, _, policy) in self._saved.items() if policy != "now"}
        there = {path: name for path, name in last.items() if os.path.isfile(path)}
        if there:
            self._session.guard(lambda: self._send(there, "now"))


def _files_below(root: str) -> list[str]:
    return [os.path.join(folder, name) for folder, _, files in os.walk(root) for name in sorted(files)]


def _asked(judge: Callable[..., bool], path: str, root: str) -> bool:
    """What a function of the user's says of a path, whether it wants to know the root or not."""
    import inspect

    return bool(judge(path, root) if len(inspect.signature(judge).parameters) == 2 else judge(path))


def _is_code(path: str) -> bool:
    name = os.path.basename(path)
    return name.endswith(".py") or name.startswith("Dockerfile") or name == "requirements.txt"


def _is_kept(path: str, root: str) -> bool:
    return os.path.relpath(path, root).split(os.sep)[0] in WANDBS
