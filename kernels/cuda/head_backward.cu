// Losses on what a decoder ends in, and their gradients: rewards, and logits a tile of the vocabulary at a time, of which
// `head.cu` knows the largest and the sum of exp(logit - largest) over all tokens.
#include "logits.cuh"

constexpr unsigned THREADS = 256;

// How weight * softplus(rejected - chosen) of each pair of rewards[pairs, 2], chosen before rejected, changes with them.
// An exponential that is infinite makes a slope of 0, as it should.
KERNEL(pair_slopes, const float* rewards, float weight, float* slopes, unsigned pairs) {
    const unsigned pair = blockIdx.x * blockDim.x + threadIdx.x;
    if (pair >= pairs) return;
    const float d = weight / (1.0f + expf(rewards[2 * pair] - rewards[2 * pair + 1]));
    slopes[2 * pair] = -d;
    slopes[2 * pair + 1] = d;
}

// From the gradients d of the rewards weight[width] . x[rows, width] + bias: d_x[rows, width], and what is added to
// d_head, the weight's and behind it, where `biased`, the bias's. A thread for each column.
KERNEL(reward_backward, const float* x, const float* weight, const float* d, unsigned rows, unsigned width,
       unsigned biased, float* d_x, float* d_head) {
    const unsigned column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width) return;
    float sum = d_head[column], bias = 0;
    for (unsigned row = 0; row < rows; ++row) {
        const uint64_t at = uint64_t(row) * width + column;
        d_x[at] = d[row] * weight[column];
        sum += d[row] * x[at];
        bias += d[row];
    }
    d_head[column] = sum;
    if (column == 0 && biased) d_head[width] += bias;
}

// The logarithm of the sum of exp(logit) over the vocabulary.
__device__ __forceinline__ float log_sum(const float* largest, const float* sums) {
    return largest[blockIdx.x] + logf(sums[blockIdx.x]);
}

// losses[i] = -log softmax(logits)[target], in nats, from the target's logit.
KERNEL(token_losses, const float* chosen, const float* largest, const float* sums, float* losses, unsigned count) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) losses[i] = largest[i] + logf(sums[i]) - chosen[i];
}

// Of that loss of a row, times its weight, the gradient d[block, tile] of
// logits[block, tile], those of the tokens from `first` on, before the soft cap. A block for each row.
template <class E>
__device__ __forceinline__ void cross_entropy(const float* logits, unsigned tile, unsigned first, float softcap,
                                              const unsigned* targets, const float* weights, const float* largest,
                                              const float* sums, E* d) {
    const float all = log_sum(largest, sums), weight = weights[blockIdx.x];
    const unsigned target = targets[blockIdx.x];
    logits += uint64_t(blockIdx.x) * tile;
    d += uint64_t(blockIdx.x) * tile;
    for (unsigned at = threadIdx.x; at < tile; at += THREADS) {
        const float y = capped(logits[at], softcap);
        const float slope = expf(y - all) - (first + at == target ? 1.0f : 0.0f);
        d[at] = narrow<E>(weight * slope * cap_slope(y, softcap));
    }
}

// A teacher's likeliest tokens at all rows: those of a row are ids[starts[row]..starts[row + 1]], with their
// log-probabilities.

// Of the tile, the logits of a teacher's tokens into `taught`. A block for each row.
KERNEL(gather_taught, const float* logits, unsigned tile, unsigned first, float softcap, const unsigned* starts,
       const unsigned* ids, float* taught) {
    logits += uint64_t(blockIdx.x) * tile;
    const unsigned end = starts[blockIdx.x + 1];
    for (unsigned i = starts[blockIdx.x] + threadIdx.x; i < end; i += THREADS)
        if (ids[i] >= first && ids[i] - first < tile) taught[i] = capped(logits[ids[i] - first], softcap);
}

// The Kullback-Leibler divergence of the model from the teacher over the teacher's tokens and one category of all others
// (Askell et al. 2021, appendix B.5), and by what the probabilities of the others are multiplied in its gradient. A block
// for each row.
KERNEL(distil, const unsigned* starts, const float* log_probs, const float* taught, const float* largest,
       const float* sums, float* losses, float* factors) {
    // The least probability of all other tokens together: its logarithm stays finite.
    constexpr float LEAST = 1e-8f;
    __shared__ float scratch[THREADS / WARP];
    const float all = log_sum(largest, sums);
    float known = 0, seen = 0, loss = 0;
    const unsigned end = starts[blockIdx.x + 1];
    for (unsigned i = starts[blockIdx.x] + threadIdx.x; i < end; i += THREADS) {
        const float q = expf(log_probs[i]);
        known += q;
        seen += expf(taught[i] - all);
        loss += q * (log_probs[i] - (taught[i] - all));
    }
    known = block_sum(known, scratch);
    seen = block_sum(seen, scratch);
    loss = block_sum(loss, scratch);
    if (threadIdx.x != 0) return;
    const float q_rest = fmaxf(1.0f - known, LEAST), s_rest = fmaxf(1.0f - seen, LEAST);
    losses[blockIdx.x] = loss + q_rest * (logf(q_rest) - logf(s_rest));
    factors[blockIdx.x] = 1.0f - q_rest / s_rest;
}

// As cross_entropy, of that divergence.
template <class E>
__device__ __forceinline__ void distillation(const float* logits, unsigned tile, unsigned first, float softcap,
                                             const unsigned* starts, const unsigned* ids, const float* log_probs,
                                             const float* factors, const float* weights, const float* largest,
                                             const float* sums, E* d) {
    const float all = log_sum(largest, sums), weight = weights[blockIdx.x], factor = factors[blockIdx.x];
    logits += uint64_t(blockIdx.x) * tile;
    d += uint64_t(blockIdx.x) * tile;
    for (unsigned at = threadIdx.x; at < tile; at += THREADS) {
        const float y = capped(logits[at], softcap);
        d[at] = narrow<E>(weight * expf(y - all) * factor * cap_slope(y, softcap));
    }
    // The teacher's tokens have another gradient.
    __syncthreads();
    const unsigned end = starts[blockIdx.x + 1];
    for (unsigned i = starts[blockIdx.x] + threadIdx.x; i < end; i += THREADS) {
        if (ids[i] < first || ids[i] - first >= tile) continue;
        const float y = capped(logits[ids[i] - first], softcap);
        d[ids[i] - first] = narrow<E>(weight * (expf(y - all) - expf(log_probs[i])) * cap_slope(y, softcap));
    }
}

#define LOSSES(suffix, E)                                                                                           \
    KERNEL(cross_entropy_##suffix, const float* logits, unsigned tile, unsigned first, float softcap,               \
           const unsigned* targets, const float* weights, const float* largest, const float* sums, E* d) {          \
        cross_entropy(logits, tile, first, softcap, targets, weights, largest, sums, d);                            \
    }                                                                                                               \
    KERNEL(distillation_##suffix, const float* logits, unsigned tile, unsigned first, float softcap,                \
           const unsigned* starts, const unsigned* ids, const float* log_probs, const float* factors,               \
           const float* weights, const float* largest, const float* sums, E* d) {                                   \
        distillation(logits, tile, first, softcap, starts, ids, log_probs, factors, weights, largest, sums, d);     \
    }

LOSSES(f32, float)
LOSSES(bf16, bf16)
