"""What a compiled step moves without computing: how it is counted, and that it is nothing."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from benchmarks.moves import Array, moves
from tests.conftest import REPOSITORY

PROGRAM = """
HloModule jit_step

%sliced (stack: bf16[3,64,32], i: s32[]) -> bf16[64,32] {
  %stack = bf16[3,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %next = s32[] add(%i, %zero)
  %slice = bf16[1,64,32]{2,1,0} dynamic-slice(%stack, %next, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %layer = bf16[64,32]{1,0} bitcast(%slice)
}

%written (saved: f32[3,8,4], x: f32[8,4], i: s32[]) -> f32[3,8,4] {
  %saved = f32[3,8,4]{2,1,0} parameter(0)
  %x = f32[8,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %one = f32[1,8,4]{2,1,0} bitcast(%x)
  ROOT %update = f32[3,8,4]{2,1,0} dynamic-update-slice(%saved, %one, %i, %zero, %zero)
}

%computed (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  ROOT %negated = f32[8,4]{1,0} negate(%x)
}

%filled () -> f32[3,8,4] {
  %nothing = f32[] constant(0)
  ROOT %zeros = f32[3,8,4]{2,1,0} broadcast(%nothing), dimensions={}
}

%body (carried: (s32[], f32[8,4], bf16[3,64,32], f32[3,8,4])) -> (s32[], f32[8,4], bf16[3,64,32], f32[3,8,4]) {
  %carried = (s32[], f32[8,4]{1,0}, bf16[3,64,32]{2,1,0}, /*index=3*/f32[3,8,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%carried), index=1
  %stack = bf16[3,64,32]{2,1,0} get-tuple-element(%carried), index=2
  %saved = f32[3,8,4]{2,1,0} get-tuple-element(%carried), index=3
  %layer = bf16[64,32]{1,0} fusion(%stack, %i), kind=kLoop, calls=%sliced
  %y = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%computed
  %kept = f32[3,8,4]{2,1,0} fusion(%saved, %x, %i), kind=kLoop, calls=%written
  ROOT %next = (s32[], f32[8,4]{1,0}, bf16[3,64,32]{2,1,0}, f32[3,8,4]{2,1,0}) tuple(%i, %y, %stack, %kept)
}

%condition (carried: (s32[], f32[8,4], bf16[3,64,32], f32[3,8,4])) -> pred[] {
  %carried = (s32[], f32[8,4]{1,0}, bf16[3,64,32]{2,1,0}, f32[3,8,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %limit = s32[] constant(3)
  ROOT %more = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[8,4], stack: bf16[3,64,32]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %stack = bf16[3,64,32]{2,1,0} parameter(1)
  %i = s32[] constant(0)
  %saved = f32[3,8,4]{2,1,0} fusion(), kind=kLoop, calls=%filled
  %start = (s32[], f32[8,4]{1,0}, bf16[3,64,32]{2,1,0}, f32[3,8,4]{2,1,0}) tuple(%i, %x, %stack, %saved)
  %loop = (s32[], f32[8,4]{1,0}, bf16[3,64,32]{2,1,0}, f32[3,8,4]{2,1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %prefetched = bf16[3,64,32]{2,1,0:T(8,128)S(1)} copy(%stack)
  %last = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  ROOT %copied = f32[8,4]{0,1} copy(%last)
}
"""  # noqa: E501


@pytest.mark.parametrize("known", [', backend_config={"known_trip_count":{"n":"3"}}', ""])
def test_moves_of_a_program_are_counted_as_often_as_they_run(known):
    program = re.sub(r", backend_config=.*", known, PROGRAM)  # which a TPU's has not
    found = {move.name: move for move in moves(program)}
    assert found.keys() == {"saved", "layer", "kept", "copied"}
    stack, x = Array("bf16", (3, 64, 32), "{2,1,0}"), Array("f32", (8, 4), "{1,0}")
    assert found["layer"][:3] == (stack, 2 * 64 * 32, 3)
    assert found["kept"][:3] == (x, 4 * 8 * 4, 3)  # the slice, not the stack
    assert found["copied"][:3] == (x, 4 * 8 * 4, 1)
    assert found["saved"][:3] == (None, 4 * 3 * 8 * 4, 1)


# Of LLaMA-7B's widths: the compiler merges products of small ones, and to do so joins kernels.
COMPILE = """
import json, sys
from benchmarks import work
from benchmarks.scan_forms import rows
from jax_lora.planning.targets import target
case = work.case("7b", rank=8, rows=4, length=2048, layers=2, dtype="bfloat16")
for library in (False, True):
    (found,) = rows(case, target(sys.argv[1]), sys.argv[2:], library)
    print(json.dumps(found), flush=True)
"""


def compiled(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not find_spec("jax_cuda12_plugin"), reason="the extra cuda12 is not installed")
def test_a_step_without_remat_copies_no_weights_on_a_card():
    kernels = 2 * 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)  # bytes of both layers
    for row in compiled("h100", "all"):
        assert row["weights bytes"] == 0
    for row in compiled("h100", "1"):  # the count sees what a scan does
        assert row["weights bytes"] == 2 * kernels
