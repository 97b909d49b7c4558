"""Processes of a pool end with the one that began them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BEGINS = """
import os, sys, time
from qwen_image_fast.training.worker_pool import worker_pool

def wait(_):
    time.sleep(3600)

if __name__ == "__main__":
    pool = worker_pool(2)
    done = [pool.submit(os.getpid).result() for _ in range(2)]
    if sys.argv[1] == "busy":
        pool.submit(wait, 0)
    print("ready", flush=True)
    time.sleep(3600)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_who_began_them(tmp_path, state, signal_):
    script = tmp_path / "begins.py"
    script.write_text(BEGINS)
    with subprocess.Popen([sys.executable, str(script), state], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert children
        os.kill(process.pid, signal_)
    deadline = time.monotonic() + 600
    while alive := [pid for pid in children if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
