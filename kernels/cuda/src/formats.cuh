// How weights lie in device memory, and how a thread turns its share into fragments of bfloat16.
//
// A blob holds 64 outputs x 64 depths. Warp w of a group of 4 owns outputs 16 w to 16 w + 15; its lane 4g + t owns, of
// outputs g and g + 8, the depths of the four fragments j (matrix.cuh). Element e of pair p = 2c + h of fragment j is
// output g + 8h, depth 16 j + 8 c + 2 t + e. Fragments hold each pair in one register, e = 0 in the low half.
// `kernels/cuda/layout.py` writes the blobs.
#pragma once
#include "ptx.cuh"

struct Lane {
  int thread;  // in the group, 0 to 127
  int pair;    // 8 * warp + g: the pair of outputs
  u32 table;   // shared address of the format's table, as `Format::table_of` gives it
  const uint4* codebooks;
};

// Codes of four bits on 128: bfloat16 counts in ones from 128 to 256.
constexpr u32 COUNT = 0x43004300u, MINUS_132 = 0xC304C304u, MINUS_136 = 0xC308C308u, MINUS_144 = 0xC310C310u;
INLINE u32 nibbles(u32 word, int pair) { return and_or(word >> (4 * pair), 0x000F000Fu, COUNT); }

struct NoTable {
  static constexpr int TABLE_BYTES = 0;
  static INLINE void fill(u8*, const void*, int, int) {}
  static INLINE u32 table_of(u32 base, int) { return base; }
};

// (code - zero) * scale by groups of 64: bfloat16 scale and -(128 + zero) of each output after the codes.
struct Int4 : NoTable {
  static constexpr int BYTES = 2304;
  static constexpr bool SCALED = false;
  struct Codes { u32 words[4], scale[2]; };
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) {
    load_shared4(c.words, blob + lane.thread * 16);
    load_shared2(c.scale, blob + 2048 + lane.pair * 8);
  }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane&) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const u32 s = c.scale[i & 1];
      fragments[i] = mul2(add2(nibbles(c.words[i >> 2], i & 3), high_twice(s)), low_twice(s));
    }
  }
};

// The same by groups of 32.
struct Int4Group32 : NoTable {
  static constexpr int BYTES = 2560;
  static constexpr bool SCALED = false;
  struct Codes { u32 words[4], scale[4]; };
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) {
    load_shared4(c.words, blob + lane.thread * 16);
    load_shared2(c.scale, blob + 2048 + lane.pair * 8);
    load_shared2(c.scale + 2, blob + 2304 + lane.pair * 8);
  }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane&) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const u32 s = c.scale[2 * (i >> 3) + (i & 1)];
      fragments[i] = mul2(add2(nibbles(c.words[i >> 2], i & 3), high_twice(s)), low_twice(s));
    }
  }
};

// (code - 8) * scale by groups of 32: ggml's Q4_0.
struct Q4_0 : NoTable {
  static constexpr int BYTES = 2304;
  static constexpr bool SCALED = false;
  struct Codes { u32 words[4], scale[2]; };
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) {
    load_shared4(c.words, blob + lane.thread * 16);
    load_shared2(c.scale, blob + 2048 + lane.pair * 8);
  }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane&) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const u32 s = c.scale[i & 1];
      fragments[i] = mul2(add2(nibbles(c.words[i >> 2], i & 3), MINUS_136), i < 8 ? low_twice(s) : high_twice(s));
    }
  }
};

// (code - 8) * scale + middle by groups of 32, rounded once: Q4_1, and Q4_K with its groups' numbers multiplied out.
// The middle of a group is small where its lowest value is not: it loses less by rounding.
struct Q4_1 : NoTable {
  static constexpr int BYTES = 2560;
  static constexpr bool SCALED = false;
  struct Codes { u32 words[4], scale[4]; };
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) {
    load_shared4(c.words, blob + lane.thread * 16);
    load_shared2(c.scale, blob + 2048 + lane.pair * 8);
    load_shared2(c.scale + 2, blob + 2304 + lane.pair * 8);
  }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane&) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const u32 s = c.scale[2 * (i >> 3) + (i & 1)];
      fragments[i] = fma2(add2(nibbles(c.words[i >> 2], i & 3), MINUS_136), low_twice(s), high_twice(s));
    }
  }
};

// As Q4_1 with a fifth bit, and 16 for 8: bits i and 16 + i of a thread's word belong to register i.
struct Q5_K : NoTable {
  static constexpr int BYTES = 3072;
  static constexpr bool SCALED = false;
  struct Codes { u32 words[4], scale[4], fifth; };
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) {
    load_shared4(c.words, blob + lane.thread * 16);
    load_shared2(c.scale, blob + 2048 + lane.pair * 8);
    load_shared2(c.scale + 2, blob + 2304 + lane.pair * 8);
    c.fifth = load_shared(blob + 2560 + lane.thread * 4);
  }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane&) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const u32 s = c.scale[2 * (i >> 3) + (i & 1)];
      const u32 high = i < 4 ? c.fifth << (4 - i) : c.fifth >> (i - 4);
      const u32 code = and_or(high, 0x00100010u, nibbles(c.words[i >> 2], i & 3));
      fragments[i] = fma2(add2(code, MINUS_144), low_twice(s), high_twice(s));
    }
  }
};

// (code - 32) * scale by groups of 16, six bits: two words hold the upper two bits of registers 0 to 7 and 8 to 15.
struct Q6_K : NoTable {
  static constexpr int BYTES = 3584;
  static constexpr bool SCALED = false;
  struct Codes { u32 words[4], upper[2], scale[4]; };
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) {
    load_shared4(c.words, blob + lane.thread * 16);
    load_shared2(c.upper, blob + 2048 + lane.thread * 8);
    load_shared4(c.scale, blob + 3072 + lane.pair * 16);
  }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane&) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int j = i >> 2, place = 2 * (i & 7);
      const u32 word = c.upper[i >> 3], s = c.scale[2 * (i & 1) + (j >> 1)];
      const u32 high = place < 4 ? word << (4 - place) : word >> (place - 4);
      const u32 code = and_or(high, 0x00300030u, nibbles(c.words[j], i & 3));
      fragments[i] = mul2(add2(code, 0xC320C320u), j & 1 ? high_twice(s) : low_twice(s));
    }
  }
};

// LEVELS[code] * scale by groups of 64: QLoRA's NF4; the scale, float32, is rounded to bfloat16 here.
// The table holds all pairs of levels, once for each bank of shared memory.
struct Nf4 {
  static constexpr int BYTES = 2304, TABLE_BYTES = 256 * 32 * 4;
  static constexpr bool SCALED = false;
  struct Codes { u32 words[4], scale[2]; };
  static INLINE void fill(u8* table, const void*, int thread, int threads) {
    const u16 levels[16] = {NF4_LEVELS};
    for (int i = thread; i < 256 * 32; i += threads) {
      const int code = i >> 5;
      ((u32*)table)[i] = levels[code & 15] | ((u32)levels[code >> 4] << 16);
    }
  }
  static INLINE u32 table_of(u32 base, int lane) { return base + lane * 4; }
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) {
    load_shared4(c.words, blob + lane.thread * 16);
    load_shared2(c.scale, blob + 2048 + lane.pair * 8);
  }
  static INLINE u32 pair(u32 word, u32 table) { return load_table((word & 0x7F80u) + table); }
  // A word holds the pairs p = 0 to 3 as bytes, turned left by 7 bits, so that a masked shift is an offset.
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane& lane) {
    u32 scale[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float s = __uint_as_float(c.scale[h]);
      scale[h] = round2(s, s);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 w = c.words[j];
      fragments[4 * j] = mul2(pair(w, lane.table), scale[0]);
      fragments[4 * j + 1] = mul2(pair(w >> 8, lane.table), scale[1]);
      fragments[4 * j + 2] = mul2(pair(w >> 16, lane.table), scale[0]);
      fragments[4 * j + 3] = mul2(pair(__funnelshift_l(w, w, 8), lane.table), scale[1]);
    }
  }
};

// The same where blocks of 64 go on from row to row: in a blob an output has two scales, the second from a border on.
struct Nf4Across : Nf4 {
  static constexpr int BYTES = 2560;
  struct Codes { u32 words[4], scale[4]; };  // both scales of either output, then both borders
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) {
    load_shared4(c.words, blob + lane.thread * 16);
    load_shared4(c.scale, blob + 2048 + lane.pair * 16);
  }
  static INLINE u32 scales(const Codes& c, int i, int t) {
    const int depth = 16 * (i >> 2) + 8 * (i >> 1 & 1) + 2 * t, border = c.scale[2 + (i & 1)];
    return pick_bytes(c.scale[i & 1], 0, (depth < border ? 0x10 : 0x32) | (depth + 1 < border ? 0x1000 : 0x3200));
  }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane& lane) {
    const int t = lane.thread & 3;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 w = c.words[j];
      fragments[4 * j] = mul2(pair(w, lane.table), scales(c, 4 * j, t));
      fragments[4 * j + 1] = mul2(pair(w >> 8, lane.table), scales(c, 4 * j + 1, t));
      fragments[4 * j + 2] = mul2(pair(w >> 16, lane.table), scales(c, 4 * j + 2, t));
      fragments[4 * j + 3] = mul2(pair(__funnelshift_l(w, w, 8), lane.table), scales(c, 4 * j + 3, t));
    }
  }
};

// Floats of four bits (a sign, two bits of exponent, one of mantissa) under a power of two by groups of 32.
// Three of a word's four codes are a shift away from their places in a bfloat16, which is then 2^126 times too small.
struct Mxfp4 : NoTable {
  static constexpr int BYTES = 2304;
  static constexpr bool SCALED = false;
  struct Codes { u32 words[4], scale[2]; };
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) {
    load_shared4(c.words, blob + lane.thread * 16);
    load_shared2(c.scale, blob + 2048 + lane.pair * 8);
  }
  static INLINE u32 places(u32 w, int pair) {
    if (pair < 3) return w << (3 * pair) & 0x81C081C0u;
    return and_or(w >> 4, 0x00C000C0u, and_or(w >> 5, 0x01000100u, w << 1 & 0x80008000u));
  }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane&) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const u32 s = c.scale[i & 1], value = mul2(places(c.words[i >> 2], i & 3), 0x7E807E80u);
      fragments[i] = mul2(value, i < 8 ? low_twice(s) : high_twice(s));
    }
  }
};

// Floats of eight bits (a sign, four bits of exponent, three of mantissa) under a scale for each output and 64 depths.
// Registers i and i + 1 are the upper and the lower bytes of a word's halves; four bits lower they are bfloat16s that
// are 2^120 times too small.
struct Fp8 : NoTable {
  static constexpr int BYTES = 4224;
  static constexpr bool SCALED = false;
  struct Codes { u32 words[8], scale; };
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) {
    load_shared4(c.words, blob + lane.thread * 16);
    load_shared4(c.words + 4, blob + 2048 + lane.thread * 16);
    c.scale = load_shared(blob + 4096 + lane.pair * 4);
  }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane&) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const u32 w = i & 1 ? c.words[i >> 1] << 8 : c.words[i >> 1];
      const u32 low = (i & 1 ? c.words[i >> 1] << 4 : w >> 4) & 0x07F007F0u;
      const u32 value = mul2(and_or(w, 0x80008000u, low), 0x7B807B80u);
      fragments[i] = mul2(value, i & 1 ? high_twice(c.scale) : low_twice(c.scale));
    }
  }
};

// (code - 4) * scale + middle by groups of 16, three bits, rounded once; some weights are replaced by bfloat16s of a list.
// A word holds registers 5 w to 5 w + 4; bit b of register 15 is the highest of word b's halves. Behind the numbers:
// where each warp's part of the list begins, where each lane's part of that, and the ENTRIES of the list.
template <int ENTRIES> struct Spqr : NoTable {
  static constexpr int BYTES = 2720 + 4 * ENTRIES;
  static constexpr bool SCALED = false;
  struct Codes { u32 words[3], numbers[8], entry, end; };
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) {
    load_shared2(c.words, blob + lane.thread * 8);
    c.words[2] = load_shared(blob + 1024 + lane.thread * 4);
    load_shared4(c.numbers, blob + 1536 + lane.pair * 16);
    load_shared4(c.numbers + 4, blob + 2048 + lane.pair * 16);
    const int warp = lane.thread >> 5;
    const u32 list = blob + 2720 + load_shared(blob + 2560 + warp * 4), starts = blob + 2576 + warp * 36 + (lane.thread & 31);
    c.entry = list + 4 * load_shared_byte(starts);
    c.end = list + 4 * load_shared_byte(starts + 1);
  }
  static INLINE u32 code(const u32 (&words)[3], int i) {
    if (i < 15) return and_or(words[i / 5] >> (3 * (i % 5)), 0x00070007u, COUNT);
    const u32 low = and_or(words[0] >> 15, 0x00010001u, COUNT);
    return and_or(words[2] >> 13, 0x00040004u, and_or(words[1] >> 14, 0x00020002u, low));
  }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane&) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const u32 s = c.numbers[4 * (i >> 3) + 2 * (i >> 2 & 1) + (i & 1)];
      fragments[i] = fma2(add2(code(c.words, i), MINUS_132), low_twice(s), high_twice(s));
    }
    for (u32 at = c.entry; at < c.end; at += 4) {
      const u32 entry = load_shared(at), place = entry >> 16 & 15, bytes = entry >> 20 ? 0x5410 : 0x3254;
#pragma unroll
      for (int i = 0; i < 16; i++)
        if (i == place) fragments[i] = pick_bytes(fragments[i], entry, bytes);
    }
    __syncwarp();
  }
};

// Whole numbers of eight bits, two pairs a word: 128 + the lower seven bits, less 128 or 256 by the sign.
INLINE u32 bytes2(u32 word, int half) {
  const u32 u = pick_bytes(word, 0, half ? 0x4342 : 0x4140);
  return sub2(and_or(u, 0x007F007Fu, COUNT), and_or(u, 0x00800080u, COUNT));
}

// code * scale, one scale an output: applied to the sum.
struct Int8 : NoTable {
  static constexpr int BYTES = 4096;
  static constexpr bool SCALED = true;
  struct Codes { u32 words[8]; };
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) {
    load_shared4(c.words, blob + lane.thread * 16);
    load_shared4(c.words + 4, blob + 2048 + lane.thread * 16);
  }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane&) {
#pragma unroll
    for (int i = 0; i < 16; i++) fragments[i] = bytes2(c.words[i >> 1], i & 1);
  }
};

// code * scale by groups of 32: ggml's Q8_0.
struct Q8_0 : NoTable {
  static constexpr int BYTES = 4352;
  static constexpr bool SCALED = false;
  struct Codes { u32 words[8], scale[2]; };
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) {
    load_shared4(c.words, blob + lane.thread * 16);
    load_shared4(c.words + 4, blob + 2048 + lane.thread * 16);
    load_shared2(c.scale, blob + 4096 + lane.pair * 8);
  }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane&) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const u32 s = c.scale[i & 1];
      fragments[i] = mul2(bytes2(c.words[i >> 1], i & 1), i < 8 ? low_twice(s) : high_twice(s));
    }
  }
};

struct Bf16 : NoTable {
  static constexpr int BYTES = 8192;
  static constexpr bool SCALED = false;
  struct Codes { u32 words[16]; };
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) {
#pragma unroll
    for (int j = 0; j < 4; j++) load_shared4(c.words + 4 * j, blob + 2048 * j + lane.thread * 16);
  }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane&) {
#pragma unroll
    for (int i = 0; i < 16; i++) fragments[i] = c.words[i];
  }
};

// AQLM with two codebooks of 256 vectors of 8 depths: their sum, rounded; one scale an output, applied to the sum.
// A thread's vectors are whole: of each 32 depths, t owns 8 t to 8 t + 7, and x is stored in that order (x_order 1 of
// elementwise.cu). The table holds both codebooks, each vector eight times, so that 8 lanes meet no bank twice.
struct Aqlm2x8 {
  static constexpr int BYTES = 1024, TABLE_BYTES = 65536;
  static constexpr bool SCALED = true;
  struct Codes { u32 words[2]; };
  static INLINE void fill(u8* table, const void* codebooks, int thread, int threads) {
    for (int i = thread; i < 2 * 256 * 8; i += threads) ((uint4*)table)[i] = ((const uint4*)codebooks)[i >> 3];
  }
  static INLINE u32 table_of(u32 base, int lane) { return base + (lane & 7) * 16; }
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) { load_shared2(c.words, blob + lane.thread * 8); }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane& lane) {
    u32 first[4][4], second[4][4];
#pragma unroll
    for (int v = 0; v < 4; v++) {
      const u32 word = c.words[v >> 1];
      const int h = v & 1;
      load_table4(first[v], pick_bytes(word, 0, h ? 0x4442 : 0x4440) * 128 + lane.table);
      load_table4(second[v], pick_bytes(word, 0, h ? 0x4443 : 0x4441) * 128 + lane.table + 32768);
    }
#pragma unroll
    for (int v = 0; v < 4; v++) {
      const int j = v & ~1, h = v & 1;
      fragments[4 * j + h] = add2(first[v][0], second[v][0]);
      fragments[4 * j + 2 + h] = add2(first[v][1], second[v][1]);
      fragments[4 * j + 4 + h] = add2(first[v][2], second[v][2]);
      fragments[4 * j + 6 + h] = add2(first[v][3], second[v][3]);
    }
  }
};

// AQLM with one codebook of 65,536 vectors, a megabyte that the L2 cache holds; order and scales as above.
struct Aqlm1x16 : NoTable {
  static constexpr int BYTES = 1024;
  static constexpr bool SCALED = true;
  struct Codes { u32 words[2]; };
  static INLINE void load(Codes& c, u32 blob, const Lane& lane) { load_shared2(c.words, blob + lane.thread * 8); }
  static INLINE void expand(u32 (&fragments)[16], const Codes& c, const Lane& lane) {
    uint4 vectors[4];
#pragma unroll
    for (int v = 0; v < 4; v++) vectors[v] = __ldg(lane.codebooks + (c.words[v >> 1] >> (16 * (v & 1)) & 0xFFFFu));
#pragma unroll
    for (int v = 0; v < 4; v++) {
      const int j = v & ~1, h = v & 1;
      fragments[4 * j + h] = vectors[v].x;
      fragments[4 * j + 2 + h] = vectors[v].y;
      fragments[4 * j + 4 + h] = vectors[v].z;
      fragments[4 * j + 6 + h] = vectors[v].w;
    }
  }
};
