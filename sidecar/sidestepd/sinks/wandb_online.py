"""Rows into a run on a W&B server.

- a row counts once the server tells of its step, or of a later one: it holds rows in the order they were sent
- a resumed run goes on behind the last row that the server holds; the rows that it lacks are sent again word for
  word, so they land in the same lines of its history even if a dead wandb-core's last request comes after all
- a server that is away, slow or refuses is waited for; nothing is given up for it
- wandb-core keeps what it could not send yet, so there is a bound to what it is given
- artifacts go up one after the other, in a thread: one counts once the server has committed it, and the next of
  its name waits for that. So a crash leaves one at most to be sent again, which the server knows by its digest
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import wandb
from wandb.sdk.mailbox.mailbox_handle import HandleAbandonedError, ServerResponseError

from sidestepd.errors import Fatal, Retry, Trouble
from sidestepd.rows import Row, Version
from sidestepd.sinks.base import Confirmed, RunFacts
from sidestepd.sinks.wandb import BROKEN, WandbSink, init, wait_for_free_name
from sidestepd.sinks.wandb_server import Asker, Held, Server

logger = logging.getLogger(__name__)

STALLS = 3
"""A server that answers, and takes no row for so many times `stall_s`, has lost touch with our wandb-core."""
CLOSE_AGAIN_S = 0.1
UPLOAD_AGAIN_S = (2.0, 60.0)
"""Between two tries to send an artifact: at first, and at most."""
MOST_UPLOADS = 12
"""Tries before an artifact is given up that the server refuses; each has all of wandb-core's own tries in it."""
FINISH_S = 40
"""How long wandb may take for what is left when all rows are there."""
_NOT_OPENED = (wandb.errors.Error, ServerResponseError, HandleAbandonedError, TimeoutError, OSError)
_FOR_A_PERSON = re.compile(
    r"\b40[1349]\b|not found|denied|permission|unauthorized|forbidden|API key", re.IGNORECASE
)


class OnlineSink(WandbSink):
    """A run on a server."""

    takes_files = True
    most_unconfirmed = 50_000
    """Rows given to wandb-core that the server was not seen to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.held = Held()
        """What the server held when the run was opened."""
        self.ask: Callable[[], Held | None] = lambda: None
        """What it holds now. Raises Retry."""
        self.tell: Callable[[range], Iterable[tuple[int, Mapping[str, Any]]]] = lambda _: ()
        """The rows that it holds of these steps. Raises Retry."""
        self._asker: Asker | None = None
        self._written: deque[int] = deque()
        self._confirmed: list[int] = []
        self._through = -1
        self._stalled_s = 0.0
        self._uploads = ThreadPoolExecutor(1, "uploads")
        self._kept: deque[str] = deque()
        self._refused: deque[tuple[str, str]] = deque()
        self._saved: list[str] = []
        """Files that count when the run is finished: only then has wandb-core sent all it was given."""
        self._upload_trouble: Trouble | None = None
        self._lost: BaseException | None = None

    def open(self, run: RunFacts, bookmark: Mapping[str, Any]) -> Confirmed:
        """Ask what the server holds, and go on behind it."""
        server, run = _server_of(run)
        self._stalled_s = STALLS * run.stall_s
        folder = run.directory / "wandb"
        folder.mkdir(exist_ok=True)
        held = server.held(run.id, run.project, run.entity)
        if not (folder / "judged").exists():
            _judge(run, held)
            self.begin()
            (folder / "judged").touch()
        held = self.held = held or Held()
        if not held.rows and held.said_step >= 0:
            # A summary that came before its row: wandb would go on behind it, and drop what comes before.
            server.forget_summary(run.id, run.project, run.entity)
        wait_for_free_name(folder)
        opened = self._opened(_init(run))
        if opened.starting_step != held.last_step + 1:
            raise Fatal(f"wandb goes on at step {opened.starting_step}, the server holds {held.last_step}")
        self.ask = partial(server.held, run.id, opened.project, opened.entity)
        self.tell = partial(server.rows, run.id, opened.project, opened.entity)
        self._asker = Asker(self.ask, every_s=run.ask_every_s, last_step=held.last_step)
        self._through = held.last_step
        known = int(bookmark.get("through", -1))
        return Confirmed(steps=range(known + 1, held.last_step + 1), bookmark={"through": held.last_step})

    def begin(self) -> None:
        """Called once in all lives of a run, before anything of it is on the server."""

    def write(self, row: Row) -> Sequence[str]:
        """One call, if there is room."""
        if len(self._written) >= self.most_unconfirmed:
            self._collect()
        if len(self._written) >= self.most_unconfirmed:
            raise self._later("W&B takes rows more slowly than they come")
        refused = super().write(row)
        self._written.append(row.step)
        return refused

    def confirm(self) -> Confirmed:
        """What the server was seen to hold by now."""
        self._pass_on()
        self._collect()
        self._see_moving()
        asker = self._open_asker
        steps, self._confirmed = tuple(self._confirmed), []
        through = steps[-1] if steps else self._through
        self._through = through
        if self._lost is not None:
            raise Fatal(f"wandb-core is gone: {self._lost!r}")
        return Confirmed(
            steps=steps,
            bookmark={"through": through},
            trouble=asker.trouble or self._upload_trouble,
            watched=True,
            kept=[self._kept.popleft() for _ in range(len(self._kept))],
            refused=[self._refused.popleft() for _ in range(len(self._refused))],
        )

    def keep(self, version: Version, prepared: Any) -> None:
        """As any; files count when the run is finished."""
        super().keep(version, prepared)
        if version.facts is None:
            self._saved.append(version.id)

    def _log_artifact(self, version: Version, prepared: Any) -> None:
        self._uploads.submit(self._upload, version, prepared)

    def _upload(self, version: Version, prepared: Any) -> None:
        """In the thread: until the server has it, or refuses it for good."""
        pause_s = UPLOAD_AGAIN_S[0]
        for _ in range(MOST_UPLOADS):
            try:
                super()._log_artifact(version, prepared)
                prepared.wait()
            except BROKEN as error:
                self._lost = error
                return
            except Exception as error:  # noqa: BLE001 - wandb raises what its core, the server and pydantic say
                logger.warning("the artifact %s is not on the server: %.500s", prepared.name, error)
                self._upload_trouble = Trouble(f"W&B does not take the artifact {prepared.name}: {error!s:.200}")
            else:
                self._upload_trouble = None
                self._kept.append(version.id)
                return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, UPLOAD_AGAIN_S[1])
        self._upload_trouble = None
        self._refused.append((version.id, "rejected"))

    def history(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The rows that the server held when the run was opened, each step as it was sent last.

        Our files say most of them; the server tells of what a wandb-core sent and died before it wrote it.
        """
        rows = {step: values for step, values in super().history() if step <= self.held.last_step}
        behind = range(max(rows, default=-1) + 1, self.held.last_step + 1)
        if behind:
            rows.update(self.tell(behind))
        yield from sorted(rows.items())

    def close(self, exit_code: int) -> None:
        """Wait for every row to be there, then finish the run."""
        self._collect()
        if self._written:
            self._open_asker.want(hurry=True)
            raise self._later("the last rows are on their way to W&B")
        self._open_asker.stop()
        self._pass_on()
        self._ahead = None
        try:
            self._open_run.finish(exit_code=exit_code)
            wandb.teardown(exit_code)
        except (*_NOT_OPENED, *BROKEN) as error:
            raise Fatal(f"wandb did not finish the run: {error!r}") from error
        self._kept.extend(self._saved)
        self._saved = []

    def _collect(self) -> None:
        """Take what the server holds out of what is awaited."""
        asker = self._open_asker
        while self._written and self._written[0] <= asker.last_step:
            self._confirmed.append(self._written.popleft())
        if self._written:
            asker.want()
        else:
            asker.rest()

    def _later(self, why: str) -> Retry:
        self._see_moving()
        trouble = self._open_asker.trouble or Trouble(why)
        return Retry(trouble.what, after_s=CLOSE_AGAIN_S, most_s=1.0, lasting=trouble.lasting)

    def _see_moving(self) -> None:
        if self._written and time.monotonic() - self._open_asker.moved_at > self._stalled_s:
            raise Fatal(f"the server answers, and took no row for {self._stalled_s:.0f} s")

    @property
    def _open_asker(self) -> Asker:
        if self._asker is None:
            raise RuntimeError("the sink is not open")
        return self._asker


def _server_of(run: RunFacts) -> tuple[Server, RunFacts]:
    """The server, and the run by the names that wandb would give it there."""
    if run.server:
        os.environ["WANDB_BASE_URL"] = run.server
    settings = wandb.setup().settings
    project = run.project or settings.project or "uncategorized"
    entity = run.entity or settings.entity
    return Server(str(settings.base_url)), replace(run, project=project, entity=entity)


def _judge(run: RunFacts, held: Held | None) -> None:
    """Whether the run may be opened: asked once, before anything of ours is in it."""
    if run.resume == "must" and held is None:
        raise Retry(f"run {run.id} is not there, and resume = must", after_s=5.0, lasting=True)
    if run.resume == "never" and held is not None:
        raise Retry(f"run {run.id} is there already; another id makes another run", after_s=5.0, lasting=True)


def _init(run: RunFacts) -> wandb.Run:
    settings = {
        "finish_timeout": FINISH_S,
        "finish_timeout_raises": True,
        "x_file_stream_retry_wait_max_seconds": 15,  # it is waited for less long than it would wait by itself
    }
    named = {"project": run.project, "entity": run.entity, "name": run.name, "resume": "allow"}
    for names in ({**named, **run.options}, named):
        try:
            return init(run, names, "online", **settings)
        except _NOT_OPENED as error:
            trouble = Trouble(f"W&B does not open the run: {error}", bool(_FOR_A_PERSON.search(str(error))))
            raise Fatal(trouble.what, trouble=trouble) from error
        except (TypeError, ValueError) as error:  # what a run is called is no reason to be without it
            logger.warning("wandb refuses to open the run with %s: %s", ", ".join(names), error)
    raise Fatal("wandb can not open the run; the lines before say why")
