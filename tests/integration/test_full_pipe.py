"""A peer that goes while much of what it said is unread: libzmq must not take the process with it.

With ZeroMQ's own heartbeats it does: at the next one it finds a connection that failed while nothing more was read
from it, and calls abort(). In a worker that would be the training.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, time, zmq
from sidestep.sender import OPTIONS

ours, theirs = zmq.Context(), zmq.Context()
reader, peer = ours.socket(zmq.DEALER), theirs.socket(zmq.ROUTER)
for option, value in OPTIONS.items():
    reader.set(option, value)
if sys.argv[1] == "heartbeats":
    reader.set(zmq.HEARTBEAT_IVL, 50)
    reader.set(zmq.HEARTBEAT_TIMEOUT, 60_000)
peer.set(zmq.SNDHWM, 100_000)
port = peer.bind_to_random_port("tcp://127.0.0.1")
reader.connect(f"tcp://127.0.0.1:{port}")
reader.send(b"hello")
who = peer.recv()
peer.recv()
for _ in range(20_000):
    peer.send_multipart([who, bytes(1000)])
reader.poll(5000)
theirs.destroy(linger=0)
until = time.monotonic() + float(sys.argv[2])
while time.monotonic() < until:
    time.sleep(0.05)
assert reader.recv()
ours.destroy(linger=0)
"""


@pytest.mark.parametrize(("options", "seconds", "code"), [("ours", "0.5", 0), ("heartbeats", "30", -6)])
def test_a_peer_that_goes_while_much_is_unread_ends_nobody(options: str, seconds: str, code: int):
    """And with heartbeats it would: the second case is the control."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM, options, seconds], capture_output=True, timeout=60)

    assert code == ended.returncode, ended.stderr
