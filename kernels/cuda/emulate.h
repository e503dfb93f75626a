// Runs CUDA kernels on the CPU, for tests where there is no GPU: what a kernel needs of CUDA, as plain C++.
//
// A block's threads are fibers. One runs until it waits for others, at a barrier or a shuffle; then another does, in an
// order that is shuffled anew every time and in which some come last, so that a barrier that is missing shows as a wrong
// result. Fibers that wait for one another for ever, because a barrier is not reached by all, end the program. Blocks
// run one after the other.
// Numbers are the CPU's: a result is not that of a GPU to the last bit. What goes on beside a thread, copies and
// products, is done when it is waited for, bulk copies at any time before, so that a wait that is missing shows, too.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <array>
#include <utility>

#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __shared__ static
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx, blockDim, gridDim;

template <class A>
A min(A a, A b) {
    return b < a ? b : a;
}
template <class A>
A max(A a, A b) {
    return a < b ? b : a;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }

// Threads take turns only where they wait.
inline unsigned atomicAdd(unsigned* at, unsigned value) { return std::exchange(*at, *at + value); }

// ---- bf16, rounded to the nearest, ties to even ----

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ---- f16 ----

struct __half {
    uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

inline float __half2float(__half value) {
    const uint32_t exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? ldexpf(float(fraction), -24)
                                       : ldexpf(float(1024 + fraction), int(exponent) - 25);
    return value.bits >> 15 ? -size : size;
}

// ---- what threads do together ----

namespace emulated {

// Waits for all threads of the block that have not ended, or of the warp.
void wait_for_block();
void wait_for_warp();

// A place for each lane of the current warp, and the current lane.
uint64_t* lanes();
unsigned lane();

void* dynamic_shared();

// Copies of 16 bytes that are made only when somebody waits for them, all but those of the last groups.
void copy_later(void* to, const void* from, bool valid);
void end_group_of_copies();
void wait_for_copies(unsigned left);

// What warpgroup.cuh does. Addresses in shared memory are counted from somewhere, as there.
unsigned shared_address(const void* at);
void begin_barrier(uint64_t* barrier, unsigned threads);
void publish_barriers();
void arrive(uint64_t* barrier, unsigned bytes);
void wait_for_phase(uint64_t* barrier, unsigned parity);
void wait_for_warp_group();
void copy_bulk(void* to, const void* from, unsigned bytes, uint64_t* barrier);

// sums[64, columns] (+)= left[64, 16] times right, of which this thread has what tile.cuh says. `right` describes rows
// [columns, 16], or where `registers` are what the thread has of the left one, rows [16, columns].
struct Product {
    float (*sums)[4];
    int columns;
    const unsigned* registers;
    uint64_t left, right;
    bool add;
};
void begin_products();
void multiply_later(const Product& product);
void publish_to_products();
void end_products();
void wait_for_products(unsigned left);

template <class T>
T from_lane(T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    memcpy(&lanes()[lane()], &value, sizeof value);
    wait_for_warp();
    memcpy(&value, &lanes()[source], sizeof value);
    wait_for_warp();
    return value;
}

// A kernel by its name, and how to call it with an array of pointers to its arguments.
struct Kernel {
    Kernel(const char* name, void (*call)(void**));
    const char* name;
    void (*call)(void**);
    Kernel* next;
};

template <class... Arguments, size_t... I>
void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<Arguments*>(arguments[I])...);
}

template <class... Arguments>
void call(void (*kernel)(Arguments...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<Arguments...>{});
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait_for_block(); }
inline void __syncwarp() { emulated::wait_for_warp(); }

template <class T>
T __shfl_sync(unsigned, T value, int source) {
    return emulated::from_lane(value, unsigned(source) % 32);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulated::from_lane(value, emulated::lane() ^ unsigned(mask));
}

#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulated::dynamic_shared())

#define KERNEL_OF(threads, name, ...) KERNEL(name, __VA_ARGS__)
#define KERNEL(name, ...)                                                                                     \
    static void name(__VA_ARGS__);                                                                            \
    static emulated::Kernel name##_registered(#name, [](void** arguments) { emulated::call(name, arguments); }); \
    static void name(__VA_ARGS__)
