"""What Prometheus and probes are told of a real intake, and who may connect to it."""

from __future__ import annotations

import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sidestep.errors import SettingsError
from sidestepd.metrics import Metrics
from tests.support.daemons import freeze
from tests.support.services import Service
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("service"), serve__socket_mode="660", serve__linger_s=60) as service:
        yield service.start()


@pytest.fixture
def metrics(service: Service) -> Iterator[Metrics]:
    metrics = Metrics(service.home, "127.0.0.1:0")
    metrics.start()
    yield metrics
    metrics.stop()


def ask(metrics: Metrics, path: str) -> tuple[int, str]:
    """The answer to a GET."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_socket_has_the_mode_that_was_asked_for(service: Service):
    path = Path(service.address.removeprefix("ipc://"))

    assert 0o660 == stat.S_IMODE(path.stat().st_mode)


def test_counts_of_each_open_run_are_told(service: Service, metrics: Metrics):
    worker = service.worker(run="counted")
    worker.hello()
    worker.log(0, 1, 2)

    def counted() -> str:
        code, text = ask(metrics, "/metrics")
        assert 200 == code
        return text if 'records_delivered_total{run="counted"} 3.0' in text else ""

    told = eventually(counted, 60)

    lines = told.splitlines()
    for line in (
        "sidestep_up 1.0",
        "sidestep_runs 1.0",
        'sidestep_records_offered_total{run="counted"} 3.0',
        'sidestep_records_pending{run="counted"} 0.0',
        'sidestep_workers{run="counted",state="live"} 1.0',
        'sidestep_last_step{run="counted"} 2.0',
    ):
        assert line in lines


def test_health_is_that_of_intake(service: Service, metrics: Metrics):
    assert (200, "well\n") == ask(metrics, "/healthz")
    assert service.process is not None
    intake = psutil.Process(service.process.pid)

    freeze(intake)

    assert (503, "it does not answer\n") == ask(metrics, "/healthz")
    intake.resume()
    eventually(lambda: ask(metrics, "/healthz")[0] == 200, 60)
    assert 404 == ask(metrics, "/else")[0]


def test_an_address_that_is_taken_is_said(service: Service, metrics: Metrics):
    with pytest.raises(SettingsError, match=r"serve\.metrics = 127\.0\.0\.1:\d+ .*Address already in use"):
        Metrics(service.home, f"127.0.0.1:{metrics.port}").start()


def test_without_an_address_nothing_listens(service: Service):
    metrics = Metrics(service.home, None)
    metrics.start()

    assert 0 == metrics.port
    metrics.stop()
