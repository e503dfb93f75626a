"""Makes the symbol data of Askell et al. 2021, appendix C.6: a random ranking of 676 symbols, and pairs in its order.

The sets share no pair of symbols. The test pairs are set aside first, from pretraining too: a scrambled ranking orders
nearly all pairs as the control does, so that a test pair among its pairs would be an answer seen before. What may carry
over is what is known of the symbols.
"""

import itertools
import json
import random
import string

SYMBOLS = ["".join(letters) for letters in itertools.product(string.ascii_uppercase, repeat=2)]
# Random transpositions that make a pretraining ranking of the control ranking T0.
SCRAMBLES = {"T1": 10, "T2": 40, "T3": 160, "T4": 640}
TEST_PAIRS = 1000
FINETUNING_PAIRS = 18000
PRETRAINING_PAIRS = 18000


def make(seed):
    """Everything that follows from a seed: {"sets": {name: [(better, worse), ...]}, "shared": {name: share}}.

    `shared` is how much of the control's order a pretraining set knows: the share of all pairs of symbols that are in
    the control's order, where pairs that it leaves open count half. Who learned it perfectly is right so often.
    """
    rng = random.Random(seed)
    ranking = SYMBOLS.copy()
    rng.shuffle(ranking)
    pairs = list(itertools.combinations(ranking, 2))
    rng.shuffle(pairs)
    pairs = iter(pairs)
    take = lambda count: list(itertools.islice(pairs, count))  # noqa: E731
    test, finetuning, pretraining = take(TEST_PAIRS), take(FINETUNING_PAIRS), take(PRETRAINING_PAIRS)
    sets = {"test": texts(test), "T0": texts(finetuning)}
    shared = {}
    # The same pairs for all, each in the order of its own ranking.
    for name, transpositions in SCRAMBLES.items():
        place = {symbol: at for at, symbol in enumerate(scrambled(ranking, transpositions, rng))}
        sets[name] = texts(sorted(pair, key=place.get) for pair in pretraining)
        shared[name] = agreement(ranking, place)
    good, bad = ranking[: len(ranking) // 2], ranking[len(ranking) // 2 :]
    sets["binary"] = binary(good, bad, rng)
    shared["binary"] = agreement(ranking, {symbol: symbol in bad for symbol in ranking})
    # Not in the paper: the same pairs in an order that says nothing of the control's.
    unrelated = {symbol: at for at, symbol in enumerate(rng.sample(SYMBOLS, len(SYMBOLS)))}
    sets["unrelated"] = texts(sorted(pair, key=unrelated.get) for pair in pretraining)
    shared["unrelated"] = agreement(ranking, unrelated)
    shared["none"] = 0.5
    return {"sets": sets, "shared": shared}


def text(symbol):
    return f"({symbol})" * 4


def texts(pairs):
    return [(text(better), text(worse)) for better, worse in pairs]


def scrambled(ranking, transpositions, rng):
    """The ranking after so many exchanges of two symbols, anywhere in it."""
    ranking = ranking.copy()
    for _ in range(transpositions):
        i, j = rng.sample(range(len(ranking)), 2)
        ranking[i], ranking[j] = ranking[j], ranking[i]
    return ranking


def binary(good, bad, rng):
    """Binarised as in section 4.1: of a good and a bad symbol, drawn at random, each becomes a pair of its own."""
    pairs = []
    for _ in range(PRETRAINING_PAIRS // 2):
        better, worse = text(rng.choice(good)), text(rng.choice(bad))
        pairs += [(f"GOOD:{better}", f"BAD:{better}"), (f"BAD:{worse}", f"GOOD:{worse}")]
    return pairs


def agreement(ranking, place):
    """Share of pairs that `place` has in the order of the ranking; equal places count half."""
    places = [place[symbol] for symbol in ranking]
    points = [(a < b) + (a == b) / 2 for a, b in itertools.combinations(places, 2)]
    return sum(points) / len(points)


def lines(pairs):
    """As `plumb-train` reads them."""
    return "".join(json.dumps({"chosen": better, "rejected": worse}) + "\n" for better, worse in pairs)
