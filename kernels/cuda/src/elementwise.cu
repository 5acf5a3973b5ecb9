// The small operations between products. They leave x as linear.cu reads it, without a pass of their own.
//
// The layout of activations: tiles of `tile_rows` rows; in a tile, for each 8 depths, the rows one after another, each
// 8 values of bfloat16 (16 bytes). K is padded with zeros to a multiple of 512. x_order 1, for codebooks of 8 depths:
// of each 32 depths, place 8 j + 2 t + e of the pair order holds depth 8 t + 2 j + e (formats.cuh, Aqlm2x8).
#include "ptx.cuh"

INLINE u64 place_of(int row, int eighth, int eighths, int tile_rows) {
  return ((u64)(row / tile_rows) * eighths + eighth) * tile_rows + row % tile_rows;
}

// x [rows, width] -> activations, row n from row sources[n] (below 0: zeros) and depth k from column columns[k], unless
// these are null. One thread for each 8 depths of a padded row.
extern "C" __global__ void __launch_bounds__(256)
pack_rows(const u16* x, uint4* packed, const int* sources, const int* columns, int rows, int width, int eighths, int tile_rows,
          int order, int count) {
  let_next_start();
  wait_for_previous();
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= count) return;
  const int row = i / eighths, eighth = i % eighths;
  const int from = row >= rows ? -1 : sources ? sources[row] : row;
  u16 v[8];
#pragma unroll
  for (int e = 0; e < 8; e++) {
    int depth = 8 * eighth + e;
    if (order) depth = (eighth & ~3) * 8 + 8 * (e >> 1) + 2 * (eighth & 3) + (e & 1);
    v[e] = 0;
    if (from >= 0 && depth < width) v[e] = x[(u64)from * width + (columns ? columns[depth] : depth)];
  }
  packed[place_of(row, eighth, eighths, tile_rows)] =
      make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
}

// Columns of activations once more, behind depth `width`, times a factor each: outliers of int8 weights.
extern "C" __global__ void __launch_bounds__(256)
extend_rows(u16* packed, const int* columns, const float* factors, int rows, int extended, int width, int eighths, int tile_rows) {
  let_next_start();
  wait_for_previous();
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= rows * extended) return;
  const int row = i / extended, n = i % extended, from = columns[n], to = width + n;
  const u16 v = packed[place_of(row, from / 8, eighths, tile_rows) * 8 + from % 8];
  packed[place_of(row, to / 8, eighths, tile_rows) * 8 + to % 8] = round1(__uint_as_float((u32)v << 16) * factors[n]);
}

// h += add (unless null); then y = weight * h / sqrt(mean(h²) + epsilon), rounded once: rows of `width` = 8 * eighths, or
// activations if tile_rows. One block a row, sums in an order that the width alone decides.
constexpr int NORM_THREADS = 256, NORM_HELD = 8;  // eighths that a thread keeps in registers

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
norm_rows(uint4* h, const uint4* add, const float* weight, uint4* y, int eighths, int padded, int tile_rows, float epsilon) {
  let_next_start();
  wait_for_previous();
  __shared__ float parts[NORM_THREADS / 32];
  const int row = blockIdx.x, thread = threadIdx.x;
  u32 held[NORM_HELD][4];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < NORM_HELD; i++) {
    const int k = thread + i * NORM_THREADS;
    if (k >= eighths) break;
    const uint4 a = h[(u64)row * eighths + k];
    u32 v[4] = {a.x, a.y, a.z, a.w};
    if (add) {
      const uint4 b = add[(u64)row * eighths + k];
      const u32 w[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int e = 0; e < 4; e++) v[e] = round2(low_of(v[e]) + low_of(w[e]), high_of(v[e]) + high_of(w[e]));
      h[(u64)row * eighths + k] = make_uint4(v[0], v[1], v[2], v[3]);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      held[i][e] = v[e];
      sum += low_of(v[e]) * low_of(v[e]);
      sum += high_of(v[e]) * high_of(v[e]);
    }
  }
#pragma unroll
  for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
  if (thread % 32 == 0) parts[thread / 32] = sum;
  __syncthreads();
  sum = 0.f;
#pragma unroll
  for (int i = 0; i < NORM_THREADS / 32; i++) sum += parts[i];
  const float inverse = rsqrtf(sum / (8 * eighths) + epsilon);
#pragma unroll
  for (int i = 0; i < NORM_HELD; i++) {
    const int k = thread + i * NORM_THREADS;
    if (k >= eighths) break;
    u32 v[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float2 w = ((const float2*)weight)[4 * k + e];
      v[e] = round2(w.x * (low_of(held[i][e]) * inverse), w.y * (high_of(held[i][e]) * inverse));
    }
    y[tile_rows ? place_of(row, k, padded, tile_rows) : (u64)row * eighths + k] = make_uint4(v[0], v[1], v[2], v[3]);
  }
}

// One row a segment's slot: where it lies in the pages, as a row of them; -1 for padding.
INLINE long long row_of_page(int query, const int* segment_of, const int* slot_of, const int* table, int table_width, int page,
                             int pages) {
  const int segment = segment_of[query];
  if (segment < 0) return -1;
  const int slot = slot_of[query];
  if (slot / page >= table_width) return -1;
  const int id = table[(u64)segment * table_width + slot / page];
  return id < 0 || id >= pages ? -1 : (long long)id * page + slot % page;
}

INLINE u32 turned(u32 left, u32 right, float c0, float s0, float c1, float s1) {
  return round2(low_of(left) * c0 - low_of(right) * s0, high_of(left) * c1 - high_of(right) * s1);
}

// A head's halves turn by the row's angles (RoPE). x [rows, heads, width], in place; cos and sin float32 [rows, width].
extern "C" __global__ void __launch_bounds__(256)
rotate(u32* x, const float* cos, const float* sin, int heads, int width, int count) {
  let_next_start();
  wait_for_previous();
  const int i = blockIdx.x * 256 + threadIdx.x, quarter = width / 4;  // pairs of a half
  if (i >= count) return;
  const int pair = i % quarter, head = i / quarter, row = head / heads;
  u32* at = x + (u64)head * (width / 2) + pair;
  const float* c = cos + (u64)row * width + 2 * pair;
  const float* s = sin + (u64)row * width + 2 * pair;
  const int half = width / 2;
  const u32 left = at[0], right = at[quarter];
  at[0] = turned(left, right, c[0], s[0], c[1], s[1]);
  at[quarter] = turned(right, left, c[half], -s[half], c[half + 1], -s[half + 1]);
}

// New keys and values into their slots: k [queries, key_eighths], v [queries, value_eighths] of 16 bytes.
extern "C" __global__ void __launch_bounds__(256)
store_rows(const uint4* k, const uint4* v, uint4* k_pages, uint4* v_pages, const int* segment_of, const int* slot_of,
           const int* table, int table_width, int page, int pages, int key_eighths, int value_eighths) {
  let_next_start();
  wait_for_previous();
  const int query = blockIdx.x;
  const long long row = row_of_page(query, segment_of, slot_of, table, table_width, page, pages);
  if (row < 0) return;
  for (int i = threadIdx.x; i < key_eighths; i += 256) k_pages[row * key_eighths + i] = k[(u64)query * key_eighths + i];
  for (int i = threadIdx.x; i < value_eighths; i += 256)
    v_pages[row * value_eighths + i] = v[(u64)query * value_eighths + i];
}

// Queries, keys and values out of one product, [queries, heads + 2 kv_heads, width]: queries and keys turned, keys and
// values into their slots. One thread a pair of halves, or of neighbours for values.
extern "C" __global__ void __launch_bounds__(256)
rotate_and_store(const u32* qkv, u32* q, u32* k_pages, u32* v_pages, const float* cos, const float* sin,
                 const int* segment_of, const int* slot_of, const int* table, int table_width, int page, int pages,
                 int heads, int kv_heads, int width) {
  let_next_start();
  wait_for_previous();
  const int query = blockIdx.x, i = blockIdx.y * 256 + threadIdx.x, quarter = width / 4, half = width / 2;
  const long long place = row_of_page(query, segment_of, slot_of, table, table_width, page, pages);
  const int pair = i % quarter, head = i / quarter;
  if (head >= heads + 2 * kv_heads) return;
  const u32* from = qkv + ((u64)query * (heads + 2 * kv_heads) + head) * half + pair;
  const u32 left = from[0], right = from[quarter];
  if (head >= heads + kv_heads) {
    if (place < 0) return;
    u32* to = v_pages + (place * kv_heads + head - heads - kv_heads) * half + pair;
    to[0] = left, to[quarter] = right;
    return;
  }
  if (head >= heads && place < 0) return;
  const float* c = cos + (u64)query * width + 2 * pair;
  const float* s = sin + (u64)query * width + 2 * pair;
  u32* to = (head < heads ? q + ((u64)query * heads + head) * half : k_pages + (place * kv_heads + head - heads) * half) + pair;
  to[0] = turned(left, right, c[0], s[0], c[1], s[1]);
  to[quarter] = turned(right, left, c[half], -s[half], c[half + 1], -s[half + 1]);
}

// silu(gate) * up, silu(gate) and the product rounded, for `count` pairs.
extern "C" __global__ void __launch_bounds__(256)
gate_rows(const u32* gate, const u32* up, u32* y, int count) {
  let_next_start();
  wait_for_previous();
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= count) return;
  const u32 g = gate[i], u = up[i];
  const float low = low_of(g), high = high_of(g);
  const u32 s = round2(low / (1.f + __expf(-low)), high / (1.f + __expf(-high)));
  y[i] = round2(low_of(s) * low_of(u), high_of(s) * high_of(u));
}

// h += add, both bfloat16 pairs.
extern "C" __global__ void __launch_bounds__(256) add_rows(u32* h, const u32* add, int count) {
  let_next_start();
  wait_for_previous();
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i < count) h[i] = round2(low_of(h[i]) + low_of(add[i]), high_of(h[i]) + high_of(add[i]));
}
