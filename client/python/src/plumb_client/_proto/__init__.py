"""Messages of `proto/plumb/v1` and `wire.proto`, written by `generate.sh`."""
