// Linear layers of quantised weights: multiplied with few rows as they are, expanded for many.
//
// A matrix is cut into units of 16 outputs and 32 inputs, [outputs / 16][inputs / 32], so that whatever a warp reads is
// whole lines of memory. A unit has the codes' bits, in planes of 4, 2 and 1 bits (8 are two planes, of 16 inputs
// each): for each output 32 times as many bits, input by input from the lowest bit on. Behind them lies for each output
// a record of its groups' scales, then of their offsets: f16, or integers to be multiplied with the factors of 256 inputs,
// [outputs / 16][inputs / 256][16 outputs][scale, offset], which lie apart.
//
// A weight is that of QuantRows::expand, to the bit: (code + LEAST) * scale is exact, the sum with an offset is rounded to
// f32, then the weight to the type of the layer.
#include "tile.cuh"

constexpr unsigned THREADS = 256;
constexpr unsigned WARPS = THREADS / WARP;
// Outputs and inputs of a unit.
constexpr unsigned OUTPUTS = 16;
constexpr unsigned INPUTS = 32;
// Units whose rows share factors.
constexpr unsigned BLOCK = 8;
// Units of a lane that are on their way from memory while one is multiplied.
constexpr unsigned AHEAD = 2;

template <unsigned BITS_, int LEAST_, unsigned GROUP, bool FACTORS_, bool OFFSETS_>
struct Format {
    static constexpr unsigned BITS = BITS_;
    static constexpr int LEAST = LEAST_;
    static constexpr bool FACTORS = FACTORS_, OFFSETS = OFFSETS_;
    // Groups of a unit's row, and factors of 256 inputs.
    static constexpr unsigned GROUPS = INPUTS / GROUP;
    static constexpr unsigned NUMBERS = OFFSETS ? 2 : 1;
    // Bytes of a row's scales and offsets, and of a unit.
    static constexpr unsigned RECORD = GROUPS * NUMBERS * (FACTORS ? 1 : 2);
    static constexpr unsigned BYTES = OUTPUTS * (INPUTS / 8 * BITS + RECORD);
    static_assert(RECORD == 2 || RECORD == 4, "a record is loaded at once");
};

struct Matrix {
    const unsigned char* units;
    const unsigned char* factors;
    // Units of a row.
    unsigned row_units;
};

__device__ __forceinline__ float from_f16(unsigned bits) { return __half2float(__ushort_as_half(uint16_t(bits))); }

template <unsigned BYTES>
__device__ __forceinline__ unsigned load(const unsigned char* from) {
    if (BYTES == 2) return *reinterpret_cast<const uint16_t*>(from);
    return *reinterpret_cast<const unsigned*>(from);
}

// 32 weights of an output.
template <class F>
struct Weights {
    unsigned words[F::BITS];
    unsigned record = 0, factors = 0;

    // Those of a tile of outputs; zeros behind the end of the row.
    __device__ __forceinline__ void load(const Matrix& matrix, unsigned tile, unsigned unit, unsigned row) {
#pragma unroll
        for (unsigned i = 0; i < F::BITS; ++i) words[i] = 0;
        record = factors = 0;
        if (unit >= matrix.row_units) return;
        const unsigned char* plane = matrix.units + (uint64_t(tile) * matrix.row_units + unit) * F::BYTES;
        unsigned at = 0;
#pragma unroll
        for (; at + 4 <= F::BITS; at += 4) {
            uint4 four = *reinterpret_cast<const uint4*>(plane + 16 * row);
            words[at] = four.x, words[at + 1] = four.y, words[at + 2] = four.z, words[at + 3] = four.w;
            plane += 16 * OUTPUTS;
        }
        if (F::BITS & 2) {
            uint2 two = *reinterpret_cast<const uint2*>(plane + 8 * row);
            words[at] = two.x, words[at + 1] = two.y;
            plane += 8 * OUTPUTS;
            at += 2;
        }
        if (F::BITS & 1) {
            words[at] = *reinterpret_cast<const unsigned*>(plane + 4 * row);
            plane += 4 * OUTPUTS;
        }
        record = ::load<F::RECORD>(plane + F::RECORD * row);
        if (F::FACTORS) {
            const uint64_t block = uint64_t(tile) * (matrix.row_units / BLOCK) + unit / BLOCK;
            factors = ::load<2 * F::NUMBERS>(matrix.factors + (block * OUTPUTS + row) * 2 * F::NUMBERS);
        }
    }

    // A scale where `offset` is 0, else an offset.
    __device__ __forceinline__ float number(unsigned group, unsigned offset) const {
        const unsigned i = offset * F::GROUPS + group;
        if (!F::FACTORS) return from_f16(record >> 16 * i);
        return float(int8_t(record >> 8 * i)) * from_f16(factors >> 16 * offset);
    }

    __device__ __forceinline__ unsigned code(unsigned i) const {
        constexpr unsigned LOW = F::BITS == 8 ? 8 : F::BITS >= 4 ? 4 : 2;
        unsigned code = words[i * LOW / 32] >> i * LOW % 32 & ((1u << LOW) - 1);
        if (F::BITS - LOW == 2) code |= (words[LOW + i / 16] >> i % 16 * 2 & 3) << LOW;
        if (F::BITS - LOW == 1) code |= (words[LOW] >> i & 1) << LOW;
        return code;
    }
};

// The numbers that the weights of an output are made with, ready to use.
template <class F>
struct Scaled {
    const Weights<F>& weights;
    float scales[F::GROUPS], offsets[F::GROUPS];

    __device__ __forceinline__ explicit Scaled(const Weights<F>& weights) : weights(weights) {
#pragma unroll
        for (unsigned group = 0; group < F::GROUPS; ++group) {
            scales[group] = weights.number(group, 0);
            offsets[group] = F::OFFSETS ? weights.number(group, 1) : 0.0f;
        }
    }

    __device__ __forceinline__ float operator()(unsigned i) const {
        const unsigned group = i * F::GROUPS / INPUTS;
        // 2^23 and an integer below it is the integer behind the exponent: that takes no conversion.
        const float code = __uint_as_float(0x4b000000 | weights.code(i)) - float((1 << 23) - F::LEAST);
        return F::OFFSETS ? code * scales[group] + offsets[group] : code * scales[group];
    }
};

// Gives a warp its units of a tile, four at a time, each lane that of lane() % 4, with the weights of outputs lane() / 4
// and lane() / 4 + 8. The warps of a block share a tile.
template <class F, class Each>
__device__ __forceinline__ void each_unit(const Matrix& matrix, unsigned tile, Each each) {
    constexpr unsigned STEP = 4 * WARPS;
    const unsigned row = lane() / 4, column = lane() % 4;
    Weights<F> ahead[AHEAD][2];
    const auto load = [&](unsigned i, unsigned unit) {
        ahead[i][0].load(matrix, tile, unit, row);
        ahead[i][1].load(matrix, tile, unit, row + 8);
    };
    const unsigned first = 4 * (threadIdx.x / WARP);
#pragma unroll
    for (unsigned i = 0; i < AHEAD; ++i) load(i, first + i * STEP + column);
    for (unsigned start = first; start < matrix.row_units; start += AHEAD * STEP) {
#pragma unroll
        for (unsigned i = 0; i < AHEAD; ++i) {
            const unsigned unit = start + i * STEP;
            if (unit >= matrix.row_units) break;
            const Weights<F> upper = ahead[i][0], lower = ahead[i][1];
            load(i, unit + AHEAD * STEP + column);
            each(Scaled<F>(upper), Scaled<F>(lower), unit + column);
        }
    }
}

typedef float f32;

enum How : unsigned { SET, ADD, SET_BF16 };

// A layer's result, of which a block has a tile of outputs.
struct Result {
    // In the type of y, or null.
    const void* bias;
    void* y;
    // Elements from one row to the next.
    uint64_t stride;
    unsigned outputs, rows, how;

    // Adds up what the warps have, always in the same order.
    template <unsigned MOST>
    __device__ __forceinline__ void put(const float (*sums)[OUTPUTS][MOST + 1]) const {
        __syncthreads();
        for (unsigned i = threadIdx.x; i < OUTPUTS * min(rows, MOST); i += THREADS) {
            const unsigned output = i % OUTPUTS, row = i / OUTPUTS;
            if (output >= outputs) continue;
            float sum = 0;
            for (unsigned warp = 0; warp < WARPS; ++warp) sum += sums[warp][output][row];
            if (bias && how == SET_BF16) sum += wide(static_cast<const bf16*>(bias)[output]);
            else if (bias) sum += static_cast<const float*>(bias)[output];
            const uint64_t at = row * stride + output;
            if (how == SET_BF16) static_cast<bf16*>(y)[at] = narrow<bf16>(sum);
            else static_cast<float*>(y)[at] = how == ADD ? static_cast<float*>(y)[at] + sum : sum;
        }
    }
};

// bf16, on the tensor cores: a lane's four weights of two outputs and x's of one row are a part of both matrices as they
// are, whichever inputs they stand for.
template <class F, unsigned N>
__device__ __forceinline__ void multiply(const Matrix& matrix, unsigned tile, const bf16* x, const Result& result) {
    __shared__ float shared[WARPS][OUTPUTS][8 * N + 1];
    const unsigned row = lane() / 4, column = 2 * (lane() % 4);
    const uint64_t inputs = uint64_t(INPUTS) * matrix.row_units;
    float sums[N][4] = {};
    each_unit<F>(matrix, tile, [&](const Scaled<F>& upper, const Scaled<F>& lower, unsigned unit) {
        const bf16* from = x + row * inputs + INPUTS * unit;
#pragma unroll
        for (unsigned i = 0; i < INPUTS; i += 8) {
            unsigned left[2][4];
#pragma unroll
            for (unsigned part = 0; part < 2; ++part) {
                const unsigned at = i + 4 * part;
                left[part][0] = pack(upper(at), upper(at + 1)), left[part][1] = pack(lower(at), lower(at + 1));
                left[part][2] = pack(upper(at + 2), upper(at + 3)), left[part][3] = pack(lower(at + 2), lower(at + 3));
            }
#pragma unroll
            for (unsigned n = 0; n < N; ++n) {
                uint4 right = make_uint4(0, 0, 0, 0);
                if (unit < matrix.row_units && 8 * n + row < result.rows)
                    right = *reinterpret_cast<const uint4*>(from + 8 * n * inputs + i);
                multiply(sums[n], left[0], right.x, right.y);
                multiply(sums[n], left[1], right.z, right.w);
            }
        }
    });
#pragma unroll
    for (unsigned n = 0; n < N; ++n)
#pragma unroll
        for (unsigned c = 0; c < 4; ++c)
            shared[threadIdx.x / WARP][row + c / 2 * 8][8 * n + column + c % 2] = sums[n][c];
    result.template put<8 * N>(shared);
}

__device__ __forceinline__ float dot(const float (&a)[4], float4 b) {
    return a[0] * b.x + a[1] * b.y + (a[2] * b.z + a[3] * b.w);
}

// f32.
template <class F, unsigned N>
__device__ __forceinline__ void multiply(const Matrix& matrix, unsigned tile, const float* x, const Result& result) {
    __shared__ float shared[WARPS][OUTPUTS][8 * N + 1];
    const uint64_t inputs = uint64_t(INPUTS) * matrix.row_units;
    float sums[8 * N][2] = {};
    each_unit<F>(matrix, tile, [&](const Scaled<F>& upper, const Scaled<F>& lower, unsigned unit) {
        if (unit >= matrix.row_units) return;
#pragma unroll
        for (unsigned i = 0; i < INPUTS; i += 4) {
            const float of_upper[4] = {upper(i), upper(i + 1), upper(i + 2), upper(i + 3)};
            const float of_lower[4] = {lower(i), lower(i + 1), lower(i + 2), lower(i + 3)};
#pragma unroll
            for (unsigned row = 0; row < 8 * N; ++row) {
                if (row >= result.rows) break;
                const float4 right = load4(x + row * inputs + INPUTS * unit + i);
                sums[row][0] += dot(of_upper, right);
                sums[row][1] += dot(of_lower, right);
            }
        }
    });
#pragma unroll
    for (unsigned row = 0; row < 8 * N; ++row)
#pragma unroll
        for (unsigned c = 0; c < 2; ++c) {
            float sum = sums[row][c];
            sum += __shfl_xor_sync(ALL, sum, 1);
            sum += __shfl_xor_sync(ALL, sum, 2);
            if (lane() % 4 == 0) shared[threadIdx.x / WARP][lane() / 4 + 8 * c][row] = sum;
        }
    result.template put<8 * N>(shared);
}

// The 32 weights of a row's unit, rounded to the type E.
template <class F, class E, class Each>
__device__ __forceinline__ void each_four(const Matrix& matrix, unsigned tile, unsigned unit, unsigned row, Each each) {
    Weights<F> weights;
    weights.load(matrix, tile, unit, row);
    const Scaled<F> scaled(weights);
#pragma unroll
    for (unsigned i = 0; i < INPUTS; i += 4)
        each(INPUTS * unit + i, make_float4(wide(narrow<E>(scaled(i))), wide(narrow<E>(scaled(i + 1))),
                                            wide(narrow<E>(scaled(i + 2))), wide(narrow<E>(scaled(i + 3)))));
}

// out[outputs, inputs] of the tiles from `first` on, a block for each.
template <class F, class E>
__device__ __forceinline__ void expand(const Matrix& matrix, unsigned first, unsigned outputs, E* out) {
    const unsigned row = threadIdx.x % OUTPUTS;
    if (OUTPUTS * blockIdx.x + row >= outputs) return;
    out += uint64_t(INPUTS) * matrix.row_units * (OUTPUTS * blockIdx.x + row);
    for (unsigned unit = threadIdx.x / OUTPUTS; unit < matrix.row_units; unit += THREADS / OUTPUTS)
        each_four<F, E>(matrix, first + blockIdx.x, unit, row,
                        [&](unsigned at, float4 four) { store4(out + at, four); });
}

// x[block, inputs] = row ids[block], rounded to E, * scale.
template <class F, class E>
__device__ __forceinline__ void embed(const Matrix& matrix, const unsigned* ids, float scale, float* x) {
    const unsigned id = ids[blockIdx.x];
    x += uint64_t(INPUTS) * matrix.row_units * blockIdx.x;
    for (unsigned unit = threadIdx.x; unit < matrix.row_units; unit += THREADS)
        each_four<F, E>(matrix, id / OUTPUTS, unit, id % OUTPUTS, [&](unsigned at, float4 four) {
            store4(x + at, make_float4(four.x * scale, four.y * scale, four.z * scale, four.w * scale));
        });
}

// y[rows, stride] from x[rows, inputs], of the tiles from `first` on, as many as blocks, of which `outputs` are wanted;
// they are where y and bias (or null) begin. A block takes 8 N rows.
template <class F, unsigned N, class E>
__device__ __forceinline__ void layer(const Matrix& matrix, unsigned first, const E* x, const void* bias, void* y,
                                      uint64_t stride, unsigned outputs, unsigned rows, unsigned how) {
    const unsigned output = OUTPUTS * blockIdx.x, row = 8 * N * blockIdx.y;
    const uint64_t bytes = how == SET_BF16 ? sizeof(bf16) : sizeof(float);
    const void* own_bias = bias ? static_cast<const char*>(bias) + output * bytes : nullptr;
    void* own_y = static_cast<char*>(y) + (row * stride + output) * bytes;
    const Result result = {own_bias, own_y, stride, outputs - output, rows - row, how};
    multiply<F, N>(matrix, first + blockIdx.x, x + uint64_t(INPUTS) * matrix.row_units * row, result);
}

#define MATRIX const unsigned char *units, const unsigned char *factors, unsigned row_units

#define MULTIPLY(name, suffix, E, N)                                                                                  \
    KERNEL(multiply_##name##_##suffix, MATRIX, unsigned first, const E* x, const void* bias, void* y, uint64_t stride, \
           unsigned outputs, unsigned rows, unsigned how) {                                                           \
        layer<name, N>({units, factors, row_units}, first, x, bias, y, stride, outputs, rows, how);       \
    }

#define EXPAND(name, E)                                                                            \
    KERNEL(expand_##name##_##E, MATRIX, unsigned first, unsigned outputs, E* out) {                \
        expand<name, E>({units, factors, row_units}, first, outputs, out);            \
    }                                                                                              \
    KERNEL(embed_##name##_##E, MATRIX, const unsigned* ids, float scale, float* x) {               \
        embed<name, E>({units, factors, row_units}, ids, scale, x);                   \
    }

// Bits of a code, the least code, inputs of a group; whether there are factors, and offsets.
#define FORMAT(name, ...)                \
    typedef Format<__VA_ARGS__> name;    \
    MULTIPLY(name, bf16_8, bf16, 1)      \
    MULTIPLY(name, bf16_32, bf16, 4)     \
    MULTIPLY(name, f32_8, f32, 1)        \
    EXPAND(name, bf16)                   \
    EXPAND(name, f32)

FORMAT(q4_0, 4, -8, 32, false, false)
FORMAT(q4_1, 4, 0, 32, false, true)
FORMAT(q5_0, 5, -16, 32, false, false)
FORMAT(q5_1, 5, 0, 32, false, true)
FORMAT(q8_0, 8, -128, 32, false, false)
FORMAT(q2_k, 2, 0, 16, true, true)
FORMAT(q3_k, 3, -4, 16, true, false)
FORMAT(q4_k, 4, 0, 32, true, true)
FORMAT(q5_k, 5, 0, 32, true, true)
FORMAT(q6_k, 6, -32, 16, true, false)
