"""A relay whose keys are taken away, replaced or exposed while it serves: it says so, and goes on when it can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestep.endpoint import KeyFile
from sidestepd import status
from sidestepd.addresses import BOUND
from sidestepd.keygen import make_keys, rotate
from sidestepd.processes import read_json
from tests.support.daemons import DEADLINE_S, RawWorker, ServedRun
from tests.support.waiting import eventually

LISTEN = "tcp://127.0.0.1:0"


class Guarded:
    """A daemon on tcp with keys, a relay of it, and a worker there whose every record must arrive."""

    def __init__(self, base: Path) -> None:
        self.keys = base / "keys"
        make_keys(self.keys)
        own = {"listen__key_file": str(self.keys / "server.key"), "listen__clients": str(self.keys / "clients")}
        self.head = ServedRun(base / "head", listen__tcp=[LISTEN], **own).start()
        upstream = {
            "upstream__address": str(read_json(self.head.run_dir / BOUND)[LISTEN]),
            "upstream__key_file": str(self.keys / "client.key"),
        }
        self.relay = ServedRun(base / "node", sink="upstream", **upstream).start()
        self.worker: RawWorker = self.relay.worker()
        self.worker.hello()
        self._said = 0

    def log(self) -> str:
        return f"--- head\n{self.head.log()}\n--- relay\n{self.relay.log()}"

    def say(self) -> None:
        """One record more, which the relay has."""
        self.worker.log(self._said)
        self._said += 1

    def wait(self) -> None:
        """Until all that was said is in the run."""
        eventually(lambda: list(range(self._said)) == self.head.steps(), DEADLINE_S, self.log)

    def wait_for_words(self, words: str) -> None:
        """Until the relay says why it waits."""
        eventually(lambda: words in status.report(self.relay.run_dir).trouble, DEADLINE_S, self.log)

    @property
    def client(self) -> str:
        """The public key of the relay, by its file."""
        return KeyFile.read(self.keys / "client.key").pair.public

    def strike(self, key: str) -> None:
        """Take a key from the list."""
        clients = self.keys / "clients"
        clients.write_text("".join(line for line in clients.read_text().splitlines(True) if key not in line))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = Guarded(tmp_path_factory.mktemp("guarded"))
    with made.head, made.relay:
        yield made
        made.worker.bye(exit_code=0)
        assert [0, 0] == [made.relay.finish(), made.head.finish()], made.log()
        ledgers = [made.head.ledger(), made.relay.ledger()]
        assert all(it.balances for it in ledgers)
        assert ledgers[0].offered == ledgers[0].delivered == ledgers[1].delivered


class TestAKey:
    def test_that_is_taken_from_the_list_is_told_and_another_one_is_taken_up(self, guarded: Guarded):
        """On a connection that stands: it is no longer heard there."""
        guarded.say()
        guarded.wait()
        old = guarded.client

        guarded.strike(old)
        eventually(lambda: "no longer on the list" in guarded.head.log(), DEADLINE_S, guarded.log)
        guarded.say()
        guarded.wait_for_words(f"its list of clients lacks {old}")
        rotate(guarded.keys, "client")
        guarded.wait()

        assert old != guarded.client
        eventually(lambda: status.report(guarded.relay.run_dir).trouble == "", DEADLINE_S, guarded.log)

    @pytest.mark.nightly
    def test_of_the_daemon_above_may_be_replaced(self, guarded: Guarded):
        old = KeyFile.read(guarded.keys / "server.key").pair.public
        guarded.say()
        guarded.wait()

        rotate(guarded.keys, "server")
        guarded.head.kill()
        guarded.head.start()
        guarded.say()
        guarded.wait()

        assert old != KeyFile.read(guarded.keys / "server.key").pair.public

    @pytest.mark.nightly
    def test_that_others_can_read_is_not_used(self, guarded: Guarded):
        key_file = guarded.keys / "client.key"
        guarded.say()
        guarded.wait()
        guarded.head.kill()
        key_file.chmod(0o644)
        guarded.head.start()

        guarded.relay.kill()
        guarded.relay.start()
        guarded.worker.hello()
        guarded.say()
        guarded.wait_for_words("others can read or change it (mode 0644)")
        before = guarded.head.steps()
        key_file.chmod(0o600)
        guarded.wait()

        assert len(before) < len(guarded.head.steps())
