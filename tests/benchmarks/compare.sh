#!/usr/bin/env bash
# Times Plumb through its gRPC server, and what a user would pick instead, on the same work in the same run.
#
#   tests/benchmarks/compare.sh PEERS SCRIPTS [ROUNDS]
#
# PEERS holds the models pm/ and smollm2/ and the virtual environments torch/ and vllm/ (either may be absent: it is
# then left out). SCRIPTS holds score_torch.py, score_vllm.py and generate_vllm.py. Nothing else should run. Every
# round prints all figures; take the median of the rounds.
set -euo pipefail
cd "$(dirname "$0")/../.."
peers=$1 scripts=$2 rounds=${3:-3}

cargo build --release --quiet -p plumb-server -p plumb-client
ports=$(mktemp)
rm "$ports"
target/release/plumb-server --model pm="$peers/pm" --model lm="$peers/smollm2" --port 0 --prometheus-port 0 \
    --port-file "$ports" >"$ports.log" 2>&1 &
server=$!
trap 'kill "$server"; rm -f "$ports" "$ports.log"' EXIT
until [ -s "$ports" ]; do sleep 0.2; done
PLUMB_SERVER=http://$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["grpc"])' "$ports")
export PLUMB_SERVER HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=ERROR
until target/release/plumb health >/dev/null 2>&1; do sleep 0.5; done
plumb() { target/release/plumb bench "$@"; }

for round in $(seq "$rounds"); do
    echo "== round $round"
    echo "-- plumb, unique 32x256"
    plumb unique --model pm --items 32 --tokens 256 --concurrency 1 --requests 5
    echo "-- plumb, rank 4x8, 512 + 64"
    plumb rank --model pm --prompts 4 --candidates 8 --prompt-tokens 512 --tokens 64 --requests 12
    echo "-- plumb, one request of 300 tokens"
    plumb unique --model pm --items 1 --tokens 300 --concurrency 1 --requests 30
    echo "-- plumb, decode, one stream and 16"
    plumb generate --model lm --streams 1 --prompt-tokens 32 --new-tokens 128 --requests 2
    plumb generate --model lm --streams 16 --prompt-tokens 32 --new-tokens 128 --requests 32
    if [ -x "$peers/torch/bin/python" ]; then
        "$peers/torch/bin/python" "$scripts/score_torch.py" "$peers/pm" bf16 8 256 2>/dev/null
        "$peers/torch/bin/python" "$scripts/score_torch.py" "$peers/pm" f32 8 256 2>/dev/null
    fi
    if [ -x "$peers/vllm/bin/python" ]; then
        "$peers/vllm/bin/python" "$scripts/score_vllm.py" "$peers/pm" 2>/dev/null | grep '^vllm'
        "$peers/vllm/bin/python" "$scripts/generate_vllm.py" "$peers/smollm2" 32 2>/dev/null | grep '^vllm'
    fi
done
