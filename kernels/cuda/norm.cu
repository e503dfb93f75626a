// Norms of rows: RMS (Zhang and Sennrich 2019) and layer norm (Ba et al. 2016). A block for each row.
#include "row.cuh"

// Which row a block takes: the one that `rows` names, or its own.
__device__ __forceinline__ uint64_t source(const unsigned* rows) { return rows ? rows[blockIdx.x] : blockIdx.x; }

// `out = norm(x)`, or `out += norm(x)` where ADD.
template <class E, bool ADD>
__device__ __forceinline__ void put(E* out, float4 y) {
    if (ADD) {
        float4 before = load4(out);
        y = make_float4(before.x + y.x, before.y + y.y, before.z + y.z, before.w + y.w);
    }
    store4(out, y);
}

template <class E, bool ADD>
__device__ __forceinline__ void rms_norm(const float* x, const unsigned* rows, const float* weight, float eps, E* out,
                                         unsigned width) {
    __shared__ float scratch[THREADS / WARP];
    Row row(x + source(rows) * width, width);
    float squares = 0;
    row.each([&](unsigned, float4 x) { squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; });
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / width + eps);
    out += uint64_t(blockIdx.x) * width;
    row.each([&](unsigned at, float4 x) {
        float4 w = load4(weight + at);
        put<E, ADD>(out + at, make_float4(x.x * scale * w.x, x.y * scale * w.y, x.z * scale * w.z, x.w * scale * w.w));
    });
}

template <class E, bool ADD>
__device__ __forceinline__ void layer_norm(const float* x, const unsigned* rows, const float* weight, const float* bias,
                                           float eps, E* out, unsigned width) {
    __shared__ float scratch[THREADS / WARP];
    Row row(x + source(rows) * width, width);
    float sum = 0;
    row.each([&](unsigned, float4 x) { sum += (x.x + x.y) + (x.z + x.w); });
    float mean = block_sum(sum, scratch) / width;
    float squares = 0;
    row.each([&](unsigned, float4 x) {
        x = make_float4(x.x - mean, x.y - mean, x.z - mean, x.w - mean);
        squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    });
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / width + eps);
    out += uint64_t(blockIdx.x) * width;
    row.each([&](unsigned at, float4 x) {
        float4 w = load4(weight + at), b = load4(bias + at);
        put<E, ADD>(out + at, make_float4((x.x - mean) * scale * w.x + b.x, (x.y - mean) * scale * w.y + b.y,
                                          (x.z - mean) * scale * w.z + b.z, (x.w - mean) * scale * w.w + b.w));
    });
}

// x[_, width], of which `rows` (or null: all, in order) are normed into out[_, width]. width is a multiple of 4.
#define NORMS(suffix, E, ADD)                                                                                    \
    KERNEL(rms_norm_##suffix, const float* x, const unsigned* rows, const float* weight, float eps, E* out,      \
           unsigned width) {                                                                                     \
        rms_norm<E, ADD>(x, rows, weight, eps, out, width);                                                      \
    }                                                                                                            \
    KERNEL(layer_norm_##suffix, const float* x, const unsigned* rows, const float* weight, const float* bias,    \
           float eps, E* out, unsigned width) {                                                                  \
        layer_norm<E, ADD>(x, rows, weight, bias, eps, out, width);                                              \
    }

NORMS(f32, float, false)
NORMS(bf16, bf16, false)
NORMS(add, float, true)
