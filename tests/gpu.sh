#!/usr/bin/env bash
# Everything that takes a GPU, in one command:
#
#     tests/gpu.sh build FOLDER        on a machine with CUDA's compiler: packs two folders of programs, to be carried alone
#     FOLDER/run/gpu.sh run [SECONDS]  on a machine with a GPU, its driver and cuBLAS of CUDA 13, and nothing else
#     FOLDER/bench/gpu.sh bench [...]  there too, with PyTorch, Transformers and safetensors beside
#
# `run` prints the device's name, then runs the kernels against their reference, all architectures against Transformers'
# values in f32 and bf16, where there is NCCL also as parts of a model on all GPUs, and, where there is compute-sanitizer,
# the kernels under it. Exit code 1 if anything failed. `bench` takes what tests/benchmarks/gpu.py takes after the folder.
set -euo pipefail

build() {
    local folder=$1
    cd "$(dirname "$0")/.."
    # Feature by feature the same programs as `cargo test --workspace` makes, and the GPU.
    local log features=plumb-server/cuda,plumb-trainer/cuda
    log=$(cargo test --release --no-run --locked --workspace --features $features --test gpu \
        --test gpu_gradient --test gpu_gradient_rows --test golden --test gradients 2>&1) || { echo "$log" && exit 1; }
    mkdir -p "$folder"/{run,bench}/tests
    for test in gpu gpu_gradient gpu_gradient_rows golden gradients; do
        local program
        program=$(sed -nE "s|.*Executable tests/$test\.rs \((.*)\)|\1|p" <<<"$log")
        cp "$program" "$folder/run/$test"
        strip "$folder/run/$test"
    done
    log=$(cargo bench --no-run --locked --workspace --features $features --bench gpu 2>&1) ||
        { echo "$log" && exit 1; }
    cp "$(sed -nE 's|.*Executable benches/gpu\.rs \((.*)\)|\1|p' <<<"$log")" "$folder/bench/kernel-benchmark"
    local programs=(plumb-server plumb plumb-train)
    cargo build --release --locked --workspace --features $features "${programs[@]/#/--bin=}"
    cp "${programs[@]/#/${CARGO_TARGET_DIR:-target}/release/}" "$folder/bench/"
    strip "$folder/bench/kernel-benchmark" "${programs[@]/#/$folder/bench/}"
    cp -r tests/benchmarks "$folder/bench/tests/"
    for part in run bench; do
        cp -r tests/fixtures "$folder/$part/tests/"
        cp tests/gpu.sh "$folder/$part/"
        echo "$folder/$part: $(($(tar -C "$folder/$part" -cz . | wc -c) >> 20)) MiB as .tar.gz"
    done
}

bench() {
    local folder
    folder=$(dirname "$0")
    python3 "$folder/tests/benchmarks/gpu.py" "$folder" "$@"
}

run() {
    local seconds=${1:-480} failed=0
    cd "$(dirname "$0")"
    # Fixtures are found beside the programs.
    export PLUMB_FIXTURES=$PWD/tests/fixtures PLUMB_REQUIRE_GPU=1
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    step() { echo "== $1" && shift && { timeout "$seconds" "$@" || failed=1; }; }
    step kernels ./gpu --test-threads 1
    step gradients ./gpu_gradient --test-threads 1
    step 'gradients of rows' ./gpu_gradient_rows --test-threads 1
    step 'golden models' ./golden --test-threads 1 --nocapture
    step 'golden gradients' ./gradients --test-threads 1
    local sanitizer
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1 || true)
    if [ -n "$sanitizer" ]; then
        # Kernels are looked for in one module after the other, and a test asks for more memory than there is.
        for test in gpu gpu_gradient gpu_gradient_rows; do
            step "memcheck of $test" "$sanitizer" --tool memcheck --report-api-errors no --error-exitcode 1 "./$test" \
                --test-threads 1
            for tool in racecheck synccheck; do
                step "$tool of $test" "$sanitizer" --tool "$tool" --error-exitcode 1 "./$test" --test-threads 1
            done
        done
    else
        echo 'skipped: there is no compute-sanitizer'
    fi
    return "$failed"
}

case ${1:-} in
build | run | bench) "$@" ;;
*) sed -n '2,11s/^# \{0,1\}//p' "$0" && exit 64 ;;
esac
