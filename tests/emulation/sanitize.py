"""Runs tests/test_cuda_emulated.py with the kernels built under AddressSanitizer and UndefinedBehaviorSanitizer.

python tests/emulation/sanitize.py [arguments of pytest]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from build import compiler

TEST = Path(__file__).resolve().parents[1] / "test_cuda_emulated.py"


def main() -> int:
    libraries = [
        subprocess.run(
            [*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),  # Python itself is not built with them
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "DCNV4_SANITIZE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # Output unbuffered: a finding ends the process at once.
    return subprocess.call(
        [sys.executable, "-m", "pytest", "-s", "-x", str(TEST), *sys.argv[1:]], env=environment
    )


if __name__ == "__main__":
    sys.exit(main())
