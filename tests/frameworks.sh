#!/usr/bin/env bash
# What frameworks and harnesses make of Plumb, each as the package that its users install: TRL, OpenRLHF, verl, the clients
# of Cohere and OpenAI, Ray, lm-evaluation-harness and RewardBench. Nothing may be skipped here. The packages, torch with
# them, take some seven gigabytes below the folder.
#
# usage: tests/frameworks.sh [FOLDER]     (target/frameworks)
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-target/frameworks}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
programs=${CARGO_TARGET_DIR:-$PWD/target}/debug
python=$folder/bin/python

# Packages of a file of requirements, once: into the environment, or into a folder that goes before it.
install() {
    local requirements=tests/python/$1.txt done=$folder/$1.txt
    shift
    cmp --quiet "$requirements" "$done" && return
    "$python" -m pip install --quiet --disable-pip-version-check "$@" --requirement "$requirements"
    cp "$requirements" "$done"
}

[ -x "$python" ] || python3 -m venv "$folder"
install requirements
install requirements-frameworks
# OpenRLHF and verl want GPUs; what is tried of them does without.
install requirements-rollouts --no-deps
install requirements-ppo --no-deps --target "$folder/ppo"
install requirements-rewardbench --no-deps --target "$folder/rewardbench"

# Threads of several processes would wait for one another.
export OMP_NUM_THREADS=1 RUST_BACKTRACE=1

cargo test --workspace --no-run --quiet
said=$folder/said
PLUMB_PYTHON=$python PLUMB_TEST_BINARIES=$programs \
    cargo test --workspace --test it -- --nocapture python:: other_projects 2>&1 | tee "$said"
if grep -i skipped "$said" | grep -v 'PPO is in TRL up to'; then
    echo 'these were to be tried, too' >&2
    exit 1
fi

(cd client/python && PYTHONPATH=$folder/ppo PLUMB_TEST_BINARIES=$programs \
    "$python" -B -m pytest -p no:cacheprovider -rs tests/test_trl.py -k 'test_ppo or what_ppo') | tee "$said"
if grep -i skipped "$said"; then
    exit 1
fi

PYTHONPATH=$folder/rewardbench "$python" tests/python/check_rewardbench.py "$programs/plumb-train" tests/fixtures/llama-pm
