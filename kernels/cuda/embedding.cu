// Rows of the embedding, in f32.
#include "device.cuh"

// x[block, width] = table[ids[block], width] * scale; width is a multiple of 4.
template <class E>
__device__ __forceinline__ void embed(const E* table, const unsigned* ids, float scale, float* x, unsigned width) {
    const E* from = table + uint64_t(ids[blockIdx.x]) * width;
    x += uint64_t(blockIdx.x) * width;
    for (unsigned at = 4 * threadIdx.x; at < width; at += 4 * blockDim.x) {
        float4 values = load4(from + at);
        store4(x + at, make_float4(values.x * scale, values.y * scale, values.z * scale, values.w * scale));
    }
}

KERNEL(embed_f32, const float* table, const unsigned* ids, float scale, float* x, unsigned width) {
    embed(table, ids, scale, x, width);
}
KERNEL(embed_bf16, const bf16* table, const unsigned* ids, float scale, float* x, unsigned width) {
    embed(table, ids, scale, x, width);
}
