"""Frames and data sets."""

import math

import pytest
from fake import fake, scores, versions

from plumb_client import Client, data
from plumb_client.data import PairAccuracy, pair_accuracy


def pairs():
    return {
        "prompt": ["What is 2 + 2?", [{"role": "user", "content": "Hi"}]],
        "chosen": ["4.", [{"role": "assistant", "content": "Hello."}]],
        "rejected": ["Five.", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go away."}]],
    }


ITEMS = [("What is 2 + 2?", "4."), ("What is 2 + 2?", "Five."), ("Hi", "Hello."), ("Hi", "Go away.")]


def rewards(client, items):
    return [score.reward for score in client.score(items)]


@pytest.mark.parametrize(
    ("table", "options", "items"),
    [
        ({"text": ["a", "b"], "id": [1, 2]}, {}, ["a", "b"]),
        ({"prompt": ["q", "r"], "response": ["a", "b"]}, {}, [("q", "a"), ("r", "b")]),
        ({"question": ["q"], "answer": ["a"]}, {"columns": {"prompt": "question", "response": "answer"}}, [("q", "a")]),
        ({"messages": [[{"role": "user", "content": "q"}]]}, {}, [[{"role": "user", "content": "q"}]]),
        ({"text": ["\n\nHuman: q\n\nAssistant: a"]}, {"split_turns": True}, [("q", "a")]),
        (
            {"prompt": ["Human: q\n\nAssistant: a\n\nHuman: r"], "response": ["b"]},
            {"split_turns": True},
            [([("user", "q"), ("assistant", "a"), ("user", "r")], "b")],
        ),
    ],
)
def test_a_frame_gets_rewards(client, table, options, items):
    pd = pytest.importorskip("pandas")
    as_turns = [
        ([{"role": role, "content": content} for role, content in item[0]], item[1])
        if isinstance(item, tuple) and isinstance(item[0], list)
        else item
        for item in items
    ]
    frame = pd.DataFrame(table, index=range(5, 5 + len(items)))
    scored = data.score_frame(frame, client, progress=False, **options)
    assert list(scored["reward"]) == rewards(client, as_turns)
    assert list(scored.columns) == [*table, "reward", "input_tokens"]
    assert list(scored.index) == list(frame.index)
    assert "reward" not in frame


def test_the_columns_that_are_named_are_those_that_are_read():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"prompt": ["1"], "response": ["2"], "text": ["3"], "essay": ["4"]})
    with fake(scores) as target, Client(target) as client:
        scored = data.score_frame(frame, client, progress=False, columns={"text": "essay"})
        assert list(scored["reward"]) == [4.0]
        with pytest.raises(ValueError, match="anser"):
            data.score_frame(frame, client, progress=False, columns={"response": "anser"})
        with pytest.raises(ValueError, match="needs one of"):
            data.score_frame(frame, client, progress=False, columns={"chosen": "essay"})


@pytest.mark.parametrize("table", ["frame", "data set"])
def test_rewards_of_several_versions_are_warned_of(table, caplog):
    pd, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    texts = {"text": ["a"] * 6}

    def score(client):
        if table == "frame":
            return data.score_frame(pd.DataFrame(texts), client, progress=False, batch_size=1, concurrency=1)
        return data.score_dataset(datasets.Dataset.from_dict(texts), client, rows=1)

    for numbers, warnings in (([1] * 6, 0), ([1, 1, 2, 1, 2, 2], 1), ([1, 2, 3, 3, 3, 3], 2)):
        caplog.clear()
        with fake(versions(*numbers)) as target, Client(target) as client:
            assert len(score(client)) == 6
        assert len([record for record in caplog.records if record.name.startswith("plumb_client")]) == warnings


def test_all_calls_of_a_data_set_have_one_id():
    datasets = pytest.importorskip("datasets")
    seen = set()

    def behave(request, context):
        seen.add(request.request_id)
        return scores(request)

    split = datasets.Dataset.from_dict({"text": list("123456")})
    with fake(behave) as target, Client(target) as client:
        data.score_dataset(datasets.DatasetDict(train=split, test=split), client, rows=1)
    assert len(seen) == 1


@pytest.mark.parametrize("several", [False, True])
def test_what_follows_the_scores_of_a_data_set_is_computed_again(several, tmp_path):
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"chosen": ["1", "2"], "rejected": ["2", "1"]})
    (datasets.DatasetDict(train=split) if several else split).save_to_disk(str(tmp_path))
    sign = 1.0

    def behave(request, context):
        answer = scores(request)
        for result in answer.results:
            result.score.reward *= sign
        return answer

    def better(row):
        return row["margin"] > 0

    with fake(behave) as target, Client(target) as client:
        for sign, rows in ((1.0, ["2"]), (-1.0, ["1"])):  # noqa: B007
            # As a program does that is run once more.
            scored = data.score_dataset(datasets.load_from_disk(str(tmp_path)), client)
            kept = scored.filter(better)
            assert list((kept["train"] if several else kept)["chosen"]) == rows


def test_a_frame_of_pairs(client):
    pd = pytest.importorskip("pandas")
    scored = data.score_frame(pd.DataFrame(pairs()), client)
    a, b, c, d = rewards(client, ITEMS)
    assert list(scored["chosen_reward"]) == [a, c]
    assert list(scored["rejected_reward"]) == [b, d]
    assert list(scored["margin"]) == [a - b, c - d]
    assert pair_accuracy(scored).accuracy == ((a > b) + (c > d)) / 2


def test_rows_that_fail_have_no_reward(client):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"chosen": ["a", "", None, math.nan], "rejected": ["b", "c", "d", "e"]})
    scored = data.score_frame(frame, client, progress=False, on_error="return")
    assert list(scored["chosen_reward"].isna()) == list(scored["margin"].isna()) == [False, True, True, True]
    assert list(scored["rejected_reward"].isna()) == [False, False, True, True]
    assert ["INVALID_ARGUMENT" in error for error in scored["error"][1:]] == [True] * 3
    assert (pair_accuracy(scored).pairs, pair_accuracy(scored).failed) == (1, 3)
    with pytest.raises(TypeError, match="item 2"):
        data.score_frame(frame.drop(index=1), client, progress=False, on_error="raise")
    with pytest.raises(ValueError, match="needs one of"):
        data.score_frame(frame[["chosen"]], client)
    with pytest.raises(ValueError, match="chosne"):
        data.score_frame(frame, client, columns={"chosne": "chosen"})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set(client, streaming):
    datasets = pytest.importorskip("datasets")
    table = {"prompt": ["q"] * 5, "response": [f"answer {i}" for i in range(5)]}
    dataset = datasets.Dataset.from_dict(table)
    scored = data.score_dataset(dataset.to_iterable_dataset() if streaming else dataset, client, rows=2)
    rows = list(scored)
    assert [row["reward"] for row in rows] == rewards(client, [("q", row["response"]) for row in rows])
    assert [row["response"] for row in rows] == table["response"]
    both = data.score_dataset(datasets.DatasetDict(train=dataset, test=dataset), client)
    assert both["test"][0] == {**rows[0]}


def test_a_data_set_of_pairs(client):
    datasets = pytest.importorskip("datasets")
    turns = "\n\nHuman: Hi\n\nAssistant: "
    dataset = datasets.Dataset.from_dict({"chosen": [turns + "Hello.", ""], "rejected": [turns + "Go away.", "x"]})
    scored = data.score_dataset(dataset, client, split_turns=True, on_error="return", rows=1)
    c, d = rewards(client, ITEMS[2:])
    assert (scored[0]["margin"], scored[0]["error"]) == (c - d, None)
    assert scored[1]["error"].startswith("INVALID_ARGUMENT: ")
    assert (scored[1]["chosen_reward"], scored[1]["margin"]) == (None, None)


@pytest.mark.parametrize(
    ("chosen", "rejected", "accuracy"),
    [
        # Intervals as in Wilson 1927; the last ones are those of Newcombe 1998, table I.
        ([1.0] * 81 + [0.0] * 182, [0.5] * 263, PairAccuracy(263, 0, 0, 81 / 263, 0.2553, 0.3662, -0.192)),
        ([0.0] * 20, [1.0] * 20, PairAccuracy(20, 0, 0, 0.0, 0.0, 0.1611, -1.0)),
        ([1.0], [1.0], PairAccuracy(1, 1, 0, 0.5, 0.0546, 0.9454, 0.0)),
        ([1.0, None, math.nan], [0.0, 1.0, 1.0], PairAccuracy(1, 0, 2, 1.0, 0.2065, 1.0, 1.0)),
    ],
)
def test_accuracy_of_pairs(chosen, rejected, accuracy):
    found = pair_accuracy({"chosen_reward": chosen, "rejected_reward": rejected})
    assert vars(found) == pytest.approx(vars(accuracy), abs=1e-4)


def test_accuracy_of_nothing_is_no_number():
    assert math.isnan(pair_accuracy({"chosen_reward": [], "rejected_reward": []}).accuracy)
