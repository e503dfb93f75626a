// Sums over rows, in one order whatever the grid: what gradients of biases, of norms and of embeddings are made of.
#include "device.cuh"

// Rows that a part sums up.
constexpr unsigned ROWS = 64;

// parts[y, columns]: the sums over ROWS rows of x, of which a row begins every `stride` elements. A thread for each
// column.
template <class E>
__device__ __forceinline__ void column_sums(const E* x, unsigned rows, uint64_t stride, unsigned columns, float* parts) {
    const unsigned column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    const unsigned first = blockIdx.y * ROWS, end = min(first + ROWS, rows);
    float sum = 0;
    for (unsigned row = first; row < end; ++row) sum += wide(x[row * stride + column]);
    parts[uint64_t(blockIdx.y) * columns + column] = sum;
}

KERNEL(column_sums_f32, const float* x, unsigned rows, uint64_t stride, unsigned columns, float* parts) {
    column_sums(x, rows, stride, columns, parts);
}
KERNEL(column_sums_bf16, const bf16* x, unsigned rows, uint64_t stride, unsigned columns, float* parts) {
    column_sums(x, rows, stride, columns, parts);
}

// sums[i] += parts[0, i] + parts[1, i] + ...
KERNEL(add_parts, const float* parts, unsigned count, unsigned columns, float* sums) {
    const unsigned column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    float sum = sums[column];
    for (unsigned part = 0; part < count; ++part) sum += parts[uint64_t(part) * columns + column];
    sums[column] = sum;
}

// sums[ids[block], width] += factor * x[row, width] for every row of order[starts[block]..starts[block + 1]], one after
// the other. Each thread takes four columns; width is a multiple of 4.
KERNEL(add_rows, const float* x, const unsigned* ids, const unsigned* starts, const unsigned* order, float factor,
       float* sums, unsigned width) {
    const unsigned at = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (at >= width) return;
    sums += uint64_t(ids[blockIdx.x]) * width + at;
    float4 sum = load4(sums);
    const unsigned end = starts[blockIdx.x + 1];
    for (unsigned i = starts[blockIdx.x]; i < end; ++i) {
        float4 row = load4(x + uint64_t(order[i]) * width + at);
        sum = make_float4(sum.x + row.x * factor, sum.y + row.y * factor, sum.z + row.z * factor, sum.w + row.w * factor);
    }
    store4(sums, sum);
}
