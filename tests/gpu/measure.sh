#!/usr/bin/env bash
# What docs/benchmarks.md has of one GPU, each run with a limit of its own. tests/gpu/measure.sh OUT [PART ...]
set -uo pipefail
out=$1; shift
bench() { python3 launch/bench.py train "$@" --work /tmp/bench-work --out "$out/bench"; }
part() {
  case $1 in
    3b-full) bench 3b-full --yardstick --updates 13 --timeout 170 ;;
    3b-tuned) bench 3b-full --yardstick tuned --updates 13 --timeout 110 ;;
    8b-profile) PROFILE_AT=8 PROFILE_OUT=$out/profile-8b-lora-m8.json BENCH_SCRIPT=tests/gpu/profile_run.py \
        bench 8b-lora --micro_batches 8 --yardstick --updates 11 --timeout 130 ;;
    8b-sweep) bench 8b-lora --micro_batches 12 16 6 --yardstick --updates 13 --timeout 90 ;;
  esac
}
for name in "$@"; do part "$name" 2>&1 | grep -v "^$"; done
(cd "$out/bench" && tar czf "$out/logs.tgz" ./*.log && rm -f ./*.log)
