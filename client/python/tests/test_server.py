"""The real server: rewards of Transformers and of the command, and every call of the contract."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from both import KINDS, ask
from conftest import FIXTURES, expected

from plumb_client import (
    SERVICES,
    AlreadyExistsError,
    FailedPreconditionError,
    FinishReason,
    Health,
    InvalidArgumentError,
    ModelKind,
    ModelState,
    NotFoundError,
    Score,
    Text,
    TokenIds,
)

TOLERANCE = 1e-4

both = pytest.mark.parametrize("kind", KINDS)
DIALOGUES = [("What is 2 + 2?", "4."), ("What is 2 + 2?", "Five."), ("Größe?", "東京 🙂")]


@both
def test_rewards_are_those_of_transformers(kind, server):
    truth = expected("llama-pm")
    for form in ("text", "token_ids"):
        items = [case[form] for case in truth["cases"]]
        scores = ask(kind, server.url, lambda c, items=items: c.score(items, model="llama-pm", per_token=True))
        for case, score in zip(truth["cases"], scores, strict=True):
            assert score.reward == pytest.approx(case["reward"], abs=TOLERANCE)
            assert [token.value for token in score.tokens] == pytest.approx(case["token_rewards"], abs=TOLERANCE)
            assert [token.id for token in score.tokens] == case["token_ids"]
            assert (score.input_tokens, score.model.name) == (len(case["token_ids"]), "llama-pm")
    talks = truth["conversations"]
    scores = ask(kind, server.url, lambda c: c.score([talk["messages"] for talk in talks], model="llama-pm"))
    assert [s.reward for s in scores] == pytest.approx([talk["reward"] for talk in talks], abs=TOLERANCE)


def test_log_probabilities_are_those_of_transformers(client):
    for case in expected("llama-lm")["cases"]:
        item = TokenIds(case["token_ids"], response_start=3)
        [score] = client.score([item], model="llama-lm", objective="sum", per_token=True)
        # The first token has none.
        wanted = case["token_log_probs"][2:]
        assert [token.value for token in score.tokens] == pytest.approx(wanted, abs=TOLERANCE)
        assert score.reward == score.log_probs.sum == pytest.approx(sum(wanted), abs=1e-2)
        assert (score.log_probs.response_tokens, score.log_probs.unconditional_sum) == (len(wanted), None)
        [mutual] = client.score([item], model="llama-lm", objective="mutual-information")
        assert mutual.log_probs.unconditional_sum is not None


@both
def test_rewards_are_those_of_the_command(kind, server):
    items = ["A text.", *DIALOGUES, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]
    lines = [{"text": items[0]}, *({"prompt": q, "response": a} for q, a in DIALOGUES), {"messages": items[-1]}]
    said = server.plumb("score", "--model", "pm", "--json", "-", stdin="\n".join(map(json.dumps, lines)))
    wanted = [json.loads(line) for line in said.splitlines() if "reward" in line]
    scores = ask(kind, server.url, lambda c: c.score(items, model="pm"))
    # The command prints the shortest digits that make the same f32.
    assert [s.reward for s in scores] == pytest.approx([line["reward"] for line in wanted], rel=1e-7)
    assert [s.input_tokens for s in scores] == [line["input_tokens"] for line in wanted]


@both
def test_many_items_get_the_scores_that_each_has_alone(kind, server):
    items = [f"Text number {i}." for i in range(200)]
    together = ask(kind, server.url, lambda c: c.score(items, model="llama-pm"))
    stream = ask(kind, server.url, lambda c: c.score_stream(iter(items), model="llama-pm", batch_size=7))
    large = ask(kind, server.url, lambda c: c.score(items, model="llama-pm", batch_size=200))
    assert together == stream == large
    assert len({score.reward for score in together}) > 100
    alone = ask(kind, server.url, lambda c: c.score([items[137]], model="llama-pm"))
    assert alone == [together[137]]


def test_a_source_without_end_and_several_threads(client):
    def first(start: int) -> list[float]:
        stream = client.score_stream((f"{i}" for i in itertools.count(start)), batch_size=3, concurrency=2)
        return [next(stream).reward for _ in range(20)]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(first, range(4)))
    assert [rewards[3 - i] for i, rewards in enumerate(found)] == [found[0][3]] * 4


@both
def test_items_that_fail(kind, server):
    items = ["", "ok", "x" * 40_000]
    found = ask(kind, server.url, lambda c: c.score(items, model="pm", on_error="return"))
    assert [type(result) for result in found] == [InvalidArgumentError, Score, InvalidArgumentError]
    assert [found[0].index, found[2].index] == [0, 2]
    alone = ask(kind, server.url, lambda c: c.score(items, model="pm", on_error="return", batch_size=1))
    assert [type(result) for result in alone] == [type(result) for result in found]
    assert str(alone[0]) == str(found[0])
    # A call whose items all fail is refused with the first one's reason; the others have their own.
    failed = ask(kind, server.url, lambda c: c.score([items[0], items[2]], model="pm", on_error="return"))
    assert [result.message for result in failed] == [found[0].message, found[2].message]
    with pytest.raises(InvalidArgumentError, match="item 0"):
        ask(kind, server.url, lambda c: c.score(items, model="pm"))
    with pytest.raises(NotFoundError):
        ask(kind, server.url, lambda c: c.score(["a"], model="nobody", on_error="return"))
    [cut] = ask(kind, server.url, lambda c: c.score(items[2:], model="pm", truncation="left", max_tokens=50))
    assert (cut.truncated, cut.input_tokens) == (True, 50)


@both
def test_ranks(kind, server):
    candidates = ["4.", "Five.", "I am not sure."]
    ranking = ask(kind, server.url, lambda c: c.rank("What is 2 + 2?", candidates, model="pm"))
    scores = ask(kind, server.url, lambda c: c.score([("What is 2 + 2?", a) for a in candidates], model="pm"))
    assert [ranked.score for ranked in ranking.ranked] == [scores[ranked.index] for ranked in ranking.ranked]
    assert [ranked.rank for ranked in ranking.ranked] == [1, 2, 3]
    assert ranking.best.score.reward == max(score.reward for score in scores)
    assert (ranking.best.margin, ranking.best.probability) == (0.0, 0.5)
    by_ids = ask(kind, server.url, lambda c: c.rank([1, 2], [[3], TokenIds([4, 5])], model="pm"))
    whole = ask(kind, server.url, lambda c: c.score([[1, 2, 3], [1, 2, 4, 5]], model="pm"))
    assert {r.index: r.score for r in by_ids.ranked} == dict(enumerate(whole))
    partly = ask(kind, server.url, lambda c: c.rank(Text("a"), ["b", "c" * 40_000], model="pm"))
    assert (partly.ranked[1].rank, partly.ranked[1].score, type(partly.ranked[1].error)) == (
        0,
        None,
        InvalidArgumentError,
    )


@both
def test_generated_text(kind, server):
    def use(client):
        return client.generate("Hello", model="lm", max_new_tokens=12, seed=7, n=2, temperature=0.8, request_id="r")

    whole, again = ask(kind, server.url, use), ask(kind, server.url, use)
    assert whole == again
    assert (len(whole.samples), whole.seed, whole.model.name, whole.request_id) == (2, 7, "lm", "r")
    for sample in whole.samples:
        assert sample.new_tokens == len(sample.token_ids) <= 12
        assert sample.sum_log_prob < 0
        assert sample.finish_reason in (FinishReason.LENGTH, FinishReason.EOS, FinishReason.STOP_STRING)
    options = {"model": "lm", "max_new_tokens": 12, "seed": 7, "n": 2, "temperature": 0.8}
    pieces = ask(kind, server.url, lambda c: c.generate_stream("Hello", **options))
    assert "".join(piece.text for piece in pieces if piece.index == 0) == whole.text
    assert sum(piece.end is not None for piece in pieces) == 2

    greedy = expected("llama-lm")["cases"][0]
    options = {"model": "llama-lm", "temperature": 0.0, "max_new_tokens": len(greedy["greedy"]), "ignore_eos": True}
    found = ask(kind, server.url, lambda c: c.generate(greedy["token_ids"], **options))
    assert list(found.samples[0].token_ids) == greedy["greedy"]
    assert found.prompt_tokens == len(greedy["token_ids"])


@both
def test_the_best_of_several_samples(kind, server):
    options = {"model": "lm", "best_of": 4, "n": 2, "ranker": "pm", "max_new_tokens": 6, "seed": 1}
    found = ask(kind, server.url, lambda c: c.generate("Hello", **options))
    rewards = [sample.reward for sample in found.samples]
    assert (len(rewards), found.ranker.name) == (2, "pm")
    assert rewards == sorted(rewards, reverse=True)
    [score] = ask(kind, server.url, lambda c: c.score([("Hello", found.text)], model="pm"))
    assert score.reward == pytest.approx(rewards[0], abs=TOLERANCE)


@both
def test_tokens(kind, server):
    case = expected("llama-pm")["cases"][1]
    [tokens] = ask(kind, server.url, lambda c: c.tokenize([case["text"]], model="llama-pm"))
    assert [token.id for token in tokens] == case["token_ids"]
    use = lambda c: c.tokenize([case["text"]], model="llama-pm", add_special_tokens=False)  # noqa: E731
    [bare] = ask(kind, server.url, use)
    assert [token for token in tokens if not token.special] == list(bare)
    talk = expected("llama-pm")["conversations"][0]
    for generation, suffix in ((False, ""), (True, "_with_generation_prompt")):
        use = lambda c, g=generation: c.render(talk["messages"], add_generation_prompt=g, model="llama-pm")  # noqa: E731
        rendered = ask(kind, server.url, use)
        assert rendered.text == talk["rendered" + suffix]
        assert list(rendered.token_ids) == talk["token_ids" + suffix]


@both
def test_models_come_and_go(kind, server):
    def models():
        return {(m.model.name, m.model.version): m for m in ask(kind, server.url, lambda c: c.models())}

    name = f"extra-{kind}"
    source = str(FIXTURES / "llama-pm")
    loaded = ask(kind, server.url, lambda c: c.load_version(name, source, version=4))
    assert (loaded.model.name, loaded.model.version, loaded.state) == (name, 4, ModelState.AVAILABLE)
    assert (loaded.details.kind, loaded.details.reward_head) == (ModelKind.PREFERENCE, "score.weight")
    assert loaded == ask(kind, server.url, lambda c: c.model(model=name))
    with pytest.raises(AlreadyExistsError):
        ask(kind, server.url, lambda c: c.load_version(name, source, version=4))
    labelled = ask(kind, server.url, lambda c: c.set_label(name, "canary", 4))
    assert labelled.labels == ("canary",)
    shared = ask(kind, server.url, lambda c: c.set_traffic(name, {"canary": 3}))
    assert [model.traffic_weight for model in shared] == [3]
    [score] = ask(kind, server.url, lambda c: c.score(["a"], model=name, label="canary"))
    assert score.model == loaded.model
    ask(kind, server.url, lambda c: c.set_traffic(name, {}))
    assert ask(kind, server.url, lambda c: c.set_label(name, "canary", None)) is None
    assert models()[name, 4].state is ModelState.AVAILABLE

    def first(client):
        watch = client.watch_models(name)
        if kind == "sync":
            return next(watch)

        async def one():
            return await watch.__anext__()

        return one()

    assert ask(kind, server.url, first).model == loaded.model
    gone = ask(kind, server.url, lambda c: c.unload_version(name, 4))
    assert gone.state in (ModelState.DRAINING, ModelState.ENDED)
    with pytest.raises((NotFoundError, FailedPreconditionError)):
        ask(kind, server.url, lambda c: c.score(["a"], model=name, version=4))


@both
def test_a_split_of_the_calls_does_not_run_through_a_score(kind, server):
    name = f"split-{kind}"
    for version, label in ((1, "stable"), (2, "canary")):
        ask(kind, server.url, lambda c, v=version: c.load_version(name, str(FIXTURES / "llama-pm"), version=v))
        ask(kind, server.url, lambda c, v=version, at=label: c.set_label(name, at, v))
    ask(kind, server.url, lambda c: c.set_traffic(name, {"stable": 1, "canary": 1}))
    use = lambda c: c.score([f"Text {i}." for i in range(12)], model=name, batch_size=1)  # noqa: E731
    versions = [{score.model.version for score in ask(kind, server.url, use)} for _ in range(16)]
    assert {len(seen) for seen in versions} == {1}
    assert set().union(*versions) == {1, 2}
    ask(kind, server.url, lambda c: c.set_traffic(name, {}))
    for version, label in ((1, "stable"), (2, "canary")):
        ask(kind, server.url, lambda c, at=label: c.set_label(name, at, None))
        ask(kind, server.url, lambda c, v=version: c.unload_version(name, v))


@both
def test_health(kind, server):
    for service in ("", *SERVICES):
        assert ask(kind, server.url, lambda c, s=service: c.health(s)) is Health.SERVING
    with pytest.raises(NotFoundError):
        ask(kind, server.url, lambda c: c.health("nobody"))
    assert ask(kind, server.url, lambda c: c.wait_ready()) is None
