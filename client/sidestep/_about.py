"""What a run is, as far as a worker knows or can be told: its names, where it is found, how it stands.

- what the daemon said counts, then what this process knows; only what nobody here knows is waited for, once,
  and `ANSWER_S` at most
- `name`, `notes` and `tags` may be set at any time, and reach the run; no rank overrules a lower one
- nothing raises but an attribute that is not there
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from sidestep import convert
from sidestep.alerts import AlertLevel, Alerts
from sidestep.bags import Bag
from sidestep.errors import NeedsWandb, UnsupportedValue
from sidestep.keywords import MEANINGS
from sidestep.outbox import DropReason
from sidestep.session import Refusal, Session
from sidestep.settings import Settings
from sidestep.wire import Kind

ANSWER_S = 5.0
"""How long reading `run.url` and its like may wait."""
ASK_AGAIN_S = 0.1
MOST_TAG_CHARS = 64
MOST_NAME_CHARS = 128
MOST_NOTES_CHARS = 100_000
KNOWN_WHEN_OPEN = frozenset({"resumed", "starting_step"})
"""What is known when the run was opened; then the daemon tells `start_time`."""

NOT_HERE: Mapping[str, str] = {
    "finish_artifact": "an artifact is finished by the process that logged it: log it once, by one rank",
    "upsert_artifact": "an artifact is not written by several processes: log it once, by one rank",
    "link_artifact": "link it when it is there: `wandb.Api().artifact(NAME).link(TARGET)`",
    "link_model": "log_model() it, and link it when it is there: `wandb.Api().artifact(NAME).link(TARGET)`",
    "status": "stats() is the ledger of this process, and `sidestep status` tells of the run",
    "pin_config_keys": "pin them in the browser",
    "write_logs": "print it: what a command prints is kept by whoever runs it",
}
"""Names of wandb's `Run` that a worker's run does not have, and what to do instead."""


class About:
    """The part of `Run` that tells and sets what the run is."""

    __slots__ = ()

    _session: Session
    _keywords: Mapping[str, Any]
    _config: Bag
    _asked: set[str]
    _named: dict[str, Any]
    _alerts: Alerts
    _began: float

    # What it is called

    @property
    def id(self) -> str | None:
        """Its id in W&B."""
        return _str(self._told("id", self._session.settings.run_id or self._keywords.get("id")))

    @property
    def name(self) -> str | None:
        """Its name in W&B. May be set."""
        return _str(self._named.get("name") or self._told("name", self._keywords.get("name")))

    @name.setter
    def name(self, name: str | None) -> None:
        self._call("name", _cut(name, MOST_NAME_CHARS))

    @property
    def notes(self) -> str | None:
        """A longer description. May be set."""
        set_here = "notes" in self._named
        return _str(self._named["notes"] if set_here else self._told("notes", self._keywords.get("notes")))

    @notes.setter
    def notes(self, notes: str | None) -> None:
        self._call("notes", _cut(notes, MOST_NOTES_CHARS))

    @property
    def tags(self) -> tuple[str, ...]:
        """Its tags. May be set: `run.tags += ("best",)`."""
        set_here = "tags" in self._named
        return _strings(self._named["tags"] if set_here else self._told("tags", self._keywords.get("tags")))

    @tags.setter
    def tags(self, tags: Sequence[str] | None) -> None:
        given = _strings(tags)
        if long := [tag for tag in given if not 0 < len(tag) <= MOST_TAG_CHARS]:
            self._say("tags", f"a tag has 1 to {MOST_TAG_CHARS} characters: {long[0][:80]!r} is left out")
        self._call("tags", [tag for tag in given if tag not in long])

    @property
    def group(self) -> str:
        """The group of runs it belongs to."""
        return _str(self._told("group", self._keywords.get("group"))) or ""

    @group.setter
    def group(self, _: Any) -> None:
        self._fixed("group")

    @property
    def job_type(self) -> str:
        """What kind of run it is."""
        return _str(self._told("job_type", self._keywords.get("job_type"))) or ""

    @job_type.setter
    def job_type(self, _: Any) -> None:
        self._fixed("job_type")

    @property
    def project(self) -> str | None:
        """The project it is in."""
        return _str(self._told("project", self._keywords.get("project")))

    @property
    def entity(self) -> str | None:
        """The user or team it belongs to."""
        return _str(self._told("entity", self._keywords.get("entity")))

    @property
    def path(self) -> str:
        """`entity/project/id`, as far as these are known."""
        return "/".join(part for part in (self.entity, self.project, self.id) if part)

    @property
    def sweep_id(self) -> str | None:
        """The sweep it belongs to."""
        return _str(self._told("sweep_id", self._keywords.get("sweep_id"), wait=False))

    # Where it is

    @property
    def dir(self) -> str | None:
        """Its directory, on the daemon's side."""
        return _str(self._told("dir", self._session.settings.run_dir))

    @property
    def sync_dir(self) -> str | None:
        """The same."""
        return self.dir

    @property
    def url(self) -> str | None:
        """Its page; None offline."""
        return _str(self._told("url"))

    @property
    def project_url(self) -> str | None:
        """The page of its project; None offline."""
        url = self.url
        return url.partition("/runs/")[0] if url else None

    @property
    def sweep_url(self) -> str | None:
        """The page of its sweep; None offline."""
        project, sweep = self.project_url, self.sweep_id
        return f"{project}/sweeps/{sweep}" if project and sweep else None

    def get_url(self) -> str | None:
        """wandb's old name of `url`."""
        return self.url

    def get_project_url(self) -> str | None:
        """wandb's old name of `project_url`."""
        return self.project_url

    def get_sweep_url(self) -> str | None:
        """wandb's old name of `sweep_url`."""
        return self.sweep_url

    def to_html(self, height: int = 420, hidden: bool = False) -> str:
        """A frame that shows its page; offline a line that names it."""
        import html  # only a notebook needs it

        url = self.url
        if url is None:
            return html.escape(str(self))
        style = f"border:none;width:100%;height:{height}px;{'display:none;' if hidden else ''}"
        return f'<iframe src="{html.escape(url)}?jupyter=true" style="{html.escape(style)}"></iframe>'

    def display(self, height: int = 420, hidden: bool = False) -> bool:
        """Show it in a notebook; False where there is none."""
        try:
            from IPython.display import HTML, display  # type: ignore[import-not-found, unused-ignore]

            display(HTML(self.to_html(height, hidden)))  # type: ignore[no-untyped-call, unused-ignore]
        except Exception:  # noqa: BLE001 - there is no notebook, or it can not show it
            return False
        return True

    # How it stands

    @property
    def mode(self) -> str | None:
        """online, offline or disabled."""
        return _str(self._told("mode", self._keywords.get("mode")))

    @property
    def offline(self) -> bool:
        """Whether it is written into files."""
        return self.mode == "offline"

    @property
    def disabled(self) -> bool:
        """Whether every call does nothing."""
        return self.mode == "disabled"

    @property
    def resumed(self) -> bool:
        """Whether W&B had it before."""
        return bool(self._told("resumed"))

    @property
    def starting_step(self) -> int:
        """The first of wandb's steps that is this daemon's."""
        step = self._told("starting_step")
        return step if isinstance(step, int) else 0

    @property
    def start_time(self) -> float:
        """When it began, in seconds since the epoch; when this process joined, as long as the run is not open."""
        told = self._told("start_time", wait=False)
        return float(told) if isinstance(told, int | float) else self._began

    @property
    def rank(self) -> int:
        """This process's number among those of its launch."""
        return self._session.identity.rank

    @property
    def world(self) -> int:
        """How many processes were launched together."""
        return self._session.identity.world

    @property
    def settings(self) -> Settings:
        """The keywords that `init()` was given, and the names of the run as wandb's settings call them."""
        given = self._keywords
        named = {setting: given.get(name) for setting, name in MEANINGS.items()}
        return Settings(**{**named, **given, "run_id": self._session.settings.run_id or given.get("id")})

    @property
    def config_static(self) -> Mapping[str, Any]:
        """A copy of the configuration."""
        return self._config.as_dict()

    # What it is told

    def alert(
        self,
        title: str,
        text: str,
        level: str | AlertLevel | None = None,
        wait_duration: Any = None,
    ) -> None:
        """Have people hear of something now, at most once; a title not again within `wait_duration` (60 s)."""
        self._session.guard(lambda: self._alert(title, text, level, wait_duration))

    def mark_preempting(self) -> None:
        """Say that this run is about to be preempted: W&B then marks it so if it ends without a word."""
        self._call("preempted", True)

    def _alert(self, title: Any, text: Any, level: Any, wait_duration: Any) -> None:
        session = self._session
        try:
            said = self._alerts.take(title, text, level, wait_duration)
        except UnsupportedValue as error:
            raise Refusal(DropReason.UNSUPPORTED, f"alert: {error}") from None
        if said is not None and not session.silent:
            session.offer(session.pack(int(Kind.ALERT), None, said, None))

    def _call(self, name: str, value: Any) -> None:
        self._named[name] = value
        if not self._session.silent:
            self._session.send(Kind.NAMED, {name: value})

    def _fixed(self, name: str) -> None:
        self._say(name, f"run.{name} is what it was when the run was opened: give it to init(), or `sidestep run`")

    def _say(self, cause: str, text: str) -> None:
        self._session.notices.once(("run", cause), text)

    def _label(self, *_: Any, **__: Any) -> None:
        """wandb's, for libraries that say who they are."""

    # How it is known

    def _told(self, name: str, own: Any = None, *, wait: bool = True) -> Any:
        """What the daemon said; else what is known here; else what it says within `ANSWER_S`, waited for once."""
        sender = self._session.sender
        if sender is None:
            return own
        value = sender.run.get(name)
        if value is None and own is None and wait and name not in self._asked:
            self._asked.add(name)
            value = self._ask(name)
        return own if value is None else value

    def _ask(self, name: str) -> Any:
        deadline = time.monotonic() + ANSWER_S
        while (left := deadline - time.monotonic()) > 0 and (sender := self._session.sender) is not None:
            told = sender.ask(left)
            if told.get(name) is not None or (told and not _comes_later(name, told)):
                return told.get(name)
            time.sleep(min(ASK_AGAIN_S, left))
        return None


class _NotHere:
    """A name of wandb's that a run refuses. A `__getattr__` would slow down every look at `run.log`."""

    def __init__(self, name: str, instead: str) -> None:
        self._name, self._instead = name, instead

    def __get__(self, run: object, owner: type) -> NoReturn:
        if run is None:
            raise AttributeError(self._name)
        raise NeedsWandb(f"run.{self._name}: {self._instead}")


for _name, _instead in NOT_HERE.items():
    setattr(About, _name, _NotHere(_name, _instead))


def _comes_later(name: str, told: Mapping[str, Any]) -> bool:
    if name == "url":
        return bool(told.get("mode") == "online")
    return name in KNOWN_WHEN_OPEN and "start_time" not in told


def _str(value: Any) -> str | None:
    return None if value is None else str(value)


def _cut(value: Any, most: int) -> str:
    try:
        text = convert.plain(value, fallback=str)
        return (text if isinstance(text, str) else str(text or ""))[:most]
    except Exception:  # noqa: BLE001 - a foreign value's own code may raise anything
        return type(value).__name__


def _strings(tags: Any) -> tuple[str, ...]:
    if isinstance(tags, str):
        return (tags,)
    try:
        return tuple(dict.fromkeys(_cut(tag, 1000) for tag in tags or ()))
    except Exception:  # noqa: BLE001 - likewise
        return ()
