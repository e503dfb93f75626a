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
    # What an interrupted one has left would be in the way.
    rm -rf "$WORK/data.new"
    # shellcheck disable=SC2086 # several files
    plumb-train prepare "$DATASET" $FILES --output "$WORK/data.new" --dev-share "${DEV_SHARE:-0.01}"
    mv "$WORK/data.new" "$WORK/data"
fi

# shellcheck disable=SC2086 # a command with arguments, or nothing
${LAUNCH:-} plumb-train run --config "$RECIPE" --init "$INIT" \
    --train "$WORK/data/train.jsonl" --dev "$WORK/data/dev.jsonl" --output "$WORK/run"

next_version() {
    highest=0
    for folder in "$MODEL_ROOT/$MODEL"/[1-9]*; do
        case ${folder##*/} in
        *[!0-9]*) ;;
        *) [ "${folder##*/}" -le "$highest" ] || highest=${folder##*/} ;;
        esac
    done
    echo $((highest + 1))
}

is_ours() {
    for file in "$WORK/run/checkpoint"/*.safetensors; do
        cmp -s "$file" "$1/${file##*/}" || return 1
    done
}

# The version is fixed first: an interruption after it is there makes no second one of it.
until [ -e "$WORK/published" ]; do
    [ -s "$WORK/version" ] || next_version >"$WORK/version"
    version=$(cat "$WORK/version")
    if [ -e "$MODEL_ROOT/$MODEL/$version" ]; then
        # Another run may have taken it meanwhile.
        if is_ours "$MODEL_ROOT/$MODEL/$version"; then touch "$WORK/published"; else rm "$WORK/version"; fi
    elif plumb-train publish "$WORK/run/checkpoint" "$MODEL_ROOT" --name "$MODEL" --version "$version"; then
        touch "$WORK/published"
    else
        code=$?
        [ -e "$MODEL_ROOT/$MODEL/$version" ] || exit "$code"
    fi
done
