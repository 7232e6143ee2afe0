"""Artifacts, and files of the run, wait for their bytes: each goes out once, whole, and after the one before it.

    ARTIFACT ─▶ waits for its blobs ─▶ made (checked, in a thread) ─▶ written down ─▶ sink ─▶ held by the run
                              └── never whole: left out, with a reason

- versions of one name leave in the order in which they were logged, whatever their sizes
- one that is the same as the version before it, in all that is said of it, is not sent: nothing would be new
- an artifact whose files are not all what their worker sent is none: all of it is left out, counted and said
- what is known of blobs is the gatherer's; here is only who waits for which
- values in, values out. What has its fate is known by the row log, whatever life that was decided in
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sidestep.media.base import is_ref
from sidestep.wire import Record
from sidestepd.packed import BlobId
from sidestepd.rows import Logged, Position

SENT, DELIVERED, UNCHANGED = "sent", "delivered", "unchanged"
"""Fates: handed to the sink, held by the run for good, the same as the version before. Any other is a reason."""
MOST_BLOBS = 1_000_000
"""That one artifact may be made of."""
_TEXTS = ("name", "type")

Known = Callable[[BlobId], str | None]
"""Whether a blob is whole (""), never will be (why), or may still come (None)."""


@dataclass(slots=True, kw_only=True)
class Held:
    """An artifact without its fate. `state`: "", then "asked", "made", "sent"."""

    said: Logged
    state: str = ""
    signature: str = ""


class Artifacts:
    """Those that were logged and have no fate yet, in their order."""

    def __init__(self, *, fates: Iterable[tuple[str, str, str, str]] = ()) -> None:
        """`fates` are what `take_fates` gave in earlier lives: id, name, signature, fate."""
        self._fates: dict[str, str] = {}
        self._last: dict[str, str] = {}
        """The signature of the version that was sent last, by its name."""
        for id_, name, signature, fate in fates:
            self._fates[id_] = fate
            if name and fate in (SENT, DELIVERED):
                self._last[name] = signature
        self._held: dict[str, Held] = {}
        self._new_fates: dict[str, tuple[str, str, str]] = {}
        self._done: list[Logged] = []

    # What is heard

    def hear(self, said: Logged) -> None:
        """An artifact was logged, or is read of once more."""
        if said.id in self._held:
            return
        if self._fates.get(said.id, SENT) != SENT:
            self._done.append(said)
        else:
            self._held[said.id] = Held(said=said)

    def hold(self, ids: Iterable[str]) -> None:
        """The run holds these for good."""
        for id_ in ids:
            held = self._held.pop(id_, None)
            if self._fates.get(id_) == DELIVERED:
                continue
            self._settle(id_, held, DELIVERED)

    def refuse(self, id_: str, why: str) -> None:
        """It is not in the run, for good."""
        self._settle(id_, self._held.pop(id_, None), why)

    # What leaves

    def complete(self, known: Known) -> list[Logged]:
        """Those that may be made now, since all their blobs are there; each is told once."""
        found, names = [], set[str]()
        for held in list(self._held.values()):
            name = _queue(held.said)
            if held.state == "":
                why = _whole(held.said, known)
                if why:
                    self.refuse(held.said.id, why)
                    continue
                if why == "" and name not in names:
                    held.state = "asked"
                    found.append(held.said)
            if said_first(held):
                names.add(name)
        return found

    def made(self, id_: str, signature: str) -> bool:
        """It was checked; whether it is to be sent: not if it is the same as the version before it."""
        held = self._held.get(id_)
        if held is None:
            return False
        held.signature, name = signature, held.said.name
        if name and self._last.get(name) == signature and self._fates.get(id_) != SENT:
            self.refuse(id_, UNCHANGED)
            return False
        if name:
            self._last[name] = signature
        held.state = "sent"
        self._note(id_, held, SENT)
        return True

    def try_again(self, id_: str) -> None:
        """It could not be made now."""
        if (held := self._held.get(id_)) is not None:
            held.state = ""

    def flush(self, known: Known) -> None:
        """Nothing more comes: what is not whole is lost."""
        for held in [it for it in self._held.values() if it.state == ""]:
            if _whole(held.said, known) != "":
                self.refuse(held.said.id, _whole(held.said, known) or "lost")

    def take_fates(self) -> list[tuple[str, str, str, str]]:
        """What is to be written down: id, name, signature, fate."""
        found = [(id_, *rest) for id_, rest in self._new_fates.items()]
        self._new_fates = {}
        return found

    def take_done(self) -> list[Logged]:
        """Those that got their fate, whose blobs nobody needs any more."""
        done, self._done = self._done, []
        return done

    def _settle(self, id_: str, held: Held | None, fate: str) -> None:
        self._note(id_, held, fate)
        if held is not None:
            self._done.append(held.said)

    def _note(self, id_: str, held: Held | None, fate: str) -> None:
        self._fates[id_] = fate
        name, signature = (held.said.name, held.signature) if held is not None else ("", "")
        self._new_fates[id_] = (name, signature, fate)

    def is_in_run(self, id_: str) -> bool:
        """Whether the run holds it, or one that is the same."""
        return self._fates.get(id_) in (DELIVERED, UNCHANGED)

    # How it stands

    @property
    def waiting(self) -> int:
        """Artifacts without a fate."""
        return len(self._held)

    @property
    def unconfirmed(self) -> int:
        """Those that the sink was given, or is about to be given."""
        return sum(held.state != "" for held in self._held.values())

    @property
    def versions(self) -> int:
        """Those without a fate, and files of the run that were not sent."""
        return sum(held.said.facts is not None or held.state != "sent" for held in self._held.values())

    @property
    def blobs(self) -> Iterator[BlobId]:
        """What is still needed."""
        return (of for held in self._held.values() for of in blobs_of(held.said))

    def ledger(self) -> dict[str, Any]:
        """How many are in the run, were no news, were left out and why, and are on their way."""
        fates = Counter(self._fates.values())
        left_out = {why: count for why, count in fates.items() if why not in (SENT, DELIVERED, UNCHANGED)}
        return {
            "delivered": fates[DELIVERED],
            "unchanged": fates[UNCHANGED],
            "left_out": left_out,
            "waiting": self.waiting,
        }

    # What outlives a crash

    def state(self) -> list[Any]:
        """As plain values."""
        return [asdict(held.said) for held in self._held.values()]

    def restore(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Take up what `state` gave."""
        for it in state:
            blobs = tuple((of, first, last) for of, first, last in it["blobs"])
            self.hear(Logged(**{**it, "position": Position(*it["position"]), "blobs": blobs}))


def blobs_of(said: Logged) -> Iterator[BlobId]:
    """The blobs of an artifact, one by one."""
    return ((of, number) for of, first, last in said.blobs for number in range(first, last + 1))


def logged_from(record: Record, position: Position, session: bytes) -> Logged | None:
    """What a record says was logged, or None if it breaks a rule."""
    data = record.data
    facts, entries, blobs = data.get("artifact"), data.get("entries"), data.get("blobs")
    if not (isinstance(entries, bytes) or is_ref(entries)) or not isinstance(blobs, list):
        return None
    if facts is not None and not _are_facts(facts):
        return None
    ranges = tuple(it for it in map(_range, blobs) if it is not None)
    if len(ranges) < len(blobs) or sum(last - first + 1 for _, first, last in ranges) > MOST_BLOBS:
        return None
    return Logged(
        position=position,
        time=record.time,
        session=session,
        id=hashlib.sha512(b"%s %d" % (session, position.seq)).hexdigest(),
        facts=facts,
        entries=entries,
        blobs=ranges,
    )


def _are_facts(facts: Any) -> bool:
    return (
        isinstance(facts, dict)
        and all(isinstance(facts.get(name), str) and facts[name] for name in _TEXTS)
        and all(
            isinstance(facts.get(name, []), list) and all(isinstance(it, str) for it in facts.get(name, []))
            for name in ("aliases", "tags")
        )
        and isinstance(facts.get("metadata", {}), dict)
    )


def _range(said: Any) -> tuple[bytes, int, int] | None:
    if not isinstance(said, Sequence) or len(said) != 3:
        return None
    of, first, last = said
    if type(of) is not bytes or len(of) != 16 or type(first) is not int or type(last) is not int:
        return None
    return (of, first, last) if 0 <= first <= last else None


def said_first(held: Held) -> bool:
    """Whether what is said under the same name later waits for this one.

    Until the run holds it, so that at most one version of a name is sent again after a crash; files of the run
    only until they are sent, as sending them again changes nothing.
    """
    return held.said.facts is not None or held.state != "sent"


def _queue(said: Logged) -> str:
    """What keeps its order: versions of a name, and the files that a session saved."""
    return said.name or f"/{said.session.hex()}"


def _whole(said: Logged, known: Known) -> str | None:
    """Whether all blobs are there (""); else what is known of the first that is not. They come in their order."""
    return next((why for why in map(known, blobs_of(said)) if why != ""), "")
