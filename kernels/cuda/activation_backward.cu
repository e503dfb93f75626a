// Gradients of feed-forward layers' non-linearities, and of their gates.
#include "device.cuh"

enum Activation { SILU, GELU, GELU_TANH };

struct Slope {
    float value, slope;
};

template <Activation A>
__device__ __forceinline__ Slope of_activation(float x) {
    if (A == SILU) {
        const float sigmoid = 1.0f / (1.0f + expf(-x));
        return {x * sigmoid, sigmoid * (1.0f + x * (1.0f - sigmoid))};
    }
    if (A == GELU) {
        // The density of the normal distribution, whose sum is `below`.
        const float below = 0.5f * (1.0f + erff(x * 0.70710678f));
        return {x * below, below + x * 0.3989423f * expf(-0.5f * x * x)};
    }
    const float t = tanhf(0.7978846f * (x + 0.044715f * x * x * x));
    const float inner = 0.7978846f * (1.0f + 3.0f * 0.044715f * x * x);
    return {0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner};
}

// What was activated, x[rows, width], or gate and up beside one another in x[rows, 2 * width] where GATED, becomes its
// gradient, given that of the result, d[rows, width]; the result goes to inner[rows, width]. Threads of all blocks take
// four columns each; width is a multiple of 4.
template <class E, Activation A, bool GATED>
__device__ __forceinline__ void activate_backward(E* x, const float* d, E* inner, unsigned width, uint64_t count) {
    for (uint64_t i = 4 * (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x); i < count;
         i += 4 * uint64_t(gridDim.x) * blockDim.x) {
        E* at = GATED ? x + i + i / width * width : x + i;
        const float4 before = load4(at);
        const Slope of[4] = {of_activation<A>(before.x), of_activation<A>(before.y), of_activation<A>(before.z),
                             of_activation<A>(before.w)};
        const float4 dy = load4(d + i);
        const float4 up = GATED ? load4(at + width) : make_float4(1, 1, 1, 1);
        store4(inner + i, make_float4(of[0].value * up.x, of[1].value * up.y, of[2].value * up.z, of[3].value * up.w));
        store4(at, make_float4(dy.x * up.x * of[0].slope, dy.y * up.y * of[1].slope, dy.z * up.z * of[2].slope,
                               dy.w * up.w * of[3].slope));
        if (GATED)
            store4(at + width, make_float4(dy.x * of[0].value, dy.y * of[1].value, dy.z * of[2].value,
                                           dy.w * of[3].value));
    }
}

#define ACTIVATION(name, A, suffix, E)                                                                           \
    KERNEL(name##_backward_##suffix, E* x, const float* d, E* inner, unsigned width, uint64_t count) {           \
        activate_backward<E, A, false>(x, d, inner, width, count);                                               \
    }                                                                                                            \
    KERNEL(gated_##name##_backward_##suffix, E* x, const float* d, E* inner, unsigned width, uint64_t count) {   \
        activate_backward<E, A, true>(x, d, inner, width, count);                                                \
    }

ACTIVATION(silu, SILU, f32, float)
ACTIVATION(silu, SILU, bf16, bf16)
ACTIVATION(gelu, GELU, f32, float)
ACTIVATION(gelu, GELU, bf16, bf16)
ACTIVATION(gelu_tanh, GELU_TANH, f32, float)
ACTIVATION(gelu_tanh, GELU_TANH, bf16, bf16)
