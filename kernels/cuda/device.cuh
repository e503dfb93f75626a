// What all kernels share. They are compiled for GPUs by nvcc, and for the CPU by emulate.h.
//
// A kernel is declared by KERNEL(name, parameters...) and found by its name. Sizes and offsets into buffers are 64 bits
// wide. Numbers are added up in an order that depends on a row's own inputs only: a result has the same bits whatever
// stands beside it.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define KERNEL(name, ...) extern "C" __global__ void name(__VA_ARGS__)
// One with so many threads, a block on a processor.
#define KERNEL_OF(threads, name, ...) extern "C" __global__ void __launch_bounds__(threads, 1) name(__VA_ARGS__)
// At a multiple of 1024 bytes, where swizzles begin.
#define DYNAMIC_SHARED(type, name)                                \
    extern __shared__ __align__(1024) unsigned char name##_raw[]; \
    type* name = reinterpret_cast<type*>(name##_raw)
#else
#include "emulate.h"
#endif

typedef __nv_bfloat16 bf16;

constexpr unsigned WARP = 32;
constexpr unsigned ALL = 0xffffffff;

constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float wide(float value) { return value; }
__device__ __forceinline__ float wide(bf16 value) { return __bfloat162float(value); }

template <class E>
__device__ __forceinline__ E narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float value) {
    return __float2bfloat16_rn(value);
}

// Four elements in a row, at an address that is a multiple of their size.
__device__ __forceinline__ float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ __forceinline__ void store4(float* to, float4 values) { *reinterpret_cast<float4*>(to) = values; }
__device__ __forceinline__ float4 load4(const bf16* from) {
    struct alignas(8) Four {
        bf16 x, y, z, w;
    } four = *reinterpret_cast<const Four*>(from);
    return make_float4(wide(four.x), wide(four.y), wide(four.z), wide(four.w));
}
__device__ __forceinline__ void store4(bf16* to, float4 values) {
    struct alignas(8) Four {
        bf16 x, y, z, w;
    };
    *reinterpret_cast<Four*>(to) = {narrow<bf16>(values.x), narrow<bf16>(values.y), narrow<bf16>(values.z),
                                    narrow<bf16>(values.w)};
}

__device__ __forceinline__ unsigned lane() { return threadIdx.x % WARP; }

// The sum over a warp, for all its lanes.
__device__ __forceinline__ float warp_sum(float value) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL, value, distance);
    return value;
}

// The sum over a block of whole warps, for all its threads. `scratch` is a float for each warp.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    __syncthreads();
    if (lane() == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    value = 0;
    for (unsigned warp = 0; warp < blockDim.x / WARP; ++warp) value += scratch[warp];
    return value;
}
