#!/usr/bin/env bash
# Writes src/plumb_client/_proto anew. The compiler is an old one on purpose: what it writes is taken by every protobuf
# from 4.25 on, while a newer one's code refuses older libraries.
set -euo pipefail
cd "$(dirname "$0")"
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'grpcio-tools==1.62.3' 'setuptools<81'

out=src/plumb_client/_proto
rm -f "$out"/*_pb2.py "$out"/*_pb2.pyi
"$venv/bin/python" -m grpc_tools.protoc -I ../../proto -I . --python_out="$venv" --pyi_out="$venv" \
    plumb/v1/{common,preference,generation,models,tokens}.proto wire.proto
for file in "$venv"/plumb/v1/*_pb2.py* "$venv"/wire_pb2.py*; do
    sed 's/^from plumb\.v1 import/from . import/' "$file" > "$out/${file##*/}"
done
