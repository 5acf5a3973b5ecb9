// The small operations between products. They leave x as linear.cu reads it, without a pass of their own.
//
// The layout of activations: tiles of `tile_rows` rows; in a tile, for each 8 depths, the rows one after another, each
// 8 values of bfloat16 (16 bytes). K is padded with zeros to a multiple of 512. x_order 1, for codebooks of 8 depths:
// of each 32 depths, place 8 j + 2 t + e of the pair order holds depth 8 t + 2 j + e (formats.cuh, Aqlm2x8).
#include "ptx.cuh"

INLINE u64 place_of(int row, int eighth, int eighths, int tile_rows) {
  return ((u64)(row / tile_rows) * eighths + eighth) * tile_rows + row % tile_rows;
}

// x [rows, width] -> activations. One thread for each 8 depths of a padded row.
extern "C" __global__ void __launch_bounds__(256)
pack_rows(const u16* x, uint4* packed, int rows, int width, int eighths, int tile_rows, int order, int count) {
  let_next_start();
  wait_for_previous();
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= count) return;
  const int row = i / eighths, eighth = i % eighths;
  u16 v[8];
#pragma unroll
  for (int e = 0; e < 8; e++) {
    int depth = 8 * eighth + e;
    if (order) depth = (eighth & ~3) * 8 + 8 * (e >> 1) + 2 * (eighth & 3) + (e & 1);
    v[e] = row < rows && depth < width ? x[(u64)row * width + depth] : (u16)0;
  }
  packed[place_of(row, eighth, eighths, tile_rows)] =
      make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
}
