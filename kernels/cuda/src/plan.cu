// What attention must know about a batch, from the numbers that the host sent: once a forward, for all layers.
#include "ptx.cuh"

// TILE: positions at which attention cuts keys (attention.py).

// One block a segment. Rows that ask are all but the `stored` first; the n-th of the batch is query n.
// For each query: its segment (-1 for padding), its position, its slot, and
//   straight  positions below it lie in the slot of the same number: committed ones, and ancestors in a chain of
//             leading rows
//   path      [path_width] slots that hold the positions from `straight` on
//   full      positions below it, whole tiles, are seen by all queries of its group of up to `group` neighbours
// For each group: members (0 where there is none), first query, full, segment.
extern "C" __global__ void __launch_bounds__(128)
plan_rows(const int* start, const int* count, const int* base, const int* positions, const int* parents, const int* stored,
          int* segment_of, int* position_of, int* slot_of, int* straight_of, int* full_of, int* path, int4* grouped, int segments,
          int queries, int group, int groups, int path_width) {
  wait_for_previous();
  let_next_start();
  __shared__ int passed, passed_groups, chain;
  const int segment = blockIdx.x, thread = threadIdx.x;
  if (thread == 0) passed = passed_groups = 0, chain = count[segment];
  __syncthreads();
  for (int s = thread; s < segment; s += 128) {
    const int asking = count[s] - (stored ? stored[s] : 0);
    atomicAdd(&passed, asking);
    atomicAdd(&passed_groups, (asking + group - 1) / group);
  }
  const int* parent = parents + start[segment];
  for (int u = thread; u < count[segment]; u += 128)
    if (parent[u] != u - 1) atomicMin(&chain, u);
  __syncthreads();

  const int skipped = stored ? stored[segment] : 0, asking = count[segment] - skipped, below = base[segment];
  for (int i = thread; i < asking; i += 128) {
    const int u = skipped + i, query = passed + i, depth = positions[start[segment] + u] - below;
    int at = u, place = depth;
    while (at >= chain && place >= 0) at = min(parent[at], at - 1), place--;  // ends though it be no tree
    const int straight = below + place + 1;
    for (int w = u, d = depth; d > place && w >= 0; w = parent[w], d--)
      if (d - place - 1 < path_width) path[query * path_width + d - place - 1] = below + w;
    segment_of[query] = segment;
    position_of[query] = below + depth;
    slot_of[query] = below + u;
    straight_of[query] = straight;
  }
  __syncthreads();
  const int mine = (asking + group - 1) / group;
  for (int g = thread; g < mine; g += 128) {
    const int begin = passed + g * group, end = min(begin + group, passed + asking);
    int full = straight_of[begin];
    for (int q = begin + 1; q < end; q++) full = min(full, straight_of[q]);
    full -= full % TILE;
    for (int q = begin; q < end; q++) full_of[q] = full;
    grouped[passed_groups + g] = make_int4(end - begin, begin, full, segment);
  }
  if (segment == segments - 1) {
    for (int q = passed + asking + thread; q < queries; q += 128) segment_of[q] = -1;
    for (int g = passed_groups + mine + thread; g < groups; g += 128) grouped[g].x = 0;
  }
}
