// y += up (down x) for rows of several sessions, each with an adapter of its own or none: low-rank products (LoRA).
//
// Rows come in tiles of 8 that share an adapter (plan_experts of experts.cu). Two launches, whatever the number of adapters.
// THE ORDER OF A SUM: depths are cut into PARTS shares of equal length, each share among the four warps of a block; a warp
// sums in rising steps of 16 by the matrix unit from zero; warps, then shares are added in rising order, in float32; the
// result is rounded to bfloat16. Ranks are summed in rising steps of 16, then added to y, and rounded once. So a row's bits
// depend on its x, its y and its adapter alone.
//
// Fragments of 16 outputs x 16 depths (matrix.cuh): a lane's four registers lie side by side, lanes follow each other.
//
// RANK: of all adapters, padded to a multiple of 16.
#include "ptx.cuh"
#include "matrix.cuh"

constexpr int ROWS = 8, PARTS = 16, WARPS = 4, TILES = RANK / 16;

// x [rows, width] -> partial [row tiles][PARTS][ROWS][RANK]; down: [adapters][RANK / 16][steps] fragments, of depths padded
// with zeros to 16 * steps, a multiple of 16 * PARTS * WARPS.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
shrink(const u16* x, const uint4* down, const int* adapter_of, const int* row_of, float* partial, int width, int steps) {
  let_next_start();
  wait_for_previous();
  __shared__ float sums[WARPS][ROWS * RANK];
  const int tile = blockIdx.x, part = blockIdx.y, adapter = adapter_of[tile];
  if (adapter < 0) return;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, row = row_of[tile * ROWS + g];
  const int each = steps / (PARTS * WARPS), first = (part * WARPS + warp) * each;
  float d[TILES][4] = {};
  for (int i = first; i < first + each; i++) {
    u32 m[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int depth = 16 * i + 8 * h + 2 * t;
      const u16* from = x + (u64)row * width + depth;
      const u32 low = row >= 0 && depth < width ? from[0] : 0, high = row >= 0 && depth + 1 < width ? from[1] : 0;
      m[h] = low | high << 16;
    }
#pragma unroll
    for (int r = 0; r < TILES; r++) {
      const uint4 f = __ldg(down + (((u64)adapter * TILES + r) * steps + i) * 32 + lane);
      const u32 a[4] = {f.x, f.y, f.z, f.w};
      multiply(d[r], a, m[0], m[1]);
    }
  }
#pragma unroll
  for (int r = 0; r < TILES; r++)
#pragma unroll
    for (int i = 0; i < 4; i++) sums[warp][(2 * t + (i & 1)) * RANK + 16 * r + g + 8 * (i >> 1)] = d[r][i];
  __syncthreads();
  float* to = partial + ((u64)tile * PARTS + part) * ROWS * RANK;
  for (int i = threadIdx.x; i < ROWS * RANK; i += WARPS * 32) to[i] = ((sums[0][i] + sums[1][i]) + sums[2][i]) + sums[3][i];
}

// y [rows, outputs] += up times the sums; up: [adapters][ceil(outputs / 16)][RANK / 16] fragments. Each warp 16 outputs.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
expand(u16* y, const uint4* up, const int* adapter_of, const int* row_of, const float* partial, int outputs) {
  let_next_start();
  wait_for_previous();
  __shared__ u16 inner[ROWS][RANK];
  const int tile = blockIdx.x, adapter = adapter_of[tile];
  if (adapter < 0) return;
  const float* from = partial + (u64)tile * PARTS * ROWS * RANK;
  for (int i = threadIdx.x; i < ROWS * RANK; i += WARPS * 32) {
    float sum = 0.f;
#pragma unroll
    for (int part = 0; part < PARTS; part++) sum += from[part * ROWS * RANK + i];
    inner[i / RANK][i % RANK] = round1(sum);
  }
  __syncthreads();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int sixteenth = blockIdx.y * WARPS + warp, sixteenths = (outputs + 15) / 16;
  if (sixteenth >= sixteenths) return;
  float d[4] = {};
#pragma unroll
  for (int r = 0; r < TILES; r++) {
    const uint4 f = __ldg(up + (((u64)adapter * sixteenths + sixteenth) * TILES + r) * 32 + lane);
    const u32 a[4] = {f.x, f.y, f.z, f.w};
    multiply(d, a, *(const u32*)&inner[g][16 * r + 2 * t], *(const u32*)&inner[g][16 * r + 8 + 2 * t]);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = row_of[tile * ROWS + 2 * t + (i & 1)], output = sixteenth * 16 + g + 8 * (i >> 1);
    if (row < 0 || output >= outputs) continue;
    u16* at = y + (u64)row * outputs + output;
    *at = round1(__uint_as_float((u32)*at << 16) + d[i]);
  }
}
