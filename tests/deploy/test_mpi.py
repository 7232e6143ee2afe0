"""`mpirun sidestep run -- COMMAND` with real MPIs on two nodes, which are network namespaces: one run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestepd import status
from sidestepd.rundir import newest_run_dir
from tests.support.daemons import read_jsonl
from tests.support.namespaces import Network, missing
from tests.support.waiting import eventually
from tests.support.workshop import Workshop

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(bool(missing(cuts=False)), reason=missing(cuts=False)),
    pytest.mark.timeout(300),
]

WAIT_S = 120.0
STEPS = 30
TRAIN = f"""
import os, sys, time
from pathlib import Path
import sidestep
folder, rank = Path(sys.argv[1]), int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"])
run = sidestep.init()
for step in range({STEPS}):
    run.log({{"step": step, "rank": rank}}, step=step)
    time.sleep(0.02)
run.finish(timeout=60)
(folder / f"ended-{{rank}}").touch()
while any(not (folder / f"ended-{{other}}").exists() for other in range(4)):
    time.sleep(0.05)
sys.exit(3 if rank == 2 and sys.argv[2:] == ["fails"] else 0)
"""
MPIS = {
    "openmpi": "mpirun --allow-run-as-root --bind-to none --prtemca plm_ssh_agent SHELL --host node0:1,node1:3",
    "mpich": "mpiexec -launcher ssh -launcher-exec SHELL -hosts node0:1,node1:3",
    "impi-rt": "mpiexec.hydra -launcher ssh -launcher-exec SHELL -hosts node0,node1 -ppn 2",
}
"""How each starts its parts on other nodes, by the package that it comes in; SHELL stands in for ssh."""
FAILED = {"impi-rt": 255}
"""What one ends with at times, when a process of another node has failed with whatever."""


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with Network(tmp_path, 2) as network:
        yield network


@pytest.mark.parametrize("package", MPIS)
@pytest.mark.parametrize(("words", "code"), [((), 0), (("fails",), 3)], ids=["well", "fails"])
def test_mpirun_on_two_nodes_is_one_run(
    network: Network, workshop: Workshop, tmp_path: Path, package: str, words: tuple[str, ...], code: int
):
    launcher, *options = MPIS[package].replace("SHELL", str(network.remote_shell())).split()
    (tmp_path / "train.py").write_text(TRAIN)
    sets = ["--set", "sink.kind=jsonl", "--set", "samplers.enabled=off", "--set", "order.patience_s=30"]
    train = [sys.executable, str(tmp_path / "train.py"), str(tmp_path), *words]

    command = network.start(
        0,
        [str(workshop.launcher(package) / launcher), *options, "-n", "4",
         sys.executable, "-m", "sidestep", "run", "--dir", str(tmp_path), *sets, "--", *train],
    )  # fmt: skip

    ended = command.wait(WAIT_S)
    assert ended in {code, code and FAILED.get(package, code)}, network.log()
    run_dir = newest_run_dir(tmp_path)
    assert run_dir is not None, network.log()
    eventually(lambda: status.report(run_dir).state == "finished", WAIT_S, network.log)
    # mpirun kills all commands when one has failed: what they left running has finished the run, and clears up.
    eventually(lambda: not (run_dir.parent / ".jobs").exists(), WAIT_S, network.log)
    rows, report = read_jsonl(run_dir), status.report(run_dir)
    assert list(range(STEPS)) == [row.values["step"] for row in rows], network.log()
    assert {4} == {row.values["sidestep/ranks_reported"] for row in rows}
    assert {"node0", "node1"} == {it.node for it in report.sessions if it.role == "worker"}
    assert ["node1"] == [it.node for it in report.sessions if it.role == "relay"]
    assert (code, "finished", 0) == (report.run.exit_code, report.state, report.ledger.pending)
    assert report.ledger.balances
