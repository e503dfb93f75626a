// Numbers that are rounded, and numbers of one value.
#include "device.cuh"

template <class E>
__device__ __forceinline__ void round_to(const float* from, E* to, uint64_t count) {
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += uint64_t(gridDim.x) * blockDim.x)
        to[i] = narrow<E>(from[i]);
}

KERNEL(round_f32, const float* from, float* to, uint64_t count) { round_to(from, to, count); }
KERNEL(round_bf16, const float* from, bf16* to, uint64_t count) { round_to(from, to, count); }

KERNEL(fill, float* x, float value, uint64_t count) {
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += uint64_t(gridDim.x) * blockDim.x)
        x[i] = value;
}
