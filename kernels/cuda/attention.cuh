// What the kernels of attention are given: which rows attend to which keys, and where results go.
#pragma once

#include "pages.cuh"

constexpr float LN2 = 0.6931471805599453f;

// Rows that attend to the same keys, of one sequence or of several with the same pages there.
struct Piece {
    // Where its rows are in the list of rows, and how many.
    unsigned first, rows;
    // The least of their positions.
    unsigned position;
    // The keys, by position; `from` is a multiple of 64.
    unsigned from, to;
    // Where the sequence's pages begin in the list of pages.
    unsigned pages;
};

struct Row {
    // In q and in the result.
    unsigned row;
    // Where its partial result goes, or WHOLE if the piece has all keys that it sees.
    unsigned slot;
};
constexpr unsigned WHOLE = 0xffffffff;

struct Rule {
    unsigned heads, kv_heads, dim, padded_dim;
    float scale;
    // 0 for none.
    float softcap;
    // Keys that a query sees, itself included; 0 for all.
    unsigned window;
};

// Where results go.
template <class E>
struct Results {
    // [rows, heads, dim].
    E* out;
    // [rows, heads], or null: the natural logarithm of the sum of exp(score) over the keys that a row sees, of scores as
    // they go into soft-max, scaled and capped.
    float* log_sums;
    // [slots, heads, padded_dim]: what a row makes of a piece's keys alone. Not set where it sees none.
    float* partial;
    // [slots, heads]: as `log_sums` for these keys, but to base 2; -INFINITY where a row sees none.
    float* partial_log_sums;
};

// A piece's rows, as a block for a key head has them: positions times heads.
struct Rows {
    const Row* rows;
    unsigned heads, first_head, group, count;

    __device__ Rows(const Piece& piece, const Row* list, const Rule& rule, unsigned kv_head)
        : rows(list + piece.first),
          heads(rule.heads),
          first_head(kv_head * (rule.heads / rule.kv_heads)),
          group(rule.heads / rule.kv_heads),
          count(piece.rows * (rule.heads / rule.kv_heads)) {}
    __device__ Row of(unsigned i) const { return rows[i / group]; }
    // In [rows, heads], or in [slots, heads].
    __device__ uint64_t at(unsigned row, unsigned i) const { return uint64_t(row) * heads + first_head + i % group; }
};

__device__ __forceinline__ bool sees(const Rule& rule, unsigned query, unsigned key) {
    return key <= query && (rule.window == 0 || query - key < rule.window);
}

// The first position that one sees.
__device__ __forceinline__ unsigned first_seen(unsigned position, unsigned window) {
    return window && position + 1 > window ? position + 1 - window : 0;
}
