// The attention of attention.cu on the matrix unit of Hopper, for heads of bf16 that fill runs of 128 bytes (Shah et al.
// 2024, FlashAttention-3).
//
// One warp group of a block brings tiles of keys and values, in as many copies as they have pages and runs, the other two
// take 64 rows each. While a group makes weights of its scores, the matrix unit makes its next scores and sums the values
// that it has weighted before. Tiles are aligned to the position in the sequence, and one that a row does not see changes
// none of its bits.
#include "pages.cuh"
#include "warpgroup.cuh"

constexpr unsigned GROUPS = 2;
// Of a group.
constexpr unsigned ROWS = 64;
constexpr unsigned THREADS = (1 + GROUPS) * WARP_GROUP;

// As in attention.cu.
struct Piece {
    unsigned row, rows, position, pages;
};
struct Rule {
    unsigned heads, kv_heads, dim, padded_dim;
    float scale, softcap;
    unsigned window;
};

// How a head of WIDTH elements is cut: TILE keys at a time, STAGES tiles of keys and as many of values in shared memory,
// products of BLOCK of its columns at a time.
template <int WIDTH>
struct Shape {
    static constexpr int TILE = WIDTH > 128 ? 64 : 128;
    static constexpr int STAGES = WIDTH > 64 ? 2 : 4;
    static constexpr int BLOCK = WIDTH > 64 ? 128 : 64;
};

// Shared memory: q of each group, tiles of keys and of values, all as pages.cuh says, and for each tile a barrier that
// says that it is there, and one that it is not needed any more.
template <int WIDTH>
struct Shared {
    using S = Shape<WIDTH>;
    bf16 q[GROUPS][ROWS * WIDTH];
    bf16 keys[S::STAGES][S::TILE * WIDTH];
    bf16 values[S::STAGES][S::TILE * WIDTH];
    Barrier keys_there[S::STAGES], keys_done[S::STAGES], values_there[S::STAGES], values_done[S::STAGES];
};

// Tiles from `first` to before `end`.
struct Tiles {
    unsigned first, end;
};

// The first position that one sees.
__device__ __forceinline__ unsigned first_seen(unsigned position, unsigned window) {
    return window && position + 1 > window ? position + 1 - window : 0;
}

// What a thread brings for the block.
template <int WIDTH>
__device__ __forceinline__ void bring(Shared<WIDTH>& shared, const bf16* keys, const bf16* values, const unsigned* pages,
                                      unsigned last_page, unsigned kv_heads, unsigned kv_head, Tiles tiles) {
    using S = Shape<WIDTH>;
    constexpr unsigned PAGES = S::TILE / PAGE;
    auto bring_tile = [&](bf16* to, const bf16* from, unsigned tile, Barrier* there, Barrier* done, unsigned round) {
        unsigned numbers[PAGES];
        // Behind the last page comes that one again: what no row sees has to be finite, as all values in pages are.
#pragma unroll
        for (unsigned i = 0; i < PAGES; ++i) numbers[i] = pages[min(tile * PAGES + i, last_page)];
        // At first every stage is free.
        wait_for_phase(done, (round + 1) % 2);
        arrive_expecting(there, S::TILE * WIDTH * sizeof(bf16));
#pragma unroll
        for (unsigned i = 0; i < PAGES; ++i) {
            const bf16* page = from + (uint64_t(numbers[i]) * kv_heads + kv_head) * PAGE * WIDTH;
#pragma unroll
            for (unsigned run = 0; run < WIDTH / RUN; ++run)
                copy_bulk(to + (run * S::TILE + i * PAGE) * RUN, page + run * PAGE * RUN, PAGE * RUN * sizeof(bf16),
                          there);
        }
    };
    // Keys are needed a tile before values are.
    const unsigned count = tiles.end - tiles.first;
    for (unsigned i = 0; i <= count; ++i) {
        if (i < count) {
            unsigned stage = i % S::STAGES;
            bring_tile(shared.keys[stage], keys, tiles.first + i, &shared.keys_there[stage], &shared.keys_done[stage],
                       i / S::STAGES);
        }
        if (i > 0) {
            unsigned stage = (i - 1) % S::STAGES;
            bring_tile(shared.values[stage], values, tiles.first + i - 1, &shared.values_there[stage],
                       &shared.values_done[stage], (i - 1) / S::STAGES);
        }
    }
}

// What one of the groups that compute does with its rows of the piece, which begin at `first_row`.
template <int WIDTH>
__device__ __forceinline__ void attend(Shared<WIDTH>& shared, const bf16* q, const Piece& piece, const Rule& rule,
                                       unsigned first_row, Tiles tiles, bf16* out) {
    using S = Shape<WIDTH>;
    constexpr int TILE = S::TILE, BLOCK = S::BLOCK, CHUNKS = WIDTH / 8;
    const unsigned kv_head = blockIdx.y, group = rule.heads / rule.kv_heads, rows = piece.rows * group;
    const unsigned thread = threadIdx.x % WARP_GROUP;
    // Rows of the piece are positions by heads.
    auto position = [&](unsigned row) { return piece.position + row / group; };
    auto head = [&](unsigned row) {
        return uint64_t(piece.row + row / group) * rule.heads + kv_head * group + row % group;
    };
    auto stage_of = [&](unsigned tile) { return (tile - tiles.first) % S::STAGES; };
    auto wait_for = [&](Barrier* there, unsigned tile) {
        wait_for_phase(there + stage_of(tile), (tile - tiles.first) / S::STAGES % 2);
    };
    auto leave = [&](Barrier* done, unsigned tile) {
        if (lane() == 0) arrive(done + stage_of(tile));
    };
    // Tiles that the group does not see.
    auto pass = [&](unsigned from, unsigned to) {
        for (unsigned tile = from; tile < to; ++tile) {
            wait_for(shared.keys_there, tile);
            wait_for(shared.values_there, tile);
            __syncwarp();
            leave(shared.keys_done, tile);
            leave(shared.values_done, tile);
        }
    };
    if (first_row >= rows) return pass(tiles.first, tiles.end);

    bf16* own_q = shared.q[first_row / ROWS];
    for (unsigned i = thread; i < ROWS * CHUNKS; i += WARP_GROUP) {
        unsigned row = first_row + i / CHUNKS, column = i % CHUNKS * 8;
        bool valid = row < rows;
        copy16(own_q + swizzled(ROWS, i / CHUNKS, column), q + (valid ? head(row) * WIDTH + column : 0), valid);
    }
    end_group_of_copies();
    const unsigned lowest = position(first_row), highest = position(min(first_row + ROWS, rows) - 1);
    const Tiles own = {first_seen(lowest, rule.window) / TILE, highest / TILE + 1};
    // The two rows of this lane, and from where to where they see keys.
    const unsigned upper = first_row + thread / WARP * 16 + lane() / 4, two[2] = {upper, upper + 8};
    const unsigned to[2] = {position(two[0]), position(two[1])};
    const unsigned from[2] = {first_seen(to[0], rule.window), first_seen(to[1], rule.window)};
    float largest[2] = {-INFINITY, -INFINITY}, shrink[2], sum[2] = {0, 0};
    float s[TILE / 8][4], o[WIDTH / BLOCK][BLOCK / 8][4];
    unsigned p[TILE / 16][4];
#pragma unroll
    for (int i = 0; i < WIDTH / BLOCK; ++i)
#pragma unroll
        for (int j = 0; j < BLOCK / 8; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) o[i][j][c] = 0;

    const uint64_t described_q = describe(own_q, 0);
    // s = q keys^T
    auto score = [&](unsigned tile) {
        wait_for(shared.keys_there, tile);
        const uint64_t keys = describe(shared.keys[stage_of(tile)], 0);
        begin_products();
#pragma unroll
        for (int k = 0; k < WIDTH; k += 16) {
            const unsigned run = k / RUN * RUN * sizeof(bf16), within = k % RUN * sizeof(bf16);
            product_of_64(s, from_byte(described_q, run * ROWS + within), from_byte(keys, run * TILE + within), k > 0);
        }
        end_products();
    };
    // o += p values, which are there.
    auto weigh = [&](unsigned tile) {
        const uint64_t values = describe(shared.values[stage_of(tile)], TILE * RUN * sizeof(bf16));
        begin_products();
#pragma unroll
        for (int k = 0; k < TILE; k += 16)
#pragma unroll
            for (int n = 0; n < WIDTH; n += BLOCK)
                weighted_of_64(o[n / BLOCK], p[k / 16], from_byte(values, (n * TILE + k * RUN) * sizeof(bf16)));
        end_products();
    };
    const float scale = (rule.softcap != 0 ? rule.softcap : rule.scale) * LOG2E, capped = rule.scale / rule.softcap;
    // s becomes weights, `shrink` what is to be done with those before.
    auto soften = [&](unsigned tile) {
        if (rule.softcap != 0) {
#pragma unroll
            for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) s[j][c] = tanh_by_powers(s[j][c] * capped);
        }
        if (tile * TILE < first_seen(highest, rule.window) || tile * TILE + TILE - 1 > lowest) {
            const unsigned key = tile * TILE + 2 * (lane() % 4);
#pragma unroll
            for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    // Those before the first are very large here.
                    bool seen = key + 8 * j + c % 2 - from[c / 2] <= to[c / 2] - from[c / 2];
                    s[j][c] = seen ? s[j][c] : -INFINITY;
                }
        }
        float least[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float before = largest[half];
            float most = -INFINITY;
#pragma unroll
            for (int j = 0; j < TILE / 8; ++j) most = fmaxf(most, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
            largest[half] = fmaxf(before, most * scale);
            // Of a row that has seen nothing yet, every weight is 0.
            least[half] = largest[half] == -INFINITY ? 0 : largest[half];
            shrink[half] = power_of_2(before - least[half]);
            sum[half] *= shrink[half];
        }
#pragma unroll
        for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                s[j][c] = power_of_2(fmaf(s[j][c], scale, -least[c / 2]));
                sum[c / 2] += s[j][c];
            }
    };
    auto pack_weights = [&] {
#pragma unroll
        for (int i = 0; i < TILE / 16; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) p[i][c] = pack(s[2 * i + c / 2][c % 2 * 2], s[2 * i + c / 2][c % 2 * 2 + 1]);
    };

    wait_for_copies<0>();
    publish_to_products();
    sync_warp_group();
    pass(tiles.first, own.first);
    score(own.first);
    wait_for_products<0>(s);
    leave(shared.keys_done, own.first);
    soften(own.first);
    wait_for(shared.values_there, own.first);
    pack_weights();
    for (unsigned tile = own.first + 1; tile < own.end; ++tile) {
        score(tile);
        weigh(tile - 1);
        wait_for_products<1>(s);
        leave(shared.keys_done, tile);
        soften(tile);
        // Here, because the assembler would move the next wait to before what has just been computed.
        wait_for(shared.values_there, tile);
        wait_for_products<0>(o);
        leave(shared.values_done, tile - 1);
#pragma unroll
        for (int i = 0; i < WIDTH / BLOCK; ++i)
#pragma unroll
            for (int j = 0; j < BLOCK / 8; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) o[i][j][c] *= shrink[c / 2];
        pack_weights();
    }
    weigh(own.end - 1);
    wait_for_products<0>(o);
    leave(shared.values_done, own.end - 1);

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        sum[half] += __shfl_xor_sync(ALL, sum[half], 1);
        sum[half] += __shfl_xor_sync(ALL, sum[half], 2);
        if (two[half] >= rows) continue;
        const float share = 1 / sum[half];
        bf16* row = out + head(two[half]) * rule.dim;
#pragma unroll
        for (int j = 0; j < WIDTH / 8; ++j) {
            const float(&both)[4] = o[j / (BLOCK / 8)][j % (BLOCK / 8)];
            const unsigned column = 8 * j + 2 * (lane() % 4);
            if (column < rule.dim)
                *reinterpret_cast<unsigned*>(row + column) = pack(both[2 * half] * share, both[2 * half + 1] * share);
        }
    }
    pass(own.end, tiles.end);
}

// Nothing on a GPU of another kind.
template <int WIDTH>
__device__ __forceinline__ void run(const bf16* q, const bf16* keys, const bf16* values, const Piece* pieces,
                                    const unsigned* pages, const Rule& rule, bf16* out) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using S = Shape<WIDTH>;
    DYNAMIC_SHARED(Shared<WIDTH>, shared);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < S::STAGES; ++stage) {
            for (Barrier* there : {&shared->keys_there[stage], &shared->values_there[stage]}) begin_barrier(there, 1);
            // Each warp says so.
            for (Barrier* done : {&shared->keys_done[stage], &shared->values_done[stage]})
                begin_barrier(done, GROUPS * WARP_GROUP / WARP);
        }
        publish_barriers();
    }
    __syncthreads();
    const Piece piece = pieces[blockIdx.x];
    const unsigned last = piece.position + piece.rows - 1;
    const Tiles tiles = {first_seen(piece.position, rule.window) / S::TILE, last / S::TILE + 1};
    if (threadIdx.x < WARP_GROUP) {
        leave_registers<24>();
        if (threadIdx.x == 0)
            bring<WIDTH>(*shared, keys, values, pages + piece.pages, last / PAGE, rule.kv_heads, blockIdx.y, tiles);
    } else {
        take_registers<240>();
        attend<WIDTH>(*shared, q, piece, rule, (threadIdx.x / WARP_GROUP - 1) * ROWS, tiles, out);
    }
#endif
}

// q[rows, heads, WIDTH] over pages as in pages.cuh, into out[rows, heads, dim], dim even, scale and softcap not negative.
// Blocks are pieces by key heads; a piece has at most GROUPS * ROWS / (heads / kv_heads) rows.
#define ATTENTION(WIDTH)                                                                                   \
    KERNEL_OF(THREADS, attention_hopper_bf16_##WIDTH, const bf16* q, const bf16* keys, const bf16* values, \
              const Piece* pieces, const unsigned* pages, Rule rule, bf16* out) {                          \
        run<WIDTH>(q, keys, values, pieces, pages, rule, out);                                             \
    }

ATTENTION(64)
ATTENTION(128)
ATTENTION(256)
