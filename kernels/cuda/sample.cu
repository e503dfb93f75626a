// Drawing tokens from rows of logits; kernels/src/sample.rs says how, and computes the same to the bit. A block for
// each draw, which goes over its row a few times: logits stay in the GPU's cache, and nothing is sorted.
#include "device.cuh"

constexpr unsigned THREADS = 1024;
// As many warps as a warp has lanes.
constexpr unsigned WARPS = THREADS / WARP;
static_assert(WARPS == WARP, "a lane for each warp");

constexpr unsigned ID_BITS = 24, DIGIT = 9, BUCKETS = 1 << DIGIT, FIRST_SHIFT = 45;
constexpr uint64_t WHOLE = uint64_t(1) << 63;
constexpr unsigned NO_SET = 0xffffffff;
constexpr uint64_t EVERYTHING = ~uint64_t(0);
constexpr float LARGEST = 3.40282347e38f;

struct Terms {
    uint64_t random, top_p;
    unsigned row, top_k;
    float min_p, penalty, inverse_temperature;
    unsigned penalised, excluded, unused;
};

enum Status : unsigned { DRAWN, NOT_FINITE, ALL_EXCLUDED };

struct Outcome {
    // Of all weights, with nothing left out at temperature 1.
    uint64_t sum;
    float logit, largest;
    unsigned token, status;
};

// ---- what threads find out together ----

struct Add {
    __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Max {
    __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return max(a, b); }
};

// For all lanes.
template <class F>
__device__ __forceinline__ uint64_t of_warp(uint64_t value, F both) {
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        value = both(value, __shfl_xor_sync(ALL, value, distance));
    return value;
}

// For all threads.
template <class F>
__device__ __forceinline__ uint64_t of_block(uint64_t value, uint64_t* scratch, F both) {
    value = of_warp(value, both);
    __syncthreads();
    if (lane() == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    return of_warp(scratch[lane()], both);
}

// The sum up to each lane.
__device__ __forceinline__ uint64_t sums_of_warp(uint64_t value) {
    for (unsigned distance = 1; distance < WARP; distance *= 2) {
        const uint64_t before = __shfl_sync(ALL, value, int(lane() - distance));
        if (lane() >= distance) value += before;
    }
    return value;
}

// The first lane whose sum exceeds `value`; WARP if none does.
__device__ __forceinline__ unsigned first_above(uint64_t sum, uint64_t value) {
    return unsigned(of_warp(sum <= value, Add()));
}

// ---- weights ----

// A number that is larger for a larger float, none of which is NaN.
__device__ __forceinline__ unsigned ordered(float value) {
    const unsigned bits = __float_as_uint(value);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}
__device__ __forceinline__ float from_ordered(unsigned number) {
    return __uint_as_float(number >> 31 ? number & 0x7fffffff : ~number);
}

// e^x for x up to 0, as in kernels/src/math.rs.
__device__ __forceinline__ float exp_to_one(float x) {
    constexpr float ROUND = 12582912, LEAST = -86.9f;
    const float clamped = fmaxf(x, LEAST);
    const float rounded = fmaf(clamped, 1.44269504f, ROUND);
    const float n = rounded - ROUND;
    const float r = fmaf(n, 2.1219444e-4f, fmaf(n, -0.6933594f, clamped));
    float p = 1.9875691e-4f;
    p = fmaf(p, r, 1.3982e-3f);
    p = fmaf(p, r, 8.333452e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666665e-1f);
    p = fmaf(p, r, 0.5f);
    const float y = fmaf(p, r * r, r) + 1;
    const unsigned exponent = __float_as_uint(rounded) - __float_as_uint(ROUND) + 126;
    return x < LEAST ? 0 : y * __uint_as_float(exponent << 23) * 2;
}

__device__ __forceinline__ uint64_t whole(float weight) { return uint64_t(weight * 0x1p40f); }

__device__ __forceinline__ uint64_t place(unsigned token, float weight) {
    return uint64_t(__float_as_uint(1) - __float_as_uint(weight)) << ID_BITS | token;
}

__device__ __forceinline__ bool contains(const unsigned* set, unsigned token) {
    return set && set[token / 32] >> token % 32 & 1;
}

// A row, and what is done to its logits.
struct Row {
    const float* logits;
    unsigned vocabulary;
    const unsigned *penalised, *excluded;
    float penalty, inverse_temperature;
    // Of the adjusted logits.
    float largest;

    __device__ float adjusted(unsigned token, float logit) const {
        if (contains(excluded, token)) return -INFINITY;
        if (logit == -INFINITY || !contains(penalised, token)) return logit;
        return fminf(fmaxf(logit >= 0 ? logit / penalty : logit * penalty, -LARGEST), LARGEST);
    }

    __device__ float weight(unsigned token, float logit) const {
        return exp_to_one((adjusted(token, logit) - largest) * inverse_temperature);
    }

    // Calls f(token, logit) for tokens of the warp from `first` to `end`, several of which are loaded at a time.
    template <class F>
    __device__ __forceinline__ void each(unsigned first, unsigned end, F f) const {
        constexpr unsigned AT_ONCE = 8;
#pragma unroll 1
        for (unsigned token = first + lane(); token < end; token += AT_ONCE * WARP) {
            float values[AT_ONCE];
#pragma unroll
            for (unsigned i = 0; i < AT_ONCE; ++i)
                values[i] = token + i * WARP < end ? logits[token + i * WARP] : -INFINITY;
#pragma unroll
            for (unsigned i = 0; i < AT_ONCE; ++i)
                if (token + i * WARP < end) f(token + i * WARP, values[i]);
        }
    }

    // The same for all tokens, of all warps.
    template <class F>
    __device__ __forceinline__ void each(F f) const {
        const unsigned part = (vocabulary + THREADS - 1) / THREADS * WARP, first = threadIdx.x / WARP * part;
        each(first, min(first + part, vocabulary), f);
    }
};

// ---- the likeliest tokens ----

// Tokens by a digit of their places: how many, and the sums of their weights.
struct Histogram {
    unsigned count[BUCKETS], low[BUCKETS], high[BUCKETS];

    __device__ void clear() {
        __syncthreads();
        for (unsigned i = threadIdx.x; i < BUCKETS; i += THREADS) count[i] = low[i] = high[i] = 0;
        __syncthreads();
    }

    // A token whose place begins with the prefix.
    __device__ void add(uint64_t place, uint64_t weight, uint64_t prefix, unsigned shift) {
        const uint64_t digits = place >> shift;
        if (digits >> DIGIT != prefix) return;
        const unsigned bucket = unsigned(digits) % BUCKETS, part = unsigned(weight);
        const unsigned before = atomicAdd(&low[bucket], part);
        const unsigned rest = unsigned(weight >> 32) + (before + part < before);
        if (rest) atomicAdd(&high[bucket], rest);
        atomicAdd(&count[bucket], 1);
    }

    __device__ uint64_t weight(unsigned bucket) const { return uint64_t(high[bucket]) << 32 | low[bucket]; }
};

// Where a measure is reached.
struct Found {
    // BUCKETS if it is not.
    unsigned bucket, count;
    // The bucket's, and those of all before it.
    uint64_t weight, measure_before, weight_before;
};

// Finds the first bucket up to which there are `target` tokens, or there is so much weight; for the first warp.
__device__ __forceinline__ void find(const Histogram& histogram, bool by_count, uint64_t target, Found* found) {
    constexpr unsigned EACH = BUCKETS / WARP;
    uint64_t own_weight = 0, own_measure = 0;
    for (unsigned i = EACH * lane(); i < EACH * (lane() + 1); ++i) {
        own_weight += histogram.weight(i);
        own_measure += by_count ? histogram.count[i] : histogram.weight(i);
    }
    const uint64_t weights = sums_of_warp(own_weight), measures = sums_of_warp(own_measure);
    const unsigned at = first_above(measures, target - 1);
    if (at == WARP) {
        if (lane() == WARP - 1) *found = {BUCKETS, 0, 0, measures, weights};
    } else if (lane() == at) {
        Found it = {EACH * at, 0, 0, measures - own_measure, weights - own_weight};
        for (;; ++it.bucket) {
            it.count = histogram.count[it.bucket];
            it.weight = histogram.weight(it.bucket);
            const uint64_t measure = by_count ? it.count : it.weight;
            if (it.measure_before + measure >= target) break;
            it.measure_before += measure;
            it.weight_before += it.weight;
        }
        *found = it;
    }
}

struct Cut {
    // The largest place of the tokens, and the sum of their weights.
    uint64_t last, weight;
};

// The likeliest tokens that are `target` together, or have so much weight, or all. `first` is the histogram of the
// first digit.
__device__ Cut cut(const Row& row, const Histogram& first, bool by_count, uint64_t target, Histogram& histogram,
                   Found* found) {
    uint64_t prefix = 0, weight = 0;
    for (unsigned shift = FIRST_SHIFT;; shift -= DIGIT) {
        if (shift != FIRST_SHIFT) {
            histogram.clear();
            row.each([&](unsigned token, float logit) {
                const float weight = row.weight(token, logit);
                if (whole(weight)) histogram.add(place(token, weight), whole(weight), prefix, shift);
            });
            __syncthreads();
        }
        if (threadIdx.x < WARP) find(shift == FIRST_SHIFT ? first : histogram, by_count, target, found);
        __syncthreads();
        const Found it = *found;
        // It is written again.
        __syncthreads();
        weight += it.weight_before;
        if (it.bucket == BUCKETS) return {EVERYTHING, weight};
        target -= it.measure_before;
        prefix = prefix << DIGIT | it.bucket;
        if (shift == 0 || it.count == 1) return {((prefix + 1) << shift) - 1, weight + it.weight};
    }
}

// ---- the draw ----

// outcomes[block] of draws[block], from its row of logits[_, vocabulary]. Sets of tokens are bits of words in `sets`.
KERNEL_OF(THREADS, draw_tokens, const float* __restrict__ logits, unsigned vocabulary, const Terms* __restrict__ draws,
          const unsigned* __restrict__ sets, Outcome* outcomes) {
    __shared__ uint64_t scratch[WARPS];
    __shared__ Histogram first_digits, digits;
    __shared__ Found found;
    const Terms& terms = draws[blockIdx.x];
    Row row = {logits + uint64_t(terms.row) * vocabulary,
               vocabulary,
               terms.penalised == NO_SET ? nullptr : sets + terms.penalised,
               terms.excluded == NO_SET ? nullptr : sets + terms.excluded,
               terms.penalty,
               terms.inverse_temperature,
               0};

    // The largest logit; the largest adjusted one, of equals that with the lowest id.
    uint64_t most = 0, best = 0;
    row.each([&](unsigned token, float logit) {
        // NaN counts as infinity.
        most = max(most, uint64_t(ordered(logit < INFINITY ? logit : INFINITY)));
        // Minus zero is zero.
        best = max(best, uint64_t(ordered(row.adjusted(token, logit) + 0.0f)) << 32 | ~token);
    });
    const float largest = from_ordered(unsigned(of_block(most, scratch, Max())));
    best = of_block(best, scratch, Max());
    row.largest = from_ordered(unsigned(best >> 32));
    const bool finite = fabsf(largest) < INFINITY, possible = row.largest > -INFINITY;
    const Status status = !finite ? NOT_FINITE : !possible ? ALL_EXCLUDED : DRAWN;
    if (threadIdx.x == 0) outcomes[blockIdx.x] = {0, 0, largest, 0, status};
    if (!finite || !possible) return;

    // The sum of all weights, and tokens by the first digit of their places.
    const bool likeliest = terms.inverse_temperature == 0;
    const bool cuts = !likeliest && (terms.top_k < vocabulary || terms.top_p < WHOLE);
    if (cuts) first_digits.clear();
    uint64_t sum = 0;
    row.each([&](unsigned token, float logit) {
        sum += whole(exp_to_one(logit - largest));
        if (cuts) {
            const float weight = row.weight(token, logit);
            if (whole(weight)) first_digits.add(place(token, weight), whole(weight), 0, FIRST_SHIFT);
        }
    });
    sum = of_block(sum, scratch, Add());
    const auto drawn = [&](unsigned token) {
        if (threadIdx.x != 0) return;
        outcomes[blockIdx.x].token = token;
        outcomes[blockIdx.x].logit = row.logits[token];
    };
    if (threadIdx.x == 0) outcomes[blockIdx.x].sum = sum;
    if (likeliest) return drawn(~unsigned(best));

    // The place of the last token that is kept.
    uint64_t last = EVERYTHING;
    if (cuts) {
        uint64_t left = 0;
        for (unsigned i = threadIdx.x; i < BUCKETS; i += THREADS) left += first_digits.weight(i);
        left = of_block(left, scratch, Add());
        if (terms.top_k < vocabulary) {
            const Cut kept = cut(row, first_digits, true, terms.top_k, digits, &found);
            last = kept.last;
            left = kept.weight;
        }
        if (terms.top_p < WHOLE) {
            const uint64_t target = max(uint64_t(__umul64hi(left << 1, terms.top_p)), uint64_t(1));
            last = cut(row, first_digits, false, target, digits, &found).last;
        }
    }
    if (terms.min_p > 0) last = min(last, place((1 << ID_BITS) - 1, terms.min_p));
    const auto kept = [&](unsigned token, float logit) {
        const float weight = row.weight(token, logit);
        const uint64_t number = whole(weight);
        return number && place(token, weight) <= last ? number : 0;
    };

    // Each warp sums up a part of the tokens among which it is, until they are no more than a warp has lanes.
    unsigned first = 0, end = vocabulary;
    uint64_t random = 0;
    do {
        const unsigned part = (end - first + THREADS - 1) / THREADS * WARP;
        const unsigned own = first + threadIdx.x / WARP * part;
        uint64_t sum = 0;
        row.each(own, min(own + part, end), [&](unsigned token, float logit) { sum += kept(token, logit); });
        sum = of_warp(sum, Add());
        __syncthreads();
        if (lane() == 0) scratch[threadIdx.x / WARP] = sum;
        __syncthreads();
        const uint64_t weight = scratch[lane()], sums = sums_of_warp(weight);
        // Below the sum of all.
        if (end - first == vocabulary) random = __umul64hi(terms.random, __shfl_sync(ALL, sums, WARP - 1));
        const unsigned at = first_above(sums, random);
        random -= __shfl_sync(ALL, sums - weight, int(at));
        first += at * part;
        end = min(first + part, end);
    } while (end - first > WARP);
    const unsigned token = first + lane();
    const uint64_t sums = sums_of_warp(token < end ? kept(token, row.logits[token]) : 0);
    drawn(first + first_above(sums, random));
}
