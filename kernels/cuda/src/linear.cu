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
//   SPLIT             1: a tile is one quarter; its totals go to `partial`, and the block that is last adds the four
//   CLUSTER           1: the four blocks of a place are a cluster (Hopper), and each adds up a share of the place out of
//                     their shared memories instead
//   GATED             1: outputs are pairs of gate and up; silu(gate) * up goes out as the next linear's activations
//   EXPERTS           1: each tile of rows has weights of its own, or none at all
//   WIDE              1: y is float32
//   REGISTERS         of a consuming thread, taken from the producers; 0: as compiled
//   RESIDENT          blocks that a multiprocessor must hold
//   WGMMA             1: Hopper's product
#include "ptx.cuh"
#include "matrix.cuh"
#include "formats.cuh"

using Weights = FORMAT;

constexpr int GROUPS = GROUPS_OUT * GROUPS_K, CONSUMERS = GROUPS * 128;
constexpr int TEAM = GROUPS_K * 128;  // threads that share outputs
constexpr int THREADS = CONSUMERS + (REGISTERS ? 128 : 32);
constexpr int SUMS = TILE_ROWS / 2;  // of a thread, for each blob of outputs
constexpr int QUARTERS = SPLIT ? 1 : 4 / GROUPS_K;  // of a group
constexpr int X_BYTES = TILE_ROWS * 128;  // 64 depths of a tile's rows
constexpr int WEIGHT_STAGE = GROUPS * BLOCKS * DEPTH * Weights::BYTES, X_STAGE = GROUPS_K * DEPTH * X_BYTES;
constexpr int STAGE = WEIGHT_STAGE + X_STAGE;
constexpr int TILE_OUTPUTS = GROUPS_OUT * BLOCKS * 64;
static_assert(SPLIT ? GROUPS_K == 1 : !CLUSTER, "a group of a tile that is one quarter sums that, and only then quarters meet");

struct Problem {
  const u8* weights;      // [ceil(outputs / 64)][depth_blobs] blobs
  const u8* x;            // [row tiles][depth_blobs] x X_BYTES: matrices of [8 depths / 8][TILE_ROWS][8]
  u16* y;                 // [rows][outputs], or the next linear's x if GATED, or floats if WIDE
  float* partial;         // [places][4][TILE_ROWS][TILE_OUTPUTS] if SPLIT and no CLUSTER
  u32* arrived;           // [places] zero, and left so, if SPLIT and no CLUSTER
  const float* scale;     // [outputs padded to 64] if the format is SCALED
  const float* bias;      // [outputs] or null
  const int* experts;     // [row tiles] whose weights (and scale) a tile of rows meets, below 0 none, if EXPERTS
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

// Which weights a tile of rows meets; below 0: it holds no rows.
INLINE int expert_of(const Problem& p, const Tile& t) { return EXPERTS ? p.experts[t.rows] : 0; }

// Where the blobs of 64 outputs begin; tiles that reach past the last read it again, and their sums go nowhere.
INLINE const u8* weights_of(const Problem& p, const Tile& t, int expert, int group_out, int block, int depth_blob) {
  const int blobs = (p.outputs + 63) / 64, wanted = (t.outputs * GROUPS_OUT + group_out) * BLOCKS + block;
  const u64 line = (u64)(EXPERTS ? expert * blobs : 0) + min(wanted, blobs - 1);
  return p.weights + (line * p.depth_blobs + depth_blob) * Weights::BYTES;
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
  bool may_read_x = EXPERTS;
  if (EXPERTS) wait_for_previous();
  ring.phase = 1;  // the first pass over the ring finds it empty
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile t(index, p.row_tiles);
    const int expert = expert_of(p, t);
    if (expert < 0) continue;
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
                    weights_of(p, t, expert, g / GROUPS_K, b, first + (g % GROUPS_K) * group_depth), DEPTH * Weights::BYTES,
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
    const int expert = expert_of(p, t);
    if (expert < 0) continue;
    for (int i = 0; i < steps; i++, passed++) {
      const u32 stage = ring.stage();
      if (passed >= STAGES) barrier_wait(ring.empty_barrier(), ring.phase);
      const int first = t.quarter * quarter_depth + i * DEPTH;
      for (int g = 0; g < GROUPS; g++)
        for (int b = 0; b < BLOCKS; b++)
          copy_warp(stage + (g * BLOCKS + b) * DEPTH * Weights::BYTES,
                    weights_of(p, t, expert, g / GROUPS_K, b, first + (g % GROUPS_K) * group_depth), DEPTH * Weights::BYTES,
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

// ---- totals: [TILE_ROWS][TILE_OUTPUTS] floats in shared memory ----

// Where an output of a row is: rows that a warp writes together are spread over banks.
INLINE int place_of(int row, int output) { return row * TILE_OUTPUTS + (output ^ (row >> 1 & 3) * 8); }
INLINE void sync_team(const Consumer& c) { sync_threads(1 + c.group_out, TEAM); }
INLINE void sync_consumers() { sync_threads(1 + GROUPS_OUT, CONSUMERS); }

// Sum i of blob b goes to row 8 (i / 4) + 2 t + i % 2 of the tile and output 16 warp + pair + 8 (i / 2 % 2) of the blob.
INLINE void fold(float* totals, const float (&sums)[BLOCKS][SUMS], bool first, const Consumer& c) {
  float* const base = totals + place_of(2 * c.t, c.warp * 16 + c.pair) + c.group_out * BLOCKS * 64;
  float* const next = totals + place_of(2 * c.t, c.warp * 16 + c.pair + 8) + c.group_out * BLOCKS * 64;
#pragma unroll
  for (int b = 0; b < BLOCKS; b++)
#pragma unroll
    for (int i = 0; i < SUMS; i += 16) {  // loads of sixteen are under way together
      float before[16];
#pragma unroll
      for (int e = 0; e < 16 && i + e < SUMS; e++)
        before[e] = first ? 0.f : (e & 2 ? next : base)[(8 * (i + e >> 2) + (e & 1)) * TILE_OUTPUTS + b * 64];
#pragma unroll
      for (int e = 0; e < 16 && i + e < SUMS; e++)
        (e & 2 ? next : base)[(8 * (i + e >> 2) + (e & 1)) * TILE_OUTPUTS + b * 64] =
            first ? sums[b][i + e] : before[e] + sums[b][i + e];
    }
}

// All that a team sums of a tile, in order. Of two groups over K the second keeps its first quarter until its turn.
INLINE void sum_tile(float* totals, Ring& ring, const Consumer& c, int steps) {
  float sums[BLOCKS][SUMS], held[BLOCKS][SUMS];
#pragma unroll 1
  for (int q = 0; q < QUARTERS; q++) {
    sum_quarter(sums, ring, c, steps);
    if (GROUPS_K == 1 || (GROUPS_K == 2 && c.group_k == 0)) fold(totals, sums, q == 0, c);
    if (GROUPS_K == 2 && q == 0) {
#pragma unroll
      for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < SUMS; i++) held[b][i] = sums[b][i];
    }
  }
  if (GROUPS_K == 4) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (c.group_k == k) fold(totals, sums, k == 0, c);
      sync_team(c);
    }
  } else {
    sync_team(c);
  }
  if (GROUPS_K == 2) {
    if (c.group_k == 1) fold(totals, held, false, c), fold(totals, sums, false, c);
    sync_team(c);
  }
}

// ---- the four quarters of a place meet ----

#if CLUSTER
// The blocks of a cluster: each tells all when its totals are there to be read, and when it has read theirs.
struct Meeting {
  u32 written, read, phase = 0;  // shared addresses of barriers that wait for four arrivals
  INLINE void all(u32 barrier) {
    sync_consumers();
    if (threadIdx.x < 4) barrier_arrive_at(barrier, threadIdx.x);
    barrier_wait_cluster(barrier, phase);
  }
};
#else
// A quarter's totals leave the block. Whether it is the last of its four.
INLINE bool last_of_place(const Problem& p, const Tile& t, const float* totals) {
  __shared__ u32 before;
  float* place = p.partial + ((u64)t.place * 4 + t.quarter) * TILE_ROWS * TILE_OUTPUTS;
  sync_consumers();
#pragma unroll 4
  for (int i = threadIdx.x; i < TILE_ROWS * TILE_OUTPUTS / 4; i += CONSUMERS) ((float4*)place)[i] = ((const float4*)totals)[i];
  __threadfence();
  sync_consumers();
  if (threadIdx.x == 0) before = atomicAdd(p.arrived + t.place, 1u);
  sync_consumers();
  if (before < 3) return false;
  __threadfence();
  if (threadIdx.x == 0) p.arrived[t.place] = 0;
  return true;
}
#endif

INLINE float4 add4(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// Four neighbouring outputs of a row, the sum of all quarters.
INLINE float4 total_of(const Problem& p, const Tile& t, const float* totals, int row, int output) {
  const int at = place_of(row, output);
  if (!SPLIT) return *(const float4*)(totals + at);
  float4 q[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
#if CLUSTER
    q[i] = load_shared_of(shared_address(totals + at), i);
#else
    q[i] = __ldcg((const float4*)(p.partial + ((u64)t.place * 4 + i) * TILE_ROWS * TILE_OUTPUTS + at));
#endif
  }
  return add4(add4(add4(q[0], q[1]), q[2]), q[3]);
}

// ---- what becomes of totals ----

INLINE float finish(const Problem& p, float total, int expert, int output) {
  const int known = min(output, p.outputs - 1);
  if (Weights::SCALED) total *= p.scale[(EXPERTS ? expert * ((p.outputs + 63) & ~63) : 0) + known];
  if (p.bias) total += p.bias[known];
  return total;
}

INLINE float4 finish4(const Problem& p, float4 v, int expert, int output) {
  return make_float4(finish(p, v.x, expert, output), finish(p, v.y, expert, output + 1), finish(p, v.z, expert, output + 2),
                     finish(p, v.w, expert, output + 3));
}

INLINE void store4(const Problem& p, int row, int output, float4 v) {
  const u64 at = (u64)row * p.outputs + output;
  const u32 low = round2(v.x, v.y), high = round2(v.z, v.w);
  if (p.outputs % 4 == 0) {
    if (WIDE) *(float4*)((float*)p.y + at) = v;
    else *(uint2*)(p.y + at) = make_uint2(low, high);
    return;
  }
  const float wide[4] = {v.x, v.y, v.z, v.w};
  const u16 narrow[4] = {(u16)low, (u16)(low >> 16), (u16)high, (u16)(high >> 16)};
#pragma unroll
  for (int e = 0; e < 4; e++)
    if (output + e < p.outputs) {
      if (WIDE) ((float*)p.y)[at + e] = wide[e];
      else p.y[at + e] = narrow[e];
    }
}

// gate, up, silu(gate) and the product are each rounded.
INLINE float gated(float gate, float up) {
  const u32 both = round2(gate, up);
  const float v = low_of(both);
  return low_of(round2(v / (1.f + __expf(-v)), 0.f)) * high_of(both);
}

// Where piece n of a tile lies, whose `columns` outputs from `first` on are taken: four outputs of a row, or four pairs
// if GATED: of each 16 outputs the first 8 are gates, the others their ups.
struct Piece {
  int row, column;
  INLINE Piece(int n, int first, int columns) {
    const int each = columns / (GATED ? 8 : 4), at = n % each;
    row = n / each;
    column = first + (GATED ? (at >> 1) * 16 + (at & 1) * 4 : at * 4);
  }
};

INLINE void store_piece(const Problem& p, const Tile& t, int expert, const Piece& piece, float4 v, float4 up) {
  const int line = t.rows * TILE_ROWS + piece.row, output = t.outputs * TILE_OUTPUTS + piece.column;
  if (line >= p.rows || output >= p.outputs) return;
  v = finish4(p, v, expert, output);
  if (!GATED) return store4(p, line, output, v);
  up = finish4(p, up, expert, output + 8);
  const int eighths = (p.outputs / 2 + 511) / 512 * 64;  // of 8 depths in the next linear's padded x
  u16* to = p.y + (((u64)t.rows * eighths + output / 16) * TILE_ROWS + piece.row) * 8 + (output & 4);
  *(uint2*)to = make_uint2(round2(gated(v.x, up.x), gated(v.y, up.y)), round2(gated(v.z, up.z), gated(v.w, up.w)));
}

// COUNT pieces from `begin` on, every STEP-th from `mine`; loads of a few are under way together.
template <int COUNT, int STEP>
INLINE void store_pieces(const Problem& p, const Tile& t, int expert, const float* totals, int first, int columns, int begin, int mine) {
  constexpr int MOST = (SPLIT && !REGISTERS ? 2 : 4) / (GATED ? 2 : 1), EACH = (COUNT + STEP - 1) / STEP;
  constexpr int AT_ONCE = EACH < MOST ? EACH : MOST;
#pragma unroll 1
  for (int n = mine; n < COUNT; n += AT_ONCE * STEP) {
    float4 v[AT_ONCE], up[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const Piece piece(begin + min(n + i * STEP, COUNT - 1), first, columns);
      v[i] = total_of(p, t, totals, piece.row, piece.column);
      if (GATED) up[i] = total_of(p, t, totals, piece.row, piece.column + 8);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      if (n + i * STEP < COUNT) store_piece(p, t, expert, Piece(begin + n + i * STEP, first, columns), v[i], up[i]);
  }
}

INLINE void consume(const Problem& p, Ring ring, float* totals, int quarter_depth, const Consumer& c, u32 meeting) {
  constexpr int PIECE = GATED ? 8 : 4;
  if (EXPERTS) wait_for_previous();
#if CLUSTER
  Meeting four{meeting, meeting + 8};
  cluster_wait();
#endif
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile t(index, p.row_tiles);
    const int expert = expert_of(p, t);
    if (expert < 0) continue;
    sum_tile(totals, ring, c, quarter_depth / DEPTH);
    wait_for_previous();  // y and partial may still be read by it
#if CLUSTER
    constexpr int SHARE = TILE_ROWS * TILE_OUTPUTS / PIECE / 4;
    four.all(four.written);
    store_pieces<SHARE, CONSUMERS>(p, t, expert, totals, 0, TILE_OUTPUTS, t.quarter * SHARE, threadIdx.x);
    four.all(four.read);
    four.phase ^= 1;
#else
    if (SPLIT && !last_of_place(p, t, totals)) continue;
    store_pieces<TILE_ROWS * BLOCKS * 64 / PIECE, TEAM>(p, t, expert, totals, c.group_out * BLOCKS * 64, BLOCKS * 64, 0,
                                                        c.group_k * 128 + c.share.thread);
    sync_team(c);
#endif
  }
}

extern "C" __global__ void
#if CLUSTER
__cluster_dims__(4, 1, 1)
#endif
__launch_bounds__(THREADS, RESIDENT)
linear(const u8* weights, const u8* x, u16* y, float* partial, u32* arrived, const float* scale, const float* bias, const u8* codebooks,
       const int* experts, int rows, int outputs, int depth_blobs, int tiles, int row_tiles) {
  extern __shared__ __align__(1024) u8 shared[];  // table, ring, totals
  __shared__ __align__(8) u64 barriers[2 * STAGES + 2];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const u32 base = shared_address(shared), meeting = shared_address(barriers + 2 * STAGES);
  Ring ring{base + Weights::TABLE_BYTES, shared_address(barriers), shared_address(barriers + STAGES)};
  Weights::fill(shared, codebooks, threadIdx.x, THREADS);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(ring.full + 8 * i, HOPPER ? 1 : 32);
      barrier_init(ring.empty + 8 * i, GROUPS * 4);
    }
    barrier_init(meeting, 4);
    barrier_init(meeting + 8, 4);
#if HOPPER
    fence_barriers();
#endif
  }
  __syncthreads();
#if CLUSTER
  cluster_arrive();  // consumers wait for it before they meet
#endif
  let_next_start();
  const Problem p{weights, x, y, partial, arrived, scale, bias, experts, rows, outputs, depth_blobs, tiles, row_tiles};
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
  consume(p, ring, (float*)(shared + Weights::TABLE_BYTES + STAGES * STAGE), quarter_depth, c, meeting);
}
