"""Where a step's time went, read from its profiler trace.

Each instant of the step belongs to one row: to the work that is being done, else to communication
in flight, which then is exposed, else to the wait for data, else to the host. So the rows add up to
the step. On GPUs work is kernels on any stream; on CPU it is the operators of the thread that took
the step, each for the time in which no other one runs inside it.
"""

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

STEP, DATA = "llamesh: step", "llamesh: data"
"""Names of the spans that whoever records the trace puts around the step, and its wait for data."""

MATRIX, ATTENTION, ELEMENTWISE = "matrix products", "attention", "elementwise"
OPTIMIZER, COMMUNICATION = "optimizer", "communication exposed"
WAIT, HOST = "data", "host"
# In this order an instant that several of them claim is given away.
ROWS = (MATRIX, ATTENTION, OPTIMIZER, ELEMENTWISE, COMMUNICATION, WAIT, HOST)

_OPTIMIZER = re.compile(r"Optimizer\.step#")  # torch's own span around each step of an optimizer
_COMMUNICATION = re.compile(r"^gloo:|nccl", re.I)
# The compiler names its kernels after all that they fuse, on CPU a whole graph's; products that it
# calls have their own names.
_FUSED = re.compile(r"^(triton_(poi|red|per)_|\w*cpp_fused|## Call CompiledFxGraph)")
_ATTENTION = re.compile(r"attention|attn|fmha|flash|sdpa", re.I)
_MATRIX = re.compile(
    r"^aten::(addmm|_addmm_activation|mm|bmm|baddbmm|dot|mv|addmv|_scaled_mm|mkldnn_linear)\b"
    r"|^mkldnn::_linear|gemm|nvjet|cutlass|cublas|xmma|splitK|^triton_tem_\w*mm",
    re.I,
)
_WORKS = re.compile(r"^(aten|fsdp|prims|torch_attn|_quantized)::")
# Operators that compute nothing: they make views, allocate, or call the others.
_GLUE = re.compile(
    r"^aten::(\w*view\w*|\w*reshape\w*|as_strided\w*|detach_?|t|transpose|permute|slice|select"
    r"|unsqueeze|squeeze|expand\w*|split\w*|chunk|unbind|narrow|alias|empty\w*|resize_|set_|numel"
    r"|lift_fresh|to|_to_copy|contiguous|clone|matmul|linear|result_type|resolve_\w+|item|zeros"
    r"|ones|zeros_like|full|_local_scalar_dense|is_\w+|record_stream)$"
)


class Span(NamedTuple):
    """Something that lasted, in microseconds of the trace's clock."""

    begin: float
    end: float


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step by row, in the order of `ROWS`; they add up to `total`.

    `communication` is how long anything was in flight, exposed or not; `allocated` how many bytes
    more than at its beginning the device held at the step's fullest moment.
    """

    rows: dict[str, float]
    total: float
    communication: float
    allocated: int

    def table(self) -> str:
        """The rows as aligned lines, the longest first."""
        lines = [
            f"  {name:<22}{1e3 * seconds:10.1f} ms {share:6.1%}"
            for name, seconds in sorted(self.rows.items(), key=lambda row: -row[1])
            for share in [seconds / self.total]
        ]
        lines.append(f"  {'the step':<22}{1e3 * self.total:10.1f} ms")
        hidden = self.communication - self.rows[COMMUNICATION]
        lines.append(f"  {'communication hidden':<22}{1e3 * hidden:10.1f} ms behind work")
        lines.append(f"  {'memory on top':<22}{self.allocated / 2**30:10.3f} GiB at most")
        return "\n".join(lines)


def read_step_times(trace: Path) -> StepTimes:
    """The times of the step whose trace this is: JSON as torch's profiler writes it, gzipped."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        return step_times(json.load(file)["traceEvents"])


def step_times(events: Iterable[dict[str, Any]]) -> StepTimes:
    """The times of the one step that the events of a trace tell of."""
    events = list(events)
    lasting = [event for event in events if event.get("ph") == "X" and "cat" in event]
    # On GPUs a span of the host comes a second time, as the device saw it.
    step = next(e for e in lasting if e["name"] == STEP and e["cat"] == "user_annotation")
    whole = _span(step)
    kernels = [event for event in lasting if event["cat"].startswith(("kernel", "gpu_mem"))]
    own = [event for event in lasting if event["tid"] == step["tid"]]
    claims: dict[str, list[Span]] = {name: [] for name in ROWS}
    for row, span in _of_kernels(kernels, lasting) if kernels else _of_operators(own):
        claims[row].append(span)
    if not kernels:  # gloo has threads of its own
        claims[COMMUNICATION] += [_span(e) for e in lasting if _COMMUNICATION.search(e["name"])]
    claims[WAIT] = [_span(event) for event in own if event["name"] == DATA]
    claims[HOST] = [whole]
    rows = partition(whole, [claims[name] for name in ROWS])
    in_flight, _ = partition(whole, [claims[COMMUNICATION], [whole]])
    seconds = {name: share / 1e6 for name, share in zip(ROWS, rows, strict=True)}
    allocated = _most_allocated(events, whole, 1 if kernels else 0)
    return StepTimes(seconds, (whole.end - whole.begin) / 1e6, in_flight / 1e6, allocated)


def partition(whole: Span, layers: Sequence[Sequence[Span]]) -> list[float]:
    """How much of `whole` each layer covers that no layer before it covers."""
    edges = [
        (min(max(edge, whole.begin), whole.end), change, layer)
        for layer, spans in enumerate(layers)
        for span in spans
        for edge, change in ((span.begin, 1), (span.end, -1))
    ]
    covered, active, before = [0.0] * len(layers), [0] * len(layers), whole.begin
    for edge, change, layer in sorted(edges):
        first = next((number for number, count in enumerate(active) if count > 0), None)
        if first is not None:
            covered[first] += edge - before
        active[layer] += change
        before = edge
    return covered


def _most_allocated(events: Sequence[dict[str, Any]], whole: Span, device_type: int) -> int:
    """The largest sum of what was allocated and freed up to an instant of the step."""
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
        and event["args"]["Device Type"] == device_type
        and whole.begin <= event["ts"] <= whole.end
    ]
    return max(accumulate(change for _, change in sorted(changes)), default=0)


def _of_kernels(
    kernels: Sequence[dict[str, Any]], lasting: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, Span]]:
    """Each kernel and copy with its row: by its own name, by the operator that launched it."""
    operators = {e["args"].get("External id"): e["name"] for e in lasting if e["cat"] == "cpu_op"}
    operators.pop(None, None)
    launches = {
        event["args"]["correlation"]: event
        for event in lasting
        if event["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]
    }
    updates = [event for event in lasting if _is_update(event)]
    for kernel in kernels:
        launch = launches.get(kernel["args"].get("correlation"))
        if _COMMUNICATION.search(kernel["name"]):
            row = COMMUNICATION
        elif launch and any(_within(launch, update) for update in updates):
            row = OPTIMIZER
        else:
            operator = operators.get(kernel["args"].get("External id"), "")
            rows = (_row(name) for name in (kernel["name"], operator))
            row = next((row for row in rows if row is not None), ELEMENTWISE)
        yield row, _span(kernel)


def _of_operators(own: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Span]]:
    """The parts of a thread's time in which an operator works, with their rows.

    What works inside a matrix product or attention belongs to it. Time in glue, in Python or in a
    span that only names what it holds is no work: it is not given out.
    """
    stack: list[tuple[float, str | None, bool]] = []  # end, row, whether inside an update
    at = 0.0

    def until(now: float) -> Iterator[tuple[str, Span]]:
        nonlocal at
        if stack and stack[-1][1] is not None and now > at:
            row = stack[-1][1]
            yield (OPTIMIZER if stack[-1][2] and row != COMMUNICATION else row), Span(at, now)
        at = max(at, now)

    for event in sorted(own, key=lambda event: (event["ts"], -event["dur"])):
        begin, end = _span(event)
        while stack and stack[-1][0] <= begin:
            yield from until(stack[-1][0])
            stack.pop()
        yield from until(begin)
        _, above, updating = stack[-1] if stack else (0.0, None, False)
        inherits = above in (MATRIX, ATTENTION)
        row = above if inherits else _row(event["name"])
        stack.append((end, row, updating or _is_update(event)))
    while stack:
        yield from until(stack[-1][0])
        stack.pop()


def _row(name: str) -> str | None:
    """The row of an operator or a kernel by its name; None for what does not compute."""
    if _COMMUNICATION.search(name) or name.startswith(("c10d::", "_c10d_functional::")):
        return COMMUNICATION
    if name.startswith(("autograd::", "Optimizer.", "FSDP::")):
        return None
    if _FUSED.search(name):
        return ELEMENTWISE
    if _ATTENTION.search(name):
        return ATTENTION
    if _MATRIX.search(name):
        return MATRIX
    return ELEMENTWISE if _WORKS.match(name) and not _GLUE.match(name) else None


def _is_update(event: dict[str, Any]) -> bool:
    return event["cat"] == "user_annotation" and bool(_OPTIMIZER.search(event["name"]))


def _within(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
    """Whether an event began while another one of its thread lasted."""
    return inner["tid"] == outer["tid"] and 0 <= inner["ts"] - outer["ts"] <= outer["dur"]


def _span(event: dict[str, Any]) -> Span:
    return Span(event["ts"], event["ts"] + event["dur"])
