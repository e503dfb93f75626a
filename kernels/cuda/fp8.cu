// Rows as e4m3 with a scale each, and what is made of products of such rows where cuBLASLt does not scale them itself.
// What a number becomes is said in kernels/src/fp8.rs, whose bits these are.
#include "device.cuh"

constexpr unsigned THREADS = 256;

__device__ __forceinline__ unsigned e4m3(float x) {
    const unsigned bits = __float_as_uint(x), sign = bits >> 24 & 0x80;
    float size = __uint_as_float(bits & 0x7fffffff);
    if (size != size) return sign | 0x7f;
    // The last bit of 2^14 is the distance of the numbers below 2^-6.
    if (size < 0.015625f) return sign | (__float_as_uint(size + 16384.0f) - __float_as_uint(16384.0f));
    const unsigned most = __float_as_uint(fminf(size, 448.0f));
    return sign | (((most + 0x7ffff + (most >> 20 & 1)) >> 20) - ((127 - 7) << 3));
}

// codes[block, width] and scales[block] of x[block, width]; width is a multiple of 4.
template <class E>
__device__ __forceinline__ void quantise(const E* x, unsigned char* codes, float* scales, unsigned width) {
    __shared__ float scratch[THREADS / WARP];
    x += uint64_t(blockIdx.x) * width;
    codes += uint64_t(blockIdx.x) * width;
    float largest = 0;
    for (unsigned at = 4 * threadIdx.x; at < width; at += 4 * THREADS) {
        const float4 four = load4(x + at);
        largest = fmaxf(largest, fmaxf(fmaxf(fabsf(four.x), fabsf(four.y)), fmaxf(fabsf(four.z), fabsf(four.w))));
    }
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, distance));
    if (lane() == 0) scratch[threadIdx.x / WARP] = largest;
    __syncthreads();
    for (unsigned warp = 0; warp < THREADS / WARP; ++warp) largest = fmaxf(largest, scratch[warp]);
    // The smallest normal number.
    const float scale = fmaxf(largest / 448.0f, 1.17549435e-38f);
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    for (unsigned at = 4 * threadIdx.x; at < width; at += 4 * THREADS) {
        const float4 four = load4(x + at);
        *reinterpret_cast<unsigned*>(codes + at) = e4m3(four.x / scale) | e4m3(four.y / scale) << 8 |
                                                   e4m3(four.z / scale) << 16 | e4m3(four.w / scale) << 24;
    }
}

KERNEL(quantise_f32, const float* x, unsigned char* codes, float* scales, unsigned width) {
    quantise(x, codes, scales, width);
}
KERNEL(quantise_bf16, const bf16* x, unsigned char* codes, float* scales, unsigned width) {
    quantise(x, codes, scales, width);
}

// y[rows, stride] = sums[rows, outputs] * of_x[rows] * of_w[outputs] + bias[outputs] (bf16, or null), or is added to where
// ADD. Threads of all blocks take a number each.
template <class O, bool ADD>
__device__ __forceinline__ void rescale(const float* sums, const float* of_x, const float* of_w, const bf16* bias, O* y,
                                        uint64_t stride, unsigned outputs, uint64_t count) {
    const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        const uint64_t row = i / outputs, output = i % outputs;
        float value = sums[i] * of_x[row] * of_w[output] + (bias ? wide(bias[output]) : 0.0f);
        O* to = y + row * stride + output;
        *to = narrow<O>(ADD ? wide(*to) + value : value);
    }
}

#define RESCALE(name, O, ADD)                                                                                        \
    KERNEL(rescale_##name, const float* sums, const float* of_x, const float* of_w, const bf16* bias, O* y,          \
           uint64_t stride, unsigned outputs, uint64_t count) {                                                      \
        rescale<O, ADD>(sums, of_x, of_w, bias, y, stride, outputs, count);                                          \
    }

RESCALE(f32, float, false)
RESCALE(add, float, true)
RESCALE(bf16, bf16, false)
