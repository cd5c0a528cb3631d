"""Memory that was freed is used again."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from workers.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def fill():
    return [b"x" * (2 << 20) for _ in range(16)]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
before = faults()
if sys.argv[2] == "one thread":
    for _ in range(4):
        fill()
else:
    for threads in [ThreadPoolExecutor(1) for _ in range(4)]:
        threads.submit(fill).result()
print(faults() - before)
"""


def faults(how: str, threads: str) -> int:
    """Pages that had to be asked for when the same memory was needed four times more."""
    command = [sys.executable, "-c", PROGRAM, how, threads]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize("threads", ["one thread", "others"])
def test_memory_that_was_freed_is_used_again(threads: str) -> None:
    assert faults("keep", threads) < 1000 < faults("as it comes", threads)
