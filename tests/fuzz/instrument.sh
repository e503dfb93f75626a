#!/bin/sh
# rustc for the crates of the workspace, as cargo's RUSTC_WORKSPACE_WRAPPER: with libFuzzer's coverage, but for programs
# that run during the build.
case " $* " in
*" --crate-name build_script_"* | *" --crate-type proc-macro "*) exec "$@" ;;
*) exec "$@" $PLUMB_FUZZ_RUSTFLAGS ;;
esac
