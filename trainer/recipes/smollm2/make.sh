#!/usr/bin/env bash
# Trains the preference adapter for SmolLM2-135M that comes with the repository, from the language model by preference
# pretraining and fine-tuning: make.sh DATA WORK LM
#
# DATA holds hh-rlhf, stackexchange and hellaswag; LM is SmolLM2-135M-Instruct, as tests/smollm2.sh finds it; WORK takes all
# that is made on the way, and what is interrupted goes on there. About twenty minutes on two cores.
set -euo pipefail
data=$(realpath "$1")
mkdir -p "$2"
lm=$(realpath "$3")
recipes=$(realpath "$(dirname "$0")")
adapter=$(realpath "$recipes/../../../server/models")/smollm2-pm
cd "$2"
train() { cargo run --quiet --release --manifest-path "$recipes/../../../Cargo.toml" -p plumb-trainer -- "$@"; }

[ -d hh ] || train prepare hh-rlhf "$data"/hh-rlhf/*train.jsonl.gz --output hh --dev-share 0
[ -d hs ] || train prepare hellaswag "$data"/hellaswag/*train.jsonl.gz --output hs --dev-share 0
[ -d seb ] || train prepare stack-exchange "$data"/stackexchange/*.jsonl.gz --output seb --dev-share 0.05 --binarise
train run --config "$recipes/pmp.toml" --init "$lm" --output pmp
train run --config "$recipes/pm.toml" --init "$lm" --output pm
mkdir -p "$adapter"
cp pm/checkpoint/* "$adapter/"
# Where the language model lies here is nobody's business.
sed -i 's|"base_model_name_or_path": .*|"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",|' "$adapter/adapter_config.json"
