// What attention reads: q and k normed and rotated (Su et al. 2021), k and v written to their pages. A warp for each
// head of each row.
#include "pages.cuh"

constexpr unsigned MAX_DIM = 256;
constexpr unsigned KEPT = MAX_DIM / WARP;
constexpr unsigned NONE = 0xffffffff;

// A row is q of all heads, k of all key heads, then v of all key heads. `norms` are q's and k's weights, or null.
// Pages are as in pages.cuh, q is [rows, heads, padded_dim]; what pads is 0. Row i goes to position positions[i] of its
// sequence, which is in page pages[i]; of a row that is of no sequence, whose page is NONE, nothing is kept. The rotation's
// table is [positions, rotated], cosines before sines.
//
// A v that is not finite would reach queries that do not see it, through a weight of zero, so it is left out, and its
// key becomes NaN, which is masked for those and seen by the others.
template <class E>
__device__ __forceinline__ void prepare(const E* qkv, const unsigned* positions, const unsigned* pages,
                                        const float* q_norm, const float* k_norm, float eps, const float* table,
                                        unsigned rotated, unsigned heads, unsigned kv_heads, unsigned dim,
                                        unsigned padded_dim, E* q, E* keys, E* values) {
    unsigned head = blockIdx.y * (blockDim.x / WARP) + threadIdx.x / WARP;
    const uint64_t row = blockIdx.x;
    if (head >= heads + 2 * kv_heads || (head >= heads && pages[row] == NONE)) return;
    const E* x = qkv + (row * (heads + 2 * kv_heads) + head) * dim;
    float kept[KEPT];
#pragma unroll
    for (unsigned i = 0; i < KEPT; ++i) {
        unsigned at = lane() + i * WARP;
        kept[i] = at < dim ? wide(x[at]) : 0;
    }
    const unsigned position = positions[row];
    const uint64_t tile = uint64_t(pages[row]) * kv_heads + (head - heads) % kv_heads;
    E* out = head < heads ? q + (row * heads + head) * padded_dim
                          : (head < heads + kv_heads ? keys : values) + tile * PAGE * padded_dim;
    if (head >= heads + kv_heads) {
        bool finite = true;
#pragma unroll
        for (unsigned i = 0; i < KEPT; ++i) finite &= isfinite(kept[i]);
        finite = warp_sum(finite ? 0 : 1) == 0;
#pragma unroll
        for (unsigned i = 0; i < KEPT; ++i) {
            unsigned at = lane() + i * WARP;
            if (at < padded_dim) out[in_tile<E>(position, at, padded_dim)] = narrow<E>(finite ? kept[i] : 0);
        }
        return;
    }
    const float* norm = head < heads ? q_norm : k_norm;
    if (norm) {
        float squares = 0;
#pragma unroll
        for (unsigned i = 0; i < KEPT; ++i) squares += kept[i] * kept[i];
        float scale = 1.0f / sqrtf(warp_sum(squares) / dim + eps);
#pragma unroll
        for (unsigned i = 0; i < KEPT; ++i) {
            unsigned at = lane() + i * WARP;
            if (at < dim) kept[i] *= scale * norm[at];
        }
    }
    // A pair is half of the rotated part apart: in another lane, and perhaps in another place of it.
    const unsigned half = rotated / 2;
    const float* angles = table + uint64_t(position) * rotated;
    __shared__ float all[4][MAX_DIM];
    float* shared = all[threadIdx.x / WARP];
#pragma unroll
    for (unsigned i = 0; i < KEPT; ++i) shared[lane() + i * WARP] = kept[i];
    __syncwarp();
    bool poisoned = false;
    if (head >= heads) {
        const E* v = x + uint64_t(kv_heads) * dim;
        bool finite = true;
        for (unsigned at = lane(); at < dim; at += WARP) finite &= isfinite(wide(v[at]));
        poisoned = warp_sum(finite ? 0 : 1) != 0;
    }
#pragma unroll
    for (unsigned i = 0; i < KEPT; ++i) {
        unsigned at = lane() + i * WARP;
        float y = kept[i];
        if (at < half) y = y * angles[at] - shared[at + half] * angles[half + at];
        else if (at < rotated) y = y * angles[at - half] + shared[at - half] * angles[at];
        unsigned to = head < heads ? at : in_tile<E>(position, at, padded_dim);
        if (at < padded_dim) out[to] = narrow<E>(poisoned ? NAN : y);
    }
}

#define PREPARE(suffix, E)                                                                                           \
    KERNEL(prepare_##suffix, const E* qkv, const unsigned* positions, const unsigned* pages, const float* q_norm, \
           const float* k_norm, float eps, const float* table, unsigned rotated, unsigned heads, unsigned kv_heads,  \
           unsigned dim, unsigned padded_dim, E* q, E* keys, E* values) {                                            \
        prepare(qkv, positions, pages, q_norm, k_norm, eps, table, rotated, heads, kv_heads, dim, padded_dim, q,     \
                keys, values);                                                                                       \
    }

PREPARE(f32, float)
PREPARE(bf16, bf16)
