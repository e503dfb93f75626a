// What Hopper's warp groups have: four warps in a row that multiply 64 rows on the matrix unit (wgmma), barriers in shared
// memory that count threads and bytes (mbarrier), bulk copies that such barriers count, and registers that move from one
// group to another. For code that is compiled for sm_90a only, with a plain body for the CPU.
//
// Products go on while their group does other things, in groups: begin_products, products, end_products. Until
// wait_for_products nothing that they read or write may be touched, neither registers nor shared memory. Of 64 rows a
// warp has 16; a lane holds of them what tile.cuh says.
#pragma once

#include "tile.cuh"

constexpr unsigned WARP_GROUP = 4 * WARP;

__device__ __forceinline__ unsigned shared_address(const void* at) {
#ifdef __CUDACC__
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
#else
    return emulated::shared_address(at);
#endif
}

// ---- barriers ----

// Counts threads and bytes. When as many threads have arrived as it is for, and as many bytes as they expect, its phase
// ends, and another one of the other parity begins; the first is of parity 0.
typedef uint64_t Barrier;

// Before others use it comes publish_barriers by the same thread, then __syncthreads.
__device__ __forceinline__ void begin_barrier(Barrier* barrier, unsigned threads) {
#ifdef __CUDACC__
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(threads) : "memory");
#else
    emulated::begin_barrier(barrier, threads);
#endif
}

__device__ __forceinline__ void publish_barriers() {
#ifdef __CUDACC__
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#else
    emulated::publish_barriers();
#endif
}

__device__ __forceinline__ void arrive(Barrier* barrier) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
#else
    emulated::arrive(barrier, 0);
#endif
}

// Arrives, and the phase waits for so many bytes too.
__device__ __forceinline__ void arrive_expecting(Barrier* barrier, unsigned bytes) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#else
    emulated::arrive(barrier, bytes);
#endif
}

// Waits until a phase of this parity has ended: the one that goes on now, or the one before.
__device__ __forceinline__ void wait_for_phase(Barrier* barrier, unsigned parity) {
#ifdef __CUDACC__
    unsigned ended;
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(ended)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!ended);
#else
    emulated::wait_for_phase(barrier, parity);
#endif
}

// Waits for all threads of the warp group.
__device__ __forceinline__ void sync_warp_group() {
#ifdef __CUDACC__
    // Barrier 0 is __syncthreads.
    asm volatile("bar.sync %0, %1;\n" ::"r"(1 + threadIdx.x / WARP_GROUP), "n"(WARP_GROUP) : "memory");
#else
    emulated::wait_for_warp_group();
#endif
}

// ---- copies ----

// Copies `bytes` from global memory; the barrier counts them when they are there. Addresses are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, unsigned bytes, Barrier* barrier) {
#ifdef __CUDACC__
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
            shared_address(to)),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
#else
    emulated::copy_bulk(to, from, bytes, barrier);
#endif
}

// What this thread has written to shared memory will be seen by products after the next barrier.
__device__ __forceinline__ void publish_to_products() {
#ifdef __CUDACC__
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#else
    emulated::publish_to_products();
#endif
}

// ---- registers ----

// All warps of the group leave it all but so many registers a thread, or wait until there are so many.
template <int COUNT>
__device__ __forceinline__ void leave_registers() {
#ifdef __CUDACC__
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(COUNT));
#endif
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDACC__
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(COUNT));
#endif
}

// ---- products ----

// A matrix of bf16 in shared memory, swizzled as in pages.cuh, at a multiple of 1024 bytes, as the matrix unit wants it
// described (PTX ISA, "matrix descriptor"). `leading` is the bytes from one run of a row to the next, for products along
// rows; one along columns is within a run.
__device__ __forceinline__ uint64_t describe(const bf16* matrix, unsigned leading) {
    constexpr uint64_t GROUP_OF_ROWS = 8 * 128, SWIZZLE_128 = 1;
    return uint64_t(shared_address(matrix) >> 4) | uint64_t(leading >> 4) << 16 | GROUP_OF_ROWS >> 4 << 32 |
           SWIZZLE_128 << 62;
}

// The part of it that begins so many bytes on.
__device__ __forceinline__ uint64_t from_byte(uint64_t description, unsigned bytes) {
    return description + (bytes >> 4);
}

// 2^x, 0 if that is less than 2^-126.
__device__ __forceinline__ float power_of_2(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// The hyperbolic tangent to 2^-20, without branches.
__device__ __forceinline__ float tanh_by_powers(float x) {
    const float square = power_of_2(2 * LOG2E * x);
#ifdef __CUDACC__
    return 1 - __fdividef(2, 1 + square);
#else
    return 1 - 2 / (1 + square);
#endif
}

#ifdef __CUDACC__

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Results are there only from here on, which the compiler does not know.
template <int N>
__device__ __forceinline__ void settle(float (&sums)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) asm volatile("" : "+f"(sums[j][c])::"memory");
}
template <int M, int N>
__device__ __forceinline__ void settle(float (&sums)[M][N][4]) {
#pragma unroll
    for (int i = 0; i < M; ++i) settle(sums[i]);
}

// Waits for all groups of products but the last LEFT; `sums` is what those that are done have written.
template <int LEFT, class Sums>
__device__ __forceinline__ void wait_for_products(Sums& sums) {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(LEFT) : "memory");
    settle(sums);
}

#define SUMS_8(s, j) "+f"(s[j][0]), "+f"(s[j][1]), "+f"(s[j][2]), "+f"(s[j][3])
#define SUMS_32(s, j) SUMS_8(s, j), SUMS_8(s, j + 1), SUMS_8(s, j + 2), SUMS_8(s, j + 3)
#define SUMS_64(s, j) SUMS_32(s, j), SUMS_32(s, j + 4)
#define SUMS_128(s, j) SUMS_64(s, j), SUMS_64(s, j + 8)
#define NAMES_32                                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                       \
    NAMES_32                                                                                                           \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Operands that follow the sums: of a product of two matrices in shared memory %a, %b and whether to add, of one by
// registers %a to %d and %e.
#define PRODUCTS(N, NAMES, a, b, c, d, e)                                                                            \
    __device__ __forceinline__ void product_of_64(float (&s)[N / 8][4], uint64_t left, uint64_t right, bool add) {   \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #c                                                         \
                     ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, %" #a ", %" #b     \
                     ", p, 1, 1, 0, 0;\n}\n"                                                                         \
                     : SUMS_##N(s, 0)                                                                                \
                     : "l"(left), "l"(right), "r"(int(add)));                                                        \
    }                                                                                                                \
    __device__ __forceinline__ void weighted_of_64(float (&o)[N / 8][4], const unsigned (&p)[4], uint64_t v) {       \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, {%" #a ", %" #b ", %" #c \
                     ", %" #d "}, %" #e ", 1, 1, 1, 1;\n"                                                            \
                     : SUMS_##N(o, 0)                                                                                \
                     : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));                                          \
    }

// product_of_64: s[64, N] = left[64, 16] right[N, 16]^T, or += where `add`; both are rows in shared memory.
// weighted_of_64: o[64, N] += p[64, 16] v[16, N]; a lane has p in four registers of two, v is rows in shared memory.
PRODUCTS(64, NAMES_32, 32, 33, 34, 35, 36)
PRODUCTS(128, NAMES_64, 64, 65, 66, 67, 68)

#undef PRODUCTS
#undef NAMES_64
#undef NAMES_32
#undef SUMS_128
#undef SUMS_64
#undef SUMS_32
#undef SUMS_8

#else

inline void begin_products() { emulated::begin_products(); }
inline void end_products() { emulated::end_products(); }
template <int LEFT, class Sums>
void wait_for_products(Sums&) {
    emulated::wait_for_products(LEFT);
}
template <int N>
void product_of_64(float (&s)[N][4], uint64_t left, uint64_t right, bool add) {
    emulated::multiply_later({s, 8 * N, nullptr, left, right, add});
}
template <int N>
void weighted_of_64(float (&o)[N][4], const unsigned (&p)[4], uint64_t v) {
    emulated::multiply_later({o, 8 * N, p, 0, v, true});
}

#endif
