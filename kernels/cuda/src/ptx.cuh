// Instructions that CUDA C++ has no plain words for.
#pragma once

#define HOPPER (__CUDA_ARCH__ == 900)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE __device__ __forceinline__

// ---- bits and pairs of bfloat16 ----

INLINE u32 and_or(u32 a, u32 mask, u32 bits) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
  return r;
}
INLINE u32 pick_bytes(u32 a, u32 b, u32 selector) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
INLINE u32 low_twice(u32 v) { return pick_bytes(v, v, 0x1010); }
INLINE u32 high_twice(u32 v) { return pick_bytes(v, v, 0x3232); }

INLINE u32 fma2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
#if HOPPER
INLINE u32 add2(u32 a, u32 b) {
  u32 r;
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
INLINE u32 sub2(u32 a, u32 b) {
  u32 r;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
INLINE u32 mul2(u32 a, u32 b) {
  u32 r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
#else  // capability 8 has the fused form alone; the result is the same
INLINE u32 add2(u32 a, u32 b) { return fma2(a, 0x3F803F80u, b); }
INLINE u32 sub2(u32 a, u32 b) { return fma2(b, 0xBF80BF80u, a); }
INLINE u32 mul2(u32 a, u32 b) { return fma2(a, b, 0x80008000u); }
#endif

INLINE u32 round2(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
INLINE u16 round1(float v) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
INLINE float low_of(u32 pair) { return __uint_as_float(pair << 16); }
INLINE float high_of(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// ---- shared memory, by 32-bit address ----

INLINE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
INLINE u32 load_shared(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
INLINE u32 load_shared_byte(u32 address) {
  u32 v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
INLINE void load_shared2(u32* v, u32 address) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(address) : "memory");
}
INLINE void load_shared4(u32* v, u32 address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}
// From a table that never changes: the compiler may move the load.
INLINE u32 load_table(u32 address) {
  u32 v;
  asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
INLINE void load_table4(u32* v, u32 address) {
  asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address));
}

// ---- barriers ----

INLINE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals));
}
INLINE void barrier_arrive(u32 barrier) {
  asm volatile("{.reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0];}" :: "r"(barrier) : "memory");
}
INLINE void barrier_wait(u32 barrier, u32 phase) {
  for (u32 tries = 0; tries < (1u << 24); tries++) {
    u32 passed;
#if HOPPER
    asm volatile("{.reg .pred P; mbarrier.try_wait.parity.shared::cta.b64 P, [%1], %2; selp.u32 %0, 1, 0, P;}"
                 : "=r"(passed) : "r"(barrier), "r"(phase) : "memory");
#else
    asm volatile("{.reg .pred P; mbarrier.test_wait.parity.shared::cta.b64 P, [%1], %2; selp.u32 %0, 1, 0, P;}"
                 : "=r"(passed) : "r"(barrier), "r"(phase) : "memory");
#endif
    if (passed) return;
  }
  asm volatile("trap;");  // a fault is better than a card that hangs
}
INLINE void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(barrier), "r"(threads) : "memory");
}

// ---- copies into shared memory ----

INLINE void copy_async16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory");
}
// The barrier counts this thread's copies so far as one arrival, once they are there.
INLINE void arrive_after_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(barrier) : "memory");
}
INLINE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#if HOPPER
constexpr u64 READ_ONCE = 0x12F0000000000000ull, READ_AGAIN = 0x14F0000000000000ull;  // hints for the L2 cache

INLINE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("{.reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1;}"
               :: "r"(barrier), "r"(bytes) : "memory");
}
INLINE void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier, u64 hint) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               :: "r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(hint) : "memory");
}
// ---- clusters: four blocks that see each other's shared memory ----

INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
INLINE u32 address_in(u32 address, u32 block) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  return there;
}
INLINE void barrier_arrive_at(u32 barrier, u32 block) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" :: "r"(address_in(barrier, block)) : "memory");
}
INLINE void barrier_wait_cluster(u32 barrier, u32 phase) {
  for (u32 tries = 0; tries < (1u << 24); tries++) {
    u32 passed;
    asm volatile("{.reg .pred P; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 P, [%1], %2; selp.u32 %0, 1, 0, P;}"
                 : "=r"(passed) : "r"(barrier), "r"(phase) : "memory");
    if (passed) return;
  }
  asm volatile("trap;");
}
INLINE float4 load_shared_of(u32 address, u32 block) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address_in(address, block)) : "memory");
  return v;
}

INLINE void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}
#endif

// ---- overlap with the kernels before and after (programmatic dependent launch) ----

INLINE void let_next_start() {
#if HOPPER
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// What earlier kernels wrote may be read, and what they read may be written, from here on.
INLINE void wait_for_previous() {
#if HOPPER
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
