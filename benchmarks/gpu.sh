#!/usr/bin/env bash
# What a card is to show, what pays most first: bash benchmarks/gpu.sh [PART…]
#
#   ranks    training of LLaMA-7B's shapes at ranks 8, 512, 2048 and 4096, 4 x 2048 tokens, beside PEFT
#   large    the same at rank 4096 and in full with gradient checkpointing, also at 1 x 2048
#   llama3   Llama-3-8B, rank 16 on all seven layers, dropout 0.1, 2 x 4096 tokens, ours alone:
#            NeMo publishes 12,473 tokens/s on an H100
#   mix      256 real prompts of SmolLM2 beside transformers' generate
#   study    SmolLM2 on real tasks, all of the paper's ranks, a round after the other, the cheapest
#            cells first, for LIMIT seconds (540) with its report: rerun it to resume
#
# These are the parts that run without names, about 15 minutes in all on an H200; each has its own
# limit of seconds. A part that ends early leaves what it has, a case that does not fit says so.
# By name alone: options (attention kernels, remat, lengths), decode and large_batch (prompts of one
# length, beside generate), and pack (for `study`, see below).
#
# Weights are random but for `mix` and `study`, which read MODEL (`make base`) and DATA, a checkout
# of Natural Instructions (`study`: of at least 500 train tasks). Needed: jax[cuda], flax, optax,
# jaxtyping, pandas, torch, transformers and peft; for `mix` gguf, for `study` the whole package.
# Results are in OUT (runs/gpu) by part. SIZE=tiny rehearses on any machine. PYTHON names an
# interpreter.
#
# To a machine that gets 64 MB at a time, and sees neither MODEL nor DATA: `gpu.sh pack` writes the
# data as one file of 20 MB, PACKED/niv2.tar.xz (PACKED is .cache/gpu), and the base in two parts,
# PACKED/base.aa and base.ab. Carry them there one by one; `study` unpacks what it finds. It leaves
# OUT/study.tar.xz, all but the checkpoints: carried back and there again as PACKED/study.tar.xz, it
# resumes the study on a fresh machine. ROUNDS (0 1 2) has the rounds to run, STUDY further flags of
# study.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
model=${MODEL:-.cache/SmolLM2-135M-Instruct.Q4_1.gguf}
data=${DATA:-../shared/data/niv2-slice}
tasks=${DATA:-../shared/data/niv2}
packed=${PACKED:-.cache/gpu}
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore TF_CPP_MIN_LOG_LEVEL=2

if [ "${SIZE:-7b}" = tiny ]; then
	size=tiny eight=tiny dtype=float32 shape=2x32 row=1x32 long=1x64 lengths=4x16,2x32 prompt=1x8
	small=2,4,8 large=full,8 kernels=xla batches=1,2 many=4 new=4 repeats=1
	mix="--prompts=8 --per-task=2 --batch=4"
	study=(--config=configs/study_smoke.py) rounds=0
else
	size=7b eight=8b dtype=bfloat16 shape=4x2048 row=1x2048 long=2x4096 lengths=16x512,8x1024 prompt=1x512
	small=8,512,2048,4096 large=full,4096 kernels=xla,cudnn batches=1,32,128 many=256 new=64 repeats=3
	mix="--prompts=256 --per-task=52 --batch=64"
	study=() rounds=${ROUNDS:-0 1 2} # its flags name what `unpack` finds
fi

limited() { # NAME SECONDS COMMAND…
	local name=$1 seconds=$2
	shift 2
	timeout --kill-after=20 "$seconds" "$@" || echo "$name: ended early" >&2
}

measure() { # NAME SECONDS SIZE FLAGS…
	local name=$1 seconds=$2 size=$3
	shift 3
	limited "$name" "$seconds" "$python" benchmarks/run.py --size="$size" --dtype=$dtype --isolate \
		--loss=all --loss-chunk=1024 --out="$out/$name" "$@"
}

pack() {
	mkdir -p "$packed"
	tar -cJf "$packed/niv2.tar.xz" --mode=u+rwX -C "$(dirname "$tasks")" "$(basename "$tasks")"
	split --number=2 "$model" "$packed/base."
}

# What was packed, where it is not there already; a file is whole or not there.
unpack() {
	if [ ! -d "$tasks" ] && [ -f "$packed/niv2.tar.xz" ]; then
		tasks=$packed/niv2
		if [ ! -d "$tasks" ]; then
			rm -rf "$packed/partial"
			mkdir -p "$packed/partial"
			tar -xJf "$packed/niv2.tar.xz" -C "$packed/partial"
			mv "$packed/partial"/* "$tasks"
		fi
	fi
	if [ ! -f "$model" ] && [ -f "$packed/base.aa" ] && [ -f "$packed/base.ab" ]; then
		mkdir -p "$(dirname "$model")"
		cat "$packed/base.aa" "$packed/base.ab" >"$model.partial"
		mv "$model.partial" "$model"
	fi
	if [ ! -d "$out/study" ] && [ -f "$packed/study.tar.xz" ]; then
		mkdir -p "$out"
		tar -xJf "$packed/study.tar.xz" -C "$out"
	fi
}

run_study() {
	local round left words end=$((SECONDS + ${LIMIT:-540}))
	unpack
	if [ "$size" != tiny ]; then
		study=("--config=configs/study_smollm2.py:model=$model,data=$tasks")
	fi
	read -ra words <<<"${STUDY:-}"
	for round in $rounds; do
		left=$((end - SECONDS - 60)) # a minute is for the report
		[ "$left" -gt 0 ] || break
		limited "study, round $round" "$left" "$python" study.py --workdir="$out/study" \
			"${study[@]}" --only="round == $round" "${words[@]}"
	done
	if [ -f "$out/study/results.parquet" ]; then
		"$python" study.py --workdir="$out/study" --report
	fi
	if [ -d "$out/study" ]; then
		tar -cJf "$out/study.tar.xz" --exclude=checkpoints --exclude=adapter --exclude=tensorboard \
			--exclude=locks -C "$out" study
	fi
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
		pack) pack ;;
		study) run_study ;;
		options) measure options 150 $size $step --remat=none,full --attention=$kernels \
			--shapes=$lengths --ranks=8 ;;
		decode) measure decode 200 $size $peer $decode --profile --batches=$batches ;;
		large_batch) measure large_batch 120 $size $peer $decode --batches=$many ;;
		*) echo "$part: no such part" >&2 && exit 2 ;;
	esac
done
