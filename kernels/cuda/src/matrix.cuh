// Matrix products of bfloat16 with sums in float32: weights are the left operand and come from registers.
//
// A fragment holds 16 outputs x 16 depths: lane 4g + t has (output g, depths 2t, 2t + 1), (g + 8, the same), (g, 2t + 8,
// 2t + 9), (g + 8, the same). Sums: (output g, rows 2t, 2t + 1), (g + 8, the same), for each 8 rows of x.
#pragma once
#include "ptx.cuh"

// Four 8 x 8 matrices of the layout of activations: for each lane the pair of depths that `multiply` asks for.
INLINE void load_matrices(u32 (&m)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(address) : "memory");
}
// sums[0..3] += 16 outputs x 16 depths x 8 rows
INLINE void multiply(float* sums, const u32* weights, u32 x0, u32 x1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(x0), "r"(x1));
}

#if WGMMA
// Hopper's product of a group of 128 threads: 64 outputs x 16 depths x ROWS rows, x from shared memory, asynchronous.
INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> INLINE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }

// Describes 16 depths x `rows` rows of x in shared memory: matrices of 8 rows x 8 depths, 128 bytes each, no swizzle;
// 128 bytes from 8 rows to the next, 16 * rows bytes from 8 depths to the next.
INLINE u64 wgmma_descriptor(u32 address, int rows) {
  return ((u64)8 << 32) | ((u64)rows << 16) | (u64)((address & 0x3FFFFu) >> 4);
}

template <int ROWS> INLINE void wgmma(float (&d)[ROWS / 2], const u32* a, u64 x, int add);

#define SUMS8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(add)

template <> INLINE void wgmma<32>(float (&d)[16], const u32* a, u64 x, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %21, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
               "{%16, %17, %18, %19}, %20, p, 1, 1, 0;}\n"
               : SUMS8(0), SUMS8(8)
               : OPERANDS);
}

template <> INLINE void wgmma<64>(float (&d)[32], const u32* a, u64 x, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
               "{%32, %33, %34, %35}, %36, p, 1, 1, 0;}\n"
               : SUMS8(0), SUMS8(8), SUMS8(16), SUMS8(24)
               : OPERANDS);
}

template <> INLINE void wgmma<128>(float (&d)[64], const u32* a, u64 x, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
               "{%64, %65, %66, %67}, %68, p, 1, 1, 0;}\n"
               : SUMS8(0), SUMS8(8), SUMS8(16), SUMS8(24), SUMS8(32), SUMS8(40), SUMS8(48), SUMS8(56)
               : OPERANDS);
}
#undef SUMS8
#undef OPERANDS
#endif
