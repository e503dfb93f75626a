#!/usr/bin/env bash
# Fuzzes every target for so many seconds, or only those that are named, and prints a table:
#
#     tests/fuzz/run.sh [--own | --asan] [--jobs N] SECONDS [TARGET...]
#
# One target after the other, or N at a time.
#
# Stable Rust and a C++ compiler will do. Coverage is that of everything but the standard library, built in
# `target/fuzz`; with --own it is that of the workspace's own crates, beside the other crates as `cargo test` has built
# them, which is quick. --asan adds AddressSanitizer, in `target/asan`, by what stable Rust calls unstable.
#
# Templates are rendered in processes of their own, as a server does: their limits are tried, their coverage is not seen.
#
# What is new stays in `target/fuzz-corpus`, from which the next run goes on. Exit code 1 if an input ends a target, takes
# longer than a second (ten with --own) or more memory than it may have: the input is in `target/fuzz-findings`, beside
# what the program said. The programs are named in `build.log` there: one runs an input that it is given, and makes it
# smaller with `-minimize_crash=1`. Put it into `corpus/TARGET`, and fix the bug.
#
# With cargo-fuzz: cargo +nightly fuzz run --dev --fuzz-dir tests/fuzz --features libfuzzer TARGET
set -euo pipefail
cd "$(dirname "$0")/../.."

coverage='-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing'
target=${CARGO_TARGET_DIR:-target}
platform=$(rustc -vV | sed -n 's/^host: //p')
most_mib=2048
most_seconds=1

mode=all jobs=1
while true; do
    case ${1:-} in
    --own | --asan) mode=${1#--} && shift ;;
    --jobs) jobs=${2:?"--jobs takes a number"} && shift 2 ;;
    *) break ;;
    esac
done
seconds=${1:?"usage: tests/fuzz/run.sh [--own | --asan] [--jobs N] SECONDS [TARGET...]"} && shift
targets=("$@")
if [ ${#targets[@]} = 0 ]; then
    for file in tests/fuzz/fuzz_targets/*.rs; do targets+=("$(basename "$file" .rs)"); done
fi

# Built as tests are: the programs of `cargo test --workspace` are there already, with the same features.
build() {
    local bins=() name
    for name in "${targets[@]}"; do bins+=(--bin "$name"); done
    CARGO_TERM_COLOR=never CARGO_INCREMENTAL=0 cargo test --no-run --locked "$@" "${bins[@]}" >"$log" 2>&1 ||
        { grep -v '^ *Compiling ' "$log" && exit 1; }
}
findings=$target/fuzz-findings && mkdir -p "$findings"
log=$findings/build.log
case $mode in
own)
    RUSTC_WORKSPACE_WRAPPER=$PWD/tests/fuzz/instrument.sh PLUMB_FUZZ_RUSTFLAGS=$coverage \
        build --workspace --features plumb-fuzz/libfuzzer
    # It is for machines that are busy with other things, too.
    most_seconds=10
    ;;
all)
    RUSTFLAGS=$coverage build --package plumb-fuzz --features libfuzzer --target "$platform" --target-dir "$target/fuzz"
    ;;
asan)
    RUSTC_BOOTSTRAP=1 RUSTFLAGS="$coverage -Zsanitizer=address" \
        build --package plumb-fuzz --features libfuzzer --target "$platform" --target-dir "$target/asan"
    # The runtime's shadow memory and quarantine.
    most_mib=8192
    ;;
esac
program() { sed -nE "s|.*Executable .*fuzz_targets/$1\.rs \((.*)\)|\1|p" "$findings/build.log"; }

# Files that an input stands for are written for every input: in memory, where there is a place.
TMPDIR=$(mktemp -d -p "$([ -w /dev/shm ] && echo /dev/shm || echo "${TMPDIR:-/tmp}")" plumb-fuzz.XXXXXX)
export TMPDIR RUST_BACKTRACE=0
trap 'rm -rf "$TMPDIR"' EXIT

# Fuzzes a target, and writes its line of the table.
fuzz() {
    local name=$1 log=$findings/$1.log grown=$target/fuzz-corpus/$1 ended=0 state=- options
    options=(-max_total_time="$seconds" -timeout=$most_seconds -report_slow_units=1 -rss_limit_mb=$most_mib -max_len=65536
        -artifact_prefix="$findings/$name-" -print_final_stats=1)
    [ -f "tests/fuzz/dict/$name" ] && options+=(-dict="tests/fuzz/dict/$name")
    mkdir -p "$grown"
    "$(program "$name")" "${options[@]}" "$grown" "tests/fuzz/corpus/$name" >"$log" 2>&1 || ended=$?
    stat() { sed -n "s/^stat::$1: *//p" "$log"; }
    last() { sed -nE "s/.* $1: ([0-9]+).*/\1/p" "$log" | tail -1; }
    if [ $ended != 0 ]; then
        state=$(sed -nE 's/.*Test unit written to (.*)/\1/p' "$log" | tail -1)
        state=${state:-"exit code $ended, see $log"}
    fi
    printf '%-12s %10s %8s %8s %8s %8s s %4s MiB %8s\n' "$name" "$(stat number_of_executed_units)" \
        "$(stat average_exec_per_sec)" "$(last cov)" "$(last ft)" "$(stat slowest_unit_time_sec)" "$(stat peak_rss_mb)" "$state"
    [ "$state" = - ]
}
export -f fuzz program
export findings target seconds most_seconds most_mib

printf '%-12s %10s %8s %8s %8s %10s %8s %8s\n' target inputs /s edges features slowest RSS findings
printf '%s\n' "${targets[@]}" | xargs -P "$jobs" -I{} bash -c 'fuzz {}' || exit 1
