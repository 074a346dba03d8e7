# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from pathlib import Path


def test_a_run_that_is_killed_three_times_at_random_ends_as_if_nothing_had_happened():
    command = [sys.executable, "-m", "tests.kill_runs", "--kills", "3", "--steps", "12"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": killed ") == 3 and "bit for bit" in done.stdout
