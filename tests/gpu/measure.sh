#!/usr/bin/env bash
# What docs/benchmarks.md has, each run with a limit of its own. tests/gpu/measure.sh OUT [PART ...]
set -uo pipefail
out=$1; shift
mkdir -p "$out/bench"
bench() { python3 launch/bench.py train "$@" --work /tmp/bench-work --out "$out/bench"; }
STOCK="--fused_linear false --fused_step false --fused_loss false --leaf_modules false --kept_layers 0 --use_liger_kernel false"
part() {
  case $1 in
    8b) bench 8b-lora --timeout 200 ;;
    8b-tuned) bench 8b-lora --yardstick tuned --only yardstick --timeout 120 ;;
    8b-features) for flags in "" "--fetch_ahead true"; do
        bench 8b-lora --micro_batches 6 --yardstick --timeout 110 --flags="$flags"; done ;;
    8b-profile) PROFILE_AT=8 PROFILE_OUT=$out/8b-lora-after.json BENCH_SCRIPT=tests/gpu/profile_run.py \
        bench 8b-lora --micro_batches 8 --yardstick --updates 11 --timeout 130 ;;
    8b-profile-stock) PROFILE_AT=4 PROFILE_OUT=$out/8b-lora-before.json BENCH_SCRIPT=tests/gpu/profile_run.py \
        bench 8b-lora --micro_batches 8 --yardstick --updates 8 --timeout 150 --flags="$STOCK" ;;
    8b-sweep) bench 8b-lora --micro_batches 8 12 16 --yardstick --timeout 90 ;;
    8b-gpu) bench 8b-lora-gpu --yardstick --timeout 100 ;;
    8b-long) bench 8b-lora-8k 8b-lora-64k --yardstick --timeout 240 ;;
    3b) bench 3b-full --timeout 170 ;;
    3b-tuned) bench 3b-full --yardstick tuned --only yardstick --timeout 120 ;;
    3b-features) for flags in "" "--fetch_ahead true --overlap_step true"; do
        bench 3b-full --yardstick --timeout 130 --flags="$flags"; done ;;
    parity) python3 -m pytest -q -p no:cacheprovider tests/gpu/test_features.py ;;
    *) echo "no part $1"; return 2 ;;
  esac
}
# First, and to its end: a build that a time limit kills leaves a lock behind.
python3 -m trainer.ops cpu_adam
for name in "$@"; do part "$name" 2>&1 | grep -v "^$"; done
(cd "$out" && tar czf logs.tgz bench/*.log && rm -f bench/*.log)
