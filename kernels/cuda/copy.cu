// Numbers from one place to another, and all of one value.
#include "device.cuh"

// to[i] = from[i], rounded where it has fewer bits.
template <class From, class To>
__device__ __forceinline__ void copy(const From* from, To* to, uint64_t count) {
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += uint64_t(gridDim.x) * blockDim.x)
        to[i] = narrow<To>(wide(from[i]));
}

KERNEL(copy_f32_f32, const float* from, float* to, uint64_t count) { copy(from, to, count); }
KERNEL(copy_f32_bf16, const float* from, bf16* to, uint64_t count) { copy(from, to, count); }
KERNEL(copy_bf16_bf16, const bf16* from, bf16* to, uint64_t count) { copy(from, to, count); }

KERNEL(fill, float* x, float value, uint64_t count) {
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += uint64_t(gridDim.x) * blockDim.x)
        x[i] = value;
}
