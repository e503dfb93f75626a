// A row that a block goes over more than once.
#pragma once

#include "device.cuh"

constexpr unsigned THREADS = 256;
// Columns that a thread keeps, four at a time: rows up to 8,192 wide are read once.
constexpr unsigned KEPT = 8;

// Runs over a row in fours, the first KEPT of them from registers.
struct Row {
    const float* x;
    unsigned fours;
    float4 kept[KEPT];

    __device__ __forceinline__ Row(const float* x, unsigned width) : x(x), fours(width / 4) {
#pragma unroll
        for (unsigned i = 0; i < KEPT; ++i) {
            unsigned at = threadIdx.x + i * THREADS;
            kept[i] = at < fours ? load4(x + 4 * at) : make_float4(0, 0, 0, 0);
        }
    }

    template <class F>
    __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (unsigned i = 0; i < KEPT; ++i) {
            unsigned at = threadIdx.x + i * THREADS;
            if (at < fours) f(4 * at, kept[i]);
        }
        for (unsigned at = threadIdx.x + KEPT * THREADS; at < fours; at += THREADS) f(4 * at, load4(x + 4 * at));
    }
};
