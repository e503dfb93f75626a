// Gradients of q, k and v taken back through rotation and norm. A block takes ROWS rows, a warp a head at a time; what
// blocks have found of the gradients of the norms' weights is summed up afterwards, in an order of its own.
#include "device.cuh"

constexpr unsigned MAX_DIM = 256;
constexpr unsigned KEPT = MAX_DIM / WARP;
constexpr unsigned WARPS = 8;
constexpr unsigned ROWS = 16;

// dqkv and qkv are rows of q of all heads, k of all key heads, then v of all key heads; qkv is what the norms were
// given, and not read where there are none. The norms are q's and k's weights, or null. The rotation's table is
// [positions, rotated], cosines before sines. `parts[blocks, 2, dim]` are the gradients of q's and k's weights.
template <class E>
__device__ __forceinline__ void unprepare(const float* dqkv, const E* qkv, const unsigned* positions,
                                          const float* q_norm, const float* k_norm, float eps, const float* table,
                                          unsigned rotated, unsigned heads, unsigned kv_heads, unsigned dim,
                                          uint64_t count, E* out, float* parts) {
    const unsigned warp = threadIdx.x / WARP, all_heads = heads + 2 * kv_heads, half = rotated / 2;
    const uint64_t first = uint64_t(blockIdx.x) * ROWS;
    const unsigned rows = min(uint64_t(ROWS), count - first);
    __shared__ float shared[WARPS][MAX_DIM];
    float of_q[KEPT] = {}, of_k[KEPT] = {};
    for (unsigned i = warp; i < rows * all_heads; i += WARPS) {
        const uint64_t row = first + i / all_heads;
        const unsigned head = i % all_heads;
        const uint64_t at_head = (row * all_heads + head) * dim;
        float d[KEPT];
#pragma unroll
        for (unsigned j = 0; j < KEPT; ++j) {
            unsigned at = lane() + j * WARP;
            d[j] = at < dim ? dqkv[at_head + at] : 0;
        }
        if (head < heads + kv_heads && rotated > 0) {
            // A pair is half of the rotated part apart: in another lane, and perhaps in another place of it.
            const float* angles = table + uint64_t(positions[row]) * rotated;
#pragma unroll
            for (unsigned j = 0; j < KEPT; ++j) shared[warp][lane() + j * WARP] = d[j];
            __syncwarp();
#pragma unroll
            for (unsigned j = 0; j < KEPT; ++j) {
                unsigned at = lane() + j * WARP;
                if (at < half) d[j] = d[j] * angles[at] + shared[warp][at + half] * angles[half + at];
                else if (at < rotated) d[j] = d[j] * angles[at - half] - shared[warp][at - half] * angles[at];
            }
            // The next head goes where this one was.
            __syncwarp();
        }
        const float* norm = head < heads ? q_norm : (head < heads + kv_heads ? k_norm : nullptr);
        if (norm) {
            float x[KEPT], squares = 0, along = 0;
#pragma unroll
            for (unsigned j = 0; j < KEPT; ++j) {
                unsigned at = lane() + j * WARP;
                x[j] = at < dim ? wide(qkv[at_head + at]) : 0;
                squares += x[j] * x[j];
                if (at < dim) along += d[j] * norm[at] * x[j];
            }
            const float scale = 1.0f / sqrtf(warp_sum(squares) / dim + eps);
            along = warp_sum(along) * scale * scale * scale / dim;
#pragma unroll
            for (unsigned j = 0; j < KEPT; ++j) {
                unsigned at = lane() + j * WARP;
                if (at >= dim) continue;
                const float of_weight = d[j] * x[j] * scale;
                if (head < heads) of_q[j] += of_weight;
                else of_k[j] += of_weight;
                d[j] = d[j] * norm[at] * scale - x[j] * along;
            }
        }
#pragma unroll
        for (unsigned j = 0; j < KEPT; ++j) {
            unsigned at = lane() + j * WARP;
            if (at < dim) out[at_head + at] = narrow<E>(d[j]);
        }
    }
    if (!q_norm && !k_norm) return;
    for (unsigned part = 0; part < 2; ++part) {
        __syncthreads();
#pragma unroll
        for (unsigned j = 0; j < KEPT; ++j) shared[warp][lane() + j * WARP] = part == 0 ? of_q[j] : of_k[j];
        __syncthreads();
        for (unsigned at = threadIdx.x; at < dim; at += WARPS * WARP) {
            float sum = 0;
            for (unsigned i = 0; i < WARPS; ++i) sum += shared[i][at];
            parts[(uint64_t(blockIdx.x) * 2 + part) * dim + at] = sum;
        }
    }
}

#define UNPREPARE(suffix, E)                                                                                         \
    KERNEL(unprepare_##suffix, const float* dqkv, const E* qkv, const unsigned* positions, const float* q_norm,       \
           const float* k_norm, float eps, const float* table, unsigned rotated, unsigned heads, unsigned kv_heads,   \
           unsigned dim, uint64_t count, E* out, float* parts) {                                                      \
        unprepare(dqkv, qkv, positions, q_norm, k_norm, eps, table, rotated, heads, kv_heads, dim, count, out, parts); \
    }

UNPREPARE(f32, float)
UNPREPARE(bf16, bf16)

// Adds up `parts[count, 2, dim]`, those of q to d_q_norm and those of k to d_k_norm, where they are not null. A block
// takes 32 columns of one of them, each of its warps every WARPS-th part.
KERNEL(unprepare_norms, const float* parts, uint64_t count, unsigned dim, float* d_q_norm, float* d_k_norm) {
    float* to = blockIdx.y == 0 ? d_q_norm : d_k_norm;
    const unsigned column = blockIdx.x * WARP + lane(), warp = threadIdx.x / WARP;
    __shared__ float shared[WARPS][WARP];
    float sum = 0;
    if (to && column < dim)
        for (uint64_t part = warp; part < count; part += WARPS) sum += parts[(part * 2 + blockIdx.y) * dim + column];
    shared[warp][lane()] = sum;
    __syncthreads();
    if (!to || column >= dim || warp != 0) return;
    sum = 0;
    for (unsigned i = 0; i < WARPS; ++i) sum += shared[i][lane()];
    to[column] += sum;
}
