"""Prints the golden values of the tests in client/src/stats.rs. Needs scipy 1.17.

    python tests/python/golden_statistics.py
"""

import numpy as np
from scipy import special, stats


def numbers(n, seed):
    """The generator of the Rust tests: a linear congruence, cut to halves so that there are ties."""
    state, out = seed, []
    for _ in range(n):
        state = (state * 1103515245 + 12345) % 2**31
        out.append((state >> 16) % 40 / 2 - 10)
    return np.array(out)


a, b = numbers(50, 1), numbers(50, 2)
c = a + b / 4
print("a", a[:4], "b", b[:4])
for name, x, y in (("a, b", a, b), ("a, c", a, c), ("b, c", b, c)):
    distance = stats.ks_2samp(x, y).statistic
    effective = np.sqrt(len(x) * len(y) / (len(x) + len(y)))
    print(name)
    print("  spearman", repr(float(stats.spearmanr(x, y).statistic)))
    print("  kendall", repr(float(stats.kendalltau(x, y).statistic)))
    print("  ks", repr(float(distance)), repr(float(special.kolmogorov(effective * distance))))
short = numbers(17, 3)
print("ks of unequal numbers", repr(float(stats.ks_2samp(a, short).statistic)))
print("kolmogorov", [repr(float(special.kolmogorov(x))) for x in (0.2, 0.5, 0.99, 1.0, 1.5, 3.0)])
print("summary of c", [repr(float(v)) for v in (c.mean(), c.std(ddof=1), *np.quantile(c, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]))])

# Clusters of 1, 2, 3, 4, 5, 1, 2, ... observations of c.
sizes, sums, at = [], [], 0
while at < len(c):
    size = min(len(sizes) % 5 + 1, len(c) - at)
    sums.append(c[at : at + size].sum())
    sizes.append(size)
    at += size
sizes, sums = np.array(sizes), np.array(sums)
mean = sums.sum() / sizes.sum()
k = len(sizes)
error = np.sqrt(((sums - mean * sizes) ** 2).sum() * k / (k - 1)) / sizes.sum()
half = stats.norm.ppf(0.975) * error
print("clustered", repr(float(mean)), repr(float(mean - half)), repr(float(mean + half)))
