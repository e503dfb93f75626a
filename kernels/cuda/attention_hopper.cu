// The attention of attention.cu on the matrix unit of Hopper, for heads of bf16 that fill runs of 128 bytes (Shah et al.
// 2024, FlashAttention-3).
//
// One warp group of a block brings tiles of keys and values, in as many copies as they have pages and runs, the other two
// take 64 rows each. While a group makes weights of its scores, the matrix unit makes its next scores and sums the values
// that it has weighted before. Tiles are aligned to the position in the sequence, and one that a row does not see changes
// none of its bits.
#include "attention.cuh"
#include "warpgroup.cuh"

constexpr unsigned GROUPS = 2;
// Of a group.
constexpr unsigned ROWS = 64;
constexpr unsigned THREADS = (1 + GROUPS) * WARP_GROUP;

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
__device__ __forceinline__ void attend(Shared<WIDTH>& shared, const bf16* q, const Piece& piece, const Rows& rows,
                                       const unsigned* positions, const Rule& rule, unsigned first_row, Tiles tiles,
                                       const Results<bf16>& results) {
    using S = Shape<WIDTH>;
    constexpr int TILE = S::TILE, BLOCK = S::BLOCK, CHUNKS = WIDTH / 8;
    const unsigned thread = threadIdx.x % WARP_GROUP;
    auto position = [&](unsigned row) { return row < rows.count ? positions[rows.of(row).row] : piece.position; };
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
    if (first_row >= rows.count) return pass(tiles.first, tiles.end);

    bf16* own_q = shared.q[first_row / ROWS];
    for (unsigned i = thread; i < ROWS * CHUNKS; i += WARP_GROUP) {
        unsigned row = first_row + i / CHUNKS, column = i % CHUNKS * 8;
        bool valid = row < rows.count;
        uint64_t from = valid ? rows.at(rows.of(row).row, row) * WIDTH + column : 0;
        copy16(own_q + swizzled(ROWS, i / CHUNKS, column), q + from, valid);
    }
    end_group_of_copies();
    // The last of the group's rows is the one that sees most, or all of them see all keys.
    const unsigned seen = position(min(first_row + ROWS, rows.count) - 1) / TILE + 1;
    const Tiles own = {tiles.first, max(tiles.first, min(tiles.end, seen))};
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
        // A tile that neither the window nor the diagonal cuts is seen as a whole.
        if (tile * TILE < max(from[0], from[1]) || tile * TILE + TILE - 1 > piece.position) {
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
    // Of a window there may be none among the piece's keys.
    if (own.first < own.end) {
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
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        sum[half] += __shfl_xor_sync(ALL, sum[half], 1);
        sum[half] += __shfl_xor_sync(ALL, sum[half], 2);
        if (two[half] >= rows.count) continue;
        const Row row = rows.of(two[half]);
        const bool whole = row.slot == WHOLE;
        const uint64_t at = rows.at(whole ? row.row : row.slot, two[half]);
        const float share = 1 / sum[half], log_sum = largest[half] + log2f(sum[half]);
        if (whole && results.log_sums && lane() % 4 == 0) results.log_sums[at] = log_sum * LN2;
        if (!whole && lane() % 4 == 0) results.partial_log_sums[at] = log_sum;
        if (sum[half] == 0) continue;
#pragma unroll
        for (int j = 0; j < WIDTH / 8; ++j) {
            const float(&both)[4] = o[j / (BLOCK / 8)][j % (BLOCK / 8)];
            const float left = both[2 * half] * share, right = both[2 * half + 1] * share;
            const unsigned column = 8 * j + 2 * (lane() % 4);
            if (column >= rule.dim) continue;
            if (whole) *reinterpret_cast<unsigned*>(results.out + at * rule.dim + column) = pack(left, right);
            else *reinterpret_cast<float2*>(results.partial + at * WIDTH + column) = make_float2(left, right);
        }
    }
    pass(own.end, tiles.end);
}

// Nothing on a GPU of another kind.
template <int WIDTH>
__device__ __forceinline__ void run(const bf16* q, const bf16* keys, const bf16* values, const Piece* pieces,
                                    const Row* list, const unsigned* positions, const unsigned* pages, const Rule& rule,
                                    const Results<bf16>& results) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using S = Shape<WIDTH>;
    DYNAMIC_SHARED(Shared<WIDTH>, shared);
    const Piece piece = pieces[blockIdx.x];
    // The list may be longer than what is in it.
    if (piece.rows == 0) return;
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
    const unsigned first = max(first_seen(piece.position, rule.window), piece.from) / S::TILE;
    const Tiles tiles = {first, max(first, (piece.to + S::TILE - 1) / S::TILE)};
    if (threadIdx.x < WARP_GROUP) {
        leave_registers<24>();
        if (threadIdx.x == 0)
            bring<WIDTH>(*shared, keys, values, pages + piece.pages, (piece.to - 1) / PAGE, rule.kv_heads, blockIdx.y,
                         tiles);
    } else {
        take_registers<240>();
        const Rows rows(piece, list, rule, blockIdx.y);
        attend<WIDTH>(*shared, q, piece, rows, positions, rule, (threadIdx.x / WARP_GROUP - 1) * ROWS, tiles, results);
    }
#endif
}

// q[rows, heads, WIDTH] over pages as in pages.cuh, dim even, scale and softcap not negative. Blocks are pieces by key
// heads; a piece has at most GROUPS * ROWS / (heads / kv_heads) rows, and begins at a multiple of TILE. `positions` are
// those of all rows.
#define ATTENTION(WIDTH)                                                                                         \
    KERNEL_OF(THREADS, attention_hopper_bf16_##WIDTH, const bf16* q, const bf16* keys, const bf16* values,       \
              const Piece* pieces, const Row* rows, const unsigned* positions, const unsigned* pages, Rule rule, \
              Results<bf16> results) {                                                                           \
        run<WIDTH>(q, keys, values, pieces, rows, positions, pages, rule, results);                              \
    }

ATTENTION(64)
ATTENTION(128)
ATTENTION(256)
