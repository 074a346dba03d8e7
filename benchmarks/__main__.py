# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks [op ...]``: runs the benchmarks on the machine at hand and prints the outcome."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import OPS, environment, report, results

ROOT = Path(__file__).resolve().parent.parent


def bench_file(op: str) -> str:
    return f"benchmarks/bench_{op}.py"


def command(op: str, save: Path, *options: str) -> list[str]:
    """Runs one op's bench file; its rows go to ``save/<device>/<op>.json``."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-W", "ignore", "-p", "no:cacheprovider"]
    return [*pytest, "--benchmark-columns=median,iqr,rounds", "--save", str(save), *options, bench_file(op)]


def child_environment(device: torch.device) -> dict[str, str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if device.type == "cpu" and not any(name.startswith(("MALLOC_", "LD_PRELOAD")) for name in env):
        env |= environment.ALLOCATOR
    return env


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; all when none is named")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--save", type=Path, default=results.FOLDER, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that everything runs")
    arguments = parser.parse_args()
    if unknown := [op for op in arguments.ops if op not in OPS]:
        parser.error(f"no op is called {', '.join(unknown)}; there are {', '.join(OPS)}")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = environment.device_folder(environment.device_name(device))
    logs = ROOT / "build" / "benchmarks"
    logs.mkdir(parents=True, exist_ok=True)
    failed = []
    for op in arguments.ops or OPS:
        steps = "its benchmark on tiny shapes" if arguments.tiny else "its tests, then its benchmark"
        print(f"{op}: {steps}; log in {logs.relative_to(ROOT)}/{op}.log", flush=True)
        options = ["--device", device.type, "--bar", "--capture=sys", *(["--tiny"] if arguments.tiny else [])]
        with open(logs / f"{op}.log", "w") as log:
            done = subprocess.run(
                command(op, arguments.save, *options), cwd=ROOT, stdout=log, env=child_environment(device)
            )
        if done.returncode:
            failed.append(op)
            print((logs / f"{op}.log").read_text()[-3000:])
        path = arguments.save / folder / f"{op}.json"
        if path.exists():
            print(report.text_table(results.load(path)), flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
