// Gradients of norms. One kernel takes them back to the rows, a block for each, and leaves what the other needs, which
// sums up those of the weights over parts of the rows; `sums.cu` adds the parts.
#include "row.cuh"

// Rows that a part sums up; as in `sums.cu`.
constexpr unsigned ROWS = 64;

// Adds to dx[block, width] the gradient of the row x[block, width], given that of its norm, dy[block, width].
// stats[block] are the row's mean, 0 for an RMS norm, and what it was multiplied by. width is a multiple of 4.
template <bool LAYER>
__device__ __forceinline__ void norm_backward(const float* x, const float* weight, float eps, const float* dy, float* dx,
                                              float2* stats, unsigned width) {
    __shared__ float scratch[THREADS / WARP];
    const uint64_t start = uint64_t(blockIdx.x) * width;
    dy += start;
    dx += start;
    Row row(x + start, width);
    float mean = 0;
    if (LAYER) {
        float sum = 0;
        row.each([&](unsigned, float4 x) { sum += (x.x + x.y) + (x.z + x.w); });
        mean = block_sum(sum, scratch) / width;
    }
    float squares = 0, level = 0, along = 0;
    row.each([&](unsigned at, float4 x) {
        float4 d = load4(dy + at), w = load4(weight + at);
        x = make_float4(x.x - mean, x.y - mean, x.z - mean, x.w - mean);
        d = make_float4(d.x * w.x, d.y * w.y, d.z * w.z, d.w * w.w);
        squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
        if (LAYER) level += (d.x + d.y) + (d.z + d.w);
        along += d.x * x.x + d.y * x.y + d.z * x.z + d.w * x.w;
    });
    const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / width + eps);
    level = LAYER ? block_sum(level, scratch) / width : 0;
    along = block_sum(along, scratch) * scale * scale / width;
    row.each([&](unsigned at, float4 x) {
        float4 d = load4(dy + at), w = load4(weight + at), sum = load4(dx + at);
        sum.x += scale * (d.x * w.x - level - (x.x - mean) * along);
        sum.y += scale * (d.y * w.y - level - (x.y - mean) * along);
        sum.z += scale * (d.z * w.z - level - (x.z - mean) * along);
        sum.w += scale * (d.w * w.w - level - (x.w - mean) * along);
        store4(dx + at, sum);
    });
    if (threadIdx.x == 0) stats[blockIdx.x] = make_float2(mean, scale);
}

KERNEL(rms_norm_backward, const float* x, const float* weight, float eps, const float* dy, float* dx, float2* stats,
       unsigned width) {
    norm_backward<false>(x, weight, eps, dy, dx, stats, width);
}
KERNEL(layer_norm_backward, const float* x, const float* weight, float eps, const float* dy, float* dx, float2* stats,
       unsigned width) {
    norm_backward<true>(x, weight, eps, dy, dx, stats, width);
}

// parts[y, width] of an RMS norm, parts[y, 2 * width] of a layer norm: the gradients of the weight, and then of the bias,
// from ROWS rows. A thread for each column.
template <bool LAYER>
__device__ __forceinline__ void norm_weights(const float* x, const float* dy, const float2* stats, unsigned rows,
                                             unsigned width, float* parts) {
    const unsigned column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width) return;
    const unsigned first = blockIdx.y * ROWS, end = min(first + ROWS, rows);
    float weight = 0, bias = 0;
    for (unsigned row = first; row < end; ++row) {
        const uint64_t at = uint64_t(row) * width + column;
        weight += dy[at] * (x[at] - stats[row].x) * stats[row].y;
        if (LAYER) bias += dy[at];
    }
    parts += uint64_t(blockIdx.y) * (LAYER ? 2 : 1) * width + column;
    parts[0] = weight;
    if (LAYER) parts[width] = bias;
}

KERNEL(rms_norm_weights, const float* x, const float* dy, const float2* stats, unsigned rows, unsigned width,
       float* parts) {
    norm_weights<false>(x, dy, stats, rows, width, parts);
}
KERNEL(layer_norm_weights, const float* x, const float* dy, const float2* stats, unsigned rows, unsigned width,
       float* parts) {
    norm_weights<true>(x, dy, stats, rows, width, parts);
}
