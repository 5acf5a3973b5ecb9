// Rows that meet different weights in one launch: where they go, and what becomes of what comes back.
#include "ptx.cuh"

constexpr int MOST_EXPERTS = 1024, PLAN_THREADS = 1024;

// chosen [pairs]: an expert for each of `each` choices of a row; outside of 0 .. experts - 1: none. Slots of one expert
// lie side by side, in tiles of `tile` rows that hold no other's. For each tile its expert (-1: empty), for each slot its row
// (-1: none), for each choice its slot (-1: none). One block.
extern "C" __global__ void __launch_bounds__(PLAN_THREADS)
plan_experts(const int* chosen, int* expert_of, int* row_of, int* slot_of, int pairs, int each, int experts, int tile, int tiles) {
  let_next_start();
  wait_for_previous();
  __shared__ int ends[2][MOST_EXPERTS];  // tiles of experts, summed up
  const int thread = threadIdx.x, lane = thread & 31;
  for (int i = thread; i < tiles * tile; i += PLAN_THREADS) row_of[i] = -1;
  for (int i = thread; i < tiles; i += PLAN_THREADS) expert_of[i] = -1;
  for (int i = thread; i < pairs; i += PLAN_THREADS)
    if (chosen[i] < 0 || chosen[i] >= experts) slot_of[i] = -1;
  for (int e = thread >> 5; e < experts; e += PLAN_THREADS / 32) {
    int before = 0;
    for (int begin = 0; begin < pairs; begin += 32) {
      const int i = begin + lane;
      const bool mine = i < pairs && chosen[i] == e;
      const u32 others = __ballot_sync(~0u, mine);
      if (mine) slot_of[i] = before + __popc(others & ((1u << lane) - 1));
      before += __popc(others);
    }
    if (lane == 0) ends[0][e] = (before + tile - 1) / tile;
  }
  int now = 0;
  for (int step = 1; step < experts; step *= 2, now ^= 1) {
    __syncthreads();
    for (int e = thread; e < experts; e += PLAN_THREADS) ends[now ^ 1][e] = ends[now][e] + (e >= step ? ends[now][e - step] : 0);
  }
  __syncthreads();
  for (int e = thread; e < experts; e += PLAN_THREADS)
    for (int t = e ? ends[now][e - 1] : 0; t < ends[now][e]; t++) expert_of[t] = e;
  for (int i = thread; i < pairs; i += PLAN_THREADS) {
    const int e = chosen[i];
    if (e < 0 || e >= experts) continue;
    const int slot = (e ? ends[now][e - 1] : 0) * tile + slot_of[i];
    slot_of[i] = slot;
    row_of[slot] = i / each;
  }
}

// out[row] = sum over its choices, in their order, of share * y[slot], in float32, rounded once. One thread four values.
extern "C" __global__ void __launch_bounds__(256)
combine_rows(const float4* y, const int* slot_of, const float* shares, uint2* out, int each, int quarters, int count) {
  let_next_start();
  wait_for_previous();
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= count) return;
  const int row = i / quarters, at = i % quarters;
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  for (int c = 0; c < each; c++) {
    const int slot = slot_of[row * each + c];
    if (slot < 0) continue;
    const float4 v = y[(u64)slot * quarters + at];
    const float share = shares[row * each + c];
    sum[0] += share * v.x, sum[1] += share * v.y, sum[2] += share * v.z, sum[3] += share * v.w;
  }
  out[i] = make_uint2(round2(sum[0], sum[1]), round2(sum[2], sum[3]));
}
