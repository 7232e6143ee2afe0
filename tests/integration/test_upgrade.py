"""What a daemon of each version before left behind is taken up by this one, and so are its workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidestep.wire import (
    NO_SESSION,
    VERSION,
    Ack,
    Bye,
    Frame,
    Hello,
    Message,
    Refuse,
    Status,
    Welcome,
    Wrapper,
    decode,
    encode,
    limits,
    spoken_in,
    unwrap,
    version_of,
)
from sidestep.wire.limits import OLDEST_VERSION
from sidestepd import status
from sidestepd.processes import read_json
from tests.support.daemons import RawWorker, read_jsonl
from tests.support.golden_runs import CONFIG, FOLDER, STEPS, TakenUp, messages

VERSIONS = [FOLDER / str(version) for version in range(OLDEST_VERSION, VERSION + 1)]


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: f"version {version.name}")
class TestTakenUp:
    def test_a_backlog_is_written_and_workers_go_on_where_they_were(self, version: Path, tmp_path: Path):
        """Two workers come back: each sends once more what was acknowledged before, then goes on, and ends."""
        with TakenUp(version, tmp_path / "run") as run:
            before = status.report(run.run_dir).ledger
            run.start()
            worker = run.worker(session=NO_SESSION)
            for parts in messages(version):
                worker.send(parts)
                while not _answered(decode(parts), worker):
                    pass
            run.finish()

            assert before.pending > 0
            assert list(range(STEPS)) == [row.values["global_step"] for row in run.rows() if "loss" in row.values]
            assert status.report(run.run_dir).ledger.balances

    @pytest.mark.nightly
    def test_a_backlog_alone_is_drained(self, version: Path, tmp_path: Path):
        run = TakenUp(version, tmp_path / "run")

        ended = subprocess.run(
            [sys.executable, "-P", "-m", "sidestep", "drain", str(run.run_dir)], capture_output=True, timeout=120
        )

        assert 0 == ended.returncode, ended.stderr
        assert list(range(10)) == [
            row.values["global_step"] for row in read_jsonl(run.run_dir) if "loss" in row.values
        ]
        assert "finished" == read_json(run.run_dir / "run.json")["state"]
        assert json.dumps({"config": CONFIG}) in (run.run_dir / "rows.jsonl").read_text()


NEXT = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("sidestep.wire.limits", {str(Path(limits.__file__))!r})
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.OLDEST_VERSION, module.VERSION = module.VERSION, module.VERSION + 1
"""
"""A process that runs this first is of the version after ours, by its number: nothing else differs as yet."""


class TestTheVersionAfterThis:
    def test_answers_workers_and_relays_of_this_one_in_theirs(self, tmp_path: Path):
        """They read no other, and would give up what they have."""
        (tmp_path / "sitecustomize.py").write_text(NEXT)
        with TakenUp(FOLDER / str(VERSION), tmp_path / "run") as run:
            run.environment = {
                "PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.getenv("PYTHONPATH"))))
            }
            run.start(ready=False)
            worker, relay, newer = run.worker(session=NO_SESSION), run.worker(), run.worker()
            for parts in messages(FOLDER / str(VERSION)):
                worker.send(parts)
                while not _answered(decode(parts), worker):
                    pass
            wrapper = Wrapper(relay.session)
            wrapper.add(encode(Hello(session=relay.session, role="relay", launch="relay", node="n")))
            relay.send(wrapper.close())
            answer = relay.receive()
            hello = Hello(session=newer.session, role="relay", launch="newer", node="m")
            newer.send(spoken_in(VERSION + 1, encode(hello)))
            in_its_own = newer.receive()
            finished = run.finish()

        assert 0 == finished
        assert VERSION + 1 == version_of(in_its_own)  # the daemon is of the next version indeed
        assert isinstance(decode(spoken_in(VERSION, in_its_own)), Welcome)
        assert [VERSION, VERSION] == [version_of(answer), *map(version_of, unwrap(answer))]
        assert [Welcome] == [type(decode(inner)) for inner in unwrap(answer)]
        assert list(range(STEPS)) == [row.values["global_step"] for row in run.rows() if "loss" in row.values]
        assert status.report(run.run_dir).ledger.balances


def _answered(said: Message, worker: RawWorker) -> bool:
    """Hear one answer; whether it is the one that the message is waited with for."""
    if isinstance(said, Status):
        return True
    answer = worker.listen()
    assert answer is not None
    assert not isinstance(answer, Refuse), answer
    if isinstance(said, Frame):
        return isinstance(answer, Ack) and answer.first >= said.end
    return isinstance(answer, Welcome if isinstance(said, Hello) else Bye)
