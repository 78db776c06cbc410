#!/usr/bin/env bash
# What docs/benchmarks.md has, each run with a limit of its own. tests/gpu/measure.sh OUT [PART ...]
# The parts "before-…" need BEFORE, a folder with the tree of another commit, and run both in turn.
set -uo pipefail
out=$1; shift
mkdir -p "$out/bench"
bench() { python3 tests/bench/train.py train "$@" --work /tmp/bench-work --out "$out/bench"; }
turns() { python3 tests/gpu/compare.py "${BEFORE:?}" "$@" --work /tmp/bench-work --out "$out/bench"; }
STOCK="--disable_optimizations all --kept_layers 0 --use_liger_kernel false"
part() {
  case $1 in
    machine) python3 launch/bench.py machine ;;
    8b) bench 8b-lora --steps 12 --timeout 150 ;;  # ours, the peer's, the best stock one
    8b-tuned) bench 8b-lora --baseline tuned --steps 12 --timeout 120 ;;
    8b-profile) PROFILE_AT=8 PROFILE_OUT=$out/8b-lora-after.json BENCH_SCRIPT=tests/gpu/profile_run.py \
        bench 8b-lora --micro_batches 8 --only ours --steps 11 --timeout 130 ;;
    8b-profile-stock) PROFILE_AT=4 PROFILE_OUT=$out/8b-lora-before.json BENCH_SCRIPT=tests/gpu/profile_run.py \
        bench 8b-lora --micro_batches 8 --only ours --steps 8 --timeout 150 --flags="$STOCK" ;;
    8b-gpu) bench 8b-lora-gpu --only ours --steps 12 --timeout 100 ;;
    8b-8k) bench 8b-lora-8k --only ours --steps 12 --timeout 150 ;;
    8b-64k) bench 8b-lora-64k --only ours --steps 12 --timeout 260 --flags="--activation_offload true" ;;
    3b) bench 3b-full --steps 12 --timeout 150 ;;
    3b-tuned) bench 3b-full --baseline tuned --steps 12 --timeout 150 ;;
    3b-plain) bench 3b-full --only ours --steps 12 --timeout 150 --flags="--disable_optimizations overlap_step" ;;
    3b-gpu) bench 3b-full-gpu --only ours --steps 12 --timeout 120 ;;
    before-8b) turns 8b-lora --seconds "${LIMIT:-300}" ;;
    before-1b) turns 1b-full --seconds "${LIMIT:-250}" ;;
    before-nvme) turns 1b-full-nvme --seconds "${LIMIT:-500}"; rm -rf /tmp/bench-work/swap ;;
    io) python3 -m trainer.system.ops async_io && python3 launch/bench.py io /tmp/bench-work --bytes 4GB --seconds 40 ;;
    3b-nvme) bench 3b-full-nvme --only ours --steps 5 --timeout 380; rm -rf /tmp/bench-work/swap ;;
    1b) bench 1b-full --only ours --steps 12 --timeout 120 ;;
    8b-one) bench 8b-full-one --only ours --steps 6 --timeout 200 ;;
    14b) bench 14b-infinity --only ours --steps "${STEPS:-3}" --timeout "${LIMIT:-560}" --flags="${FLAGS:-}"; rm -rf /tmp/bench-work/swap ;;
    70b-quarter) bench 70b-quarter-infinity --only ours --steps 4 --timeout 300; rm -rf /tmp/bench-work/swap ;;
    70b-full) bench 70b-infinity --only ours --steps 4 --timeout 560; rm -rf /tmp/bench-work/swap ;;
    disk) mkdir -p /tmp/bench-work && python3 tests/bench/disk.py /tmp/bench-work/disk ;;
    timeline) TIMELINE=$out/timeline.json TIMELINE_AT=4 BENCH_SCRIPT=tests/bench/timeline.py \
        bench 70b-quarter-infinity --only ours --steps 6 --timeout 300; rm -rf /tmp/bench-work/swap ;;
    tiers) timeout 400 python3 -m pytest -q -s -p no:cacheprovider tests/gpu/test_tiers.py ;;
    70b) bench 70b-lora --only ours --micro_batches 4 16 --steps 11 --timeout 300 ;;
    70b-tuned) bench 70b-lora --baseline tuned --only baseline --steps 10 --timeout 280 ;;
    70b-layers) bench 70b-layers-full --only ours --steps 12 --timeout 200 ;;
    70b-layers-nvme) bench 70b-layers-full-nvme --only ours --steps 5 --timeout 420; rm -rf /tmp/bench-work/swap ;;
    checkpoint) timeout 200 python3 tests/bench/checkpoint.py --gpu --saves 3 --folder /tmp ;;
    8b-full) bench 8b-full --only ours --steps 12 --timeout 240 ;;
    auto) deepspeed --num_gpus 1 launch/train.py --deepspeed auto --model_name_or_path /tmp/bench-work/8b-32 --random_weights --method lora \
        --dataset /tmp/bench-work/rows-2048.jsonl --validation_split 0 --per_device_train_batch_size 12 --max_steps 10 --export false \
        --save_strategy no --output_dir "/tmp/bench-work/auto-$RANDOM" --report_to none ;;  # after a part that has made the inputs
    resume) python3 -m pytest -q --collect-only -p no:cacheprovider tests/gpu/test_checkpoint.py | grep :: \
        | timeout 300 xargs -d '\n' -P 3 -I {} python3 -m pytest -q -s -p no:cacheprovider {} ;;  # three at once
    parity) timeout 300 python3 -m pytest -q -p no:cacheprovider tests/gpu/test_features.py ;;
    *) echo "no part $1"; return 2 ;;
  esac
}
# First, and to its end: a build that a time limit kills leaves a lock behind.
python3 -m trainer.system.ops cpu_adam
for name in "$@"; do part "$name" 2>&1 | grep --line-buffered -v "^$"; done
(cd "$out" && tar czf logs.tgz bench/*.log && rm -f bench/*.log)
