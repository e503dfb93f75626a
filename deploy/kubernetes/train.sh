#!/bin/sh
# Prepares data, trains a preference model and publishes it, each step once: started again, it goes on where it was.
#
#   DATASET     kind of data set, as `plumb-train prepare --help` lists them
#   FILES       its files, with wildcards
#   RECIPE      TOML file with the options of `plumb-train run`
#   INIT        checkpoint to begin with
#   WORK        folder of this run
#   MODEL_ROOT  folder that servers watch
#   MODEL       name of the model in it
#   LAUNCH      what starts the processes of the run, such as mpirun with options; nothing for one
set -eu

if ! [ -e "$WORK/data" ]; then
    mkdir -p "$WORK"
    # shellcheck disable=SC2086 # several files
    plumb-train prepare "$DATASET" $FILES --output "$WORK/data.new" --dev-share "${DEV_SHARE:-0.01}"
    mv "$WORK/data.new" "$WORK/data"
fi

# shellcheck disable=SC2086 # a command with arguments, or nothing
${LAUNCH:-} plumb-train run --config "$RECIPE" --init "$INIT" \
    --train "$WORK/data/train.jsonl" --dev "$WORK/data/dev.jsonl" --output "$WORK/run"

if ! [ -e "$WORK/published" ]; then
    plumb-train publish "$WORK/run/checkpoint" "$MODEL_ROOT" --name "$MODEL"
    touch "$WORK/published"
fi
