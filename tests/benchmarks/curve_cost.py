"""What keys cost: CPU of both ends for each frame and each megabyte, over tcp on this machine.

    python -m tests.benchmarks.curve_cost [--megabytes 50]

One connection says frames of a size as fast as they are taken, with keys and without, in turns; the receiver
takes them as intake does. CPU is that of the whole process, libzmq's own threads included, so that it holds on a
busy machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from typing import Any

import zmq
from rich.console import Console
from rich.table import Table

from sidestep.endpoint import Endpoint
from sidestep.sender import OPTIONS, connect
from sidestep.wire import MAX_FRAME_BYTES
from sidestepd.keygen import new_pair
from tests.benchmarks.measuring import machine

SIZES = (300, 3_000, 30_000, 262_144)
MOST_FRAMES = 20_000
TURNS = 3


def receive(pipe: Any, secret: str | None, frames: int) -> None:
    """Take so many frames, and tell what that cost."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.RCVHWM, 64)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        if secret is not None:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, bytes.fromhex(secret))
        pipe.send(socket.bind_to_random_port("tcp://127.0.0.1"))
        socket.recv_multipart()
        began = time.process_time()
        for _ in range(frames):
            if secret is None:
                socket.recv_multipart()
            else:
                frame = socket.recv(copy=False)
                frame.get("Socket-Type")  # as User-Id is looked up
                socket.recv_multipart()
        pipe.send(time.process_time() - began)


def say(endpoint: Endpoint, size: int, frames: int) -> float:
    """Send so many frames; returns what that cost."""
    header, body = bytes(40), bytes(size)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        for option, value in OPTIONS.items():
            socket.set(option, value)
        socket.linger = -1
        connect(socket, endpoint)
        socket.send_multipart([header, body])
        began = time.process_time()
        for _ in range(frames):
            socket.send_multipart([header, body])
        socket.close()
    return time.process_time() - began


def measure(size: int, megabytes: float, *, keys: bool) -> dict[str, float]:
    """CPU of both ends, in seconds for each frame."""
    server, client = new_pair(), new_pair()
    frames = max(100, min(MOST_FRAMES, int(megabytes * 1e6 / size)))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=receive, args=(theirs, server.secret if keys else None, frames))
    receiver.start()
    address = f"tcp://127.0.0.1:{ours.recv()}"
    secured = Endpoint(address=address, server_key=server.public, own=client)
    sent = say(secured if keys else Endpoint(address=address), size, frames)
    received = float(ours.recv())
    receiver.join()
    return {"sender": sent / frames, "receiver": received / frames}


def main() -> None:
    """Measure in turns, and print the least of each: what else goes on can only add to it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=50.0, help="of each size, at most")
    options = parser.parse_args()
    table = Table("bytes", "end", "µs/frame plain", "with keys", "ms/MB plain", "with keys")
    figures: dict[str, Any] = {"machine": machine()}
    for size in SIZES:
        seen = [
            (measure(size, options.megabytes, keys=False), measure(size, options.megabytes, keys=True))
            for _ in range(TURNS)
        ]
        for end in ("sender", "receiver"):
            plain, keyed = (min(turn[way][end] for turn in seen) for way in range(2))
            figures[f"{size} {end}"] = {"plain_s": plain, "keys_s": keyed}
            cells = [1e6 * plain, 1e6 * keyed, 1e9 * plain / size, 1e9 * keyed / size]
            table.add_row(f"{size:,}", end, *(f"{cell:.3g}" for cell in cells))
    Console().print(table)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
