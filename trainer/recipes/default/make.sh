#!/usr/bin/env bash
# Trains the two small models that come with the server, from text to preference model: make.sh DATA WORK
#
# DATA holds hh-rlhf, stackexchange, gsm8k-solutions, hellaswag, ethics and lm_corpus; WORK takes all that is made on the
# way, and what is interrupted goes on there. About twenty minutes on two cores. The same data give the same bits on the
# same kind of CPU.
set -euo pipefail
data=$(realpath "$1")
mkdir -p "$2"
recipes=$(realpath "$(dirname "$0")")
models=$(realpath "$recipes/../../../server/models")
cd "$2"
train() { cargo run --quiet --release --manifest-path "$recipes/../../../Cargo.toml" -p plumb-trainer -- "$@"; }

# prepare NAME DATASET DEV_SHARE FILE... [--binarise]
prepare() {
    [ -f "$1/train.jsonl" ] || train prepare "$2" "${@:4}" --output "$1" --dev-share "$3"
}

# An article a line.
[ -f articles.jsonl ] || zcat "$data/lm_corpus/wiki_demo.txt.gz" |
    python3 -c 'import json, sys; [print(json.dumps({"text": line.strip()})) for line in sys.stdin if line.strip()]' > articles.jsonl
corpus=$data/lm_corpus
prepare text text 0.03 "$corpus/c4_demo.jsonl.gz" articles.jsonl "$corpus"/wikitext2.valid.txt.gz "$corpus"/wikitext2.test.txt.gz "$corpus/tinyshakespeare.txt.gz"
prepare hh hh-rlhf 0 "$data"/hh-rlhf/*train.jsonl.gz
prepare hhdev hh-rlhf 0 "$data"/hh-rlhf/*dev.jsonl.gz
prepare se stack-exchange 0.05 "$data"/stackexchange/*.jsonl.gz
prepare seb stack-exchange 0.05 "$data"/stackexchange/*.jsonl.gz --binarise
prepare util ethics-utilitarianism 0 "$data/ethics/utilitarianism/util_train.csv.gz"
prepare utildev ethics-utilitarianism 0 "$data/ethics/utilitarianism/util_test.csv.gz"
prepare hsdev hellaswag 0 "$data"/hellaswag/*dev.jsonl.gz
prepare hs hellaswag 0 "$data"/hellaswag/*train.jsonl.gz
prepare gsm gsm8k-solutions 0.05 "$data"/gsm8k-solutions/*.jsonl.gz

[ -d new ] || train scratch {text,se,hh,hs}/train.jsonl --output new --seed 1
train run --config "$recipes/lm.toml" --output lm
train run --config "$recipes/pmp.toml" --output pmp
train run --config "$recipes/pm.toml" --output pm
for model in lm pm; do
    mkdir -p "$models/$model"
    cp $model/checkpoint/* "$models/$model/"
done
