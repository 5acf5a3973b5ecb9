// y = x Wᵀ with packed weights.
//
// THE ORDER OF A SUM. K, padded with zeros to a multiple of 512, is cut into four quarters. Each quarter is summed by the
// matrix unit in steps of 16 depths in rising order, from zero, in float32; then ((q0 + q1) + q2) + q3 in float32.
// A weight is rounded to bfloat16 once or twice as formats.cuh says, x is bfloat16, y is rounded once at the end.
// So a row's bits depend on its x and on W alone: not on the rows beside it, nor on any choice below.
//
// One producer warp streams stages of weights and x into a ring in shared memory; groups of four warps take them out,
// unpack weights into registers and multiply. Blocks walk over tiles: outputs x rows, or x a quarter of K as well (SPLIT).
//
// Choices, from linear.py:
//   FORMAT            one of formats.cuh
//   TILE_ROWS         rows of x in a tile: 8 or 16 (mma.sync), 32, 64 or 128
//   GROUPS_OUT        groups of warps side by side over outputs
//   GROUPS_K          groups of warps over K, 1, 2 or 4: each sums 4 / GROUPS_K quarters
//   BLOCKS            blobs of 64 outputs a group
//   DEPTH             blobs of 64 depths a stage
//   UNROLL            stages that one turn of the main loop takes
//   STAGES            stages of the ring
//   SPLIT             1: a tile is one quarter; its sums go to `partial`, and the block that is last adds the four
//   GATED             1: outputs are pairs of gate and up; silu(gate) * up goes out as the next linear's activations
//   TOTALS_IN_SHARED  1: totals wait in shared memory while the next quarter is summed
//   REGISTERS         of a consuming thread, taken from the producers; 0: as compiled
//   RESIDENT          blocks that a multiprocessor must hold
//   WGMMA             1: Hopper's product
#include "ptx.cuh"
#include "matrix.cuh"
#include "formats.cuh"

using Weights = FORMAT;

constexpr int GROUPS = GROUPS_OUT * GROUPS_K, CONSUMERS = GROUPS * 128;
constexpr int THREADS = CONSUMERS + (REGISTERS ? 128 : 32);
constexpr int SUMS = TILE_ROWS / 2;  // of a thread, for each blob of outputs
constexpr int QUARTERS = SPLIT ? 1 : 4 / GROUPS_K;  // of a group
constexpr int X_BYTES = TILE_ROWS * 128;  // 64 depths of a tile's rows
constexpr int WEIGHT_STAGE = GROUPS * BLOCKS * DEPTH * Weights::BYTES, X_STAGE = GROUPS_K * DEPTH * X_BYTES;
constexpr int STAGE = WEIGHT_STAGE + X_STAGE;
constexpr int ROW_BYTES = 144, GATED_ROW_BYTES = 80;  // of 64 or 32 outputs on their way out, spread over banks
constexpr int TAIL = BLOCKS * TILE_ROWS * (TOTALS_IN_SHARED ? 256 : ROW_BYTES);  // of a group over outputs

struct Problem {
  const u8* weights;      // [ceil(outputs / 64)][depth_blobs] blobs
  const u8* x;            // [row tiles][depth_blobs] x X_BYTES: matrices of [8 depths / 8][TILE_ROWS][8]
  u16* y;                 // [rows][outputs], or the next linear's x if GATED
  float* partial;         // [places][4][BLOCKS * SUMS][CONSUMERS] if SPLIT
  u32* arrived;           // [places] zero, and left so, if SPLIT
  const float* scale;     // [outputs] if the format is SCALED
  const float* bias;      // [outputs] or null
  int rows, outputs, depth_blobs, tiles, row_tiles;
};

// Where a tile lies. Tiles that share weights follow each other, so that the L2 cache keeps them.
struct Tile {
  int quarter, place, rows, outputs;
  INLINE Tile(int index, int row_tiles) {
    quarter = SPLIT ? index & 3 : 0;
    place = SPLIT ? index >> 2 : index;
    rows = place % row_tiles;
    outputs = place / row_tiles;
  }
};

struct Ring {
  u32 stages, full, empty;  // shared addresses of the stages and of one barrier each
  u32 slot = 0, phase = 0;
  INLINE u32 stage() const { return stages + slot * STAGE; }
  INLINE u32 full_barrier() const { return full + 8 * slot; }
  INLINE u32 empty_barrier(int back = 0) const {
    const int s = (int)slot - back;
    return empty + 8 * (s < 0 ? s + STAGES : s);
  }
  INLINE void advance() { if (++slot == STAGES) { slot = 0; phase ^= 1; } }
};

INLINE void release(u32 barrier, int lane) {
  __syncwarp();
  if (lane == 0) barrier_arrive(barrier);
}

// ---- producer ----

// Where the blobs of 64 outputs begin; tiles that reach past the last read it again, and their sums go nowhere.
INLINE const u8* weights_of(const Problem& p, const Tile& t, int group_out, int block, int depth_blob) {
  const int blobs = (p.outputs + 63) / 64, wanted = (t.outputs * GROUPS_OUT + group_out) * BLOCKS + block;
  return p.weights + ((u64)min(wanted, blobs - 1) * p.depth_blobs + depth_blob) * Weights::BYTES;
}

#if HOPPER
INLINE void load_x(const Problem& p, u32 stage, u32 barrier, const Tile& t, int depth_blob, int group_depth) {
#pragma unroll
  for (int k = 0; k < GROUPS_K; k++)
    copy_bulk(stage + WEIGHT_STAGE + k * DEPTH * X_BYTES,
              p.x + ((u64)t.rows * p.depth_blobs + depth_blob + k * group_depth) * X_BYTES, DEPTH * X_BYTES, barrier,
              READ_AGAIN);
}

INLINE void produce(const Problem& p, Ring ring, int quarter_depth, int group_depth, int lane) {
  if (lane) return;
  const int steps = group_depth / DEPTH;
  u32 passed = 0, waiting = 0;
  bool may_read_x = false;
  ring.phase = 1;  // the first pass over the ring finds it empty
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile t(index, p.row_tiles);
    for (int i = 0; i < steps; i++, passed++) {
      const u32 stage = ring.stage(), full = ring.full_barrier();
      if (passed >= STAGES) barrier_wait(ring.empty_barrier(), ring.phase);
      barrier_expect(full, STAGE);
      const int first = t.quarter * quarter_depth + i * DEPTH;
#pragma unroll
      for (int g = 0; g < GROUPS; g++)
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
          copy_bulk(stage + (g * BLOCKS + b) * DEPTH * Weights::BYTES,
                    weights_of(p, t, g / GROUPS_K, b, first + (g % GROUPS_K) * group_depth), DEPTH * Weights::BYTES,
                    full, READ_ONCE);
      ring.advance();
      if (may_read_x) {
        load_x(p, stage, full, t, first, group_depth);
      } else if (++waiting == STAGES || i + 1 == steps) {
        // Weights of the first stages are under way; x is there when the kernel before has ended.
        wait_for_previous();
        may_read_x = true;
        for (u32 s = 0; s < waiting; s++)
          load_x(p, ring.stages + s * STAGE, ring.full + 8 * s, t, t.quarter * quarter_depth + s * DEPTH, group_depth);
      }
    }
  }
}
#else
INLINE void copy_warp(u32 to, const u8* from, int bytes, int lane) {
#pragma unroll 4
  for (int at = lane * 16; at < bytes; at += 512) copy_async16(to + at, from + at);
}

INLINE void produce(const Problem& p, Ring ring, int quarter_depth, int group_depth, int lane) {
  const int steps = group_depth / DEPTH;
  u32 passed = 0;
  ring.phase = 1;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile t(index, p.row_tiles);
    for (int i = 0; i < steps; i++, passed++) {
      const u32 stage = ring.stage();
      if (passed >= STAGES) barrier_wait(ring.empty_barrier(), ring.phase);
      const int first = t.quarter * quarter_depth + i * DEPTH;
      for (int g = 0; g < GROUPS; g++)
        for (int b = 0; b < BLOCKS; b++)
          copy_warp(stage + (g * BLOCKS + b) * DEPTH * Weights::BYTES,
                    weights_of(p, t, g / GROUPS_K, b, first + (g % GROUPS_K) * group_depth), DEPTH * Weights::BYTES,
                    lane);
      for (int k = 0; k < GROUPS_K; k++)
        copy_warp(stage + WEIGHT_STAGE + k * DEPTH * X_BYTES,
                  p.x + ((u64)t.rows * p.depth_blobs + first + k * group_depth) * X_BYTES, DEPTH * X_BYTES, lane);
      arrive_after_copies(ring.full_barrier());
      ring.advance();
    }
  }
  wait_for_copies();
}
#endif

// ---- consumers ----

struct Consumer {
  int group, group_out, group_k, warp, lane, pair, t;  // pair: g of the lane, t: its place among four
  Lane share;
};

#if WGMMA
// One stage by Hopper's product. Two sets of fragments take turns: one is filled while the other is multiplied.
// The slot before this one is released as soon as its last product has read it.
INLINE void take_stage(float (&sums)[BLOCKS][SUMS], u32 (&fragments)[2][16], const Ring& ring, const Consumer& c,
                       int turn, bool first) {
  const u32 weights = ring.stage() + c.group * BLOCKS * DEPTH * Weights::BYTES;
  const u32 x = ring.stage() + WEIGHT_STAGE + c.group_k * DEPTH * X_BYTES;
#pragma unroll
  for (int d = 0; d < DEPTH; d++)
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const int blob = d * BLOCKS + b;
      u32 (&f)[16] = fragments[(DEPTH * BLOCKS == 1 ? turn : blob) & 1];
      typename Weights::Codes codes;
      Weights::load(codes, weights + (b * DEPTH + d) * Weights::BYTES, c.share);
      if (turn || blob >= 2) wgmma_wait<1>();
      if (DEPTH * BLOCKS > 1 && turn && blob == 1) release(ring.empty_barrier(1), c.lane);
      if (DEPTH * BLOCKS == 1 && turn >= 2) release(ring.empty_barrier(2), c.lane);
      Weights::expand(f, codes, c.share);
      wgmma_fence();
      const u64 at = wgmma_descriptor(x + d * X_BYTES, TILE_ROWS);
#pragma unroll
      for (int j = 0; j < 4; j++)
        wgmma<TILE_ROWS>(sums[b], f + 4 * j, at + (u64)(j * 2 * TILE_ROWS), first && !d && !j ? 0 : 1);
      wgmma_commit();
    }
}

INLINE void sum_quarter(float (&sums)[BLOCKS][SUMS], Ring& ring, const Consumer& c, int steps) {
  u32 fragments[2][16];
#pragma unroll 1
  for (int i = 0; i < steps; i += UNROLL) {
#pragma unroll
    for (int turn = 0; turn < UNROLL; turn++) {
      barrier_wait(ring.full_barrier(), ring.phase);
      take_stage(sums, fragments, ring, c, turn, i + turn == 0);
      ring.advance();
    }
    wgmma_wait<0>();  // fragments that live on over the edge of the loop would make the compiler wait at each product
    if (DEPTH * BLOCKS == 1 && UNROLL > 1) release(ring.empty_barrier(2), c.lane);
    release(ring.empty_barrier(1), c.lane);
  }
#pragma unroll
  for (int b = 0; b < BLOCKS; b++)
#pragma unroll
    for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(sums[b][i])::"memory");
}
#else
INLINE void take_stage(float (&sums)[BLOCKS][SUMS], const Ring& ring, const Consumer& c) {
  const u32 weights = ring.stage() + c.group * BLOCKS * DEPTH * Weights::BYTES;
  const u32 x = ring.stage() + WEIGHT_STAGE + c.group_k * DEPTH * X_BYTES;
#pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    u32 fragments[BLOCKS][16];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      typename Weights::Codes codes;
      Weights::load(codes, weights + (b * DEPTH + d) * Weights::BYTES, c.share);
      Weights::expand(fragments[b], codes, c.share);
    }
#pragma unroll
    for (int n = 0; n < TILE_ROWS / 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 m[4];  // 8 rows x 32 depths
        load_matrices(m, x + d * X_BYTES + (4 * half + (c.lane >> 3)) * (TILE_ROWS * 16) + n * 128 + (c.lane & 7) * 16);
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int b = 0; b < BLOCKS; b++)
            multiply(sums[b] + 4 * n, fragments[b] + 4 * (2 * half + j), m[2 * j], m[2 * j + 1]);
      }
  }
}

INLINE void sum_quarter(float (&sums)[BLOCKS][SUMS], Ring& ring, const Consumer& c, int steps) {
#pragma unroll
  for (int b = 0; b < BLOCKS; b++)
#pragma unroll
    for (int i = 0; i < SUMS; i++) sums[b][i] = 0.f;
#pragma unroll 1
  for (int i = 0; i < steps; i += UNROLL) {
#pragma unroll
    for (int turn = 0; turn < UNROLL; turn++) {
      barrier_wait(ring.full_barrier(), ring.phase);
      take_stage(sums, ring, c);
      release(ring.empty_barrier(), c.lane);
      ring.advance();
    }
  }
}
#endif

// Quarter `q` of this group joins its totals. With two groups over K the second keeps its two quarters apart.
INLINE void fold_quarter(float (&totals)[BLOCKS][SUMS], float (&sums)[BLOCKS][SUMS], int q, float* shared, const Consumer& c) {
#pragma unroll
  for (int b = 0; b < BLOCKS; b++)
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
#if TOTALS_IN_SHARED
      float* kept = shared + (b * SUMS + i) * 128 + c.share.thread;
      const float total = q ? *kept + sums[b][i] : sums[b][i];
      if (q < QUARTERS - 1) *kept = total; else totals[b][i] = total;
#else
      if (q == 0) totals[b][i] = sums[b][i];
      else if (!(GROUPS_K == 2 && c.group_k == 1)) totals[b][i] += sums[b][i];
#endif
    }
}

// The quarters of the other groups over K join the first group's totals, in order, through one region.
INLINE void fold_groups(float (&totals)[BLOCKS][SUMS], float (&last)[BLOCKS][SUMS], float* shared, const Consumer& c) {
#pragma unroll
  for (int k = 0; k < 4 - QUARTERS; k++) {
    const int owner = GROUPS_K == 4 ? k + 1 : 1;
    float (&given)[BLOCKS][SUMS] = GROUPS_K == 2 && k == 1 ? last : totals;
    if (c.group_k == owner) {
#pragma unroll
      for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < SUMS; i++) shared[(b * SUMS + i) * 128 + c.share.thread] = given[b][i];
    }
    sync_threads(1, CONSUMERS);
    if (c.group_k == 0) {
#pragma unroll
      for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < SUMS; i++) totals[b][i] += shared[(b * SUMS + i) * 128 + c.share.thread];
    }
    sync_threads(1, CONSUMERS);
  }
}

// Sum i of a thread belongs to this row of the tile and this output of its blob.
INLINE int row_of(int i, const Consumer& c) { return 8 * (i >> 2) + 2 * c.t + (i & 1); }
INLINE int output_of(int i, const Consumer& c) { return c.warp * 16 + c.pair + 8 * ((i >> 1) & 1); }
INLINE int blob_of(const Tile& t, int b, const Consumer& c) { return (t.outputs * GROUPS_OUT + c.group_out) * BLOCKS + b; }

// A quarter's sums leave the block. Whether it is the last of its four, and `totals` are those of the place.
INLINE bool join_quarters(const Problem& p, const Tile& t, float (&totals)[BLOCKS][SUMS], const Consumer& c) {
  constexpr int QUARTER = BLOCKS * SUMS * CONSUMERS;
  __shared__ u32 before;
  float* place = p.partial + (u64)t.place * 4 * QUARTER + threadIdx.x;
#pragma unroll
  for (int b = 0; b < BLOCKS; b++)
#pragma unroll
    for (int i = 0; i < SUMS; i++) place[t.quarter * QUARTER + (b * SUMS + i) * CONSUMERS] = totals[b][i];
  __threadfence();
  sync_threads(1, CONSUMERS);
  if (threadIdx.x == 0) before = atomicAdd(p.arrived + t.place, 1u);
  sync_threads(1, CONSUMERS);
  if (before < 3) return false;
  __threadfence();
  if (threadIdx.x == 0) p.arrived[t.place] = 0;
#pragma unroll
  for (int b = 0; b < BLOCKS; b++)
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
      const float* at = place + (b * SUMS + i) * CONSUMERS;
      totals[b][i] = ((__ldcg(at) + __ldcg(at + QUARTER)) + __ldcg(at + 2 * QUARTER)) + __ldcg(at + 3 * QUARTER);
    }
  return true;
}

// What becomes of a sum in float32.
INLINE float finish(float sum, const float* scale, const float* bias, int output) {
  if (Weights::SCALED) sum *= scale[output];
  if (bias) sum += bias[output];
  return sum;
}

INLINE void store_rows(const Problem& p, const Tile& t, float (&totals)[BLOCKS][SUMS], u8* tail, const Consumer& c) {
#pragma unroll
  for (int b = 0; b < BLOCKS; b++)
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
      const int output = output_of(i, c), whole = min(blob_of(t, b, c) * 64 + output, p.outputs - 1);
      *(u16*)(tail + (b * TILE_ROWS + row_of(i, c)) * ROW_BYTES + output * 2) =
          round1(finish(totals[b][i], p.scale, p.bias, whole));
    }
  sync_threads(2 + c.group_out, 128);
  const bool aligned = p.outputs % 8 == 0;
  for (int piece = c.share.thread; piece < BLOCKS * TILE_ROWS * 8; piece += 128) {
    const int b = piece / (TILE_ROWS * 8), row = (piece >> 3) % TILE_ROWS, output = blob_of(t, b, c) * 64 + (piece & 7) * 8;
    const u8* from = tail + (b * TILE_ROWS + row) * ROW_BYTES + (piece & 7) * 16;
    if (t.rows * TILE_ROWS + row >= p.rows || output >= p.outputs) continue;
    u16* to = p.y + (u64)(t.rows * TILE_ROWS + row) * p.outputs + output;
    if (aligned) *(uint4*)to = *(const uint4*)from;
    else for (int e = 0; e < 8 && output + e < p.outputs; e++) to[e] = ((const u16*)from)[e];
  }
}

INLINE float silu(float v) { return v / (1.f + __expf(-v)); }

// Outputs g are gates, outputs g + 8 of the same 16 their ups. gate, up, silu(gate) and the product are each rounded.
INLINE void store_gated(const Problem& p, const Tile& t, float (&totals)[BLOCKS][SUMS], u8* tail, const Consumer& c) {
#pragma unroll
  for (int b = 0; b < BLOCKS; b++)
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
      if (i & 2) continue;
      const int output = min(blob_of(t, b, c) * 64 + output_of(i, c), p.outputs - 9);
      const u32 both = round2(finish(totals[b][i], p.scale, p.bias, output),
                              finish(totals[b][i + 2], p.scale, p.bias, output + 8));
      const float gate = low_of(round2(silu(low_of(both)), 0.f));
      *(u16*)(tail + (b * TILE_ROWS + row_of(i, c)) * GATED_ROW_BYTES + (c.warp * 8 + c.pair) * 2) =
          round1(gate * high_of(both));
    }
  sync_threads(2 + c.group_out, 128);
  const int eighths = (p.outputs / 2 + 511) / 512 * 64;  // of 8 depths in the next linear's padded x
  for (int piece = c.share.thread; piece < BLOCKS * TILE_ROWS * 4; piece += 128) {
    const int b = piece / (TILE_ROWS * 4), row = (piece >> 2) % TILE_ROWS, at = blob_of(t, b, c) * 4 + (piece & 3);
    if (t.rows * TILE_ROWS + row < p.rows && at * 16 < p.outputs)
      ((uint4*)p.y)[((u64)t.rows * eighths + at) * TILE_ROWS + row] =
          *(const uint4*)(tail + (b * TILE_ROWS + row) * GATED_ROW_BYTES + (piece & 3) * 16);
  }
}

INLINE void consume(const Problem& p, Ring ring, u8* after_ring, int quarter_depth, const Consumer& c) {
  u8* tail = after_ring + c.group_out * TAIL;
  float* others = (float*)(after_ring + GROUPS_OUT * TAIL) + c.group_out * BLOCKS * SUMS * 128;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile t(index, p.row_tiles);
    float sums[BLOCKS][SUMS], totals[BLOCKS][SUMS];
#pragma unroll
    for (int q = 0; q < QUARTERS; q++) {
      sum_quarter(sums, ring, c, quarter_depth / DEPTH);
      fold_quarter(totals, sums, q, (float*)tail, c);
    }
    wait_for_previous();  // y and partial may still be read by it
    if (SPLIT && !join_quarters(p, t, totals, c)) continue;
    if (GROUPS_K > 1) fold_groups(totals, sums, others, c);
    if (c.group_k) continue;
    if (TOTALS_IN_SHARED) sync_threads(2 + c.group_out, 128);
    if (GATED) store_gated(p, t, totals, tail, c);
    else store_rows(p, t, totals, tail, c);
    sync_threads(2 + c.group_out, 128);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
linear(const u8* weights, const u8* x, u16* y, float* partial, u32* arrived, const float* scale, const float* bias, const u8* codebooks,
       int rows, int outputs, int depth_blobs, int tiles, int row_tiles) {
  extern __shared__ __align__(1024) u8 shared[];  // table, ring, tails, regions of fold_groups
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const u32 base = shared_address(shared);
  Ring ring{base + Weights::TABLE_BYTES, shared_address(barriers), shared_address(barriers + STAGES)};
  Weights::fill(shared, codebooks, threadIdx.x, THREADS);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(ring.full + 8 * i, HOPPER ? 1 : 32);
      barrier_init(ring.empty + 8 * i, GROUPS * 4);
    }
#if HOPPER
    fence_barriers();
#endif
  }
  __syncthreads();
  let_next_start();
  const Problem p{weights, x, y, partial, arrived, scale, bias, rows, outputs, depth_blobs, tiles, row_tiles};
  const int quarter_depth = depth_blobs / 4, group_depth = SPLIT ? quarter_depth : depth_blobs / GROUPS_K;
  if (warp >= GROUPS * 4) {
#if REGISTERS
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp > GROUPS * 4) return;
#endif
    produce(p, ring, quarter_depth, group_depth, lane);
    return;
  }
#if REGISTERS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
#endif
  Consumer c;
  c.group = warp >> 2, c.group_out = c.group / GROUPS_K, c.group_k = c.group % GROUPS_K;
  c.warp = warp & 3, c.lane = lane, c.pair = lane >> 2, c.t = lane & 3;
  c.share = {(int)threadIdx.x & 127, c.warp * 8 + c.pair, Weights::table_of(base, lane), (const uint4*)codebooks};
  consume(p, ring, shared + Weights::TABLE_BYTES + STAGES * STAGE, quarter_depth, c);
}
