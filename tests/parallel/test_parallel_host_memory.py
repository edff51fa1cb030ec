"""What becomes of freed host memory, in processes of their own: it is set for a whole one."""

import json
from pathlib import Path

import pytest
from conftest import start_python

PROGRAM = """
import json, resource, sys
import torch
from parallel.host_memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def flags(address):
    inside = False
    for line in open("/proc/self/smaps"):
        begin, dash, end = line.split()[0].partition("-")
        if dash:
            inside = int(begin, 16) <= address < int(end, 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]

if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), resource.RLIM_INFINITY))
if sys.argv[1] == "kept":
    assert keep_freed_memory()
sizes = [40, 70, 50]  # MiB; glibc learns a size up to 32 by itself
tensors = [torch.ones(size * 2**18) for size in sizes]
huge = "hg" in flags(tensors[0].data_ptr() + 20 * 2**20)  # the middle of it
del tensors
before = faults()
tensors = [torch.ones(size * 2**18) for size in sizes]
print(json.dumps({"huge": huge, "faults": faults() - before}))
"""


def in_a_process(*words: str) -> dict[str, int]:
    done = start_python(["-c", PROGRAM, *words])
    assert done.returncode == 0, done.stderr
    told: dict[str, int] = json.loads(done.stdout)
    return told


def test_memory_that_a_training_frees_is_there_when_it_is_asked_for_again() -> None:
    assert in_a_process("kept")["faults"] < 100  # of 4 KiB: what the interpreter itself takes
    assert in_a_process("returned")["faults"] > 160 * 2**20 // 2**21  # even in huge pages


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists()
    or Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2",
    reason="this kernel maps no huge pages on request, or counts memory that is not touched",
)
def test_the_heap_of_a_training_may_be_mapped_in_huge_pages() -> None:
    assert in_a_process("kept")["huge"]
    assert not in_a_process("returned")["huge"]


def test_where_address_space_is_limited_the_heap_takes_none_that_it_does_not_need() -> None:
    assert not in_a_process("kept", str(2**36))["huge"]  # all fits into 64 GiB, a limit even so
