"""What a program costs, counted without running it: FLOPs, memory, collectives, compilations.

Counts do not depend on how busy a machine is, so tests can hold programs to them. FLOPs are those
of matrix products, read from the traced program with the trip counts of its loops; memory and
collectives are read from the compiled one.
"""

import contextlib
import dataclasses
import math
import re
from collections import Counter

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

# TPU slices by product name: topology of `jax.experimental.topologies`. A v5p or v4 name counts
# cores, two a chip; a v5e or v6e name counts chips.
TOPOLOGIES = {
    "v4-8": "v4:2x2x1",
    "v4-16": "v4:2x2x2",
    "v4-32": "v4:2x2x4",
    "v5e-4": "v5e:2x2",
    "v5e-8": "v5e:2x4",
    "v5e-16": "v5e:4x4",
    "v5e-32": "v5e:4x8",
    "v5e-64": "v5e:8x8",
    "v5e-128": "v5e:8x16",
    "v5e-256": "v5e:16x16",
    "v5p-8": "v5p:2x2x1",
    "v5p-16": "v5p:2x2x2",
    "v5p-32": "v5p:2x2x4",
    "v5p-64": "v5p:2x4x4",
    "v5p-128": "v5p:4x4x4",
    "v6e-4": "v6e:2x2",
    "v6e-8": "v6e:2x4",
    "v6e-16": "v6e:4x4",
    "v6e-64": "v6e:8x8",
    "v6e-256": "v6e:16x16",
}
# Dense bfloat16 FLOPs a second of a device, by the name that JAX gives its kind (a TPU device is a
# chip from v4 on). Sources: NVIDIA's data sheets of H100, H200 and A100 (half of what they give
# for sparse matrices); cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e.
PEAKS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


# FLOPs


def flops(program, *, recomputed: bool = True) -> int:
    """Matrix-product FLOPs of a program, a multiplication and an addition counting two.

    Scans count by their length, a branch by its most expensive side, a part that runs on every
    device of a manual mesh axis once a device. Products whose result is not used are left out.

    Args:
      program: `jax.jit(f).trace(*args)`, or a ClosedJaxpr.
      recomputed: False leaves out what `jax.checkpoint` computes a second time for the backward
        pass, so that the count does not depend on it.

    Raises:
      ValueError: at a while loop with products (its trip count is not known before it runs) or at
        a kernel whose inside cannot be counted.
    """
    jaxpr = getattr(program, "jaxpr", program)
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return _flops(used, recomputed)


def _flops(jaxpr, recomputed) -> int:
    return sum(_eqn_flops(eqn, recomputed) for eqn in jaxpr.eqns)


def _eqn_flops(eqn, recomputed) -> int:
    name, params = eqn.primitive.name, eqn.params
    # How JAX names the part: tests/train/test_tracking.py holds it to that.
    if not recomputed and "rematted_computation" in str(eqn.source_info.name_stack):
        return 0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        inner = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
        return 2 * inner * math.prod(eqn.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        per_output = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * per_output * math.prod(eqn.outvars[0].aval.shape)
    if name == "pallas_call":
        raise ValueError(f"the products inside the kernel {params.get('name')} cannot be counted")
    inside = [_flops(jaxpr, recomputed) for jaxpr in jaxprs_in_params(params)]
    if name == "cond":
        return max(inside)
    if name == "scan":
        return params["length"] * sum(inside)
    if name == "while" and sum(inside):
        raise ValueError("a while loop has no trip count that can be known; use a scan")
    if name == "shard_map":
        manual = params["newly_manual_axes"]
        return math.prod(params["mesh"].shape[axis] for axis in manual) * sum(inside)
    return sum(inside)


def peak(devices) -> float | None:
    """Dense bfloat16 FLOPs a second of `devices` together, or None where a kind is not known.

    CPUs are not: theirs depends on clock, cores and instructions.
    """
    each = [PEAKS.get(device.device_kind) for device in devices]
    return None if None in each else sum(each)


# Memory


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. `aliased` is the part of the outputs that takes donated arguments."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int


def memory(compiled) -> Memory:
    """Memory of a compiled program, as its compiler planned it."""
    found = compiled.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.temp_size_in_bytes,
        found.alias_size_in_bytes,
    )


# Collectives


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communication of a compiled program.

    Attributes:
      kind: "all-reduce", "reduce-scatter", "all-gather", "all-to-all" or "collective-permute".
      axes: Mesh axes along which devices talk, or () without a mesh.
      bytes: Of its result on one device.
      loops: While loops around it.
      source: The JAX operation it comes from, where the compiler kept it.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    loops: int
    source: str


_KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?)\s(" + "|".join(_KINDS) + r")(-start)?\("
)
_CALLS = re.compile(
    r"(body|condition|calls|to_apply|called_computations|branch_computations)="
    r"(?:%?([\w.\-]+)|\{([^}]*)\})"
)
_ARRAY = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collectives(compiled, mesh=None) -> list[Collective]:
    """The collectives of a compiled program, each with the loops around it.

    On TPU a reduce-scatter may be a fusion named all-reduce-scatter around an all-reduce, and one
    gather may be spread over the products that hide it, in several instructions of one channel;
    each is reported as the one thing it is.

    Args:
      compiled: From `.compile()`, or its text.
      mesh: To name the axes.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    current, found, callers, kinds = None, [], {}, {}
    for line in text.splitlines():
        if started := _COMPUTATION.match(line):
            current = started.group(1)
            continue
        fused = "all-reduce-scatter" in line and " fusion(" in line
        for how, one, several in _CALLS.findall(line):
            for name in filter(None, [one, *re.split(r"[,\s]+", several)]):
                callers.setdefault(name.lstrip("%"), []).append((current, how == "body"))
                if fused:
                    kinds[name.lstrip("%")] = "reduce-scatter"
        if operation := _OPERATION.match(line):
            found.append((current, operation, line))
    depth: dict[str, int] = {}

    def loops(name):
        if name not in depth:
            depth[name] = 0
            above = callers.get(name, [])
            depth[name] = max((loops(c) + inside for c, inside in above), default=0)
        return depth[name]

    made, parts = [], set()
    for where, operation, line in found:
        kind = operation.group(3)
        size = _size(operation)
        if kind == "all-reduce" and where in kinds:
            kind = kinds[where]
            size //= len(next(iter(_groups(line)), [0]))
        if part := re.search(r"(channel_id=\d+),.*(chain_id=\"\d+\")", line):
            if part.groups() in parts:
                continue
            parts.add(part.groups())
        source = re.search(r'op_name="([^"]*)"', line)
        made.append(
            Collective(
                kind,
                _axes(line, mesh) if mesh is not None else (),
                size,
                loops(where),
                source.group(1) if source else "",
            )
        )
    return made


def _size(operation):
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * (int(bits or 8) // 8 or 1)
        for _, bits, dims in _ARRAY.findall(operation.group(2))
    ]
    # An asynchronous start also returns its operands, before its results.
    if operation.group(4) and operation.group(3) != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _groups(line):
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line)
    if listed:
        return [
            [int(i) for i in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed.group(1))
        ]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        shape, reshape, order = (
            [int(i) for i in part.split(",")] if part else None for part in iota.groups()
        )
        ids = np.arange(math.prod(reshape)).reshape(reshape)
        ids = ids.transpose(order) if order else ids
        return ids.reshape(shape).tolist()
    pairs = re.search(r"source_target_pairs=\{([\d,{}]*)\}", line)
    if pairs:
        return [[int(i) for i in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", pairs.group(1))]
    return []


def _axes(line, mesh):
    """Axes in which the members of a group differ; ids are positions in the mesh's order."""
    groups = _groups(line)
    sizes = tuple(mesh.shape.values())
    if not groups or groups == [[]]:
        return tuple(a for a, n in mesh.shape.items() if n > 1)
    differ = set()
    for group in groups:
        at = np.array(np.unravel_index(group, sizes))
        differ |= {i for i in range(len(sizes)) if len(set(at[i])) > 1}
    return tuple(a for i, a in enumerate(mesh.shape) if i in differ)


# Compilations


@contextlib.contextmanager
def compilations():
    """Counts compilations while it is open: yields a Counter by name, such as {"jit(step)": 1}."""
    counts: Counter[str] = Counter()

    def listen(event, _, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            counts[facts.get("fun_name", "")] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# Machines that are not here


def tpu_devices(name: str):
    """Devices of a TPU slice to compile for, without owning one. Needs the package libtpu.

    Args:
      name: A product name such as "v5e-8".

    Raises:
      ValueError: on an unknown name, with those that are known.
      ModuleNotFoundError: without libtpu, saying how to get it.
    """
    import importlib.util
    import os

    from jaxreward.core.resolve import near

    if name not in TOPOLOGIES:
        raise ValueError(
            f"unknown TPU slice {name!r}{near(name, TOPOLOGIES)}; known: {', '.join(TOPOLOGIES)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "compiling for a TPU needs the package libtpu: pip install 'jaxreward[plan]'"
        )
    # libtpu asks a metadata server and locks the chips of a host unless told otherwise.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", name)
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[name]).devices
