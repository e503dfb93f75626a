// What is done with a gradient.
#include "device.cuh"

constexpr unsigned THREADS = 256;
// Numbers whose squares a block sums up.
constexpr unsigned PIECE = 1 << 16;

// A step of Adam with decoupled weight decay (Loshchilov and Hutter 2019), as PyTorch takes it.
struct AdamW {
    // Learning rate over the first moment's correction; what is kept of a weight.
    float rate, keep;
    float beta1, beta2, eps;
    // Root of the second moment's correction.
    float second;
    // Multiplies the gradient.
    float scale;
};

// Changes weights by their gradient and its running means, and rounds them into `rounded`, unless that is null.
template <class E>
__device__ __forceinline__ void adamw(const AdamW& how, float* weights, const float* gradient, float* mean,
                                      float* square, E* rounded, uint64_t count) {
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
         i += uint64_t(gridDim.x) * blockDim.x) {
        const float g = gradient[i] * how.scale;
        const float m = mean[i] + (g - mean[i]) * (1.0f - how.beta1);
        const float s = square[i] * how.beta2 + g * g * (1.0f - how.beta2);
        const float w = weights[i] * how.keep - how.rate * m / (sqrtf(s) / how.second + how.eps);
        weights[i] = w;
        mean[i] = m;
        square[i] = s;
        if (rounded) rounded[i] = narrow<E>(w);
    }
}

KERNEL(adamw_f32, AdamW how, float* weights, const float* gradient, float* mean, float* square, float* rounded,
       uint64_t count) {
    adamw(how, weights, gradient, mean, square, rounded, count);
}
KERNEL(adamw_bf16, AdamW how, float* weights, const float* gradient, float* mean, float* square, bf16* rounded,
       uint64_t count) {
    adamw(how, weights, gradient, mean, square, rounded, count);
}

// The sum over a block of whole warps, for its first thread.
__device__ __forceinline__ double block_total(double value) {
    __shared__ double scratch[THREADS / WARP];
    for (int distance = WARP / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL, value, distance);
    if (lane() == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    value = 0;
    for (unsigned warp = 0; warp < THREADS / WARP; ++warp) value += scratch[warp];
    return value;
}

// sums[block]: that of the squares of PIECE numbers. Short enough for f32 to keep what counts of a thread's.
KERNEL(squares, const float* x, uint64_t count, double* sums) {
    const uint64_t first = uint64_t(blockIdx.x) * PIECE, end = min(first + PIECE, count);
    float sum = 0;
    for (uint64_t i = first + threadIdx.x; i < end; i += THREADS) sum += x[i] * x[i];
    const double total = block_total(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// total = sums[0] + sums[1] + ..., by one block.
KERNEL(total, const double* sums, uint64_t count, double* total) {
    double sum = 0;
    for (uint64_t i = threadIdx.x; i < count; i += THREADS) sum += sums[i];
    sum = block_total(sum);
    if (threadIdx.x == 0) *total = sum;
}

// sum += x.
KERNEL(add, const float* x, float* sum, uint64_t count) {
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += uint64_t(gridDim.x) * blockDim.x)
        sum[i] += x[i];
}
