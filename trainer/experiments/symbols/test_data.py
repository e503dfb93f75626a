"""What the data have to be: python3 -m unittest discover trainer/experiments/symbols"""

import unittest

import data


def symbols(pair):
    return frozenset(side.removeprefix("GOOD:").removeprefix("BAD:") for side in pair)


class Sets(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.made = data.make(1)
        cls.sets = cls.made["sets"]

    def test_a_symbol_is_written_four_times(self):
        self.assertEqual(data.text("AC"), "(AC)(AC)(AC)(AC)")
        self.assertEqual(len(set(data.SYMBOLS)), 676)

    def test_no_pair_is_in_two_sets(self):
        test, finetuning, pretraining = ({symbols(pair) for pair in self.sets[name]} for name in ("test", "T0", "T1"))
        self.assertEqual([len(test), len(finetuning), len(pretraining)], [1000, 18000, 18000])
        self.assertFalse(test & finetuning or test & pretraining or finetuning & pretraining)
        self.assertTrue(all(len(pair) == 2 for pair in test | finetuning | pretraining))

    def test_one_ranking_orders_test_and_finetuning(self):
        # The symbol that wins all its pairs in one set loses none in the other.
        better, worse = ({side[at] for side in self.sets["T0"]} for at in (0, 1))
        best, worst = better - worse, worse - better
        self.assertFalse([pair for pair in self.sets["test"] if pair[1] in best or pair[0] in worst])

    def test_scrambled_sets_differ_in_order_alone(self):
        first = [symbols(pair) for pair in self.sets["T1"]]
        for name in ("T2", "T3", "T4", "unrelated"):
            self.assertEqual([symbols(pair) for pair in self.sets[name]], first)

    def test_more_transpositions_share_less(self):
        shares = [self.made["shared"][name] for name in ("T1", "T2", "T3", "T4")]
        self.assertEqual(shares, sorted(shares, reverse=True))
        # An exchange of two symbols d places apart turns 2d - 1 of the 228,150 pairs, about 450 on average.
        self.assertAlmostEqual(shares[0], 1 - 10 * 450 / 228150, delta=0.01)
        self.assertLess(shares[3], 0.6)
        self.assertAlmostEqual(self.made["shared"]["unrelated"], 0.5, delta=0.06)

    def test_halves_share_three_quarters(self):
        # All pairs across the middle, and half of the others.
        across = 338 * 338 / 228150
        self.assertAlmostEqual(self.made["shared"]["binary"], across + (1 - across) / 2)

    def test_a_symbol_is_good_or_bad_for_good(self):
        pairs = self.sets["binary"]
        self.assertEqual(len(pairs), data.PRETRAINING_PAIRS)
        self.assertTrue(all(len(symbols(pair)) == 1 for pair in pairs))
        good = {next(iter(symbols(pair))) for pair in pairs if pair[0].startswith("GOOD:")}
        bad = {next(iter(symbols(pair))) for pair in pairs if pair[0].startswith("BAD:")}
        self.assertEqual((len(good), len(bad)), (338, 338))
        self.assertFalse(good & bad)

    def test_a_seed_is_one_experiment(self):
        self.assertEqual(data.make(1), self.made)
        self.assertNotEqual(data.make(2)["sets"]["test"], self.sets["test"])


if __name__ == "__main__":
    unittest.main()
