#!/usr/bin/env bash
# LLaMA-7B's shapes on one NVIDIA GPU, transformers + PEFT beside us, under 25 minutes in all.
#
#   bash benchmarks/gpu.sh                 every part
#   bash benchmarks/gpu.sh ranks decode    some: each takes less than 10 minutes
#   SIZE=tiny bash benchmarks/gpu.sh       a rehearsal on any machine
#
# Weights are random. It needs jax[cuda], flax, optax, jaxtyping, pandas, torch, transformers and
# peft, and nothing of this package's data or scoring. Results are in OUT (runs/gpu) by part as
# they come; a part that ends early leaves what it has, a case that does not fit says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore TF_CPP_MIN_LOG_LEVEL=2

if [ "${SIZE:-7b}" = tiny ]; then
	size=tiny long=2x32 lengths=4x16,2x32 small=2x32,1x16 prompt=1x8 ranks=2,8 batches=1,2 new=4
	kernels=xla dtype=float32
else
	size=7b long=4x2048 lengths=16x512,8x1024,4x2048 small=4x2048,1x2048,1x512 prompt=1x512
	ranks=8,64,512,2048,4096 batches=1,32,128,256 new=64 kernels=xla,cudnn dtype=bfloat16
fi

measure() { # NAME SECONDS FLAGS…
	local name=$1 seconds=$2
	shift 2
	timeout "$seconds" "$python" benchmarks/run.py --size="$size" --dtype="$dtype" --apart \
		--repeats=3 --loss=all --out="$out/$name" "$@" || echo "$name: ended early" >&2
}

peer=--peer=hf_peft
[ $# -gt 0 ] || set -- ranks full options dropout decode
for part in "$@"; do
	case $part in
		ranks) measure ranks 540 $peer --parts=step --remat=full --shapes=$long --ranks=$ranks ;;
		full) measure full 200 $peer --parts=step --remat=full --shapes=$small --ranks=full ;;
		options) measure options 400 --parts=step --remat=none,full --attention=$kernels \
			--shapes=$lengths --ranks=8 ;;
		dropout) measure dropout 120 $peer --parts=step --remat=full --dropout=0.05 \
			--shapes=$long --ranks=8 ;;
		decode) measure decode 240 $peer --parts=decode --batches=$batches --shapes=$prompt \
			--new-tokens=$new --ranks=8 ;;
		*) echo "$part: no such part" >&2 && exit 2 ;;
	esac
done
