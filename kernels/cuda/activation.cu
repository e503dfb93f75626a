// Non-linearities of feed-forward layers, and their gates.
#include "device.cuh"

enum Activation { SILU, GELU, GELU_TANH };

template <Activation A>
__device__ __forceinline__ float activated(float x) {
    if (A == SILU) return x / (1.0f + expf(-x));
    if (A == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    return 0.5f * x * (1.0f + tanhf(0.7978846f * (x + 0.044715f * x * x * x)));
}

// out[rows, width] of up[rows, width], or of both halves of gate_up[rows, 2 * width] where GATED. Threads of all blocks
// take four columns each; width is a multiple of 4.
template <class E, Activation A, bool GATED>
__device__ __forceinline__ void activate(const E* x, E* out, unsigned width, uint64_t count) {
    for (uint64_t i = 4 * (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x); i < count;
         i += 4 * uint64_t(gridDim.x) * blockDim.x) {
        const E* from = GATED ? x + i + i / width * width : x + i;
        float4 y = load4(from);
        y = make_float4(activated<A>(y.x), activated<A>(y.y), activated<A>(y.z), activated<A>(y.w));
        if (GATED) {
            float4 up = load4(from + width);
            y = make_float4(y.x * up.x, y.y * up.y, y.z * up.z, y.w * up.w);
        }
        store4(out + i, y);
    }
}

#define ACTIVATION(name, A)                                                        \
    KERNEL(name##_f32, const float* x, float* out, unsigned width, uint64_t count) { \
        activate<float, A, false>(x, out, width, count);                           \
    }                                                                              \
    KERNEL(name##_bf16, const bf16* x, bf16* out, unsigned width, uint64_t count) { \
        activate<bf16, A, false>(x, out, width, count);                            \
    }                                                                              \
    KERNEL(gated_##name##_f32, const float* x, float* out, unsigned width, uint64_t count) { \
        activate<float, A, true>(x, out, width, count);                            \
    }                                                                              \
    KERNEL(gated_##name##_bf16, const bf16* x, bf16* out, unsigned width, uint64_t count) { \
        activate<bf16, A, true>(x, out, width, count);                             \
    }

ACTIVATION(silu, SILU)
ACTIVATION(gelu, GELU)
ACTIVATION(gelu_tanh, GELU_TANH)
