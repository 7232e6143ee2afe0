"""The run of this process: `init`, and the calls that need not name a run.

- one run at a time; a second `init` joins the first unless that is finished, or `reinit` says otherwise
- from `init` on `sidestep.log` is the run's method itself
- the command that a run belongs to decides what run it is: a differing `id` is said and passed over
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import msgpack

from sidestep import configs, convert, exits, ranks
from sidestep._run import Metric, Run, SilentRun
from sidestep.bags import Bag, entries_of
from sidestep.companions import KEYWORDS, accompany
from sidestep.errors import UnsupportedValue
from sidestep.keywords import MEANINGS, complain, named_by
from sidestep.notices import Notices
from sidestep.outbox import DropReason
from sidestep.session import EXIT_S, NewCarrier, Session
from sidestep.settings import Settings, WorkerSettings
from sidestep.wire import MAX_CONTROL_BYTES, Kind

VARIABLES = {
    "id": ("WANDB_RUN_ID",),
    "project": ("SIDESTEP_RUN_PROJECT", "WANDB_PROJECT"),
    "entity": ("SIDESTEP_RUN_ENTITY", "WANDB_ENTITY"),
    "name": ("SIDESTEP_RUN_NAME", "WANDB_NAME"),
    "group": ("SIDESTEP_RUN_GROUP", "WANDB_RUN_GROUP"),
    "job_type": ("SIDESTEP_RUN_JOB_TYPE", "WANDB_JOB_TYPE"),
    "tags": ("SIDESTEP_RUN_TAGS", "WANDB_TAGS"),
    "notes": ("SIDESTEP_RUN_NOTES", "WANDB_NOTES"),
    "resume": ("WANDB_RESUME",),
    "mode": ("SIDESTEP_RUN_MODE", "WANDB_MODE", "SIDESTEP_MODE"),
    "sweep_id": ("WANDB_SWEEP_ID",),
}
"""The variables that stand for a keyword of `init()` where that is not given, the strongest first."""

OWN_SETTINGS = ("address", "autostart", "context", "key_file", "server_key")
"""What `init(settings=...)` may say of the way to the daemon; it is stronger than the environment."""

_notices = Notices()
_run: Run | None = None
_strict: bool | None = None
_carrier: NewCarrier | None = None
"""What takes records out of a process instead of a sender: a test's recorder."""

_P = ParamSpec("_P")


def _harmless(begin: Callable[_P, Run]) -> Callable[_P, Run]:
    """A training does not die of `init()`, whatever goes wrong in it, unless that was asked for."""

    @wraps(begin)
    def init(*args: _P.args, **keywords: _P.kwargs) -> Run:
        try:
            return begin(*args, **keywords)
        except Exception as error:
            if _is_strict(keywords.get("strict")):
                raise
            return _in_spite_of(error)

    return init


@_harmless
def init(
    entity: str | None = None,
    project: str | None = None,
    dir: str | os.PathLike[str] | None = None,  # noqa: A002 - wandb's name for it
    id: str | None = None,  # noqa: A002 - wandb's name for it
    name: str | None = None,
    notes: str | None = None,
    tags: Sequence[str] | None = None,
    config: Any = None,
    config_exclude_keys: Sequence[str] | None = None,
    config_include_keys: Sequence[str] | None = None,
    *,
    group: str | None = None,
    job_type: str | None = None,
    mode: str | None = None,
    resume: bool | str | None = None,
    reinit: bool | str | None = None,
    settings: Settings | Mapping[str, Any] | None = None,
    strict: bool | None = None,
    **keywords: Any,
) -> Run:
    """Join the run, and return at once. Every rank calls it.

    The keywords are wandb's; what is not honoured is said, with what happens instead. `strict=True` is for tests:
    what a training run would count and say is raised.
    """
    global _run  # noqa: PLW0603 - "the current run" is what this module is
    wanted_config = _filtered(config, config_include_keys, config_exclude_keys)
    if _run is not None and not _run._session.finished:
        if reinit not in (True, "finish_previous"):
            return _joined(_run, wanted_config, reinit)
        _run.finish()
    if keywords.pop("tensorboard", None):  # wandb's old name of it
        keywords.setdefault("sync_tensorboard", True)
    entries = _entries(settings)
    ours = {name: entries.pop(name) for name in OWN_SETTINGS if name in entries}
    named = named_by(entries) | _given(
        project=project, entity=entity, name=name, id=id, group=group, job_type=job_type, tags=tags, notes=notes,
        dir=dir, mode=mode, resume=resume,
    )  # fmt: skip
    sweep = _of_sweep(named)
    wanted = _plain_keywords(
        _from_wandb(os.environ),
        {setting: value for setting, value in entries.items() if setting not in MEANINGS},
        keywords,
        named,
    )
    complain({name: value for name, value in keywords.items() if name not in KEYWORDS}, entries, _notices.once)
    if mode == "shared":
        _notices.once("shared", "init(mode='shared'): every process shares the one run here, in any mode")
        wanted.pop("mode")
    options = WorkerSettings.from_env(_over(os.environ, ours), strict=_strict if strict is None else strict)
    _run = _new_run(options, wanted)
    _configure(_run, wanted_config, sweep)
    accompany(_run, wanted)
    _bind(_run)
    return _run


def log(data: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> None:
    """`Run.log` of the current run."""
    if (run := _run) is None:
        return _too_early("log()")
    return run.log(data, step, commit)


def define_metric(name: str, *args: Any, **keywords: Any) -> Metric:
    """`Run.define_metric` of the current run."""
    if (run := _run) is None:
        _too_early("define_metric()")
        return Metric(name=name)
    return run.define_metric(name, *args, **keywords)


def finish(exit_code: int | None = None, timeout: float = EXIT_S) -> None:
    """`Run.finish` of the current run, if there is one."""
    if (run := _run) is not None:
        run.finish(exit_code, timeout)


def of_run(name: str) -> Callable[..., Any]:
    """A method of whatever run is the current one when it is called, as a function of the module."""

    def call(*args: Any, **keywords: Any) -> Any:
        if (run := _run) is None:
            return _too_early(f"{name}()")
        return getattr(run, name)(*args, **keywords)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"`Run.{name}` of the current run."
    return call


def current() -> Run | None:
    """The run of this process, from `init` to `finish`."""
    return None if _run is None or _run._session.finished else _run


def rejoin(address: str | None, run_id: str | None, mode: str | None) -> Run:
    """The run of this process, which joins the one that another process has handed over to it."""
    if (run := current()) is not None:
        return run
    for name, value in (("SIDESTEP_ADDRESS", address), ("SIDESTEP_RUN_ID", run_id)):
        if value:
            os.environ.setdefault(name, value)
    return init(mode=mode)


def notices() -> Notices:
    """What this process has said already."""
    return _notices


def bag(name: str) -> Bag:
    """The current run's `config` or `summary`."""
    if _run is None:
        _too_early(name)
        return Bag(None, Kind.CONFIG)
    return _run.config if name == "config" else _run.summary


@contextmanager
def carried_by(carrier: NewCarrier, *, strict: bool) -> Iterator[None]:
    """Have the runs that begin inside carried by something else than a sender; the one outside is untouched."""
    global _run, _carrier, _strict, _notices
    package = vars(sys.modules[__package__])
    before = _run, _carrier, _strict, _notices, package["log"]
    _run, _carrier, _strict, _notices, package["log"] = None, carrier, strict, Notices(), log
    try:
        yield
        finish()
    finally:
        finish(exit_code=1)  # of what an exception left unfinished
        _run, _carrier, _strict, _notices, package["log"] = before


def _new_run(settings: WorkerSettings, keywords: Mapping[str, Any]) -> Run:
    identity = ranks.identify(os.environ, ranks.Here.now(), launch=settings.launch_id)
    disabled = "disabled" in (keywords.get("mode"), settings.mode)
    session = Session(
        settings=settings,
        identity=identity,
        keywords=keywords,
        notices=_notices,
        silent=disabled,
        carrier=_carrier,
    )
    if disabled:
        return SilentRun(session, {**keywords, "mode": "disabled"})
    if settings.run_id and keywords.get("id", settings.run_id) != settings.run_id:
        _notices.once(
            "id", f"init(id={keywords['id']!r}): this process joins the run {settings.run_id!r} of its command"
        )
    forget = exits.watch(session.ends_with)
    run = Run(session, keywords)

    def on_finish(_: float) -> None:
        run._save_last()
        forget()

    session.on_finish = on_finish
    return run


def _is_strict(said: Any) -> bool:
    """Whether mistakes are to be raised, as far as that can be told when something went wrong already."""
    said = _strict if said is None else said
    if said is None:
        return os.environ.get("SIDESTEP_STRICT", "").lower() in ("1", "true", "yes", "on")
    return said is True


def _in_spite_of(error: Exception) -> Run:
    """The run that there is, or one that takes nothing and counts what it is told."""
    global _run  # noqa: PLW0603 - as in init()
    lost = _run is None or _run._session.finished
    if lost:
        me = ranks.Identity(rank=0, world=1, local_rank=0, node="", pid=os.getpid(), launch="", attempt=0)
        session = Session(settings=WorkerSettings(), identity=me, keywords={}, notices=_notices, silent=True)
        session.outbox.close(DropReason.INTERNAL)
        _run = Run(session, {})
    what = "nothing that this process logs is kept" if lost else "not everything that it was given counts"
    _notices.once("init", f"init() went wrong, {what}: {type(error).__name__}: {_said_of(error)}")
    assert _run is not None
    _bind(_run)
    return _run


def _said_of(error: Exception) -> str:
    try:
        return str(error)[:500]
    except Exception:  # noqa: BLE001 - a foreign error's own code may raise anything
        return ""


def _over(environ: Mapping[str, str], ours: Mapping[Any, Any]) -> dict[str, str]:
    """The environment, with what a script says instead of it."""
    given = {f"SIDESTEP_{str(name).upper()}": str(value) for name, value in ours.items() if value is not None}
    where = {"SIDESTEP_ADDRESS", "SIDESTEP_CONTEXT"}
    weaker = where - given.keys() if where & given.keys() else set()
    return {name: value for name, value in environ.items() if name not in weaker} | given


def _bind(run: Run) -> None:
    """Make `sidestep.log` the run's own method: a function between would cost a call with cold caches 1 to 2 µs.

    Who imported `log` before has the function still, which does the same.
    """
    vars(sys.modules[__package__])["log"] = run.log


def _configure(run: Run, config: Any, sweep: Mapping[str, Any] | None) -> None:
    """wandb's order: the file of defaults, what `init()` was given, and over both what the sweep chose."""
    if Path(configs.DEFAULTS).exists():
        run.config.update(configs.DEFAULTS)
    run.config.update(config)
    if sweep:
        run.config.lock(sweep)


def _given(**names: Any) -> dict[str, Any]:
    return {name: value for name, value in names.items() if value is not None}


def _of_sweep(named: dict[str, Any]) -> dict[str, Any] | None:
    """What the sweep chose, if this run is one of a sweep; then `named` goes without what the sweep calls it."""
    if not os.environ.get("WANDB_SWEEP_ID", "").strip():
        return None
    if given := [name for name in ("project", "entity", "id") if named.pop(name, None)]:
        _notices.once("sweep", f"init({', '.join(given)}): the run is one of a sweep, whose names count")
    try:
        return configs.of_sweep(os.environ)
    except UnsupportedValue as error:
        _notices.once("sweep values", f"the values of the sweep are not known: {error}")
        return {}


def _filtered(config: Any, include: Sequence[str] | None, exclude: Sequence[str] | None) -> Any:
    """The configuration without what is not wanted of it."""
    if not include and not exclude:
        return config
    try:
        entries = entries_of(config)
    except UnsupportedValue:
        return config  # said when it is stored
    return {
        name: value
        for name, value in entries.items()
        if (not include or name in include) and name not in (exclude or ())
    }


def _joined(run: Run, config: Any, reinit: Any = None) -> Run:
    if run._session.dormant:
        run._session.guard(lambda: None)  # a forked child that says init() is a session from then on
    elif reinit == "create_new":
        _notices.once(
            "init", "init(reinit='create_new'): a process has one run at a time; it is the one that there is"
        )
    elif reinit != "return_previous":
        _notices.once("init", "init() again: it returns the run that there is; finish() ends it")
    run.config.update(config)
    return run


def _entries(settings: Settings | Mapping[str, Any] | None) -> dict[Any, Any]:
    try:
        return entries_of(settings)
    except UnsupportedValue as error:
        _notices.once("settings", f"init(settings=...): {error}")
        return {}


def _from_wandb(environ: Mapping[str, str]) -> dict[str, Any]:
    """What this process's environment says of its run, which need not be the daemon's environment."""
    found: dict[str, Any] = {}
    for name, variables in VARIABLES.items():
        if said := next((environ[it].strip() for it in variables if environ.get(it, "").strip()), ""):
            if name == "id" and environ.get("SIDESTEP_RUN_ID"):
                continue  # the run of the command that this process belongs to
            found[name] = [tag.strip() for tag in said.split(",") if tag.strip()] if name == "tags" else said
    return found


def _plain_keywords(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """What of the keywords the daemon can be told: plain, given, and not too much."""
    plain: dict[str, Any] = {}
    for name, value in ((name, value) for source in sources for name, value in source.items()):
        if value is None:
            continue
        try:
            plain[str(name)] = convert.plain(os.fspath(value) if isinstance(value, Path) else value)
        except UnsupportedValue as error:
            _notices.once(("init", name), f"init({name}=...): {error}")
    while len(msgpack.packb(plain)) > MAX_CONTROL_BYTES // 2:
        largest = max(plain, key=lambda name: len(msgpack.packb(plain[name])))
        _notices.once(("init", largest), f"init({largest}=...) is too large and left out")
        del plain[largest]
    return plain


def note(cause: str, text: str) -> None:
    """Say something once in this process."""
    _notices.once(cause, text)


def _too_early(what: str) -> None:
    _notices.once(("too early", what), f"{what} before init(): without effect")
