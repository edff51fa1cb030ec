"""Reuse of freed host memory. The allocator settings are per process, so each test starts one."""

import json
from pathlib import Path

import pytest
from conftest import start_python

PROGRAM = """
import json, resource, sys
import torch
from resilience.host_memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def flags(address):
    inside = False
    for line in open("/proc/self/smaps"):
        start, dash, end = line.split()[0].partition("-")
        if dash:
            inside = int(start, 16) <= address < int(end, 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]

if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), resource.RLIM_INFINITY))
if sys.argv[1] == "kept":
    assert keep_freed_memory()
sizes = [40, 70, 50]  # MiB; above the 32 MiB up to which glibc adapts its threshold
tensors = [torch.ones(size * 2**18) for size in sizes]
huge = "hg" in flags(tensors[0].data_ptr() + 20 * 2**20)  # its middle
del tensors
before = faults()
tensors = [torch.ones(size * 2**18) for size in sizes]
print(json.dumps({"huge": huge, "faults": faults() - before}))
"""


def run_program(*arguments: str) -> dict[str, int]:
    process = start_python(["-c", PROGRAM, *arguments])
    assert process.returncode == 0, process.stderr
    result: dict[str, int] = json.loads(process.stdout)
    return result


def test_freed_memory_is_reused_without_page_faults() -> None:
    assert run_program("kept")["faults"] < 100  # pages of 4 KiB used by the interpreter itself
    assert run_program("returned")["faults"] > 160 * 2**20 // 2**21  # even with huge pages


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists()
    or Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2",
    reason="the kernel has no transparent huge pages, or disallows memory overcommit",
)
def test_heap_may_be_mapped_in_huge_pages() -> None:
    assert run_program("kept")["huge"]
    assert not run_program("returned")["huge"]


def test_heap_is_not_enlarged_for_huge_pages_if_address_space_is_limited() -> None:
    assert not run_program("kept", str(2**36))["huge"]  # 64 GiB would suffice, but it is a limit
