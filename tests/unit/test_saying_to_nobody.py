"""What the command line says where nobody reads it any more: a pager that ended, an srun that was killed."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_stderr_that_is_closed_ends_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    code = "from sidestepd.saying import say; say('first'); say('second'); print('goes on')"

    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writer, timeout=60)

    os.close(writer)
    assert (0, b"goes on\n") == (done.returncode, done.stdout)
