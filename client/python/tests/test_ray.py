"""Data sets of Ray, on a cluster of this machine alone."""

import itertools
import runpy

import grpc
import pytest
from conftest import PACKAGE
from fake import fake, refuse, scores

from plumb_client import Client


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    # Its processes do not have this one's module path.
    environment = {"env_vars": {"PYTHONPATH": str(PACKAGE / "src")}}
    quiet = {"include_dashboard": False, "log_to_driver": False}
    ray.init(num_cpus=2, object_store_memory=100 << 20, runtime_env=environment, **quiet)
    yield ray
    ray.shutdown()


def write(folder, files):
    """Parquet files of these columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for number, columns in enumerate(files):
        pq.write_table(pa.table(columns), folder / f"{number}.parquet")
    return folder


def read(folder):
    import pyarrow.parquet as pq

    return sorted(pq.read_table(folder).to_pylist(), key=lambda row: row["id"])


def test_parquet_gets_the_rewards_of_the_client(ray, server, client, tmp_path):
    ids = [range(k * 40, k * 40 + 40) for k in range(3)]
    files = [{"id": list(part), "prompt": [f"{i}?" for i in part], "response": [f"{i}!" for i in part]} for part in ids]
    source = write(tmp_path / "in", files)
    main = runpy.run_path(str(PACKAGE / "examples" / "ray_score.py"))["main"]
    main([str(source), str(tmp_path / "out"), "--server", server.url, "--model", "pm", "--rows", "16"])
    rows = read(tmp_path / "out")
    wanted = client.score([(f"{i}?", f"{i}!") for i in range(120)])
    assert [(row["id"], row["prompt"]) for row in rows] == [(i, f"{i}?") for i in range(120)]
    assert [(row["reward"], row["input_tokens"]) for row in rows] == [(s.reward, s.input_tokens) for s in wanted]
    assert {row["error"] for row in rows} == {None}


def test_pairs_that_fail_and_columns_that_are_there(ray, server, client, tmp_path):
    from plumb_client.ray import score_ray_dataset

    turns = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": word}] for word in ("Hello.", "Go.")]
    columns = {
        "id": [0, 1],
        "good": [turns[0]] * 2,
        "rejected": [turns[1], []],
        "margin": ["old", "old"],
    }
    source = ray.data.read_parquet(str(write(tmp_path / "in", [columns])))
    options = {"columns": {"chosen": "good"}, "on_error": "return", "model": "pm"}
    scored = score_ray_dataset(source, client, actors=(1, 2), **options)
    scored.write_parquet(str(tmp_path / "out"))
    chosen, rejected = (score.reward for score in client.score(turns))
    first, second = read(tmp_path / "out")
    assert (first["chosen_reward"], first["rejected_reward"], first["margin"]) == (chosen, rejected, chosen - rejected)
    assert (second["good"], second["chosen_reward"]) == (turns[0], chosen)
    assert (second["rejected_reward"], second["margin"], first["error"]) == (None, None, None)
    assert second["error"].startswith("INVALID_ARGUMENT")


def test_an_error_ends_the_job(ray, server):
    from plumb_client.ray import score_ray_dataset

    with pytest.raises(Exception, match="item 1"):
        score_ray_dataset(ray.data.from_items([{"text": "a"}, {"text": ""}]), server.url, model="pm").take_all()


def test_actors_use_all_servers(ray):
    from plumb_client.ray import Scorer

    served = [set(), set()]

    def count(index):
        def behave(request, context):
            served[index].update(dict(context.invocation_metadata())["x-client-id"].split())
            return scores(request)

        return behave

    with fake(count(0)) as first, fake(count(1)) as second:
        client = Client([first, second], client_id="actors", batch_size=4)
        source = ray.data.from_items([{"text": str(i)} for i in range(64)], override_num_blocks=4)
        compute = ray.data.ActorPoolStrategy(size=2)
        scored = source.map_batches(
            Scorer, fn_constructor_args=(client,), compute=compute, num_cpus=0.25, batch_format="pyarrow", batch_size=16
        )
        rows = scored.take_all()
    assert {row["text"]: row["reward"] for row in rows} == {str(i): float(i) for i in range(64)}
    assert served == [{"actors"}, {"actors"}]


def test_a_job_waits_for_its_servers_and_has_one_id(ray):
    from plumb_client.ray import score_ray_dataset

    seen, calls = set(), itertools.count()

    def behave(request, context):
        if next(calls) < 6:
            refuse(context, grpc.StatusCode.UNAVAILABLE)
        seen.add(request.request_id)
        return scores(request)

    with fake(behave) as target:
        source = ray.data.from_items([{"text": str(i)} for i in range(32)], override_num_blocks=4)
        rows = score_ray_dataset(source, target, rows=4).take_all()
    assert {row["text"]: row["reward"] for row in rows} == {str(i): float(i) for i in range(32)}
    assert len(seen) == 1
