"""A training step compiled ahead of time for devices that are not here.

It is the step that training runs, with its shardings, on abstract arrays: the compiler of the
target reports how much memory each of its functions takes. No accelerator is needed, and nothing is
allocated; the default backend should be the CPU (JAX_PLATFORMS=cpu, before JAX starts).

A TPU's compiler is given 1 MiB of memory: it assigns the buffers, reports how much they would take,
and refuses. The code of the step, minutes of work, is not generated. Four steps of LLaMA-7B that
were compiled to the end had peaks within 4% of that, in either direction.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any  # of devices, whose type jax does not export to type checkers

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered

from jax_lora import sharding
from jax_lora.errors import ConfigError
from jax_lora.planning.memory import memory
from jax_lora.planning.steps import PlannedStep, trees
from jax_lora.planning.targets import Target
from jax_lora.training.unstacked import unstack

# What XLA's CUDA compiler needs to know of a card, after openxla/xla,
# backends/gpu/target_config/specs.
_CARD = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
  device_memory_size: {bytes} memory_bandwidth: {bandwidth} {chip}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }} device_description_str: "{name}"
"""
_AMPERE = """cuda_compute_capability { major: 8 } core_count: 108 fpus_per_core: 64
  threads_per_core_limit: 2048
  clock_rate_ghz: 1.41 l2_cache_size: 41943040
  shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912"""
_HOPPER = """cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 threads_per_core_limit: 2048
  clock_rate_ghz: 1.98 l2_cache_size: 52428800
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448"""
_ADA = """cuda_compute_capability { major: 8 minor: 9 } core_count: 128 fpus_per_core: 128
  threads_per_core_limit: 1536 clock_rate_ghz: 2.52 l2_cache_size: 75497472
  shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376"""
_CARDS = {
    "a100-40gb": (_AMPERE, "NVIDIA A100-SXM4-40GB"),
    "a100-80gb": (_AMPERE, "NVIDIA A100-SXM4-80GB"),
    "h100": (_HOPPER, "NVIDIA H100 80GB HBM3"),
    "h200": (_HOPPER, "NVIDIA H200 141GB HBM3e"),
    "rtx4090": (_ADA, "NVIDIA GeForce RTX 4090"),
}
# Chips → the slice that has as many.
_SLICES = {
    "v5e": {
        1: "1x1",
        4: "2x2",
        8: "2x4",
        16: "4x4",
        32: "4x8",
        64: "8x8",
        128: "8x16",
        256: "16x16",
    },
    "v5p": {
        1: "1x1x1",
        4: "2x2x1",
        8: "2x2x2",
        16: "2x2x4",
        32: "2x4x4",
        64: "4x4x4",
        128: "4x4x8",
    },
}


@dataclass(frozen=True)
class Program:
    """What the compiler reports for one function, bytes on one device.

    `peak` is what the run needs during the function: what the run holds, arguments included, and
    what the function adds to it.
    """

    arguments: int
    temporary: int
    peak: int
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What the compiler reports for every function of a step, by its name."""

    programs: dict[str, Program]

    @property
    def peak(self) -> int:
        """Bytes on one device at the worst moment of a step."""
        return max(program.peak for program in self.programs.values())


def devices(target: Target, count: int) -> Sequence[Any]:
    """Devices to compile for.

    Raises:
      ConfigError: an extra that is not installed, or a number of chips that no slice has.
    """
    kind, platform = target.kind, target.device.platform
    if platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < count:
            raise ConfigError(
                f"--target: found cpu-{count}, expected at most {len(found)} devices; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
            )
        return found[:count]
    if platform == "tpu":
        if find_spec("libtpu") is None:
            raise ConfigError(f"{kind}: compiling needs the tpu extra: pip install -e '.[tpu]'")
        if count not in _SLICES[kind]:
            known = ", ".join(map(str, _SLICES[kind]))
            raise ConfigError(f"{kind}: found {count} chips, expected a slice of {known}")
        # There is no metadata server to ask, and another process may hold the library.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        name = f"{kind}:{_SLICES[kind][count]}"
        host = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}  # by default 2x2x1
        return topologies.get_topology_desc(name, platform="tpu", **host).devices
    if not any(find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        raise ConfigError(f"{kind}: compiling needs the cuda12 extra: pip install -e '.[cuda12]'")
    chip, name = _CARDS[kind]
    card = _CARD.format(
        bytes=target.device.bytes, bandwidth=int(target.device.bandwidth or 0), chip=chip, name=name
    )
    return topologies.get_topology_desc(
        kind, platform="cuda", target_config=card, topology=f"1x1x{count}"
    ).devices


def lower_step(planned: PlannedStep, target: Target) -> dict[str, Lowered]:
    """The functions of a step, by name, ready to be compiled for the target's devices.

    Args:
      planned: the step; its mesh says how many devices.
      target: the kind of device; its count is not used.

    Raises:
      ConfigError: as `devices`; a mesh that the devices do not fill.
    """
    mesh = sharding.make_mesh(planned.resolved.mesh_sizes, devices(target, planned.devices))
    frozen, state, diff_params, micro = trees(planned, mesh)
    if planned.resolved.unstacks:
        frozen = unstack(frozen)
    step, _ = planned.functions(mesh if planned.devices > 1 else None)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    lowered = {
        "accumulate": step.accumulate.lower(
            diff_params, scalar, diff_params, state.step, frozen, micro, scalar
        ),
        "update": step.update.lower(state, frozen, diff_params),
    }
    if planned.resolved.materialized:
        lowered["prepare"] = jax.jit(step.prepare).lower(state, frozen)
    return lowered


def compile_step(planned: PlannedStep, target: Target) -> Verdict:
    """Compile the functions of a step for the target's devices.

    The arguments and what it raises are those of `lower_step`.
    """
    mesh = planned.abstract_mesh
    frozen, state, diff_params, _ = trees(planned)
    takes = {"accumulate": (diff_params, diff_params, frozen), "update": (state, diff_params)}
    takes["prepare"] = (state.trainable,)
    held = memory(planned).held
    programs = {}
    for name, program in lower_step(planned, target).items():
        start = time.perf_counter()
        if target.device.platform == "tpu":
            arguments = sharding.local_bytes(takes[name], mesh)
            temporary = added = max(0, need(program) - arguments)
        else:
            found = program.compile().memory_analysis()
            assert found is not None
            arguments, temporary = found.argument_size_in_bytes, found.temp_size_in_bytes
            added = found.peak_memory_in_bytes - arguments
            if target.device.platform == "cpu":  # whose peak is no more than the arguments
                added = temporary + found.output_size_in_bytes - found.alias_size_in_bytes
        seconds = time.perf_counter() - start
        programs[name] = Program(arguments, temporary, held + added, seconds)
    return Verdict(programs)


def need(program: Lowered) -> int:
    """Bytes that a TPU's compiler needs for a program, its arguments included.

    From its refusal: "Ran out of memory on HBM, the total memory required for HLO temporaries
    (16.60G) exceeds available HBM (1.00M)."
    """
    try:
        found = program.compile({"xla_tpu_max_hbm_size_mib": "1"}).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"memory required [^(]*\(([\d.]+)([KMG])\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
            raise
        return int(float(found[1]) * 1024 ** ("KMG".index(found[2]) + 1))
    assert found is not None
    return found.peak_memory_in_bytes
