// How keys and values lie in pages: [pages, kv_heads] tiles of PAGE positions of one head.
//
// Where a position's row is made of whole runs of 64 bf16, a tile is [padded_dim / 64, PAGE, 64], the chunks of 16 bytes
// of a run in the order that the matrix unit of Hopper takes (PTX ISA, "128-byte swizzle"). Any other is plain rows.
#pragma once

#include "device.cuh"

constexpr unsigned PAGE = 32;
// Elements of a run of 128 bytes.
constexpr unsigned RUN = 64;

// Where an element of a matrix [columns / RUN, rows, RUN] of swizzled runs is, if that begins at a multiple of 1024 bytes.
__device__ __forceinline__ unsigned swizzled(unsigned rows, unsigned row, unsigned column) {
    const unsigned chunk = column % RUN / 8;
    return (column / RUN * rows + row) * RUN + (chunk ^ row % 8) * 8 + column % 8;
}

// Where an element is in the tile of its position. Neighbours from a multiple of 16 bytes on stay neighbours.
template <class E>
__device__ __forceinline__ unsigned in_tile(unsigned position, unsigned column, unsigned padded_dim) {
    const unsigned row = position % PAGE;
    return sizeof(E) == 2 && padded_dim % RUN == 0 ? swizzled(PAGE, row, column) : row * padded_dim + column;
}
