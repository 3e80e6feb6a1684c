#!/usr/bin/env bash
# LLaMA-7B's shapes on one NVIDIA GPU, transformers + PEFT beside us, about 10 minutes in all; then a
# study of SmolLM2 (all of the paper's ranks, three sets, three rounds), as many of its cells as 15
# minutes allow: rerun the same command to resume.
#
#   bash benchmarks/gpu.sh                 every part
#   bash benchmarks/gpu.sh ranks decode    some
#   SIZE=tiny bash benchmarks/gpu.sh       a rehearsal on any machine
#
# Weights are random. It needs jax[cuda], flax, optax, jaxtyping, pandas, torch, transformers and
# peft; `mix` and `study`, which are of SmolLM2 (`make base`) on DATA, a checkout of at least 11
# train tasks (../shared/data/niv2-slice), need gguf too, and `study` the whole package. Results are
# in OUT (runs/gpu) by part as they come; a part that ends early leaves what it has, a case that does
# not fit says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore TF_CPP_MIN_LOG_LEVEL=2

if [ "${SIZE:-7b}" = tiny ]; then
	size=tiny dtype=float32 shape=2x32 lengths=4x16,2x32 row=1x32 prompt=1x8 unroll=2 kernels=xla
	small=2,4 large=2,8 batches=1,2 many=4 new=4 mix="--per-task=1 --batch=2"
	study=(--config=configs/study_smoke.py)
else
	size=7b dtype=bfloat16 shape=4x2048 lengths=16x512,8x1024 row=1x2048 prompt=1x512 unroll=32
	small=8,64,512 large=8,2048,4096 batches=1,32,128 many=256 new=64 kernels=xla,cudnn
	mix="--per-task=50 --batch=64"
	study=("--config=configs/study_smollm2.py:data=${DATA:-../shared/data/niv2-slice}"
		"--config.ranks=(4,8,16,32,64,128,256,512,1024,2048,4096,'full')"
		"--config.sets=('T3','T6','T11')" "--config.run.data.sizes=(3,6,11)"
		"--config.rounds=(0,1,2)" --config.run.epochs=6 --config.run.batch_size=128)
fi

measure() { # NAME SECONDS FLAGS…
	local name=$1 seconds=$2
	shift 2
	timeout "$seconds" "$python" benchmarks/run.py --size="$size" --dtype="$dtype" --apart \
		--loss=all --loss-chunk=1024 --out="$out/$name" "$@" || echo "$name: ended early" >&2
}

peer=--peer=hf_peft
step="--parts=step --repeats=3 --dropout=0.05"
decode="--parts=decode --repeats=2 --ranks=8 --shapes=$prompt --new-tokens=$new"
[ $# -gt 0 ] || set -- ranks decode unroll remat full mix options large_batch study
for part in "$@"; do
	case $part in
		ranks) measure ranks 150 $peer $step --parts=products,step --profile --remat=none \
			--shapes=$shape --ranks=$small ;;
		remat) measure remat 150 $peer $step --profile --remat=full --shapes=$shape --ranks=$large ;;
		full) measure full 90 $peer $step --remat=full --shapes=$row --ranks=full ;;
		unroll) measure unroll 200 $step --profile --unroll=$unroll --shapes=$shape --ranks=8 ;;
		options) measure options 150 $step --remat=none,full --attention=$kernels \
			--shapes=$lengths --ranks=8 ;;
		decode) measure decode 200 $peer $decode --profile --batches=$batches ;;
		large_batch) measure large_batch 120 $peer $decode --batches=$many ;;
		mix) timeout 150 "$python" -m benchmarks.decoding --peer=hf --dtype=$dtype $mix \
			--buckets=1024 --new-tokens=$new --repeats=1 --out="$out/mix" \
			${DATA:+--data="$DATA"} || echo "mix: ended early" >&2 ;;
		study) timeout 900 "$python" study.py --workdir="$out/study" "${study[@]}" ||
			echo "study: ended early" >&2
			"$python" study.py --workdir="$out/study" --report ;;
		*) echo "$part: no such part" >&2 && exit 2 ;;
	esac
done
