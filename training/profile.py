"""Profile single training steps: trace, memory snapshot and a breakdown of the step time.

`log.profile` lists the steps. Only rank 0 records; the other ranks do the same work and wait for
it. In the breakdown each instant belongs to one row: compute, otherwise communication in flight
(which is then exposed), otherwise the wait for data, otherwise the host, so that the rows add up
to the step time. On GPUs, compute means kernels on any stream; on CPU, the operators of the
training thread, each counted for its self time.
"""

import gzip
import json
import math
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

if TYPE_CHECKING:
    from training.run import Run

TRACE, MEMORY, TABLE = "trace.json.gz", "memory.pickle", "time.txt"
MAX_ALLOCATIONS = 1_000_000  # events in the memory history

STEP, DATA = "llamesh: step", "llamesh: data"
"""Trace annotations around the step and around its wait for data."""

MATRIX, ATTENTION, ELEMENTWISE = "matrix products", "attention", "elementwise"
OPTIMIZER, COMMUNICATION = "optimizer", "exposed communication"
WAIT, HOST = "data wait", "host"
# An instant claimed by several rows belongs to the first.
ROWS = (MATRIX, ATTENTION, OPTIMIZER, ELEMENTWISE, COMMUNICATION, WAIT, HOST)

_OPTIMIZER = re.compile(r"Optimizer\.step#")  # annotation that torch puts around an optimizer step
_COMMUNICATION = re.compile(r"^gloo:|nccl", re.I)
# Inductor names a kernel after all operators that it fuses, on CPU after the complete graph. Matrix
# products outside of these kernels keep their names.
_FUSED = re.compile(r"^(triton_(poi|red|per)_|\w*cpp_fused|## Call CompiledFxGraph)")
_ATTENTION = re.compile(r"attention|attn|fmha|flash|sdpa", re.I)
_MATRIX = re.compile(
    r"^aten::(addmm|_addmm_activation|mm|bmm|baddbmm|dot|mv|addmv|_scaled_mm|mkldnn_linear)\b"
    r"|^mkldnn::_linear|gemm|nvjet|cutlass|cublas|xmma|splitK|^triton_tem_\w*mm",
    re.I,
)
_OPERATOR = re.compile(r"^(aten|fsdp|prims|torch_attn|_quantized)::")
# Operators without computation: views, allocation, and wrappers around other operators.
_OVERHEAD = re.compile(
    r"^aten::(\w*view\w*|\w*reshape\w*|as_strided\w*|detach_?|t|transpose|permute|slice|select"
    r"|unsqueeze|squeeze|expand\w*|split\w*|chunk|unbind|narrow|alias|empty\w*|resize_|set_|numel"
    r"|lift_fresh|to|_to_copy|contiguous|clone|matmul|linear|result_type|resolve_\w+|item|zeros"
    r"|ones|zeros_like|full|_local_scalar_dense|is_\w+|record_stream)$"
)


class Span(NamedTuple):
    """A time interval in microseconds of the trace's clock."""

    start: float
    end: float


@dataclass(frozen=True)
class StepBreakdown:
    """Time of one step by row.

    Attributes:
        rows: Seconds by row, in the order of `ROWS`; they add up to `total`.
        communication: Seconds in which any communication was in flight, exposed or overlapped.
        peak_allocated: Bytes allocated at the step's peak beyond those at its start.
    """

    rows: dict[str, float]
    total: float
    communication: float
    peak_allocated: int

    def table(self) -> str:
        """Return the rows as aligned lines, longest time first."""
        lines = [
            f"  {name:<24}{1e3 * seconds:10.1f} ms {seconds / self.total:6.1%}"
            for name, seconds in sorted(self.rows.items(), key=lambda row: -row[1])
        ]
        overlapped = self.communication - self.rows[COMMUNICATION]
        lines += [
            f"  {'total':<24}{1e3 * self.total:10.1f} ms",
            f"  {'overlapped communication':<24}{1e3 * overlapped:10.1f} ms",
            f"  {'peak memory increase':<24}{self.peak_allocated / 2**30:10.3f} GiB",
        ]
        return "\n".join(lines)


@contextmanager
def profile_step(run: "Run", step: int) -> Iterator[None]:
    """Profile the step run inside this context, then write and print the result.

    On CUDA, the profiler synchronizes before and after the step, so that the trace holds all work
    of this step and nothing else. A profile that cannot be written does not stop training.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences its start and stop messages
    device = run.fabric.device
    on_cuda = device.type == "cuda"
    synchronize = partial(torch.cuda.synchronize, device) if on_cuda else lambda: None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    run.clock.around_data = partial(record_function, DATA)
    name, profiler = f"the profile of step {step}", None
    with run.optional(name):
        if on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
        # CPU memory has no snapshot, so allocations go into the trace.
        profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        profiler.start()
        with run.clock.drain():
            synchronize()
    with record_function(STEP):
        yield
        with run.clock.drain():
            synchronize()
    run.clock.around_data = nullcontext
    folder = run.folder.path / "profile" / f"step-{step:08d}"
    with run.clock.stall(), run.optional(name):
        if profiler is None:
            return  # its error is reported
        profiler.stop()
        snapshot = torch.cuda.memory._snapshot() if on_cuda else None
        if on_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / TRACE))
        if snapshot is not None:  # for https://pytorch.org/memory_viz
            (folder / MEMORY).write_bytes(pickle.dumps(snapshot))
        table = read_breakdown(folder / TRACE).table()
        (folder / TABLE).write_text(table + "\n", encoding="utf-8")
        run.console.note(f"Profile of step {step}, written to {folder}:\n{table}")


def read_breakdown(trace: Path) -> StepBreakdown:
    """Return the breakdown of the step in a gzipped Chrome trace written by torch.profiler."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        return break_down(json.load(file)["traceEvents"])


def break_down(events: Iterable[dict[str, Any]]) -> StepBreakdown:
    """Return the breakdown of the single step that the trace events describe."""
    events = list(events)
    complete = [event for event in events if event.get("ph") == "X" and "cat" in event]
    # On GPUs a host annotation appears a second time, with the device's times.
    step = next(e for e in complete if e["name"] == STEP and e["cat"] == "user_annotation")
    step_span = _span(step)
    kernels = [event for event in complete if event["cat"].startswith(("kernel", "gpu_mem"))]
    main_thread = [event for event in complete if event["tid"] == step["tid"]]
    claims: dict[str, list[Span]] = {name: [] for name in ROWS}
    for row, span in _kernel_spans(kernels, complete) if kernels else _self_times(main_thread):
        claims[row].append(span)
    if not kernels:  # gloo runs in separate threads
        claims[COMMUNICATION] += [_span(e) for e in complete if _COMMUNICATION.search(e["name"])]
    claims[WAIT] = [_span(event) for event in main_thread if event["name"] == DATA]
    claims[HOST] = [step_span]
    rows = partition(step_span, [claims[name] for name in ROWS])
    in_flight, _ = partition(step_span, [claims[COMMUNICATION], [step_span]])
    return StepBreakdown(
        rows={name: microseconds / 1e6 for name, microseconds in zip(ROWS, rows, strict=True)},
        total=(step_span.end - step_span.start) / 1e6,
        communication=in_flight / 1e6,
        peak_allocated=_peak_allocated(events, step_span, device_type=1 if kernels else 0),
    )


def partition(interval: Span, layers: Sequence[Sequence[Span]]) -> list[float]:
    """Return how much of `interval` each layer covers that no earlier layer covers."""
    edges = [
        (min(max(edge, interval.start), interval.end), change, layer)
        for layer, spans in enumerate(layers)
        for span in spans
        for edge, change in ((span.start, 1), (span.end, -1))
    ]
    covered, active, previous = [0.0] * len(layers), [0] * len(layers), interval.start
    for edge, change, layer in sorted(edges):
        first = next((index for index, count in enumerate(active) if count > 0), None)
        if first is not None:
            covered[first] += edge - previous
        active[layer] += change
        previous = edge
    return covered


def _peak_allocated(events: Sequence[dict[str, Any]], step: Span, device_type: int) -> int:
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
        and event["args"]["Device Type"] == device_type
        and step.start <= event["ts"] <= step.end
    ]
    return max(accumulate(change for _, change in sorted(changes)), default=0)


def _kernel_spans(
    kernels: Sequence[dict[str, Any]], complete: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, Span]]:
    """Yield row and span of each kernel and copy.

    The row follows from the kernel's name, otherwise from the operator that launched it.
    """
    operators = {e["args"].get("External id"): e["name"] for e in complete if e["cat"] == "cpu_op"}
    operators.pop(None, None)
    launches = {
        event["args"]["correlation"]: event
        for event in complete
        if event["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]
    }
    updates = [event for event in complete if _is_update(event)]
    for kernel in kernels:
        launch = launches.get(kernel["args"].get("correlation"))
        if _COMMUNICATION.search(kernel["name"]):
            row = COMMUNICATION
        elif launch and any(_started_within(launch, update) for update in updates):
            row = OPTIMIZER
        else:
            operator = operators.get(kernel["args"].get("External id"), "")
            row = _row(kernel["name"]) or _row(operator) or ELEMENTWISE
        yield row, _span(kernel)


def _self_times(events: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Span]]:
    """Yield row and span of each interval in which an operator of one thread computes.

    Operators nested in a matrix product or attention count for that row. Overhead operators,
    Python and plain annotations do not compute, so their self time is not yielded.
    """
    stack: list[tuple[float, str | None, bool]] = []  # end, row, whether inside an update
    at = 0.0
    for event in [*sorted(events, key=lambda event: (event["ts"], -event["dur"])), None]:
        start = math.inf if event is None else event["ts"]
        while stack and (at < start or stack[-1][0] <= start):
            end, row, updating = stack[-1]
            until = min(end, start)
            if row is not None and until > at:
                yield (OPTIMIZER if updating and row != COMMUNICATION else row), Span(at, until)
            at = max(at, until)
            if end <= start:
                stack.pop()
        if event is not None:
            at = max(at, start)
            _, parent_row, updating = stack[-1] if stack else (0.0, None, False)
            row = parent_row if parent_row in (MATRIX, ATTENTION) else _row(event["name"])
            stack.append((_span(event).end, row, updating or _is_update(event)))


def _row(name: str) -> str | None:
    """Return the row of an operator or kernel, or None if it does not compute."""
    if _COMMUNICATION.search(name) or name.startswith(("c10d::", "_c10d_functional::")):
        return COMMUNICATION
    if name.startswith(("autograd::", "Optimizer.", "FSDP::")):
        return None
    for row, pattern in ((ELEMENTWISE, _FUSED), (ATTENTION, _ATTENTION), (MATRIX, _MATRIX)):
        if pattern.search(name):
            return row
    return ELEMENTWISE if _OPERATOR.match(name) and not _OVERHEAD.match(name) else None


def _is_update(event: dict[str, Any]) -> bool:
    return event["cat"] == "user_annotation" and bool(_OPTIMIZER.search(event["name"]))


def _started_within(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
    """Return whether `inner` started on the thread of `outer` during `outer`."""
    return inner["tid"] == outer["tid"] and 0 <= inner["ts"] - outer["ts"] <= outer["dur"]


def _span(event: dict[str, Any]) -> Span:
    return Span(event["ts"], event["ts"] + event["dur"])
