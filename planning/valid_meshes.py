"""Why no mesh of a number of devices is valid, and which numbers of devices or axes are.

Validity is decided by the rules of `train.py` (`PlanRequest`); memory is not planned here.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, product

from parallel.mesh import AXES, MeshShape
from planning.request import Choice, PlanRequest, configured_choice
from planning.search import divisors, kept_axes, part_counts, searched_meshes, settings

SIZE = "train.micro_batch_size"
MOST_NAMED = 1024  # larger sizes of an axis are not named, as in `training.config_rules`


def no_valid_mesh(request: PlanRequest, devices: int, is_given: bool = True) -> str | None:
    """Return the rule that meshes of `devices` devices break and a remedy; None if one is valid.

    Args:
        is_given: Whether the number of devices is a requirement; otherwise it follows from axes.
    """
    if _is_valid(request, devices):
        return None
    on_devices, keeps_size = devices if is_given else None, SIZE in request.kept
    numbers = {mesh.world_size for mesh in axis_meshes(request)}
    nearest = _nearest(numbers, devices, partial(_is_valid, request))
    if not nearest:
        # Together with a micro-batch that divides no batch, the axes are reported first.
        of_axes = no_valid_mesh(request.without(SIZE), devices, is_given) if keeps_size else None
        return of_axes or _invalid_axes(request, on_devices) or _first_error(request, devices)
    rule = _first_error(request, devices).partition("; ")[0]
    omitted = ""
    if (axes := kept_axes(request)) and _is_valid(request.without(*_keys(axes)), devices):
        omitted = f", or omit {' '.join(_keys(axes))}"
    return (
        f"no valid mesh of {device_count(devices)}: {rule}; use {device_count(*nearest)}{omitted}"
    )


def device_count(*numbers: int) -> str:
    """Return numbers of devices as text."""
    return f"{' or '.join(map(str, numbers))} device{'' if numbers == (1,) else 's'}"


def _nearest(
    numbers: Iterable[int], devices: int, is_valid: Callable[[int], bool]
) -> tuple[int, ...]:
    """Return the valid numbers next to `devices`, below and above."""
    ordered = sorted(numbers)
    below = (number for number in reversed(ordered) if number < devices and is_valid(number))
    above = (number for number in ordered if number > devices and is_valid(number))
    return *islice(below, 1), *islice(above, 1)


def axis_meshes(request: PlanRequest, replicated: bool = False) -> Iterator[MeshShape]:
    """Yield the meshes whose axes divide batch, sequence and heads.

    Without replicas, unless they are asked for or kept: they are as valid as shards.
    """
    one_device = configured_choice(request.config, MeshShape(1, 1, 1, 1))
    no_pipeline = replace(one_device.parallel, pp_parts=1, pp_layers=None, pp_checkpoint=None)
    one_device = replace(one_device, parallel=no_pipeline)
    specs = [spec for spec, _ in request.stages(one_device)]
    batches = divisors(math.gcd(*(spec.global_batch_size for spec in specs)))
    sizes = {
        "dp_replicate": batches if replicated else [1],
        "dp_shard": batches,
        "cp": divisors(math.gcd(*(spec.seq_len for spec in specs))),
        "tp": divisors(specs[0].model.n_heads),
        "pp": [1],
    } | {axis: [size] for axis, size in kept_axes(request).items()}
    for axes in product(*(sizes[axis] for axis in AXES)):
        yield MeshShape(**dict(zip(AXES, axes, strict=True)))


def _is_valid(request: PlanRequest, devices: int) -> bool:
    return any(not setting_errors(request, mesh) for mesh in searched_meshes(devices, request))


def setting_errors(request: PlanRequest, mesh: MeshShape) -> list[str]:
    """Return the errors of a mesh with every searched setting; empty if one of them is valid."""
    if errors := request.mesh_errors(mesh):
        return errors
    of_settings = []
    for pp_parts in part_counts(mesh, request):
        on_mesh = settings(mesh, request, pp_parts)
        if not on_mesh.compute:
            return request.compute_errors(Choice(on_mesh.parallel, None))
        of_settings += [
            request.choice_errors(on_mesh.choice(batch, on_mesh.compute[0], on_mesh.reshards[0]))
            for batch in on_mesh.batches
        ]
    return min(of_settings, key=len)


def _first_error(request: PlanRequest, devices: int) -> str:
    """Return an error of the mesh with the smallest `tp` and `cp`."""
    tried = list(searched_meshes(devices, request))
    if not tried:
        kept = {axis: size for axis, size in kept_axes(request).items() if size > 1}
        product_of = " × ".join(f"parallel.{axis}={size}" for axis, size in kept.items())
        return f"{product_of} needs a multiple of {math.prod(kept.values())} devices"
    simplest = min(tried, key=lambda mesh: (mesh.tp, mesh.cp, mesh.dp_replicate))
    return setting_errors(request, simplest)[0]


def _invalid_axes(request: PlanRequest, devices: int | None) -> str | None:
    """Return the error and the valid sizes of the kept axis that makes all meshes invalid.

    If several do, each of them.

    Args:
        devices: None if sizes may change the number of devices.
    """
    axes = kept_axes(request)
    for axis, size in axes.items():
        if (error := _axis_error(request.without(f"parallel.{axis}"), axis, size, devices)) != "":
            return error
    free = request.without(*_keys(axes))
    errors = [_axis_error(free, axis, size, devices) for axis, size in axes.items()]
    return "; ".join(each for each in errors if each) or None


def _axis_error(request: PlanRequest, axis: str, size: int, devices: int | None) -> str:
    """Return the error of a size of an axis, with those that are valid; empty if none is known."""
    meshes = axis_meshes(request, replicated=True)
    named = (mesh for mesh in meshes if getattr(mesh, axis) <= MOST_NAMED)
    valid = [mesh for mesh in named if not setting_errors(request, mesh)]
    errors = request.mesh_errors(MeshShape(**dict.fromkeys(AXES, 1) | {axis: size}))
    if not valid or not errors:
        return ""
    sizes, where = {getattr(mesh, axis) for mesh in valid}, ""
    if devices is not None:
        on = {mesh.world_size: set[int]() for mesh in valid}
        for mesh in valid:
            on[mesh.world_size].add(getattr(mesh, axis))
        sizes = on.get(devices, set())
        if not sizes:
            first, *others = _nearest(on, devices, lambda _: True)
            numbers = [first, *(number for number in others if on[number] & on[first])]
            sizes = set.intersection(*(on[number] for number in numbers))
            where = f" on {device_count(*numbers)}"
    *most, last = map(str, sorted(sizes))
    listing = f"{', '.join(most)} or {last}" if most else last
    tightest = min(errors, key=lambda error: len(error.partition("; use ")[2]))
    rule, key = tightest.partition("; ")[0], f"parallel.{axis}"
    return f"{rule}; use {'' if rule.startswith(key) else f'{key}='}{listing}{where}"


def _keys(axes: dict[str, int]) -> list[str]:
    return [f"parallel.{axis}" for axis in axes]
