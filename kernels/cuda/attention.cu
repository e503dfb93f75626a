// Causal attention over packed sequences whose keys and values lie in pages, with soft-max as one goes along (Dao 2023,
// FlashAttention-2).
//
// A block takes 64 rows, 16 for each of its warps: positions of one sequence, times the heads that share a key head. It
// walks over tiles of keys that are aligned to the position in the sequence, so a row's order of summation depends on its
// position alone; a tile of which a row sees nothing changes none of its bits.
#include "tile.cuh"

constexpr int PAGE = 32;
constexpr int ROWS = 64;
constexpr int THREADS = 128;
constexpr float LOG2E = 1.4426950408889634f;

// Neighbouring rows of one sequence.
struct Piece {
    unsigned row, rows, position;
    // Where the sequence's pages begin in the list of pages.
    unsigned pages;
};

struct Rule {
    unsigned heads, kv_heads, dim, padded_dim;
    float scale;
    // 0 for none.
    float softcap;
    // Keys that a query sees, itself included; 0 for all.
    unsigned window;
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
__device__ __forceinline__ void attend(const E* q, const E* keys, const E* values, const Piece* pieces,
                                       const unsigned* pages, Rule rule, E* out) {
    using S = Shape<E, WIDTH>;
    constexpr int TILE = S::TILE, STRIDE = S::STRIDE, CHUNK = S::CHUNK, CHUNKS = WIDTH / CHUNK;
    DYNAMIC_SHARED(E, shared);
    E* own_q = shared;
    E* own_keys = own_q + ROWS * STRIDE;
    E* own_values = own_keys + S::STAGES * TILE * STRIDE;

    const Piece piece = pieces[blockIdx.x];
    // The list may be longer than what is in it.
    if (piece.rows == 0) return;
    const unsigned kv_head = blockIdx.y, group = rule.heads / rule.kv_heads;
    const unsigned end = piece.position + piece.rows;
    pages += piece.pages;

    for (unsigned i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        unsigned row = i / CHUNKS, column = i % CHUNKS * CHUNK;
        bool valid = row < piece.rows * group && column < rule.padded_dim;
        uint64_t from = uint64_t(piece.row + row / group) * rule.heads + kv_head * group + row % group;
        copy16(own_q + row * STRIDE + column, q + (valid ? from * rule.padded_dim + column : 0), valid);
    }
    auto load = [&](unsigned tile, unsigned stage) {
        for (unsigned i = threadIdx.x; i < TILE * CHUNKS; i += THREADS) {
            unsigned row = i / CHUNKS, column = i % CHUNKS * CHUNK, position = tile * TILE + row;
            bool valid = position < end && column < rule.padded_dim;
            uint64_t page = valid ? pages[position / PAGE] : 0;
            uint64_t from = ((page * rule.kv_heads + kv_head) * PAGE + position % PAGE) * rule.padded_dim + column;
            unsigned to = (stage * TILE + row) * STRIDE + column;
            copy16(own_keys + to, keys + (valid ? from : 0), valid);
            copy16(own_values + to, values + (valid ? from : 0), valid);
        }
        end_group_of_copies();
    };

    // The two rows of this lane, by the positions of their queries.
    const unsigned rows[2] = {threadIdx.x / WARP * 16 + lane() / 4, threadIdx.x / WARP * 16 + lane() / 4 + 8};
    const unsigned queries[2] = {piece.position + rows[0] / group, piece.position + rows[1] / group};
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    float o[WIDTH / 8][4];
#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) o[j][c] = 0;

    const unsigned first =
        rule.window && piece.position + 1 > rule.window ? (piece.position + 1 - rule.window) / TILE : 0;
    const unsigned last = (end - 1) / TILE;
    load(first, 0);
    for (unsigned tile = first; tile <= last; ++tile) {
        const unsigned stage = S::STAGES == 2 ? (tile - first) % 2 : 0;
        if (S::STAGES == 2 && tile < last) {
            load(tile + 1, 1 - stage);
            wait_for_copies<1>();
        } else {
            wait_for_copies<0>();
        }
        __syncthreads();

        float s[TILE / 8][4];
        product<TILE, WIDTH>(s, own_q + threadIdx.x / WARP * 16 * STRIDE, own_keys + stage * TILE * STRIDE, STRIDE);
        float before[2] = {largest[0], largest[1]};
#pragma unroll
        for (int j = 0; j < TILE / 8; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                float score = s[j][c] * rule.scale;
                if (rule.softcap != 0) score = rule.softcap * tanhf(score / rule.softcap);
                unsigned key = tile * TILE + 8 * j + 2 * (lane() % 4) + c % 2, query = queries[c / 2];
                bool seen = key <= query && (rule.window == 0 || query - key < rule.window);
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
        // The next load goes where this tile was.
        __syncthreads();
        if (S::STAGES == 1 && tile < last) load(tile + 1, 0);
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (rows[half] >= piece.rows * group) continue;
        uint64_t to = uint64_t(piece.row + rows[half] / group) * rule.heads + kv_head * group + rows[half] % group;
#pragma unroll
        for (int j = 0; j < WIDTH / 8; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                unsigned column = 8 * j + 2 * (lane() % 4) + c;
                if (column < rule.dim) out[to * rule.dim + column] = narrow<E>(o[j][2 * half + c] / sum[half]);
            }
        }
    }
}

// q[rows, heads, padded_dim] over pages [_, kv_heads, PAGE, padded_dim], into out[rows, heads, dim]. Blocks are pieces by
// key heads; a piece has at most ROWS / (heads / kv_heads) rows.
#define ATTENTION(suffix, E, WIDTH)                                                                                   \
    KERNEL(attention_##suffix##_##WIDTH, const E* q, const E* keys, const E* values, const Piece* pieces,             \
           const unsigned* pages, Rule rule, E* out) {                                                                \
        attend<E, WIDTH>(q, keys, values, pieces, pages, rule, out);                                                  \
    }

ATTENTION(f32, float, 64)
ATTENTION(f32, float, 128)
ATTENTION(f32, float, 256)
ATTENTION(bf16, bf16, 64)
ATTENTION(bf16, bf16, 96)
ATTENTION(bf16, bf16, 128)
ATTENTION(bf16, bf16, 256)
