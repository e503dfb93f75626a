// Gradients of attention (Dao 2023, FlashAttention-2, algorithm 2): with weights P = exp(S - log_sum) of the scores S,
//
//     dV = P^T dO,    dP = dO V^T,    dS = P * (dP - rowsum(dO * O)),    dQ = dS K,    dK = dS^T Q.
//
// Two kernels instead of one that adds up atomically: a block of the first takes 64 keys and goes over the queries that
// see them, one of the second takes 64 queries and goes over the keys that they see. Both compute P and dP again. So
// every sum has one order: that of the queries in the list of spans, or that of the keys. A key's sum runs over the
// heads that share it, and over all spans whose pages it lies in.
//
// A query here is a row of one head: those of a span are its positions, times the heads that share a key head.
#include "attention.cuh"
#include "tile.cuh"

// Queries, and keys, that an entry of their lists names.
constexpr unsigned LISTED = 64;
// No page, or no row.
constexpr unsigned NONE = 0xffffffff;

// Rows of one sequence.
struct Span {
    unsigned row, rows, position;
    // Where the sequence's pages begin in the list of pages.
    unsigned pages;
};

// The queries of a span from `first` on.
struct Queries {
    unsigned span, first;
};

// Two pages in a row, the second perhaps NONE, that are part of the same spans.
struct Keys {
    unsigned position, pages[2];
    // Where the rows of its keys begin in the list of rows.
    unsigned rows;
    // Those spans, in the list of viewers.
    unsigned first, last;
};

// What is known of a query.
struct alignas(16) Query {
    // Binary logarithm of the sum of its powers.
    float log_sum;
    // dO * O.
    float along;
    unsigned position;
};

// A block's OWN rows stay in shared memory, two matrices of WIDTH; TILE rows at a time of two others go by, of which
// there are STAGES tiles. All of it is no more than the 99 KiB that a block may have on every GPU.
template <class E, int WIDTH>
struct Shape {
    static constexpr bool NARROW = sizeof(E) == 2;
    static constexpr int OWN = NARROW || WIDTH <= 128 ? 64 : 32;
    static constexpr int TILE = NARROW ? (WIDTH > 128 ? 16 : (WIDTH > 96 ? 32 : 64)) : (WIDTH > 64 ? 16 : 32);
    static constexpr int STAGES = NARROW ? 2 : 1;
    static constexpr int THREADS = OWN / 16 * WARP;
    // Elements of 16 bytes; rows are that much longer, so that those of a matrix lie in different banks.
    static constexpr int CHUNK = 16 / sizeof(E);
    static constexpr int STRIDE = WIDTH + CHUNK;
    // Blocks that share an entry of a list.
    static constexpr unsigned PARTS = LISTED / OWN;
};

// 16 bytes of a row of `dim` elements, or of the zeros behind them and in place of an invalid row.
template <class E>
__device__ __forceinline__ void copy_chunk(E* to, const E* row, unsigned column, unsigned dim, bool valid) {
    constexpr unsigned CHUNK = 16 / sizeof(E);
    if (dim % CHUNK == 0) {
        valid = valid && column < dim;
        copy16(to, row + (valid ? column : 0), valid);
    } else {
        for (unsigned i = 0; i < CHUNK; ++i) to[i] = valid && column + i < dim ? row[column + i] : narrow<E>(0);
    }
}

// ROWS queries of a span from `first` on. What is known of them lies behind the rows of q.
template <class E, int WIDTH, int ROWS>
__device__ __forceinline__ void load_queries(E* to_q, E* to_d_out, const E* q, const E* d_out, const Query* queries,
                                             Span span, unsigned first, unsigned kv_head, const Rule& rule) {
    using S = Shape<E, WIDTH>;
    constexpr int CHUNKS = WIDTH / S::CHUNK;
    const unsigned group = rule.heads / rule.kv_heads;
    for (unsigned i = threadIdx.x; i < ROWS * CHUNKS; i += S::THREADS) {
        unsigned row = i / CHUNKS, column = i % CHUNKS * S::CHUNK, to = row * S::STRIDE + column;
        unsigned query = first + row;
        bool valid = query < span.rows * group;
        uint64_t head = valid ? uint64_t(span.row + query / group) * rule.heads + kv_head * group + query % group : 0;
        copy_chunk(to_q + to, q + head * rule.padded_dim, column, rule.padded_dim, valid);
        copy_chunk(to_d_out + to, d_out + head * rule.dim, column, rule.dim, valid);
        if (column == 0) copy16(to_q + to + WIDTH, queries + head, valid);
    }
    end_group_of_copies();
}

// ROWS keys and values from `first` to `end`, counted from the first of the pages on.
template <class E, int WIDTH, int ROWS, bool VALUES>
__device__ __forceinline__ void load_keys(E* to_keys, E* to_values, const E* keys, const E* values,
                                          const unsigned* pages, unsigned first, unsigned end, unsigned kv_head,
                                          const Rule& rule) {
    using S = Shape<E, WIDTH>;
    constexpr int CHUNKS = WIDTH / S::CHUNK;
    for (unsigned i = threadIdx.x; i < ROWS * CHUNKS; i += S::THREADS) {
        unsigned row = i / CHUNKS, column = i % CHUNKS * S::CHUNK, to = row * S::STRIDE + column, key = first + row;
        bool valid = key < end;
        uint64_t page = valid ? pages[key / PAGE] : 0;
        uint64_t from = (page * rule.kv_heads + kv_head) * PAGE * rule.padded_dim +
                        in_tile<E>(key, column, rule.padded_dim);
        valid = valid && column < rule.padded_dim;
        copy16(to_keys + to, keys + (valid ? from : 0), valid);
        if (VALUES) copy16(to_values + to, values + (valid ? from : 0), valid);
    }
    end_group_of_copies();
}

// From a product of q and k to a weight, and from the gradient of the weight to that of the product.
__device__ __forceinline__ void weigh(float& score, float& slope, const Query& query, unsigned key, const Rule& rule) {
    float scaled = score * rule.scale, scale = rule.scale;
    if (rule.softcap != 0) {
        float t = tanhf(scaled / rule.softcap);
        scaled = rule.softcap * t;
        scale *= 1 - t * t;
    }
    bool seen = sees(rule, query.position, key);
    score = seen ? exp2f(scaled * LOG2E - query.log_sum) : 0;
    slope = seen ? score * (slope - query.along) * scale : 0;
}

template <int WIDTH>
__device__ __forceinline__ void clear(float (&sums)[WIDTH / 8][4]) {
#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[j][c] = 0;
}

// A half of this lane's part of a matrix: one row, to `to[dim]`.
template <int WIDTH>
__device__ __forceinline__ void store_row(float* to, const float (&sums)[WIDTH / 8][4], int half, unsigned dim) {
#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            unsigned column = 8 * j + 2 * (lane() % 4) + c;
            if (column < dim) to[column] = sums[j][2 * half + c];
        }
    }
}

// Where the gradient of a head of q, k or v is.
__device__ __forceinline__ float* gradient_of(float* dqkv, uint64_t row, unsigned head, const Rule& rule) {
    return dqkv + (row * (rule.heads + 2 * rule.kv_heads) + head) * rule.dim;
}

// A warp has 16 keys, and their products with a tile of queries are the transposes of S and dP.
template <class E, int WIDTH, bool OF_KEYS, bool OF_VALUES>
__device__ __forceinline__ void to_keys(const E* q, const E* keys, const E* values, const E* d_out,
                                        const Query* queries, const Keys* list, const unsigned* viewers,
                                        const Span* spans, const unsigned* rows, const Rule& rule, float* dqkv) {
    using S = Shape<E, WIDTH>;
    constexpr int OWN = S::OWN, TILE = S::TILE, STRIDE = S::STRIDE;
    DYNAMIC_SHARED(E, shared);
    E* own_keys = shared;
    E* own_values = own_keys + OWN * STRIDE;
    E* tiles = own_values + OWN * STRIDE;

    const Keys* own = list + blockIdx.x / S::PARTS;
    const unsigned begin = blockIdx.x % S::PARTS * OWN, end = own->pages[1] == NONE ? PAGE : 2 * PAGE;
    if (begin >= end) return;
    const unsigned kv_head = blockIdx.y, group = rule.heads / rule.kv_heads;
    const unsigned position = own->position + begin, last = own->last;
    load_keys<E, WIDTH, OWN, OF_KEYS>(own_keys, own_values, keys, values, own->pages, begin, end, kv_head, rule);

    // Tiles are cut from the beginning of a span, whatever keys look at them.
    unsigned viewer = own->first, next = 0, stop = 0;
    Span span = {};
    auto find_next = [&] {
        while (next >= stop && viewer < last) {
            span = spans[viewers[viewer++]];
            next = position > span.position ? (position - span.position) * group / TILE * TILE : 0;
            unsigned too_far = position + OWN - 1 + rule.window;
            unsigned near = too_far > span.position ? min(span.rows, too_far - span.position) : 0;
            stop = (rule.window ? near : span.rows) * group;
        }
        return next < stop;
    };
    auto load_next = [&](unsigned stage) {
        E* to = tiles + stage * 2 * TILE * STRIDE;
        load_queries<E, WIDTH, TILE>(to, to + TILE * STRIDE, q, d_out, queries, span, next, kv_head, rule);
        next += TILE;
    };

    const unsigned warp_row = threadIdx.x / WARP * 16, row = warp_row + lane() / 4;
    float d_keys[WIDTH / 8][4], d_values[WIDTH / 8][4];
    clear<WIDTH>(d_keys);
    clear<WIDTH>(d_values);
    bool more = find_next();
    if (more) load_next(0);
    for (unsigned stage = 0; more; stage = S::STAGES == 2 ? 1 - stage : 0) {
        more = find_next();
        if (S::STAGES == 2 && more) {
            load_next(1 - stage);
            wait_for_copies<1>();
        } else {
            wait_for_copies<0>();
        }
        __syncthreads();
        const E* tile_q = tiles + stage * 2 * TILE * STRIDE;
        const E* tile_d_out = tile_q + TILE * STRIDE;
        float weights[TILE / 8][4], slopes[TILE / 8][4];
        product<TILE, WIDTH>(weights, own_keys + warp_row * STRIDE, tile_q, STRIDE);
        if (OF_KEYS) product<TILE, WIDTH>(slopes, own_values + warp_row * STRIDE, tile_d_out, STRIDE);
        else clear<TILE>(slopes);
#pragma unroll
        for (int j = 0; j < TILE / 8; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const E* behind = tile_q + (8 * j + 2 * (lane() % 4) + c) * STRIDE + WIDTH;
                const Query query = *reinterpret_cast<const Query*>(behind);
                weigh(weights[j][c], slopes[j][c], query, position + row, rule);
                weigh(weights[j][2 + c], slopes[j][2 + c], query, position + row + 8, rule);
            }
        }
        if (OF_VALUES) weighted<WIDTH, TILE>(d_values, weights, tile_d_out, STRIDE);
        if (OF_KEYS) weighted<WIDTH, TILE>(d_keys, slopes, tile_q, STRIDE);
        // The next load goes where this tile was.
        __syncthreads();
        if (S::STAGES == 1 && more) load_next(0);
    }

    rows += own->rows + begin;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const unsigned to = rows[row + 8 * half], head = rule.heads + kv_head;
        if (to == NONE) continue;
        if (OF_KEYS) store_row<WIDTH>(gradient_of(dqkv, to, head, rule), d_keys, half, rule.dim);
        if (OF_VALUES) store_row<WIDTH>(gradient_of(dqkv, to, head + rule.kv_heads, rule), d_values, half, rule.dim);
    }
}

// A warp has 16 queries.
template <class E, int WIDTH>
__device__ __forceinline__ void to_queries(const E* q, const E* keys, const E* values, const E* d_out,
                                           const Query* queries, const Queries* list, const Span* spans,
                                           const unsigned* pages, const Rule& rule, float* dqkv) {
    using S = Shape<E, WIDTH>;
    constexpr int OWN = S::OWN, TILE = S::TILE, STRIDE = S::STRIDE;
    DYNAMIC_SHARED(E, shared);
    E* own_q = shared;
    E* own_d_out = own_q + OWN * STRIDE;
    E* tiles = own_d_out + OWN * STRIDE;

    const unsigned kv_head = blockIdx.y, group = rule.heads / rule.kv_heads;
    const Queries own = list[blockIdx.x / S::PARTS];
    const Span span = spans[own.span];
    const unsigned first = own.first + blockIdx.x % S::PARTS * OWN, past = min(first + OWN, span.rows * group);
    if (first >= past) return;
    load_queries<E, WIDTH, OWN>(own_q, own_d_out, q, d_out, queries, span, first, kv_head, rule);
    const unsigned lowest = span.position + first / group, end = span.position + (past - 1) / group + 1;
    pages += span.pages;
    auto load = [&](unsigned tile, unsigned stage) {
        E* to = tiles + stage * 2 * TILE * STRIDE;
        load_keys<E, WIDTH, TILE, true>(to, to + TILE * STRIDE, keys, values, pages, tile * TILE, end, kv_head, rule);
    };

    const unsigned warp_row = threadIdx.x / WARP * 16;
    float d_queries[WIDTH / 8][4];
    clear<WIDTH>(d_queries);
    const unsigned from = first_seen(lowest, rule.window) / TILE;
    const unsigned last = (end - 1) / TILE;
    load(from, 0);
    for (unsigned tile = from; tile <= last; ++tile) {
        const unsigned stage = S::STAGES == 2 ? (tile - from) % 2 : 0;
        if (S::STAGES == 2 && tile < last) {
            load(tile + 1, 1 - stage);
            wait_for_copies<1>();
        } else {
            wait_for_copies<0>();
        }
        __syncthreads();
        const E* tile_keys = tiles + stage * 2 * TILE * STRIDE;
        const E* tile_values = tile_keys + TILE * STRIDE;
        float weights[TILE / 8][4], slopes[TILE / 8][4];
        product<TILE, WIDTH>(weights, own_q + warp_row * STRIDE, tile_keys, STRIDE);
        product<TILE, WIDTH>(slopes, own_d_out + warp_row * STRIDE, tile_values, STRIDE);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const E* behind = own_q + (warp_row + lane() / 4 + 8 * half) * STRIDE + WIDTH;
            const Query query = *reinterpret_cast<const Query*>(behind);
#pragma unroll
            for (int j = 0; j < TILE / 8; ++j) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    unsigned key = tile * TILE + 8 * j + 2 * (lane() % 4) + c;
                    weigh(weights[j][2 * half + c], slopes[j][2 * half + c], query, key, rule);
                }
            }
        }
        weighted<WIDTH, TILE>(d_queries, slopes, tile_keys, STRIDE);
        // The next load goes where this tile was.
        __syncthreads();
        if (S::STAGES == 1 && tile < last) load(tile + 1, 0);
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const unsigned query = first + warp_row + lane() / 4 + 8 * half;
        if (query >= past) continue;
        const unsigned head = kv_head * group + query % group;
        store_row<WIDTH>(gradient_of(dqkv, span.row + query / group, head, rule), d_queries, half, rule.dim);
    }
}

// Of wide heads, the gradients of keys and of values do not fit into registers together: they are the blocks of z.
template <class E, int WIDTH, class... Arguments>
__device__ __forceinline__ void to_keys_and_values(const Arguments&... arguments) {
    if constexpr (WIDTH <= 128) to_keys<E, WIDTH, true, true>(arguments...);
    else if (blockIdx.z == 0) to_keys<E, WIDTH, true, false>(arguments...);
    else to_keys<E, WIDTH, false, true>(arguments...);
}

// What the other kernels want to know of each query, a warp for each: out and d_out are [rows, heads, dim], the natural
// logarithms of the sums [rows, heads].
template <class E>
__device__ __forceinline__ void know(const E* out, const E* d_out, const float* log_sums, const unsigned* positions,
                                     unsigned heads, unsigned dim, uint64_t count, Query* queries) {
    const uint64_t query = uint64_t(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (query >= count) return;
    out += query * dim;
    d_out += query * dim;
    float along = 0;
    for (unsigned i = lane(); i < dim; i += WARP) along += wide(out[i]) * wide(d_out[i]);
    along = warp_sum(along);
    if (lane() == 0) queries[query] = {log_sums[query] * LOG2E, along, positions[query / heads]};
}

// q[rows, heads, padded_dim] and d_out[rows, heads, dim] over pages as in pages.cuh, into
// dqkv[rows, heads + 2 * kv_heads, dim]. Blocks are entries of a list, times those that share one, by key heads.
#define BACKWARD(suffix, E, WIDTH)                                                                                    \
    KERNEL(attention_to_keys_##suffix##_##WIDTH, const E* q, const E* keys, const E* values, const E* d_out,          \
           const Query* queries, const Keys* list, const unsigned* viewers, const Span* spans, const unsigned* rows,  \
           Rule rule, float* dqkv) {                                                                                  \
        to_keys_and_values<E, WIDTH>(q, keys, values, d_out, queries, list, viewers, spans, rows, rule, dqkv);        \
    }                                                                                                                 \
    KERNEL(attention_to_queries_##suffix##_##WIDTH, const E* q, const E* keys, const E* values, const E* d_out,       \
           const Query* queries, const Queries* list, const Span* spans, const unsigned* pages, Rule rule,            \
           float* dqkv) {                                                                                             \
        to_queries<E, WIDTH>(q, keys, values, d_out, queries, list, spans, pages, rule, dqkv);                        \
    }

BACKWARD(f32, float, 64)
BACKWARD(f32, float, 128)
BACKWARD(f32, float, 256)
BACKWARD(bf16, bf16, 64)
BACKWARD(bf16, bf16, 96)
BACKWARD(bf16, bf16, 128)
BACKWARD(bf16, bf16, 256)

#define KNOW(suffix, E)                                                                                              \
    KERNEL(attention_queries_##suffix, const E* out, const E* d_out, const float* log_sums, const unsigned* positions, \
           unsigned heads, unsigned dim, uint64_t count, Query* queries) {                                            \
        know(out, d_out, log_sums, positions, heads, dim, count, queries);                                            \
    }

KNOW(f32, float)
KNOW(bf16, bf16)
