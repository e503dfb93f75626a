#!/usr/bin/env bash
# Trains SmolLM2-135M by preference modelling and by imitation on a ranked and on a binary set, and measures both:
# run.sh DATA WORK LM
#
# DATA holds hellaswag and ethics; LM is SmolLM2-135M-Instruct in Hugging Face layout; WORK takes all that is made on the way,
# and what is interrupted goes on there. About half an hour on two cores. Results go to results/ beside this script,
# and into the table of README.md.
set -euo pipefail
data=$(realpath "$1")
mkdir -p "$2"
lm=$(realpath "$3")
here=$(realpath "$(dirname "$0")")
cd "$2"
train() { cargo run --quiet --release --manifest-path "$here/../../../Cargo.toml" -p plumb-trainer -- "$@"; }

[ -d hellaswag ] || train prepare hellaswag "$data"/hellaswag/*train.jsonl.gz --output hellaswag --dev-share 0
[ -d justice ] || train prepare ethics-justice "$data/ethics/justice/justice_train.csv.gz" --output justice --dev-share 0
head -10000 justice/train.jsonl > justice10k.jsonl
declare -A examples=([hellaswag]=hellaswag/train.jsonl [justice]=justice10k.jsonl)

measure() { # measure SET RUN MODEL
    [ -d "$here/results/$1-$2" ] && return
    if [ "$1" = hellaswag ]; then
        train evaluate hellaswag "$data"/hellaswag/*dev.jsonl.gz --model "$3" --output "measured-$1-$2"
    else
        train evaluate ethics-justice "$data"/ethics/justice/justice_test.csv.gz "$data"/ethics/justice/justice_test_hard.csv.gz \
            --model "$3" --output "measured-$1-$2"
    fi
    mkdir -p "$here/results/$1-$2"
    # Where the language model lies here is nobody's business.
    sed "s|\"$lm\"|\"SmolLM2-135M-Instruct\"|" "measured-$1-$2/results.json" > "$here/results/$1-$2/results.json"
}
for set in hellaswag justice; do
    measure $set untrained "$lm"
    for objective in preference imitation; do
        train run --config "$here/recipe.toml" --objective $objective --init "$lm" --train "${examples[$set]}" \
            --output "$set-$objective"
        measure $set $objective "$set-$objective/checkpoint"
    done
done
python3 "$here/table.py"
