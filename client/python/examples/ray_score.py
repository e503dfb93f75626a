"""Adds rewards to a table of Parquet files.

python ray_score.py texts/ scored/ --server http://replica-1:50051,http://replica-2:50051 --model pm --actors 8

The columns are `chosen` and `rejected`, `prompt` and `response`, `messages` or `text`; see plumb_client.data.
"""

import argparse

import ray

from plumb_client.ray import score_ray_dataset


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder or files, also of S3 or Google Cloud Storage")
    parser.add_argument("output")
    parser.add_argument("--server", help="addresses, separated by commas; default: PLUMB_SERVER")
    parser.add_argument("--model", help="the server's name of it")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--rows", type=int, default=512, help="rows of a batch")
    given = parser.parse_args(arguments)

    scored = score_ray_dataset(
        ray.data.read_parquet(given.source),
        given.server,
        actors=given.actors,
        rows=given.rows,
        on_error="return",
        model=given.model,
        priority="low",
    )
    scored.write_parquet(given.output)


if __name__ == "__main__":
    main()
