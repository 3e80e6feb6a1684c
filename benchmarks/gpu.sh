#!/usr/bin/env bash
# What a card is to show, what pays most first: bash benchmarks/gpu.sh [PART…]
#
#   ranks    training of LLaMA-7B's shapes at ranks 8, 512, 2048 and 4096, 4 x 2048 tokens, beside PEFT
#   large    the same at rank 4096 and in full with gradient checkpointing, also at 1 x 2048
#   llama3   Llama-3-8B, rank 16 on all seven layers, dropout 0.1, 2 x 4096 tokens, ours alone:
#            NeMo publishes 12,473 tokens/s on an H100
#   mix      256 real prompts of SmolLM2 beside transformers' generate
#   study    SmolLM2 on real tasks, all of the paper's ranks: rerun the same command to resume
#
# These are the parts that run without names, about 15 minutes in all on an H200; each has its own
# limit of seconds. A part that ends early leaves what it has, a case that does not fit says so.
# By name alone: scan (forms of the loop over layers), options (attention kernels, remat, lengths),
# decode and large_batch (prompts of one length, beside generate).
#
# Weights are random but for `mix` and `study`, which read MODEL (`make base`) and DATA, a checkout
# of at least 11 train tasks. Needed: jax[cuda], flax, optax, jaxtyping, pandas, torch, transformers
# and peft; for `mix` gguf, for `study` the whole package. Results are in OUT (runs/gpu) by part.
# SIZE=tiny rehearses on any machine. PYTHON names an interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
model=${MODEL:-.cache/SmolLM2-135M-Instruct.Q4_1.gguf}
data=${DATA:-../shared/data/niv2-slice}
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore TF_CPP_MIN_LOG_LEVEL=2

if [ "${SIZE:-7b}" = tiny ]; then
	size=tiny eight=tiny dtype=float32 shape=2x32 row=1x32 long=1x64 lengths=4x16,2x32 prompt=1x8
	small=2,4,8 large=full,8 kernels=xla batches=1,2 many=4 new=4 repeats=1
	mix="--prompts=8 --per-task=2 --batch=4"
	study=(--config=configs/study_smoke.py)
else
	size=7b eight=8b dtype=bfloat16 shape=4x2048 row=1x2048 long=2x4096 lengths=16x512,8x1024 prompt=1x512
	small=8,512,2048,4096 large=full,4096 kernels=xla,cudnn batches=1,32,128 many=256 new=64 repeats=3
	mix="--prompts=256 --per-task=52 --batch=64"
	study=("--config=configs/study_smollm2.py:data=$data"
		"--config.ranks=(4,8,16,32,64,128,256,512,1024,2048,4096,'full')"
		"--config.sets=('T3','T6','T11')" "--config.run.data.sizes=(3,6,11)"
		"--config.run.model=$model"
		"--config.rounds=(0,1,2)" --config.run.epochs=6 --config.run.batch_size=128)
fi

limited() { # NAME SECONDS COMMAND…
	local name=$1 seconds=$2
	shift 2
	timeout "$seconds" "$@" || echo "$name: ended early" >&2
}

measure() { # NAME SECONDS SIZE FLAGS…
	local name=$1 seconds=$2 size=$3
	shift 3
	limited "$name" "$seconds" "$python" benchmarks/run.py --size="$size" --dtype=$dtype --apart \
		--loss=all --loss-chunk=1024 --out="$out/$name" "$@"
}

peer=--peer=hf_peft
step="--parts=step --repeats=$repeats --dropout=0.05"
decode="--parts=decode --repeats=2 --ranks=8 --shapes=$prompt --new-tokens=$new"
[ $# -gt 0 ] || set -- ranks large llama3 mix study
for part in "$@"; do
	case $part in
		ranks) measure ranks 300 $size $peer $step --parts=products,step --profile --remat=none \
			--shapes=$shape --ranks=$small ;;
		large) measure large 240 $size $peer $step --remat=full --shapes=$shape,$row \
			--ranks=$large ;;
		llama3) measure llama3 100 $eight --parts=step --repeats=$repeats --profile --dropout=0.1 \
			--remat=none,full --shapes=$long --ranks=16 --targets=all ;;
		mix) limited mix 150 "$python" -m benchmarks.decoding --peer=hf --dtype=$dtype $mix \
			--buckets=1024 --new-tokens=$new --repeats=1 --model="$model" --data="$data" \
			--out="$out/mix" ;;
		study) limited study 600 "$python" study.py --workdir="$out/study" "${study[@]}"
			"$python" study.py --workdir="$out/study" --report ;;
		options) measure options 150 $size $step --remat=none,full --attention=$kernels \
			--shapes=$lengths --ranks=8 ;;
		decode) measure decode 200 $size $peer $decode --profile --batches=$batches ;;
		large_batch) measure large_batch 120 $size $peer $decode --batches=$many ;;
		*) echo "$part: no such part" >&2 && exit 2 ;;
	esac
done
