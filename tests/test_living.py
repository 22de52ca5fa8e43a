"""Whether other processes run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgen import living

pytestmark = pytest.mark.skipif(not Path("/proc/self/ns/pid").is_symlink(), reason="needs /proc")


def test_a_process_runs_until_it_is_killed_and_not_as_its_exit_status(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        assert living.runs(process.pid) and living.runs(os.getpid())
        process.send_signal(signal.SIGSTOP)
        assert living.runs(process.pid)
        process.kill()
        end = time.monotonic() + 60
        while living.runs(process.pid):  # this process has not waited for it yet
            assert time.monotonic() < end
            time.sleep(0.01)
        process.wait()
    assert not living.runs(process.pid)


def test_processes_of_one_machine_share_a_space() -> None:
    other = subprocess.run([sys.executable, "-c", "from fastgen import living; print(living.space())"], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(living.space()) and len(living.space()) == 2
