// What is read of the last hidden rows: rewards, and log-probabilities over a vocabulary that is never there as a whole.
//
// Logits come a tile of the vocabulary at a time. A row's state is the largest logit so far, the sum of exp(logit -
// largest), and whatever else is asked for. A block for each row.
#include "logits.cuh"

constexpr unsigned THREADS = 256;

// rewards[block] = weight[width] . x[block, width] + bias; width is a multiple of 4.
KERNEL(reward, const float* x, const float* weight, float bias, float* rewards, unsigned width) {
    __shared__ float scratch[THREADS / WARP];
    x += uint64_t(blockIdx.x) * width;
    float sum = 0;
    for (unsigned at = 4 * threadIdx.x; at < width; at += 4 * THREADS) {
        float4 a = load4(x + at), b = load4(weight + at);
        sum += a.x * b.x + a.y * b.y + (a.z * b.z + a.w * b.w);
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) rewards[blockIdx.x] = sum + bias;
}

// The largest over the block, for all its threads; NaN counts for nothing.
__device__ __forceinline__ float block_max(float value, float* scratch) {
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL, value, distance));
    __syncthreads();
    if (lane() == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    for (unsigned warp = 0; warp < THREADS / WARP; ++warp) value = fmaxf(value, scratch[warp]);
    return value;
}

// Takes logits[block, tile] of the tokens from `first` on into largest[block] and sums[block], which begin where `first`
// is 0. The logit of targets[block] goes to chosen[block], the largest of the tokens before it to ahead[block]; targets
// may be null.
KERNEL(fold_logits, const float* logits, unsigned tile, unsigned first, float softcap, const unsigned* targets,
       float* largest, float* sums, float* chosen, float* ahead) {
    __shared__ float scratch[THREADS / WARP];
    const unsigned row = blockIdx.x;
    logits += uint64_t(row) * tile;
    float most = -INFINITY;
    for (unsigned at = threadIdx.x; at < tile; at += THREADS) most = fmaxf(most, capped(logits[at], softcap));
    const float before = first == 0 ? -INFINITY : largest[row];
    if (targets && targets[row] >= first && targets[row] - first < tile) {
        const unsigned target = targets[row] - first;
        float earlier = -INFINITY;
        for (unsigned at = threadIdx.x; at < target; at += THREADS) earlier = fmaxf(earlier, capped(logits[at], softcap));
        earlier = fmaxf(block_max(earlier, scratch), before);
        if (threadIdx.x == 0) {
            chosen[row] = capped(logits[target], softcap);
            ahead[row] = earlier;
        }
    }
    most = fmaxf(block_max(most, scratch), before);
    // Where nothing is larger than minus infinity, nothing is subtracted.
    const float base = most == -INFINITY ? 0 : most;
    float sum = 0;
    for (unsigned at = threadIdx.x; at < tile; at += THREADS) sum += expf(capped(logits[at], softcap) - base);
    sum = block_sum(sum, scratch);
    if (threadIdx.x != 0) return;
    sums[row] = sum + (first == 0 ? 0 : sums[row] * expf(before - base));
    largest[row] = most;
}

// log_probs[2 i] = chosen[i] - log(sum of exp over the vocabulary), in nats; log_probs[2 i + 1] is 1 where the chosen
// token is the first of the likeliest, else 0.
KERNEL(log_probs, const float* chosen, const float* ahead, const float* largest, const float* sums, float* log_probs,
       unsigned count) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    log_probs[2 * i] = chosen[i] - largest[i] - logf(sums[i]);
    log_probs[2 * i + 1] = chosen[i] >= largest[i] && chosen[i] > ahead[i];
}

struct Candidate {
    float logit;
    unsigned id;
};

// The likelier of two, of equals the one with the smaller id.
__device__ __forceinline__ bool likelier(Candidate a, Candidate b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// Takes logits[block, tile] of the tokens from `first` on into best[block, count], the likeliest first, which begins
// where `first` is 0. Dynamic shared memory: 2 * count candidates.
KERNEL(fold_top, const float* logits, unsigned tile, unsigned first, float softcap, unsigned count, Candidate* best) {
    DYNAMIC_SHARED(Candidate, shared);
    __shared__ Candidate found[THREADS / WARP];
    const unsigned row = blockIdx.x;
    const Candidate none = {-INFINITY, 0xffffffff};
    logits += uint64_t(row) * tile;
    best += uint64_t(row) * count;
    // The likeliest of the tile, one after the other, until one is no better than the last so far.
    Candidate above = {INFINITY, 0};
    const Candidate last = first == 0 ? none : best[count - 1];
    unsigned taken = 0;
    for (bool begun = false; taken < count; begun = true) {
        Candidate own = none;
        for (unsigned at = threadIdx.x; at < tile; at += THREADS) {
            Candidate it = {capped(logits[at], softcap), first + at};
            if ((!begun || likelier(above, it)) && likelier(it, own)) own = it;
        }
        for (int distance = WARP / 2; distance > 0; distance /= 2) {
            Candidate other = {__shfl_xor_sync(ALL, own.logit, distance), __shfl_xor_sync(ALL, own.id, distance)};
            if (likelier(other, own)) own = other;
        }
        __syncthreads();
        if (lane() == 0) found[threadIdx.x / WARP] = own;
        __syncthreads();
        above = none;
        for (unsigned warp = 0; warp < THREADS / WARP; ++warp)
            if (likelier(found[warp], above)) above = found[warp];
        if (!likelier(above, last)) break;
        if (threadIdx.x == 0) shared[taken] = above;
        ++taken;
    }
    __syncthreads();
    // Both are in order: a candidate's place is its own, and how many of the others are likelier.
    for (unsigned i = threadIdx.x; i < count; i += THREADS) shared[count + i] = first == 0 ? none : best[i];
    __syncthreads();
    for (unsigned i = threadIdx.x; i < taken + count; i += THREADS) {
        const bool is_new = i < taken;
        const Candidate own = is_new ? shared[i] : shared[count + i - taken];
        unsigned place = is_new ? i : i - taken;
        const Candidate* others = is_new ? shared + count : shared;
        for (unsigned other = 0; other < (is_new ? count : taken); ++other) place += likelier(others[other], own);
        if (place < count) best[place] = own;
    }
}

// ids[i] and log_probs[i] of best[i]; each `count` of them are of a row.
KERNEL(top_log_probs, const Candidate* best, const float* largest, const float* sums, unsigned count, unsigned total,
       unsigned* ids, float* log_probs) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= total) return;
    ids[i] = best[i].id;
    log_probs[i] = best[i].logit - largest[i / count] - logf(sums[i / count]);
}

// x = softcap * tanh(x / softcap).
KERNEL(soft_cap, float* x, float softcap, uint64_t count) {
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += uint64_t(gridDim.x) * blockDim.x)
        x[i] = capped(x[i], softcap);
}
