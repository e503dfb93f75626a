// Causal attention over packed sequences whose keys and values lie in pages, with soft-max as one goes along (Dao 2023,
// FlashAttention-2).
//
// A block takes 64 rows, 16 for each of its warps: positions, times the heads that share a key head. It walks over tiles
// of a range of keys, aligned to the position in the sequence; a tile of which a row sees nothing changes none of its
// bits. Where the range is not all that a row sees, the result is partial, and partial results are merged in the order
// of their keys by the logarithms of their sums (Dao et al. 2023, Flash-Decoding). So a row's order of summation depends
// on how its own keys are cut, which the host decides, and not on the rows that are in its block.
#include "attention.cuh"
#include "tile.cuh"

constexpr int ROWS = 64;
constexpr int THREADS = 128;
constexpr unsigned MAX_DIM = 256;

// A row with `count` partial results from `slot` on, at most one for each lane of a warp.
struct Merge {
    unsigned row, slot, count;
};

// How a head's width is cut: WIDTH is its own, rounded up, TILE keys at a time, STAGES tiles in shared memory.
template <class E, int WIDTH>
struct Shape {
    static constexpr bool NARROW = sizeof(E) == 2;
    static constexpr int TILE = NARROW ? (WIDTH > 128 ? 32 : 64) : (WIDTH > 128 ? 16 : 32);
    static constexpr int STAGES = NARROW ? 2 : 1;
    // Elements of 16 bytes; rows are that much longer, so that those of a matrix lie in different banks.
    static constexpr int CHUNK = 16 / sizeof(E);
    static constexpr int STRIDE = WIDTH + CHUNK;
};

template <class E, int WIDTH>
__device__ __forceinline__ void load_queries(E* own, const E* q, const Rows& rows, unsigned padded_dim) {
    using S = Shape<E, WIDTH>;
    constexpr int CHUNKS = WIDTH / S::CHUNK;
    for (unsigned i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        unsigned row = i / CHUNKS, column = i % CHUNKS * S::CHUNK;
        bool valid = row < rows.count && column < padded_dim;
        uint64_t from = valid ? rows.at(rows.of(row).row, row) * padded_dim + column : 0;
        copy16(own + row * S::STRIDE + column, q + from, valid);
    }
}

// A tile of keys and values, zeros from position `end` on.
template <class E, int WIDTH>
__device__ __forceinline__ void load_tile(E* own_keys, E* own_values, const E* keys, const E* values,
                                          const unsigned* pages, const Rule& rule, unsigned kv_head, unsigned tile,
                                          unsigned end) {
    using S = Shape<E, WIDTH>;
    constexpr int CHUNKS = WIDTH / S::CHUNK;
    for (unsigned i = threadIdx.x; i < S::TILE * CHUNKS; i += THREADS) {
        unsigned row = i / CHUNKS, column = i % CHUNKS * S::CHUNK, position = tile * S::TILE + row;
        bool valid = position < end && column < rule.padded_dim;
        uint64_t page = valid ? pages[position / PAGE] : 0;
        uint64_t from = (page * rule.kv_heads + kv_head) * PAGE * rule.padded_dim +
                        in_tile<E>(position, column, rule.padded_dim);
        unsigned to = row * S::STRIDE + column;
        copy16(own_keys + to, keys + (valid ? from : 0), valid);
        copy16(own_values + to, values + (valid ? from : 0), valid);
    }
}

// The row's elements that this lane holds, before they are divided by its sum of exp2(score - largest). Row i of the
// block.
template <class E, int WIDTH>
__device__ __forceinline__ void store(const float (&o)[WIDTH / 8][4], int half, float largest, float sum, unsigned i,
                                      const Rows& rows, const Rule& rule, const Results<E>& results) {
    const Row row = rows.of(i);
    const bool whole = row.slot == WHOLE;
    const uint64_t at = rows.at(whole ? row.row : row.slot, i);
    const float log_sum = largest + log2f(sum);
    if (whole && results.log_sums && lane() % 4 == 0) results.log_sums[at] = log_sum * LN2;
    if (!whole && lane() % 4 == 0) results.partial_log_sums[at] = log_sum;
    if (sum == 0) return;
#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            unsigned column = 8 * j + 2 * (lane() % 4) + c;
            float value = o[j][2 * half + c] / sum;
            if (column >= rule.dim) continue;
            if (whole) results.out[at * rule.dim + column] = narrow<E>(value);
            else results.partial[at * rule.padded_dim + column] = value;
        }
    }
}

template <class E, int WIDTH>
__device__ __forceinline__ void attend(const E* q, const E* keys, const E* values, const Piece* pieces, const Row* list,
                                       const unsigned* positions, const unsigned* pages, const Rule& rule,
                                       const Results<E>& results) {
    using S = Shape<E, WIDTH>;
    constexpr int TILE = S::TILE, STRIDE = S::STRIDE;
    DYNAMIC_SHARED(E, shared);
    E* own_q = shared;
    E* own_keys = own_q + ROWS * STRIDE;
    E* own_values = own_keys + S::STAGES * TILE * STRIDE;

    const Piece piece = pieces[blockIdx.x];
    // The list may be longer than what is in it.
    if (piece.rows == 0) return;
    const unsigned kv_head = blockIdx.y;
    const Rows rows(piece, list, rule, kv_head);
    auto load = [&](unsigned tile, unsigned stage) {
        load_tile<E, WIDTH>(own_keys + stage * TILE * STRIDE, own_values + stage * TILE * STRIDE, keys, values,
                            pages + piece.pages, rule, kv_head, tile, piece.to);
        end_group_of_copies();
    };

    // The two rows of this lane, and the positions of their queries. A warp without rows computes nothing.
    const unsigned first_row = threadIdx.x / WARP * 16;
    const bool busy = first_row < rows.count;
    const unsigned own[2] = {first_row + lane() / 4, first_row + lane() / 4 + 8};
    unsigned queries[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
        queries[half] = own[half] < rows.count ? positions[rows.of(own[half]).row] : piece.position;
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    float o[WIDTH / 8][4];
#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) o[j][c] = 0;

    // From the window's beginning on, which may be behind all of the piece's keys.
    const unsigned first = max(first_seen(piece.position, rule.window), piece.from) / TILE, end = (piece.to + TILE - 1) / TILE;
    load_queries<E, WIDTH>(own_q, q, rows, rule.padded_dim);
    if (first < end) load(first, 0);
    for (unsigned tile = first; tile < end; ++tile) {
        const unsigned stage = S::STAGES == 2 ? (tile - first) % 2 : 0;
        if (S::STAGES == 2 && tile + 1 < end) {
            load(tile + 1, 1 - stage);
            wait_for_copies<1>();
        } else {
            wait_for_copies<0>();
        }
        __syncthreads();

        if (busy) {
            float s[TILE / 8][4];
            product<TILE, WIDTH>(s, own_q + first_row * STRIDE, own_keys + stage * TILE * STRIDE, STRIDE);
            float before[2] = {largest[0], largest[1]};
#pragma unroll
            for (int j = 0; j < TILE / 8; ++j) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    float score = s[j][c] * rule.scale;
                    if (rule.softcap != 0) score = rule.softcap * tanhf(score / rule.softcap);
                    bool seen = sees(rule, queries[c / 2], tile * TILE + 8 * j + 2 * (lane() % 4) + c % 2);
                    s[j][c] = seen ? score * LOG2E : -INFINITY;
                    largest[c / 2] = fmaxf(largest[c / 2], s[j][c]);
                }
            }
            float least[2], shrink[2], added[2] = {0, 0};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                largest[half] = fmaxf(largest[half], __shfl_xor_sync(ALL, largest[half], 1));
                largest[half] = fmaxf(largest[half], __shfl_xor_sync(ALL, largest[half], 2));
                // Of a row that has seen nothing yet, every weight is 0.
                least[half] = largest[half] == -INFINITY ? 0 : largest[half];
                shrink[half] = exp2f(before[half] - least[half]);
            }
#pragma unroll
            for (int j = 0; j < TILE / 8; ++j) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    s[j][c] = exp2f(s[j][c] - least[c / 2]);
                    added[c / 2] += s[j][c];
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                added[half] += __shfl_xor_sync(ALL, added[half], 1);
                added[half] += __shfl_xor_sync(ALL, added[half], 2);
                sum[half] = sum[half] * shrink[half] + added[half];
            }
#pragma unroll
            for (int j = 0; j < WIDTH / 8; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) o[j][c] *= shrink[c / 2];
            weighted<WIDTH, TILE>(o, s, own_values + stage * TILE * STRIDE, STRIDE);
        }
        // The next load goes where this tile was.
        __syncthreads();
        if (S::STAGES == 1 && tile + 1 < end) load(tile + 1, 0);
    }

#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (own[half] < rows.count)
            store<E, WIDTH>(o, half, largest[half], sum[half], own[half], rows, rule, results);
}

// A warp for each head of a row; a lane for each of its partial results, then for every 32nd element.
template <class E>
__device__ __forceinline__ void merge(const Merge* merges, const Rule& rule, const Results<E>& results) {
    const unsigned head = blockIdx.y * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (head >= rule.heads) return;
    const Merge row = merges[blockIdx.x];
    if (row.count == 0) return;
    const uint64_t slot = uint64_t(row.slot) * rule.heads + head, at = uint64_t(row.row) * rule.heads + head;
    const float log_sum =
        lane() < row.count ? results.partial_log_sums[slot + uint64_t(lane()) * rule.heads] : -INFINITY;
    float largest = log_sum;
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, distance));
    const float weight = exp2f(log_sum - largest), sum = warp_sum(weight);
    float o[MAX_DIM / WARP];
#pragma unroll
    for (unsigned i = 0; i < MAX_DIM / WARP; ++i) o[i] = 0;
#pragma unroll 4
    for (unsigned part = 0; part < row.count; ++part) {
        const float share = __shfl_sync(ALL, weight, part);
        const float* from = results.partial + (slot + uint64_t(part) * rule.heads) * rule.padded_dim;
#pragma unroll
        for (unsigned i = 0; i < MAX_DIM / WARP; ++i) {
            unsigned column = lane() + i * WARP;
            // Where there is no weight, there may be nothing.
            if (share != 0 && column < rule.dim) o[i] = fmaf(share, from[column], o[i]);
        }
    }
#pragma unroll
    for (unsigned i = 0; i < MAX_DIM / WARP; ++i) {
        unsigned column = lane() + i * WARP;
        if (column < rule.dim) results.out[at * rule.dim + column] = narrow<E>(o[i] / sum);
    }
    if (results.log_sums && lane() == 0) results.log_sums[at] = (largest + log2f(sum)) * LN2;
}

// q[rows, heads, padded_dim] over pages as in pages.cuh. Blocks are pieces by key heads; a piece has at most ROWS / (heads /
// kv_heads) rows. `positions` are those of all rows.
#define ATTENTION(suffix, E, WIDTH)                                                                                   \
    KERNEL(attention_##suffix##_##WIDTH, const E* q, const E* keys, const E* values, const Piece* pieces,             \
           const Row* rows, const unsigned* positions, const unsigned* pages, Rule rule, Results<E> results) {        \
        attend<E, WIDTH>(q, keys, values, pieces, rows, positions, pages, rule, results);                             \
    }

ATTENTION(f32, float, 64)
ATTENTION(f32, float, 128)
ATTENTION(f32, float, 256)
ATTENTION(bf16, bf16, 64)
ATTENTION(bf16, bf16, 96)
ATTENTION(bf16, bf16, 128)
ATTENTION(bf16, bf16, 256)

// What partial results become. Blocks are rows by some heads.
#define MERGE(suffix, E)                                                                                  \
    KERNEL(merge_attention_##suffix, const Merge* merges, Rule rule, Results<E> results) {                \
        merge(merges, rule, results);                                                                     \
    }

MERGE(f32, float)
MERGE(bf16, bf16)
