// Products of small matrices in shared memory, by one warp: on the tensor cores, or plainly where there are none for the
// type, which is also what runs on a CPU.
//
// A warp has 16 rows. A lane holds columns 8j + 2 (lane % 4) and the next of rows lane / 4 (in [j][0] and [j][1]) and
// lane / 4 + 8 (in [j][2] and [j][3]), as mma.m16n8k16 has it.
#pragma once

#include "device.cuh"

// ---- copies of 16 bytes to shared memory, which go on meanwhile ----

// Zeros where `valid` is false; then `from` is not read.
__device__ __forceinline__ void copy16(void* to, const void* from, bool valid) {
#ifdef __CUDACC__
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(valid ? 16 : 0));
#else
    emulated::copy_later(to, from, valid);
#endif
}

// Those since the last call are a group.
__device__ __forceinline__ void end_group_of_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;\n" ::);
#else
    emulated::end_group_of_copies();
#endif
}

// Waits until this thread's copies are done but for the last LEFT groups.
template <int LEFT>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;\n" ::"n"(LEFT));
#else
    emulated::wait_for_copies(LEFT);
#endif
}

// ---- plain ----

// s[16, N] = a[16, K] b[N, K]^T; rows are `stride` elements apart.
template <int N, int K, class E>
__device__ __forceinline__ void plain_product(float (&s)[N / 8][4], const E* a, const E* b, int stride) {
    const int row = lane() / 4, column = 2 * (lane() % 4);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        float sums[4] = {};
        const E* first = b + (8 * j + column) * stride;
        for (int k = 0; k < K; ++k) {
            float upper = wide(a[row * stride + k]), lower = wide(a[(row + 8) * stride + k]);
            float left = wide(first[k]), right = wide(first[stride + k]);
            sums[0] += upper * left;
            sums[1] += upper * right;
            sums[2] += lower * left;
            sums[3] += lower * right;
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) s[j][c] = sums[c];
    }
}

// o[16, N] += p[16, K] v[K, N], p rounded to v's type.
template <int N, int K, class E>
__device__ __forceinline__ void plain_weighted(float (&o)[N / 8][4], const float (&p)[K / 8][4], const E* v, int stride) {
    const int quad = lane() & ~3, column = 2 * (lane() % 4);
#pragma unroll
    for (int i = 0; i < K / 8; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            for (int owner = 0; owner < 4; ++owner) {
                float upper = wide(narrow<E>(__shfl_sync(ALL, p[i][c], quad + owner)));
                float lower = wide(narrow<E>(__shfl_sync(ALL, p[i][2 + c], quad + owner)));
                const E* row = v + (8 * i + 2 * owner + c) * stride + column;
#pragma unroll
                for (int j = 0; j < N / 8; ++j) {
                    float left = wide(row[8 * j]), right = wide(row[8 * j + 1]);
                    o[j][0] += upper * left;
                    o[j][1] += upper * right;
                    o[j][2] += lower * left;
                    o[j][3] += lower * right;
                }
            }
        }
    }
}

template <int N, int K>
__device__ __forceinline__ void product(float (&s)[N / 8][4], const float* a, const float* b, int stride) {
    plain_product<N, K>(s, a, b, stride);
}
template <int N, int K>
__device__ __forceinline__ void weighted(float (&o)[N / 8][4], const float (&p)[K / 8][4], const float* v, int stride) {
    plain_weighted<N, K>(o, p, v, stride);
}

// ---- bf16 ----
//
// In registers, two columns in each, a lane holds of 16 columns 2t, 2t + 1 and 2t + 8, 2t + 9, t = lane % 4: in a[0] and
// a[2] those of row lane / 4, in a[1] and a[3] those of row lane / 4 + 8; in b0 and b1 those of row lane / 4. So
// multiply() is d[16, 8] += a[16, 16] b[8, 16]^T.

#ifndef __CUDACC__

inline unsigned pack(float low, float high) {
    return narrow<bf16>(low).bits | unsigned(narrow<bf16>(high).bits) << 16;
}

inline void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const unsigned row = lane() & ~3, column = 8 * (lane() % 4);
    for (unsigned k = 0; k < 16; ++k) {
        const unsigned owner = k % 8 / 2, second = k / 8;
        const auto number = [&](unsigned both, unsigned source) {
            return wide(bf16{uint16_t(__shfl_sync(ALL, both, source) >> k % 2 * 16)});
        };
        const float upper = number(a[2 * second], row + owner), lower = number(a[2 * second + 1], row + owner);
        const float left = number(second ? b1 : b0, column + owner), right = number(second ? b1 : b0, column + 4 + owner);
        d[0] += upper * left;
        d[1] += upper * right;
        d[2] += lower * left;
        d[3] += lower * right;
    }
}

template <int N, int K>
void product(float (&s)[N / 8][4], const bf16* a, const bf16* b, int stride) {
    plain_product<N, K>(s, a, b, stride);
}
template <int N, int K>
void weighted(float (&o)[N / 8][4], const float (&p)[K / 8][4], const bf16* v, int stride) {
    plain_weighted<N, K>(o, p, v, stride);
}

#else

__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const bf16* from) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(from));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

__device__ __forceinline__ void load_transposed(unsigned (&r)[4], const bf16* from) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(from));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ unsigned pack(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<unsigned*>(&both);
}

template <int N, int K>
__device__ __forceinline__ void product(float (&s)[N / 8][4], const bf16* a, const bf16* b, int stride) {
    static_assert(N % 16 == 0 && K % 16 == 0, "whole matrices");
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) s[j][c] = 0;
    const bf16* of_a = a + lane() % 16 * stride + lane() / 16 * 8;
    const bf16* of_b = b + (lane() / 16 * 8 + lane() % 8) * stride + lane() / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        unsigned left[4];
        load_matrices(left, of_a + k);
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            unsigned right[4];
            load_matrices(right, of_b + n * stride + k);
            multiply(s[n / 8], left, right[0], right[1]);
            multiply(s[n / 8 + 1], left, right[2], right[3]);
        }
    }
}

template <int N, int K>
__device__ __forceinline__ void weighted(float (&o)[N / 8][4], const float (&p)[K / 8][4], const bf16* v, int stride) {
    static_assert(N % 16 == 0 && K % 16 == 0, "whole matrices");
    const bf16* of_v = v + (lane() / 8 % 2 * 8 + lane() % 8) * stride + lane() / 16 * 8;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        const float(&left)[4] = p[k / 8], (&right)[4] = p[k / 8 + 1];
        unsigned a[4] = {pack(left[0], left[1]), pack(left[2], left[3]), pack(right[0], right[1]),
                         pack(right[2], right[3])};
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            unsigned b[4];
            load_transposed(b, of_v + k * stride + n);
            multiply(o[n / 8], a, b[0], b[1]);
            multiply(o[n / 8 + 1], a, b[2], b[3]);
        }
    }
}

#endif
