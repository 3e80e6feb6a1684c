#!/usr/bin/env bash
# Our speed on a CPU beside transformers + PEFT, SmolLM2-135M's shape: bash benchmarks/cpu.sh [PART…]
# Without parts: training in bfloat16 and float32, scoring in bfloat16; under 5 minutes on two quiet
# cores. The others: decode32, mix, mix32 (the task mix through `generate`), epoch, epoch32, and
# noamx32 (training as on a CPU without bfloat16 products, where dtype="auto" is float32). Results
# lie in runs/cpu.
# PYTHON names an interpreter with the parity extra.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-runs/cpu}
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore

measure() { # NAME DTYPE FLAGS…
	local name=$1 dtype=$2
	shift 2
	"$python" benchmarks/run.py --peer=hf_peft --dtype="$dtype" \
		--loss=all --shapes=8x128 --repeats=3 --out="$out/$name" "$@"
}

mix() { # NAME DTYPE
	"$python" -m benchmarks.decoding --peer=hf --dtype="$2" --isolate --repeats=3 \
		--new-tokens=64 --out="$out/$1"
}

avx2() { # NAME DTYPE FLAGS…: neither side gets other instructions
	XLA_FLAGS="--xla_cpu_max_isa=AVX2 --xla_cpu_experimental_ynn_fusion_type=-reduce" \
		ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
		measure "$@"
}

# Each side in its own process: threads of torch that wait for work would slow the other side.
decode="--parts=decode --isolate --shapes=1x128 --batches=32 --new-tokens=32 --repeats=3"
[ $# -gt 0 ] || set -- step step32 decode
for part in "$@"; do
	case $part in
		step) measure step bfloat16 --parts=step ;;
		step32) measure step32 float32 --parts=step ;;
		noamx32) avx2 noamx32 float32 --parts=step ;;
		epoch) measure epoch bfloat16 --parts=epoch --examples=32 --repeats=1 ;;
		epoch32) measure epoch32 float32 --parts=epoch --examples=32 --repeats=1 ;;
		decode) measure decode bfloat16 $decode ;;
		decode32) measure decode32 float32 $decode ;;
		mix) mix mix bfloat16 ;;
		mix32) mix mix32 float32 ;;
		*) echo "$part: no such part" >&2 && exit 2 ;;
	esac
done
