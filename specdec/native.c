/* The native runtime's kernels: whole decoder layers of a Llama-like model in one call, for x86 CPUs with AVX-512 BF16.
 *
 * Weights lie in tiles of 16 outputs x 32 inputs, in bf16, or in 8 or 4 bits that unpack to bf16. With AMX, a tile is
 * unpacked in the first-level cache and multiplied with 16 tokens at once: a pass costs what reading the weights costs,
 * however many of the 16 tokens are there. Without, a tile's rows are unpacked into registers and multiplied with one
 * token after another. Every token is computed by the same operations in the same order whatever is scored beside it:
 * attention adds the visible keys one by one, and an invisible one adds an exact zero. So a token's logits do not depend,
 * to the last bit, on how many tokens a pass has, nor on the cache slots of a tree's branches.
 *
 * Layouts, for blocks of 16 tokens ("lanes"): FM, feature-major floats f[features][16]; VN, pairs of bf16
 * v[features / 2][16], what AMX's products read; QN, its form for I8 maps, quads of int8 q[features / 4][16], and then
 * each lane's scale; RN and QR (below), what the products without AMX read. Drafts need not be exact: their maps may be
 * I8, whose products need no unpacking, or I4, half as large. Knows nothing of Python, models' names, or drafting.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

int omp_get_thread_num(void);
int omp_get_num_threads(void);

#pragma GCC target("prfchw,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,f16c,fma,avx2,amx-tile,amx-bf16,amx-int8")

enum { BF16 = 0, Q8 = 1, Q4 = 2, I8 = 3, I4 = 4 }; /* I8, I4: for drafts; what they are multiplied with is rounded to 8 bits */
enum { MOST_BLOCKS = 4, RING = 8, AHEAD = 2, PREFETCH = 4096, MOST_EXPECTED = 1024, SOON = 64 }; /* SOON: keys ahead that are sent for */
static const int TILE_BYTES[5] = {1024, 32 + 512, 64 + 256, 1024, 64 + 512}; /* 16 x 32: bf16 | scales f16[16], int8 | scales, lows, nibbles;
    16 x 64: int8 | scales f16[16][2] (of a row's even and odd quads), for two rows each: nibbles of one above the other's */

typedef uint16_t bf16;
typedef __m512 F;

typedef struct {       /* y = W x (+ bias) */
    int32_t kind, out, in, unused; /* out: multiple of 16; in: multiple of 32 */
    const uint8_t *tiles; /* [out / 16][in / 32] */
    const float *bias;    /* [out] or NULL */
    const float *scale;   /* I8: [out]; I4: what a row's products are too large by, [out] */
} Map;

typedef struct {       /* low-rank terms beside a map: y += up (down x) */
    Map down;             /* bf16 [rank, in]; the ranks of its parts, each padded to a multiple of 32, one after the other */
    int32_t ks, unused;   /* rank / 32 of one part */
    const int32_t *first; /* [out / 16]: where an output tile's part begins in down's outputs, / 32; -1: no terms there */
    const uint8_t *up;    /* bf16 tiles [out / 16][ks] */
} LowRank;

typedef struct {
    Map qkv, out, gate_up, down; /* gate_up: tiles of gate and up alternate */
    const float *norm_in, *norm_mlp, *norm_q, *norm_k; /* norm_q, norm_k: per head, or NULL */
} Layer;

typedef struct {
    int32_t hidden, heads, kv_heads, head_dim, inner, rotated; /* rotated: rotary dimensions of a head */
    float eps, scale;
    const Layer *layers;
} Model;

typedef struct {
    int32_t batch, tokens, lo, hi, start, threads, adapted, windows; /* start: first new cache slot */
    int32_t causal, unused;      /* each token sees the slots up to its own, within its window: there are no masks */
    const int32_t *spans;        /* by window kind: how many of the last slots are seen; 0: all */
    bf16 *x;                     /* [batch * tokens, hidden], in and out; unused in a passage */
    const int64_t *positions;    /* [batch * tokens] */
    const float *rotary;         /* [position][cosines, sines][rotated / 2] */
    bf16 **keys, **values;       /* by layer: [batch, kv_heads, capacity, head_dim] */
    const int32_t *capacity;     /* by layer: slots */
    const uint8_t *const *masks; /* by window kind: [batch, tokens, start + tokens], 1 = visible; NULL: all visible */
    const int32_t *window;       /* by layer: its kind */
    bf16 **taps;                 /* by layer, hidden states before it (hi: after the last) or NULL */
    const LowRank *const *low;   /* by layer: its four maps' low-rank terms, or NULL */
} Call;

/* -- threads ------------------------------------------------------------------------------------------------------ */

typedef struct {
    int32_t waiting __attribute__((aligned(64)));
    int32_t phase __attribute__((aligned(64)));
    int32_t asleep __attribute__((aligned(64)));
} Barrier;

enum { SPINS = 1000 }; /* some 20 to 50 microseconds: others reach a barrier sooner, unless they have lost their core */

/* Wait for all `n` threads: spin, and then sleep in the kernel, which gives the core to whom we wait for. */
static void sync_threads(Barrier *b, int n) {
    int32_t phase = __atomic_load_n(&b->phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&b->waiting, 1, __ATOMIC_ACQ_REL) == n) {
        __atomic_store_n(&b->waiting, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&b->phase, phase + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&b->asleep, __ATOMIC_SEQ_CST)) syscall(SYS_futex, &b->phase, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
        return;
    }
    for (int spins = 0; spins < SPINS; spins++) {
        if (__atomic_load_n(&b->phase, __ATOMIC_ACQUIRE) != phase) return;
        _mm_pause();
    }
    /* Whoever ends the phase sees us in `asleep`, or the kernel sees that the phase has ended. */
    __atomic_add_fetch(&b->asleep, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&b->phase, __ATOMIC_SEQ_CST) == phase) syscall(SYS_futex, &b->phase, FUTEX_WAIT_PRIVATE, phase, NULL, NULL, 0);
    __atomic_sub_fetch(&b->asleep, 1, __ATOMIC_RELAXED);
}

/* The share [*from, *to) of `count` items that thread `me` of `n` works on. */
static void share(int count, int me, int n, int *from, int *to) {
    *from = (int)((int64_t)count * me / n);
    *to = (int)((int64_t)count * (me + 1) / n);
}

/* Of `items` of work that `n` threads take in turns: how many turns there are. The items of the last ones are fewer than
 * threads, and all take part in each of them. */
static int turns_of(int items, int n) { return items / n + items % n; }

/* What thread `me` works on in a turn, and whether with all others. */
static int item_of(int turn, int items, int me, int n, int *together) {
    int whole = items / n;
    *together = turn >= whole;
    return *together ? whole * n + turn - whole : turn * n + me;
}

/* -- numbers ------------------------------------------------------------------------------------------------------ */

static inline float widen(bf16 v) {
    union { uint32_t u; float f; } w = {(uint32_t)v << 16};
    return w.f;
}

static inline bf16 narrow(float v) { /* round to nearest even, as torch does */
    union { float f; uint32_t u; } w = {v};
    return (bf16)((w.u + 0x7fff + ((w.u >> 16) & 1)) >> 16);
}

static inline F load_bf16(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

static inline __m256i narrow16(F v) { return (__m256i)_mm512_cvtneps_pbh(v); }

static inline F rounded(F v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow16(v)), 16)); }

/* The pairs (even, odd) of each lane as VN's dwords. */
static inline __m512i paired(F even, F odd) {
    __m512i low = _mm512_cvtepu16_epi32(narrow16(even)), high = _mm512_cvtepu16_epi32(narrow16(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* 16 rows of 16 dwords to their columns. */
static inline void transpose(__m512i *a) {
    __m512i b[16];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) /* a[i + c]: of rows i .., columns c, 4 + c, 8 + c, 12 + c */
        for (int h = 0; h < 2; h++) {
            a[i + 2 * h] = _mm512_unpacklo_epi64(b[i + h], b[i + 2 + h]);
            a[i + 2 * h + 1] = _mm512_unpackhi_epi64(b[i + h], b[i + 2 + h]);
        }
    for (int c = 0; c < 4; c++) {
        __m512i even = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88), odd2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        a[c] = _mm512_shuffle_i32x4(even, even2, 0x88), a[8 + c] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        a[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88), a[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
}

/* exp(x) for x <= ~88; relative error below 2e-7. */
static inline F exp16(F x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    F n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    F r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    F p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* -- tiles -------------------------------------------------------------------------------------------------------- */

static int has_amx, has_vnni;

typedef struct {
    uint8_t palette, start, zero[14];
    uint16_t width[16];
    uint8_t height[16];
} TileConfig;

static void enter_tiles(void) {
    if (!has_amx) return;
    TileConfig config __attribute__((aligned(64)));
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.width[i] = 64, config.height[i] = 16;
    _tile_loadconfig(&config);
}

static void leave_tiles(void) {
    if (has_amx) _tile_release();
}

/* A tile's 16 x 32 weights as bf16 rows of 64 bytes. The same code unpacks when weights are fitted, so what was found
 * equal there is equal here. */
static inline __attribute__((always_inline)) void make_tables(const float *scale, const float *low, __m512i *table) {
    const F steps = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    F a = _mm512_fmadd_ps(steps, _mm512_set1_ps(scale[0]), _mm512_set1_ps(low[0]));
    F b = _mm512_fmadd_ps(steps, _mm512_set1_ps(scale[1]), _mm512_set1_ps(low[1]));
    F c = _mm512_fmadd_ps(steps, _mm512_set1_ps(scale[2]), _mm512_set1_ps(low[2]));
    F d = _mm512_fmadd_ps(steps, _mm512_set1_ps(scale[3]), _mm512_set1_ps(low[3]));
    /* Two rows share a table of 32 entries; the fifth bit of an index says which. */
    table[0] = (__m512i)_mm512_cvtne2ps_pbh(b, a), table[1] = (__m512i)_mm512_cvtne2ps_pbh(d, c);
}

static inline __attribute__((always_inline)) void look_up(const uint8_t *codes, const __m512i *table, __m512i *row) {
    const __m512i nibble = _mm512_set1_epi16(15), second = _mm512_set1_epi16(16);
    __m512i words = _mm512_loadu_si512(codes); /* word w, nibble j: row j of the four, column w */
    __m512i other = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4), nibble, second, 0xea); /* x & y | z */
    row[0] = _mm512_permutexvar_epi16(_mm512_and_si512(words, nibble), table[0]);
    row[1] = _mm512_permutexvar_epi16(other, table[0]);
    row[2] = _mm512_permutexvar_epi16(_mm512_and_si512(_mm512_srli_epi16(words, 8), nibble), table[1]);
    row[3] = _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi16(words, 12), second), table[1]);
}

static inline __attribute__((always_inline)) void unpack_quad(const uint8_t *codes, const float *scale, const float *low, __m512i *row) {
    __m512i table[2];
    make_tables(scale, low, table);
    look_up(codes, table, row);
}

static inline void unpack_q4(const uint8_t *tile, uint8_t *rows) {
    float scale[16] __attribute__((aligned(64))), low[16] __attribute__((aligned(64)));
    _mm512_store_ps(scale, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)tile)));
    _mm512_store_ps(low, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(tile + 32))));
    for (int quad = 0; quad < 4; quad++) {
        __m512i row[4];
        unpack_quad(tile + 64 + 64 * quad, scale + 4 * quad, low + 4 * quad, row);
        for (int o = 0; o < 4; o++) _mm512_store_si512(rows + 256 * quad + 64 * o, row[o]);
    }
}

static inline __m512i unpack_row(const uint8_t *codes, float scale) {
    F s = _mm512_set1_ps(scale);
    F a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
    F b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + 16))));
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(b, s), _mm512_mul_ps(a, s));
}

static inline void unpack_q8(const uint8_t *tile, uint8_t *rows) {
    float scale[16] __attribute__((aligned(64)));
    _mm512_store_ps(scale, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)tile)));
    for (int row = 0; row < 16; row++) _mm512_store_si512(rows + 64 * row, unpack_row(tile + 32 + 32 * row, scale[row]));
}

static inline void unpack(int kind, const uint8_t *tile, uint8_t *rows) {
    if (kind == Q4) unpack_q4(tile, rows);
    else unpack_q8(tile, rows);
}

typedef struct { /* what is multiplied: `count` tiles of `step` bytes; tokens `stride` bytes apart, blocks of them `block` */
    const uint8_t *tiles, *x;
    int64_t step, stride, block;
    int count;
} Side;

/* sums[block][16 outputs][16 lanes] of one output tile: tiles of `kind` on VN, and then side b's, which are bf16. */
static void amx_product(int kind, const Side *a, const Side *b, int blocks, float *sums) {
    const uint8_t *tiles = a->tiles, *x = a->x;
    int count = a->count, bytes = (int)a->step;
    uint8_t ring[RING][1024] __attribute__((aligned(64)));
    _tile_zero(0);
    if (blocks > 1) _tile_zero(1);
    if (blocks > 2) _tile_zero(2);
    if (blocks > 3) _tile_zero(3);
#define MULTIPLY(rows, at, step)                                                                                     \
    do {                                                                                                             \
        const uint8_t *lanes_ = (at);                                                                                \
        _tile_loadd(4, rows, 64);                                                                                    \
        _tile_loadd(5, lanes_, 64);                                                                                  \
        _tile_dpbf16ps(0, 4, 5);                                                                                     \
        if (blocks > 1) { _tile_loadd(6, lanes_ + (step), 64); _tile_dpbf16ps(1, 4, 6); }                            \
        if (blocks > 2) { _tile_loadd(5, lanes_ + 2 * (step), 64); _tile_dpbf16ps(2, 4, 5); }                        \
        if (blocks > 3) { _tile_loadd(6, lanes_ + 3 * (step), 64); _tile_dpbf16ps(3, 4, 6); }                        \
    } while (0)
    if (kind == BF16) {
        for (int k = 0; k < count; k++) {
            const uint8_t *tile = tiles + 1024 * (int64_t)k;
            for (int i = 0; i < 1024; i += 64) _mm_prefetch((const char *)tile + PREFETCH + i, _MM_HINT_T0);
            MULTIPLY(tile, x + 1024 * (int64_t)k, a->block);
        }
    } else {
        for (int k = 0; k < count + AHEAD; k++) { /* unpack ahead: a tile load waits for stores to reach the cache */
            if (k < count) {
                const uint8_t *tile = tiles + bytes * (int64_t)k;
                for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char *)tile + PREFETCH + i, _MM_HINT_T0);
                unpack(kind, tile, ring[k % RING]);
            }
            if (k >= AHEAD) MULTIPLY(ring[(k - AHEAD) % RING], x + 1024 * (int64_t)(k - AHEAD), a->block);
        }
    }
    for (int k = 0; k < b->count; k++) MULTIPLY(b->tiles + 1024 * (int64_t)k, b->x + 1024 * (int64_t)k, b->block);
    _tile_stored(0, sums, 64);
    if (blocks > 1) _tile_stored(1, sums + 256, 64);
    if (blocks > 2) _tile_stored(2, sums + 512, 64);
    if (blocks > 3) _tile_stored(3, sums + 768, 64);
#undef MULTIPLY
}

/* The same for int8 tiles and QN, times the scales of both. */
static void i8_tiles(const Side *a, int tokens, const float *scale, float *sums) {
    int32_t *whole = (int32_t *)sums;
    int blocks = (tokens + 15) / 16, count = a->count;
    int64_t stride = a->block;
    _tile_zero(0);
    if (blocks > 1) _tile_zero(1);
    if (blocks > 2) _tile_zero(2);
    if (blocks > 3) _tile_zero(3);
    for (int k = 0; k < count; k++) {
        const uint8_t *tile = a->tiles + 1024 * (int64_t)k, *lanes = a->x + 1024 * (int64_t)k;
        for (int i = 0; i < 1024; i += 64) _mm_prefetch((const char *)tile + PREFETCH + i, _MM_HINT_T0);
        _tile_loadd(4, tile, 64);
        _tile_loadd(5, lanes, 64);
        _tile_dpbssd(0, 4, 5);
        if (blocks > 1) { _tile_loadd(6, lanes + stride, 64); _tile_dpbssd(1, 4, 6); }
        if (blocks > 2) { _tile_loadd(5, lanes + 2 * stride, 64); _tile_dpbssd(2, 4, 5); }
        if (blocks > 3) { _tile_loadd(6, lanes + 3 * stride, 64); _tile_dpbssd(3, 4, 6); }
    }
    _tile_stored(0, whole, 64);
    if (blocks > 1) _tile_stored(1, whole + 256, 64);
    if (blocks > 2) _tile_stored(2, whole + 512, 64);
    if (blocks > 3) _tile_stored(3, whole + 768, 64);
    for (int b = 0; b < blocks; b++) {
        F lane = _mm512_loadu_ps((const float *)(a->x + b * stride + 1024 * (int64_t)count));
        for (int o = 0; o < 16; o++) {
            F v = _mm512_cvtepi32_ps(_mm512_load_si512(whole + 256 * b + 16 * o));
            _mm512_store_ps(sums + 256 * b + 16 * o, _mm512_mul_ps(v, _mm512_mul_ps(lane, _mm512_set1_ps(scale[o]))));
        }
    }
}

/* Bytes of a block of QN, or of QR. */
static int64_t qn_bytes(int features) { return 16 * (int64_t)features + 128; }

/* VN to QN: each lane by its largest value. */
static void to_qn(const uint32_t *vn, int features, int blocks, uint8_t *qn) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000), byte = _mm512_set1_epi32(255);
    for (int b = 0; b < blocks; b++, vn += 8 * features, qn += qn_bytes(features)) {
        __m512i most = _mm512_setzero_si512(); /* without their signs, floats order as integers do */
        for (int i = 0; i < features / 2; i++) {
            __m512i pair = _mm512_load_si512(vn + 16 * i);
            most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_slli_epi32(pair, 16), _mm512_set1_epi32(0x7fffffff)));
            most = _mm512_max_epi32(most, _mm512_and_si512(pair, _mm512_set1_epi32(0x7fff0000)));
        }
        F largest = _mm512_max_ps(_mm512_castsi512_ps(most), _mm512_set1_ps(1e-20f));
        F inverse = _mm512_div_ps(_mm512_set1_ps(127.0f), largest);
#define WHOLE(bits) _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(bits), inverse))
        for (int i = 0; i < features / 4; i++) {
            __m512i p = _mm512_load_si512(vn + 32 * i), q = _mm512_load_si512(vn + 32 * i + 16);
            __m512i low = _mm512_or_si512(_mm512_and_si512(WHOLE(_mm512_slli_epi32(p, 16)), byte),
                                          _mm512_slli_epi32(_mm512_and_si512(WHOLE(_mm512_and_si512(p, upper)), byte), 8));
            __m512i high = _mm512_or_si512(_mm512_and_si512(WHOLE(_mm512_slli_epi32(q, 16)), byte),
                                           _mm512_slli_epi32(_mm512_and_si512(WHOLE(_mm512_and_si512(q, upper)), byte), 8));
            _mm512_store_si512(qn + 64 * (int64_t)i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
#undef WHOLE
        _mm512_store_ps((float *)(qn + 16 * (int64_t)features), _mm512_mul_ps(largest, _mm512_set1_ps(1 / 127.0f)));
    }
}

/* -- the same without AMX ------------------------------------------------------------------------------------------
 * A tile's rows are multiplied with one token after another: a pass of few tokens costs few products. Inputs are in
 * rows: RN, bf16 [16 tokens][features]; QR, its form for I8 and I4 maps, int8 [16][features], each token's scale, and 128
 * times its sum. These products take one side without sign: I8's weights are 128 too large, for I4 the tokens. */

enum { ROWS = 6 }; /* tokens multiplied at once: 24 sums, 4 rows and a token fit the registers */

/* VN to RN. */
static void to_rows(const uint32_t *vn, int features, int tokens, uint32_t *rows) {
    int width = features / 2;
    for (int i = 0; i < width; i += 16) {
        __m512i a[16];
        for (int j = 0; j < 16; j++) a[j] = _mm512_load_si512(vn + 16 * (i + j));
        transpose(a);
        for (int r = 0; r < tokens; r++) _mm512_store_si512(rows + (int64_t)r * width + i, a[r]);
    }
}

/* RN to QR for a map of `kind`: each token by its largest value. */
static void to_qr(int kind, const uint32_t *rn, int features, int tokens, uint8_t *qr) {
    F *scales = (F *)(qr + 16 * (int64_t)features);
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    const __m128i more = _mm_set1_epi8(kind == I4 ? -128 : 0);
    float lane[16] __attribute__((aligned(64))) = {0}, sums[16] __attribute__((aligned(64))) = {0};
    for (int r = 0; r < tokens; r++) {
        const uint32_t *row = rn + (int64_t)r * features / 2;
        F most = _mm512_set1_ps(1e-20f);
        for (int i = 0; i < features / 2; i += 16) {
            __m512i pair = _mm512_load_si512(row + i);
            most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16))));
            most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_castsi512_ps(_mm512_and_si512(pair, upper))));
        }
        float largest = _mm512_reduce_max_ps(most);
        F inverse = _mm512_set1_ps(127.0f / largest);
        __m512i sum = _mm512_setzero_si512();
        for (int i = 0; i < features; i += 16) {
            __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load_bf16((const bf16 *)row + i), inverse));
            sum = _mm512_add_epi32(sum, whole);
            _mm_store_si128((__m128i *)(qr + (int64_t)r * features + i), _mm_xor_si128(_mm512_cvtsepi32_epi8(whole), more));
        }
        lane[r] = largest / 127.0f, sums[r] = 128.0f * (float)_mm512_reduce_add_epi32(sum);
    }
    scales[0] = _mm512_load_ps(lane), scales[1] = _mm512_load_ps(sums);
}

/* Scales and lows of a row of tiles, float [tile][scale, low][16 outputs] (I4: [16 outputs][scale, scale]): from memory
 * they are spread for nothing. */
static inline __attribute__((always_inline)) void read_scales(int kind, const uint8_t *tiles, int count, float *scales) {
    for (int k = 0; k < count; k++, tiles += TILE_BYTES[kind], scales += 32) {
        _mm512_store_ps(scales, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)tiles)));
        if (kind != Q8) _mm512_store_ps(scales + 16, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(tiles + 32))));
    }
}

/* Rows 4 quad .. of a tile, with its `scales`. */
static inline __attribute__((always_inline)) void four_rows(int kind, const uint8_t *at, int quad, const float *scales, __m512i *row) {
    if (kind == Q4) unpack_quad(at + 64 + 64 * quad, scales + 4 * quad, scales + 16 + 4 * quad, row);
    else if (kind == I4)
        for (int o = 0; o < 4; o += 2) { /* in the upper half of a byte, 16 times as large */
            __m512i codes = _mm512_loadu_si512(at + 64 + 128 * quad + 32 * o), upper = _mm512_set1_epi8(-16);
            row[o] = _mm512_and_si512(codes, upper), row[o + 1] = _mm512_and_si512(_mm512_slli_epi16(codes, 4), upper);
        }
    else
        for (int o = 0; o < 4; o++)
            row[o] = kind == Q8 ? unpack_row(at + 32 + 32 * (4 * quad + o), scales[4 * quad + o])
                                : _mm512_load_si512(at + 256 * quad + 64 * o);
}

/* Two floats, again and again. */
static inline F pair_of(const float *p) {
    int64_t both;
    memcpy(&both, p, 8);
    return _mm512_castsi512_ps(_mm512_set1_epi64(both));
}

/* The sums of four vectors' elements, side by side. */
static inline __m128 sums_of(F a, F b, F c, F d) {
    F ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    F cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    F all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* sums[4 outputs][16 lanes], in `lanes`, of `tokens` <= ROWS tokens: both sides' products are added one after the other
 * in 16 places, and those in the end, so a token's result is the same whatever is computed beside it. ahead: bytes to what
 * will be read next, or 0. */
static inline __attribute__((always_inline)) void four_outputs(int kind, int tokens, const Side *a, const Side *b, int quad, const float *scales,
                                                               int64_t ahead, __mmask16 lanes, float *sums) {
    __m512i row[4], next[4], whole[4][ROWS]; /* a kind has sums of one type: casts would keep the compiler from using registers */
    F sum[4][ROWS];
    for (int o = 0; o < 4; o++)
        for (int r = 0; r < tokens; r++)
            if (kind == I8) whole[o][r] = _mm512_setzero_si512();
            else sum[o][r] = _mm512_setzero_ps();
    if (kind == Q4) make_tables(scales + 4 * quad, scales + 16 + 4 * quad, next);
    if (kind == Q8) four_rows(kind, a->tiles, quad, scales, next);
    for (int k = 0; k < a->count; k++) {
        const uint8_t *tile = a->tiles + a->step * k, *x = a->x + 64 * k;
        if (ahead)
            for (int64_t i = 64 * quad; i < a->step; i += 256) _mm_prefetch((const char *)tile + ahead + i, _MM_HINT_T1);
        /* What the next products need is begun before these: they would wait for it behind them. */
        int after = k + 1 < a->count ? 1 : 0;
        const float *soon = scales + 32 * (k + after) + 4 * quad;
        if (kind == Q4) {
            __m512i table[2] = {next[0], next[1]};
            make_tables(soon, soon + 16, next);
            look_up(tile + 64 + 64 * quad, table, row);
        } else if (kind == Q8) {
            memcpy(row, next, sizeof row);
            four_rows(kind, tile + a->step * after, quad, scales + 32 * (k + after), next);
        } else four_rows(kind, tile, quad, scales + 32 * k, row);
        for (int r = 0; r < tokens; r++) {
            __m512i token = _mm512_load_si512(x + a->stride * r);
            for (int o = 0; o < 4; o++)
                if (kind == I8) whole[o][r] = _mm512_dpbusd_epi32(whole[o][r], row[o], token);
                else if (kind == I4) {
                    F part = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), token, row[o]));
                    sum[o][r] = _mm512_fmadd_ps(part, pair_of(scales + 32 * k + 2 * (4 * quad + o)), sum[o][r]);
                } else sum[o][r] = _mm512_dpbf16_ps(sum[o][r], (__m512bh)row[o], (__m512bh)token);
        }
    }
    for (int k = 0; kind < I8 && k < b->count; k++) {
        four_rows(BF16, b->tiles + b->step * k, quad, NULL, row);
        for (int r = 0; r < tokens; r++) {
            __m512bh token = (__m512bh)_mm512_load_si512(b->x + 64 * k + b->stride * r);
            for (int o = 0; o < 4; o++) sum[o][r] = _mm512_dpbf16_ps(sum[o][r], (__m512bh)row[o], token);
        }
    }
    __m128 four[8]; /* of a token four outputs, and then of an output four tokens */
    for (int r = 0; r < 8; r++) {
        for (int o = 0; o < 4 && kind == I8 && r < tokens; o++) sum[o][r] = _mm512_cvtepi32_ps(whole[o][r]);
        four[r] = r < tokens ? sums_of(sum[0][r], sum[1][r], sum[2][r], sum[3][r]) : _mm_setzero_ps();
    }
    _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
    _MM_TRANSPOSE4_PS(four[4], four[5], four[6], four[7]);
    for (int o = 0; o < 4; o++)
        _mm512_mask_storeu_ps(sums + 16 * o, lanes, _mm512_zextps256_ps512(_mm256_set_m128(four[4 + o], four[o])));
}

static inline __attribute__((always_inline)) void few_tokens(int kind, int tokens, const Side *a, const Side *b, int quad,
                                                             const float *scales, int64_t ahead, __mmask16 lanes, float *sums) {
    switch (tokens) {
    case 1: four_outputs(kind, 1, a, b, quad, scales, ahead, lanes, sums); break;
    case 2: four_outputs(kind, 2, a, b, quad, scales, ahead, lanes, sums); break;
    case 3: four_outputs(kind, 3, a, b, quad, scales, ahead, lanes, sums); break;
    case 4: four_outputs(kind, 4, a, b, quad, scales, ahead, lanes, sums); break;
    case 5: four_outputs(kind, 5, a, b, quad, scales, ahead, lanes, sums); break;
    default: four_outputs(kind, 6, a, b, quad, scales, ahead, lanes, sums);
    }
}

static inline __attribute__((always_inline)) void rows_of_kind(int kind, const Side *a, const Side *b, int tokens, float *sums) {
    const int packed = kind == Q4 || kind == Q8, scaled = packed || kind == I4;
    float scales[scaled ? 32 * a->count : 16] __attribute__((aligned(64)));
    if (scaled) read_scales(kind, a->tiles, a->count, scales);
    if (tokens <= ROWS) {
        for (int quad = 0; quad < 4; quad++) few_tokens(kind, tokens, a, b, quad, scales, a->step * a->count, 0xffff, sums + 64 * quad);
        return;
    }
    memset(sums, 0, 1024 * (size_t)((tokens + 15) / 16));
    uint8_t unpacked[packed ? 256 * (size_t)a->count : 64] __attribute__((aligned(64)));
    for (int quad = 0; quad < 4; quad++) {
        Side from = *a, beside = *b;
        if (packed) { /* once for all tokens */
            for (int k = 0; k < a->count; k++) {
                __m512i row[4];
                const uint8_t *tile = a->tiles + a->step * k;
                for (int64_t i = 64 * quad; i < a->step; i += 256)
                    _mm_prefetch((const char *)tile + a->step * a->count + i, _MM_HINT_T1);
                four_rows(kind, tile, quad, scales + 32 * k, row);
                for (int o = 0; o < 4; o++) _mm512_store_si512(unpacked + 256 * (size_t)k + 64 * o, row[o]);
            }
            from.tiles = unpacked, from.step = 256, beside.tiles += 256 * quad;
        }
        for (int r = 0; r < tokens; r += r % 16 == 12 ? 4 : ROWS) {
            int left = tokens - r < 16 - r % 16 ? tokens - r : 16 - r % 16;
            from.x = a->x + a->block * (r / 16) + a->stride * (r % 16), beside.x = b->x + b->block * (r / 16) + b->stride * (r % 16);
            few_tokens(packed ? BF16 : kind, left, &from, &beside, packed ? 0 : quad, scales, packed || r ? 0 : a->step * a->count,
                       (__mmask16)((1 << (left < ROWS ? left : ROWS)) - 1), sums + 256 * (r / 16) + 64 * quad + r % 16);
        }
    }
}

/* sums[block][16 outputs][16 lanes], as amx_product, from rows. Lanes without a token are 0. */
static void row_product(int kind, const Side *a, const Side *b, int tokens, float *sums) {
    if (kind == Q4) rows_of_kind(Q4, a, b, tokens, sums);
    else if (kind == Q8) rows_of_kind(Q8, a, b, tokens, sums);
    else if (kind == I8) rows_of_kind(I8, a, b, tokens, sums);
    else if (kind == I4) rows_of_kind(I4, a, b, tokens, sums);
    else rows_of_kind(BF16, a, b, tokens, sums);
}

/* As i8_tiles, from QR, for I8 and I4. */
static void rounded_rows(int kind, const Side *a, int tokens, const float *scale, float *sums) {
    const Side none = {NULL, NULL, 1024, 0, 0, 0};
    row_product(kind, a, &none, tokens, sums);
    for (int b = 0; b < (tokens + 15) / 16; b++) {
        const F *lanes = (const F *)(a->x + b * a->block + 1024 * (int64_t)a->count); /* their scales, and sums */
        for (int o = 0; o < 16; o++) {
            F v = _mm512_load_ps(sums + 256 * b + 16 * o), own = _mm512_set1_ps(scale[o]);
            v = kind == I4 ? _mm512_mul_ps(_mm512_sub_ps(v, own), lanes[0]) : _mm512_mul_ps(_mm512_sub_ps(v, lanes[1]), _mm512_mul_ps(lanes[0], own));
            _mm512_store_ps(sums + 256 * b + 16 * o, v);
        }
    }
}

/* Bytes of a block of what `map` reads, for the layout that `input_of` makes. */
static int64_t block_bytes(const Map *map) { return map->kind >= I8 ? qn_bytes(map->in) : 32 * (int64_t)map->in; }

/* The sums of output tile `t` of `map` (and `low`, on `down_x`, its rank's activations) for `tokens` tokens, from the
 * block on that `x` begins with, in the layout that `input_of` makes; bias added. */
static void product(const Map *map, const LowRank *low, int t, const uint32_t *x, const uint32_t *down_x, int tokens,
                    float *sums) {
    int count = map->in / 32, blocks = (tokens + 15) / 16;
    Side a = {map->tiles + TILE_BYTES[map->kind] * (int64_t)count * t, (const uint8_t *)x, TILE_BYTES[map->kind],
              2 * (int64_t)map->in, block_bytes(map), count};
    Side b = {NULL, NULL, 1024, 0, 0, 0};
    if (low && low->first[t] >= 0) {
        b.count = low->ks, b.stride = 2 * (int64_t)low->down.out, b.block = 16 * b.stride;
        b.tiles = low->up + 1024 * (int64_t)low->ks * t;
        b.x = (const uint8_t *)down_x + (has_amx ? 1024 : 64) * (int64_t)low->first[t];
    }
    if (map->kind >= I8) {
        a.count = map->in / 64, a.tiles = map->tiles + a.step * a.count * t, a.stride = map->in;
        if (has_amx) i8_tiles(&a, tokens, map->scale + 16 * t, sums);
        else rounded_rows(map->kind, &a, tokens, map->scale + 16 * t, sums);
    } else if (has_amx) amx_product(map->kind, &a, &b, blocks, sums);
    else row_product(map->kind, &a, &b, tokens, sums);
    if (map->bias)
        for (int b = 0; b < blocks; b++)
            for (int o = 0; o < 16; o++) {
                float *row = sums + 256 * b + 16 * o;
                _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), _mm512_set1_ps(map->bias[16 * t + o])));
            }
}

/* What `map` reads of VN `x`: itself with AMX, or else RN in `scratch`; for I8 and I4 maps QN or QR. And that from block
 * `b` on. */
static const uint32_t *input_of(const Map *map, const uint32_t *x, int tokens, uint8_t *scratch) {
    int features = map->in, blocks = (tokens + 15) / 16;
    if (has_amx && map->kind < I8) return x;
    if (has_amx) to_qn(x, features, blocks, scratch);
    for (int b = 0; !has_amx && b < blocks; b++) {
        int some = tokens - 16 * b < 16 ? tokens - 16 * b : 16;
        uint8_t *to = scratch + b * block_bytes(map), *rows = map->kind >= I8 ? scratch + blocks * block_bytes(map) : to;
        to_rows(x + 8 * (int64_t)features * b, features, some, (uint32_t *)rows);
        if (map->kind >= I8) to_qr(map->kind, (const uint32_t *)rows, features, some, to);
    }
    return (const uint32_t *)scratch;
}

/* Bytes of `input_of`'s scratch. */
static int64_t scratch_bytes(int features, int blocks) { return (blocks + 1) * (32 * (int64_t)features + 128); }

static inline const uint32_t *from_block(const Map *map, const uint32_t *x, int b) { return x + b * block_bytes(map) / 4; }

/* -- parts of a layer --------------------------------------------------------------------------------------------- */

/* RMS norm over the features of FM `x`, to VN (as transformers rounds: once after scaling, once after the weight).
 * weight NULL: ones. */
static void norm(const float *x, const float *weight, int features, float eps, uint32_t *out) {
    F s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int i = 0; i < features; i++) {
        F v = _mm512_load_ps(x + 16 * i);
        s[i & 3] = _mm512_fmadd_ps(v, v, s[i & 3]);
    }
    F sum = _mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3]));
    F mean = _mm512_div_ps(sum, _mm512_set1_ps((float)features));
    F factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(_mm512_add_ps(mean, _mm512_set1_ps(eps))));
    for (int i = 0; i < features; i += 2) {
        F a = rounded(_mm512_mul_ps(_mm512_load_ps(x + 16 * i), factor));
        F b = rounded(_mm512_mul_ps(_mm512_load_ps(x + 16 * i + 16), factor));
        if (weight) a = _mm512_mul_ps(a, _mm512_set1_ps(weight[i])), b = _mm512_mul_ps(b, _mm512_set1_ps(weight[i + 1]));
        _mm512_store_si512(out + 8 * i, paired(a, b));
    }
}

/* Token rows [count, features] to FM blocks, absent lanes zero; and back. */
static void to_blocks(const bf16 *rows, int count, int features, float *fm) {
    memset(fm, 0, 64 * (size_t)features * ((count + 15) / 16));
    for (int r = 0; r < count; r++) {
        float *lane = fm + (int64_t)(r / 16) * features * 16 + r % 16;
        for (int i = 0; i < features; i++) lane[16 * i] = widen(rows[(int64_t)r * features + i]);
    }
}

static void from_blocks(const float *fm, int first, int end, int features, bf16 *rows) {
    for (int r = first; r < end; r++) {
        const float *lane = fm + (int64_t)(r / 16) * features * 16 + r % 16;
        for (int i = 0; i < features; i++) rows[(int64_t)r * features + i] = narrow(lane[16 * i]);
    }
}

/* Rotate one head's FM rows in place and round them to bf16, after an optional norm. */
static void rotate(float *head, const Model *m, const float *weight, const float *cos, const float *sin) {
    if (weight) {
        F sum = _mm512_setzero_ps();
        for (int i = 0; i < m->head_dim; i++) {
            F v = rounded(_mm512_load_ps(head + 16 * i));
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        F mean = _mm512_div_ps(sum, _mm512_set1_ps((float)m->head_dim));
        F factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(_mm512_add_ps(mean, _mm512_set1_ps(m->eps))));
        for (int i = 0; i < m->head_dim; i++) {
            F v = rounded(_mm512_mul_ps(rounded(_mm512_load_ps(head + 16 * i)), factor));
            _mm512_store_ps(head + 16 * i, rounded(_mm512_mul_ps(v, _mm512_set1_ps(weight[i]))));
        }
    }
    int half = m->rotated / 2;
    for (int i = 0; i < half; i++) {
        F a = rounded(_mm512_load_ps(head + 16 * i)), b = rounded(_mm512_load_ps(head + 16 * (i + half)));
        F c = _mm512_load_ps(cos + 16 * i), s = _mm512_load_ps(sin + 16 * i);
        _mm512_store_ps(head + 16 * i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        _mm512_store_ps(head + 16 * (i + half), _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
}

/* Which of 16 keys a column sees, for all of them: bits of `visible` by key and column, NULL: all. */
static inline __m256i seen(const uint16_t *visible, int key) {
    return visible ? _mm256_loadu_si256((const __m256i *)(visible + key)) : _mm256_set1_epi16(-1);
}

/* Keys in blocks of 16, without the blocks that nobody sees: holes of ragged rows, what lies before a window. (Memory
 * behind the last key's entry may be read.) */
#define EACH_BLOCK(s)                   \
    for (int s = 0; s < count; s += 16) \
        if (!visible || !_mm256_testz_si256(seen(visible, s), seen(visible, s)))

#define EACH_KEY(s)   \
    EACH_BLOCK(block) \
    for (int s = block; s < block + 16 && s < count; s++)

/* sum[column] = the sum of p[key][column], out[column][dims] that of p[key][column] v[key][dims]; COLUMNS and PARTS times
 * 16 dims at once. Keys are added in order: on where they lie nothing depends. */
#define WEIGHTED_SUM(COLUMNS, PARTS)                                                                                 \
    do {                                                                                                             \
        F acc[PARTS][COLUMNS], v[PARTS];                                                                             \
        for (int c = 0; c < COLUMNS; c++) acc[0][c] = _mm512_setzero_ps();                                           \
        EACH_KEY(s)                                                                                                  \
        for (int c = 0; c < COLUMNS; c++)                                                                            \
            acc[0][c] = _mm512_add_ps(_mm512_set1_ps(p[(columns - 1) * block + s + 16 * c]), acc[0][c]);                        \
        for (int c = 0; c < COLUMNS; c++) sum[c] = acc[0][c];                                                        \
        for (int at = 0; at < d; at += 16 * PARTS) {                                                                 \
            for (int i = 0; i < PARTS; i++)                                                                          \
                for (int c = 0; c < COLUMNS; c++) acc[i][c] = _mm512_setzero_ps();                                   \
            EACH_KEY(s) {                                                                                            \
                for (int i = 0; i < PARTS; i++) v[i] = load_bf16(values + (int64_t)s * d + at + 16 * i);             \
                for (int c = 0; c < COLUMNS; c++) {                                                                  \
                    F weight = _mm512_set1_ps(p[(columns - 1) * block + s + 16 * c]);                                           \
                    for (int i = 0; i < PARTS; i++) acc[i][c] = _mm512_fmadd_ps(weight, v[i], acc[i][c]);            \
                }                                                                                                    \
            }                                                                                                        \
            for (int i = 0; i < PARTS; i++)                                                                          \
                for (int c = 0; c < COLUMNS; c++) _mm512_store_ps(out + c * d + at + 16 * i, acc[i][c]);             \
        }                                                                                                            \
    } while (0)

/* Attention of up to 16 columns (a token and a head each) to `count` keys of one key head.
 * queries: VN [d / 2][16 columns]; visible: for each key the columns that see it, as bits from `bit` on, or NULL (all see
 * all). p: scratch, [blocks of 16 keys][column][key]; out: [16][d]. once: no other columns read these keys: they are sent
 * for ahead. Memory of whole blocks of keys is read. */
static void attend(const bf16 *keys, const bf16 *values, int count, int d, const uint32_t *queries, int columns,
                   const uint16_t *visible, int bit, float scale, int once, float *p, float *out) {
    F most[16], sum[16], scales = _mm512_set1_ps(scale);
    for (int c = 0; c < 16; c++) most[c] = _mm512_set1_ps(-1e30f);
    EACH_BLOCK(s) {
        float *to = p + columns * s;
        for (int i = 0; once && i < 16 * d; i += 32) {
            _mm_prefetch((const char *)(keys + (int64_t)(s + SOON) * d + i), _MM_HINT_T0);
            _mm_prefetch((const char *)(values + (int64_t)s * d + i), _MM_HINT_T1);
        }
        __m256i see = seen(visible, s);
        __mmask16 there = count - s < 16 ? (__mmask16)((1 << (count - s)) - 1) : 0xffff;
        if (has_amx) {
            float tile[256] __attribute__((aligned(64)));
            __m512i a[16];
            _tile_zero(0);
            for (int k = 0; k < d; k += 32) {
                _tile_loadd(4, keys + (int64_t)s * d + k, 2 * d);
                _tile_loadd(5, queries + 8 * k, 64);
                _tile_dpbf16ps(0, 4, 5);
            }
            _tile_stored(0, tile, 64);
            for (int i = 0; i < 16; i++) a[i] = _mm512_load_si512(tile + 16 * i);
            transpose(a);
            for (int c = 0; c < columns; c++) _mm512_store_si512(to + 16 * c, a[c]);
        } else
            for (int k = 0; k < d; k += 32) {
                __m512i a[16];
                for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(keys + (int64_t)(s + i) * d + k);
                transpose(a);
                for (int c = 0; c < columns; c++) {
                    F acc = k ? _mm512_load_ps(to + 16 * c) : _mm512_setzero_ps();
                    for (int j = 0; j < 16; j++)
                        acc = _mm512_dpbf16_ps(acc, (__m512bh)a[j], (__m512bh)_mm512_set1_epi32((int)queries[16 * (k / 2 + j) + c]));
                    _mm512_store_ps(to + 16 * c, acc);
                }
            }
        for (int c = 0; c < columns; c++) {
            __mmask16 mine = there & _mm256_movepi16_mask(_mm256_sll_epi16(see, _mm_cvtsi32_si128(15 - bit - c)));
            F v = _mm512_mask_mul_ps(_mm512_set1_ps(-1e30f), mine, _mm512_load_ps(to + 16 * c), scales);
            _mm512_store_ps(to + 16 * c, v);
            most[c] = _mm512_max_ps(most[c], v);
        }
    }
    for (int c = 0; c < columns; c++) most[c] = _mm512_set1_ps(_mm512_reduce_max_ps(most[c]));
    EACH_BLOCK(s)
    for (int c = 0; c < columns; c++) {
        F v = _mm512_load_ps(p + columns * s + 16 * c);
        __mmask16 mine = _mm512_cmp_ps_mask(v, _mm512_set1_ps(-1e30f), _CMP_NLE_UQ);
        _mm512_store_ps(p + columns * s + 16 * c, _mm512_maskz_mov_ps(mine, exp16(_mm512_sub_ps(v, most[c]))));
    }
    if (columns <= 3 && d % 64 == 0) WEIGHTED_SUM(3, 4);
    else if (columns <= 6 && d % 64 == 0) WEIGHTED_SUM(6, 4);
    else if (columns <= 6) WEIGHTED_SUM(6, 2);
    else if (columns <= 9) WEIGHTED_SUM(9, 2);
    else if (columns <= 12) WEIGHTED_SUM(12, 2);
    else WEIGHTED_SUM(16, 1);
    for (int c = 0; c < columns; c++) {
        F share_ = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_max_ps(sum[c], _mm512_set1_ps(1e-30f)));
        for (int at = 0; at < d; at += 16) _mm512_store_ps(out + c * d + at, _mm512_mul_ps(_mm512_load_ps(out + c * d + at), share_));
    }
}

/* -- the pass ----------------------------------------------------------------------------------------------------- */

static void *room(size_t bytes) { /* aligned to a cache line; the memory of a call comes back to the next */
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

typedef struct {
    const Model *m;
    const Call *c;
    int rows, blocks, group, column_blocks, slots, ranks;
    size_t scored, coarse, own;              /* a thread's scratch: where scores and QN begin in it, its size */
    float *x, *qkv, *cos, *sin;              /* FM; cos and sin [block][rotated / 2][16] */
    uint32_t *attended, *inner, *ranked[2];  /* VN */
    bf16 *queries;                           /* [rows, heads, head_dim] */
    uint16_t **visible;                      /* by window kind: [batch][column block][slots], or NULL */
    uint8_t *scratch;                        /* by thread: the normed block, attention's scores, QN of the widest input */
    Barrier barrier;
} Pass;

/* Tokens from block b0 on, of as many blocks as are multiplied at once. */
static int tokens_from(const Pass *p, int b0) {
    int left = p->rows - 16 * b0;
    return left < 16 * MOST_BLOCKS ? left : 16 * MOST_BLOCKS;
}

/* Low-rank activations down x of `low` for all blocks (VN; without AMX RN), zero where a token has no adapters; then all
 * threads wait. */
static void rank_down(Pass *p, const LowRank *low, const uint32_t *x, uint32_t *ranked, int me, int n) {
    if (!low) return;
    float sums[MOST_BLOCKS * 256] __attribute__((aligned(64)));
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int from, to, first = p->c->adapted > 0 ? p->c->tokens - p->c->adapted : 0;
    share(low->down.out / 16, me, n, &from, &to);
    for (int b0 = 0; b0 < p->blocks; b0 += MOST_BLOCKS) {
        int tokens = tokens_from(p, b0), blocks = (tokens + 15) / 16;
        for (int t = from; t < to; t++) {
            product(&low->down, NULL, t, x + (int64_t)b0 * low->down.in * 8, NULL, tokens, sums);
            for (int b = 0; b < blocks; b++) {
                __mmask16 adapted = 0;
                for (int lane = 0; lane < 16; lane++)
                    if (((b0 + b) * 16 + lane) % p->c->tokens >= first) adapted |= (__mmask16)(1 << lane);
                uint32_t *out = ranked + (int64_t)(b0 + b) * low->down.out * 8;
                for (int o = 0; o < 16; o += 2) {
                    const float *row = sums + 256 * b + 16 * o;
                    __m512i pairs = _mm512_maskz_mov_epi32(adapted, paired(_mm512_load_ps(row), _mm512_load_ps(row + 16)));
                    if (has_amx) _mm512_store_si512(out + 8 * (16 * t + o), pairs);
                    else _mm512_i32scatter_epi32(out + 8 * t + o / 2, _mm512_mullo_epi32(lanes, _mm512_set1_epi32(low->down.out / 2)), pairs, 4);
                }
            }
        }
    }
    sync_threads(&p->barrier, n);
}

static inline F silu_times(F gate, F up) {
    F g = rounded(gate), e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_max_ps(g, _mm512_set1_ps(-80.0f))));
    return _mm512_mul_ps(rounded(_mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1.0f), e))), rounded(up));
}

/* silu(gate) up for 16 outputs of a block; with few tokens, several outputs share a vector. Absent lanes get 0. */
static void gated(const float *gate, const float *up, int tokens, F *act) {
#define QUAD(from, o)                                                                                                \
    _mm512_insertf32x4(_mm512_insertf32x4(_mm512_insertf32x4(_mm512_castps128_ps512(_mm_load_ps((from) + 16 * (o))),  \
        _mm_load_ps((from) + 16 * (o) + 16), 1), _mm_load_ps((from) + 16 * (o) + 32), 2), _mm_load_ps((from) + 16 * (o) + 48), 3)
#define TWO(from, o) _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_load_ps((from) + 16 * (o))), _mm256_load_ps((from) + 16 * (o) + 16), 1)
    if (tokens <= 4) {
        for (int o = 0; o < 16; o += 4) {
            F v = silu_times(QUAD(gate, o), QUAD(up, o));
            act[o] = _mm512_maskz_mov_ps(15, v);
            act[o + 1] = _mm512_maskz_shuffle_f32x4(15, v, v, 1);
            act[o + 2] = _mm512_maskz_shuffle_f32x4(15, v, v, 2);
            act[o + 3] = _mm512_maskz_shuffle_f32x4(15, v, v, 3);
        }
    } else if (tokens <= 8) {
        for (int o = 0; o < 16; o += 2) {
            F v = silu_times(TWO(gate, o), TWO(up, o));
            act[o] = _mm512_maskz_mov_ps(255, v);
            act[o + 1] = _mm512_maskz_shuffle_f32x4(255, v, v, 14);
        }
    } else
        for (int o = 0; o < 16; o++) act[o] = silu_times(_mm512_load_ps(gate + 16 * o), _mm512_load_ps(up + 16 * o));
#undef QUAD
#undef TWO
}

/* x += map(VN in), rounded as transformers does: the product once, the sum once. */
static void add_product(Pass *p, const Map *map, const LowRank *low, const uint32_t *in, const uint32_t *ranked, int me, int n) {
    float sums[MOST_BLOCKS * 256] __attribute__((aligned(64)));
    int from, to;
    share(map->out / 16, me, n, &from, &to);
    for (int b0 = 0; b0 < p->blocks; b0 += MOST_BLOCKS) {
        int tokens = tokens_from(p, b0), blocks = (tokens + 15) / 16;
        for (int t = from; t < to; t++) {
            const uint32_t *low_x = low ? ranked + (int64_t)b0 * low->down.out * 8 : NULL;
            for (int b = 0; b < blocks; b++)
                for (int o = 0; o < 16; o++) __builtin_prefetch(p->x + ((int64_t)(b0 + b) * map->out + 16 * t + o) * 16, 1);
            product(map, low, t, from_block(map, in, b0), low_x, tokens, sums);
            for (int b = 0; b < blocks; b++)
                for (int o = 0; o < 16; o++) {
                    float *x = p->x + ((int64_t)(b0 + b) * map->out + 16 * t + o) * 16;
                    _mm512_store_ps(x, rounded(_mm512_add_ps(_mm512_load_ps(x), rounded(_mm512_load_ps(sums + 256 * b + 16 * o)))));
                }
        }
    }
}

/* Part `at` of `parts` of the cached keys and values that the thread will attend to: on their way while it multiplies. */
static void expect(const Pass *p, int index, int at, int parts, int me, int n) {
    const Model *m = p->m;
    const Call *c = p->c;
    int items = c->batch * m->kv_heads, together, from, to;
    share(p->slots < MOST_EXPECTED ? p->slots * m->head_dim / 32 : 0, at, parts, &from, &to);
    for (int turn = 0; turn < turns_of(items, n); turn++) {
        int item = item_of(turn, items, me, n, &together);
        int64_t first = (int64_t)item * c->capacity[index] * m->head_dim;
        for (int line = from; line < to; line++) {
            _mm_prefetch((const char *)(c->keys[index] + first + 32 * line), _MM_HINT_T1);
            _mm_prefetch((const char *)(c->values[index] + first + 32 * line), _MM_HINT_T1);
        }
    }
}

static void run_layer(Pass *p, int index, uint32_t *normed, float *scores, uint8_t *coarse, int me, int n) {
    const Model *m = p->m;
    const Call *c = p->c;
    const Layer *layer = m->layers + index;
    const LowRank *low = c->low ? c->low[index] : NULL;
    int d = m->head_dim, total = m->heads + 2 * m->kv_heads, from, to;
    float sums[MOST_BLOCKS * 256] __attribute__((aligned(64))), gate[MOST_BLOCKS * 256] __attribute__((aligned(64)));
#define LOW(i) (low && low[i].ks ? low + (i) : NULL)

    for (int b = 0; b < p->blocks; b++) /* every thread for itself: cheaper than waiting for each other */
        norm(p->x + (int64_t)b * m->hidden * 16, layer->norm_in, m->hidden, m->eps, normed + (int64_t)b * m->hidden * 8);
    const uint32_t *seen = input_of(&layer->qkv, normed, p->rows, coarse);
    rank_down(p, LOW(0), seen, p->ranked[0], me, n);
    share(total * d / 16, me, n, &from, &to);
    for (int b0 = 0; b0 < p->blocks; b0 += MOST_BLOCKS) {
        int tokens = tokens_from(p, b0), blocks = (tokens + 15) / 16;
        for (int t = from; t < to; t++) {
            if (!b0) expect(p, index, t - from, to - from, me, n);
            const uint32_t *low_x = low && low[0].ks ? p->ranked[0] + (int64_t)b0 * low[0].down.out * 8 : NULL;
            product(&layer->qkv, LOW(0), t, from_block(&layer->qkv, seen, b0), low_x, tokens, sums);
            for (int b = 0; b < blocks; b++)
                memcpy(p->qkv + ((int64_t)(b0 + b) * total * d + 16 * t) * 16, sums + 256 * b, 1024);
        }
    }
    sync_threads(&p->barrier, n);

    share(p->blocks * total, me, n, &from, &to);
    for (int item = from; item < to; item++) { /* one head of a block: rotate, then put rows where they belong */
        int b = item / total, head = item % total, kv = head - m->heads;
        float *fm = p->qkv + ((int64_t)b * total + head) * d * 16;
        const float *weight = kv < 0 ? layer->norm_q : layer->norm_k;
        int64_t at = (int64_t)b * (m->rotated / 2) * 16;
        if (kv < m->kv_heads) rotate(fm, m, weight, p->cos + at, p->sin + at);
        for (int lane = 0; lane < 16 && b * 16 + lane < p->rows; lane++) {
            int row = b * 16 + lane, line = row / c->tokens, slot = c->start + row % c->tokens;
            bf16 *to_ = kv < 0 ? p->queries + ((int64_t)row * m->heads + head) * d
                               : (kv < m->kv_heads ? c->keys : c->values)[index] +
                                     (((int64_t)line * m->kv_heads + kv % m->kv_heads) * c->capacity[index] + slot) * d;
            for (int i = 0; i < d; i++) to_[i] = narrow(fm[16 * i + lane]);
        }
    }
    sync_threads(&p->barrier, n);

    uint32_t q[16 * 128] __attribute__((aligned(64)));
    float out[16 * 256] __attribute__((aligned(64)));
    int items = c->batch * m->kv_heads * p->column_blocks, together;
    for (int turn = 0; turn < turns_of(items, n); turn++) {
        int item = item_of(turn, items, me, n, &together);
        int block = item % p->column_blocks, kv = item / p->column_blocks % m->kv_heads, line = item / p->column_blocks / m->kv_heads;
        int bit = 0, end = c->tokens * p->group - 16 * block < 16 ? c->tokens * p->group - 16 * block : 16;
        if (together) share(end, me, n, &bit, &end); /* by columns */
        int first = 16 * block + bit, columns = end - bit;
        if (!columns) continue;
        memset(q, 0, 32 * d);
        for (int col = 0; col < columns; col++) {
            int row = line * c->tokens + (first + col) / p->group, head = kv * p->group + (first + col) % p->group;
            const uint32_t *pairs = (const uint32_t *)(p->queries + ((int64_t)row * m->heads + head) * d);
            for (int i = 0; i < d / 2; i++) q[16 * i + col] = pairs[i];
        }
        int64_t cached = ((int64_t)line * m->kv_heads + kv) * c->capacity[index] * d;
        const uint16_t *visible = p->visible[c->window[index]];
        if (visible) visible += ((int64_t)line * p->column_blocks + block) * p->slots;
        attend(c->keys[index] + cached, c->values[index] + cached, p->slots, d, q, columns, visible, bit, m->scale, p->column_blocks == 1, scores, out);
        for (int col = 0; col < columns; col++) {
            int row = line * c->tokens + (first + col) / p->group, head = kv * p->group + (first + col) % p->group;
            uint32_t *lane = p->attended + ((int64_t)(row / 16) * m->heads * d + head * d) * 8 + row % 16;
            for (int i = 0; i < d; i += 16) {
                uint32_t pairs[8] __attribute__((aligned(32)));
                _mm256_store_si256((__m256i *)pairs, narrow16(_mm512_load_ps(out + col * d + i)));
                for (int j = 0; j < 8; j++) lane[8 * i + 16 * j] = pairs[j];
            }
        }
    }
    sync_threads(&p->barrier, n);

    seen = input_of(&layer->out, p->attended, p->rows, coarse);
    rank_down(p, LOW(1), seen, p->ranked[1], me, n);
    add_product(p, &layer->out, LOW(1), seen, p->ranked[1], me, n);
    sync_threads(&p->barrier, n);

    for (int b = 0; b < p->blocks; b++)
        norm(p->x + (int64_t)b * m->hidden * 16, layer->norm_mlp, m->hidden, m->eps, normed + (int64_t)b * m->hidden * 8);
    seen = input_of(&layer->gate_up, normed, p->rows, coarse);
    rank_down(p, LOW(2), seen, p->ranked[0], me, n);
    share(m->inner / 16, me, n, &from, &to);
    for (int b0 = 0; b0 < p->blocks; b0 += MOST_BLOCKS) {
        int tokens = tokens_from(p, b0), blocks = (tokens + 15) / 16;
        for (int t = from; t < to; t++) {
            const uint32_t *x = from_block(&layer->gate_up, seen, b0);
            const uint32_t *low_x = low && low[2].ks ? p->ranked[0] + (int64_t)b0 * low[2].down.out * 8 : NULL;
            product(&layer->gate_up, LOW(2), 2 * t, x, low_x, tokens, gate);
            product(&layer->gate_up, LOW(2), 2 * t + 1, x, low_x, tokens, sums);
            for (int b = 0; b < blocks; b++) {
                uint32_t *inner = p->inner + ((int64_t)(b0 + b) * m->inner + 16 * t) * 8;
                F act[16];
                gated(gate + 256 * b, sums + 256 * b, p->rows - 16 * (b0 + b), act);
                for (int o = 0; o < 16; o += 2) _mm512_store_si512(inner + 8 * o, paired(act[o], act[o + 1]));
            }
        }
    }
    sync_threads(&p->barrier, n);

    seen = input_of(&layer->down, p->inner, p->rows, coarse);
    rank_down(p, LOW(3), seen, p->ranked[1], me, n);
    add_product(p, &layer->down, LOW(3), seen, p->ranked[1], me, n);
    sync_threads(&p->barrier, n);
#undef LOW
}

/* For each key and 16 columns (a token and a query head of the group each), which columns see it. mask NULL: the last
 * `span` keys up to a token's own, or all of them. */
static uint16_t *columns_seeing(const Pass *p, const uint8_t *mask, int span) {
    const Call *c = p->c;
    uint16_t *out = room(2 * (size_t)c->batch * p->column_blocks * p->slots + 32);
    if (!out) return NULL;
    memset(out, 0, 2 * (size_t)c->batch * p->column_blocks * p->slots);
    for (int line = 0; line < c->batch; line++)
        for (int col = 0; col < c->tokens * p->group; col++) {
            int token = col / p->group, end = mask ? p->slots : c->start + token + 1, first = span && span < end ? end - span : 0;
            const uint8_t *see = mask ? mask + ((int64_t)line * c->tokens + token) * p->slots : NULL;
            uint16_t *to = out + ((int64_t)line * p->column_blocks + col / 16) * p->slots, bit = (uint16_t)(1 << col % 16);
            if (mask)
                for (int s = 0; s < end; s++) to[s] |= see[s] ? bit : 0;
            else
                for (int s = first; s < end; s++) to[s] |= bit;
        }
    return out;
}

/* Layers [lo, hi) of the call, in a team. */
static void run_layers(Pass *p, int me, int n) {
    const Call *c = p->c;
    uint8_t *mine = p->scratch + p->own * me;
    for (int index = c->lo; index < c->hi; index++) {
        if (c->taps[index]) {
            int from, to;
            share(p->rows, me, n, &from, &to);
            from_blocks(p->x, from, to, p->m->hidden, c->taps[index]);
        }
        run_layer(p, index, (uint32_t *)mine, (float *)(mine + p->scored), mine + p->coarse, me, n);
    }
}

/* Room for passes of `m` over so many tokens as `c` has, over at most `slots` cached ones, whose maps read at most
 * `widest` inputs besides the layers' own. Returns 0, or -1 without memory. `end` in any case. */
static int begin(Pass *p, const Model *m, const Call *c, int slots, int widest) {
    memset(p, 0, sizeof *p);
    p->m = m, p->rows = c->batch * c->tokens, p->blocks = (p->rows + 15) / 16, p->group = m->heads / m->kv_heads;
    p->column_blocks = (c->tokens * p->group + 15) / 16;
    int total = (m->heads + 2 * m->kv_heads) * m->head_dim, half = m->rotated / 2;
    size_t blocks = (size_t)p->blocks;
    for (int l = c->lo; c->low && l < c->hi; l++)
        for (int i = 0; c->low[l] && i < 4; i++)
            if (c->low[l][i].ks && c->low[l][i].down.out > p->ranks) p->ranks = c->low[l][i].down.out;
    p->x = room(64 * blocks * m->hidden);
    p->qkv = room(64 * blocks * total);
    p->cos = room(64 * blocks * half);
    p->sin = room(64 * blocks * half);
    p->attended = room(32 * blocks * m->heads * m->head_dim);
    p->inner = room(32 * blocks * m->inner);
    p->ranked[0] = room(32 * blocks * (p->ranks + 2));
    p->ranked[1] = room(32 * blocks * (p->ranks + 2));
    p->queries = room(2 * (size_t)p->rows * m->heads * m->head_dim);
    if (widest < m->hidden) widest = m->hidden;
    p->scored = (32 * blocks * widest + 63) / 64 * 64;
    if (widest < m->inner) widest = m->inner;
    if (widest < m->heads * m->head_dim) widest = m->heads * m->head_dim;
    p->coarse = p->scored + 64 * ((size_t)slots + 16);
    p->own = p->coarse + scratch_bytes(widest, p->blocks);
    p->scratch = room(p->own * c->threads);
    if (!(p->x && p->qkv && p->cos && p->sin && p->attended && p->inner && p->ranked[0] && p->ranked[1] && p->queries && p->scratch))
        return -1;
    memset(p->attended, 0, 32 * blocks * m->heads * m->head_dim);
    memset(p->cos, 0, 64 * blocks * half);
    memset(p->sin, 0, 64 * blocks * half);
    for (int r = 0; r < p->rows; r++)
        for (int i = 0; i < half; i++) {
            int64_t at = ((int64_t)(r / 16) * half + i) * 16 + r % 16, from = c->positions[r] * 2 * half + i;
            p->cos[at] = c->rotary[from], p->sin[at] = c->rotary[from + half];
        }
    return 0;
}

static void end(Pass *p) {
    free(p->x), free(p->qkv), free(p->cos), free(p->sin), free(p->attended), free(p->inner), free(p->ranked[0]);
    free(p->ranked[1]), free(p->queries), free(p->scratch);
}

/* Aim a pass at a call's cached tokens. Returns 0, or -1 without memory. `leave` in any case. */
static int aim(Pass *p, const Call *c) {
    p->c = c, p->slots = c->start + c->tokens;
    memset(&p->barrier, 0, sizeof p->barrier);
    p->visible = calloc((size_t)c->windows, sizeof *p->visible);
    for (int w = 0; p->visible && w < c->windows; w++)
        if (c->causal ? c->tokens > 1 || (c->spans[w] && c->spans[w] < p->slots) : c->masks[w] != NULL)
            if (!(p->visible[w] = columns_seeing(p, c->causal ? NULL : c->masks[w], c->spans[w]))) return -1;
    return p->visible ? 0 : -1;
}

static void leave(Pass *p) {
    for (int w = 0; p->visible && w < p->c->windows; w++) free(p->visible[w]);
    free(p->visible);
}

/* Run layers [lo, hi) of a call. Returns 0, or -1 if there is no memory (nothing has happened then). */
int specdec_layers(const Model *m, const Call *c) {
    Pass p;
    int failed = begin(&p, m, c, c->start + c->tokens, 0) | aim(&p, c);
    if (!failed) {
        to_blocks(c->x, p.rows, m->hidden, p.x);
#pragma omp parallel num_threads(c->threads)
        {
            int me = omp_get_thread_num(), n = omp_get_num_threads(), from, to;
            enter_tiles();
            run_layers(&p, me, n);
            share(p.rows, me, n, &from, &to);
            from_blocks(p.x, from, to, m->hidden, c->x);
            leave_tiles();
        }
        if (c->taps[c->hi]) memcpy(c->taps[c->hi], c->x, 2 * (size_t)p.rows * m->hidden);
    }
    leave(&p), end(&p);
    return failed;
}

/* -- drafting ----------------------------------------------------------------------------------------------------- */

enum { MOST_LEGS = 8, MOST_WIDTH = 16 };

typedef struct {        /* a leap, and the layers behind it */
    const Map *leap;        /* of the parts, each divided by its RMS: the residual, the previous final state (, `carried`) */
    const bf16 *carried;    /* [hidden]: the root's previous state where the layers begin */
    const Model *model;     /* the first leg has layers; the last may have none (NULL) */
    const Call *call;       /* of one token at the first free slot, without masks */
} Leg;

typedef struct {        /* a tree that grows from one root, level by level */
    int32_t legs, levels, width, root; /* width: tokens of a level that are drafted on from, children of each */
    const Leg *leg;
    const bf16 *embedding;  /* [vocabulary, hidden] */
    const bf16 *final;      /* [hidden]: the root's previous final state */
    const Map *head[2];     /* what follows is read out by, one beside the other; the second may be NULL */
    int32_t outputs[2];     /* of each head, those that count */
    const int64_t *tokens;  /* [outputs]: what they stand for, or NULL: themselves */
    const float *norm;
    float eps, unit_eps;    /* of the final norm, of the leaps' */
    float confidence;       /* growing ends when no path is as probable */
    float *scores;          /* out: [levels * width * width], log-probabilities of the candidates' paths */
    int32_t *ids, *parents; /* out: their tokens; 0: the root, i + 1: candidate i */
} Growth;

typedef struct {        /* of a thread's share of the outputs, by lane */
    float most[16] __attribute__((aligned(64))), sum[16] __attribute__((aligned(64))), floor[16] __attribute__((aligned(64)));
    float values[16][MOST_WIDTH];
    int32_t ids[16][MOST_WIDTH];
} Best;

static void insert(Best *best, int lane, int count, float value, int32_t id) {
    float *values = best->values[lane];
    int32_t *ids = best->ids[lane], at = count - 1;
    for (; at > 0 && value > values[at - 1]; at--) values[at] = values[at - 1], ids[at] = ids[at - 1];
    values[at] = value, ids[at] = id;
    best->floor[lane] = values[count - 1];
}

/* before, carried: FM; landed: out, [rows, hidden]. */
static void leap(Pass *p, const Map *map, const float *before, const float *carried, float eps, bf16 *landed, int me, int n) {
    uint8_t *mine = p->scratch + p->own * me;
    uint32_t *normed = (uint32_t *)mine;
    int hidden = p->m->hidden, from, to;
    float sums[256] __attribute__((aligned(64)));
    norm(p->x, NULL, hidden, eps, normed);
    norm(before, NULL, hidden, eps, normed + 8 * hidden);
    if (carried) norm(carried, NULL, hidden, eps, normed + 16 * hidden);
    const uint32_t *seen = input_of(map, normed, p->rows, mine + p->coarse);
    sync_threads(&p->barrier, n);
    share(hidden / 16, me, n, &from, &to);
    for (int t = from; t < to; t++) {
        product(map, NULL, t, seen, NULL, p->rows, sums);
        for (int o = 0; o < 16; o++) _mm512_store_ps(p->x + 16 * (16 * t + o), rounded(_mm512_load_ps(sums + 16 * o)));
    }
    sync_threads(&p->barrier, n);
    share(p->rows, me, n, &from, &to);
    from_blocks(p->x, from, to, hidden, landed);
}

static void read_out(Pass *p, const Growth *g, Best *best, int me, int n) {
    uint8_t *mine = p->scratch + p->own * me;
    float sums[256] __attribute__((aligned(64)));
    F most = _mm512_set1_ps(-1e30f), sum = _mm512_setzero_ps();
    for (int lane = 0; lane < 16; lane++) {
        best->floor[lane] = -1e30f;
        for (int i = 0; i < g->width; i++) best->values[lane][i] = -1e30f, best->ids[lane][i] = 0;
    }
    norm(p->x, g->norm, p->m->hidden, g->eps, (uint32_t *)mine);
    for (int h = 0; h < 2 && g->head[h]; h++) {
        const uint32_t *seen = input_of(g->head[h], (uint32_t *)mine, p->rows, mine + p->coarse);
        int from, to, first = h ? g->outputs[0] : 0;
        share((g->outputs[h] + 15) / 16, me, n, &from, &to);
        for (int t = from; t < to; t++) {
            product(g->head[h], NULL, t, seen, NULL, p->rows, sums);
            int some = g->outputs[h] - 16 * t < 16 ? g->outputs[h] - 16 * t : 16;
            F top = most;
            for (int o = 0; o < some; o++) top = _mm512_max_ps(top, _mm512_load_ps(sums + 16 * o));
            sum = _mm512_mul_ps(sum, exp16(_mm512_sub_ps(most, top)));
            most = top;
            for (int o = 0; o < some; o++) {
                F v = _mm512_load_ps(sums + 16 * o);
                sum = _mm512_add_ps(sum, exp16(_mm512_sub_ps(v, most)));
                __mmask16 good = _mm512_cmp_ps_mask(v, _mm512_load_ps(best->floor), _CMP_GT_OQ) & (__mmask16)((1u << p->rows) - 1);
                for (; good; good &= (__mmask16)(good - 1)) {
                    int lane = __builtin_ctz(good);
                    insert(best, lane, g->width, sums[16 * o + lane], first + 16 * t + o);
                }
            }
        }
    }
    _mm512_store_ps(best->most, most), _mm512_store_ps(best->sum, sum);
}

/* One lane of what the threads of the team found, merged into the first one's, as log-probabilities. */
static void merge(Best *best, int lane, int count, int team) {
    float most = best->most[lane], sum = 0;
    for (int t = 1; t < team; t++) most = best[t].most[lane] > most ? best[t].most[lane] : most;
    for (int t = 0; t < team; t++) sum += best[t].sum[lane] * __builtin_expf(best[t].most[lane] - most);
    for (int t = 1; t < team; t++)
        for (int i = 0; i < count && best[t].values[lane][i] > best->floor[lane]; i++)
            insert(best, lane, count, best[t].values[lane][i], best[t].ids[lane][i]);
    for (int i = 0; i < count; i++) best->values[lane][i] -= most + __builtin_logf(sum);
}

/* The pass of a level: `x` [rows, hidden] goes through all legs to `best`. The states of a level, [legs + 1][MOST_WIDTH]
 * [hidden]: where each leap landed and, last, the final ones; `before` is the level's parents'. Returns 0, or -1. */
static int run_level(const Growth *g, const Call *calls, const bf16 *x, const bf16 *before, bf16 *states, Best *best, float *fm) {
    Pass p, passes[MOST_LEGS];
    const Model *m = g->leg[0].model;
    int aimed = 0, widest = 3 * m->hidden, threads = calls->threads, team = 1; /* there may be fewer than we ask for */
    int64_t block = (int64_t)m->hidden * 16, final = g->legs * block;
    int failed = begin(&p, m, calls, calls->start + calls->tokens, widest);
    for (; !failed && aimed < g->legs; aimed++) {
        passes[aimed] = p;
        if (!g->leg[aimed].call) continue;
        passes[aimed].m = g->leg[aimed].model;
        failed = aim(passes + aimed, calls + aimed);
    }
    if (!failed) {
        to_blocks(x, p.rows, m->hidden, p.x);
        for (int i = 0; i <= g->legs; i++) to_blocks(before + i * block, p.rows, m->hidden, fm + i * block);
#pragma omp parallel num_threads(threads)
        {
            int me = omp_get_thread_num(), n = omp_get_num_threads(), from, to;
            if (!me) team = n;
            enter_tiles();
            for (int i = 0; i < g->legs; i++) {
                leap(passes + i, g->leg[i].leap, fm + final, g->leg[i].call ? fm + i * block : NULL, g->unit_eps, states + i * block, me, n);
                if (g->leg[i].call) run_layers(passes + i, me, n);
            }
            share(p.rows, me, n, &from, &to);
            from_blocks(p.x, from, to, m->hidden, states + final);
            read_out(&p, g, best + me, me, n);
            leave_tiles();
        }
        for (int r = 0; r < p.rows; r++) merge(best, r, g->width, team);
    }
    for (int i = 0; i < aimed; i++)
        if (g->leg[i].call) leave(passes + i);
    end(&p);
    return failed;
}

/* Grow a tree; the slots behind each call's first one need room for all tokens that are drafted from. Returns how many
 * candidates were found, or -1 without memory. */
int specdec_grow(const Growth *g) {
    const Model *m = g->leg[0].model;
    const Call *like = g->leg[0].call;
    int width = g->width, hidden = m->hidden, found = 0, rows = 1, drafted = 0, failed = 0;
    int64_t block = (int64_t)hidden * 16, first = *like->positions;
    size_t states = 2 * (size_t)block * (g->legs + 1), most = (size_t)g->levels * width;
    Call calls[MOST_LEGS];
    int64_t positions[MOST_WIDTH] = {first};
    int32_t tokens[MOST_WIDTH] = {g->root}, nodes[MOST_WIDTH] = {0}, origin[MOST_WIDTH] = {0};
    float score[MOST_WIDTH] = {0};
    bf16 *x = room(2 * block), *before = room(states), *now = room(states);
    float *fm = room(2 * states);
    Best *best = room(sizeof(Best) * like->threads);
    uint8_t *paths = calloc(2 * MOST_WIDTH, most + 1); /* of this and the next level: which drafted tokens lie on a path */
    uint8_t *mask = room((size_t)like->windows * width * (like->start + most));
    const uint8_t *masks[MOST_LEGS];
    failed = !(x && before && now && fm && best && paths && mask);
    for (int i = 0; !failed && i < g->legs; i++) {
        if (g->leg[i].call) calls[i] = *g->leg[i].call, memcpy(before + i * block, g->leg[i].carried, 2 * (size_t)hidden);
        else memset(before + i * block, 0, 2 * (size_t)hidden);
    }
    if (!failed) memcpy(before + g->legs * block, g->final, 2 * (size_t)hidden);
    for (int level = 0; !failed && level < g->levels; level++) {
        int slots = like->start + drafted + rows;
        uint8_t *path = paths + (level & 1 ? MOST_WIDTH * (most + 1) : 0), *next = paths + (level & 1 ? 0 : MOST_WIDTH * (most + 1));
        for (int w = 0; w < like->windows; w++) {
            masks[w] = mask + (size_t)w * width * (like->start + most);
            for (int r = 0; r < rows; r++) {
                uint8_t *see = (uint8_t *)masks[w] + (size_t)r * slots;
                memset(see, 1, (size_t)like->start);
                path[r * (most + 1) + drafted + r] = 1;
                memcpy(see + like->start, path + r * (most + 1), (size_t)(drafted + rows));
                int64_t hidden_ = like->spans[w] ? first + level - like->spans[w] + 1 : 0; /* slots before are out of sight */
                if (hidden_ > 0) memset(see, 0, (size_t)(hidden_ < like->start ? hidden_ : like->start));
            }
        }
        for (int r = 0; r < rows; r++) {
            positions[r] = first + level;
            memcpy(x + (int64_t)r * hidden, g->embedding + (int64_t)tokens[r] * hidden, 2 * (size_t)hidden);
        }
        for (int i = 0; i < g->legs; i++)
            if (g->leg[i].call) calls[i].tokens = rows, calls[i].start = like->start + drafted, calls[i].positions = positions, calls[i].masks = masks, calls[i].causal = 0;
        failed = run_level(g, calls, x, before, now, best, fm);
        if (failed) break;
        int begun = found, chosen[MOST_WIDTH], some = 0;
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < width; i++, found++) {
                int32_t id = best->ids[r][i];
                g->scores[found] = score[r] + best->values[r][i];
                g->ids[found] = g->tokens ? (int32_t)g->tokens[id] : id;
                g->parents[found] = nodes[r];
            }
        for (int i = begun; i < found; i++) { /* the likeliest of them, the first one first */
            if (some == width && g->scores[i] <= g->scores[chosen[width - 1]]) continue;
            int at = some < width ? some++ : width - 1;
            for (; at > 0 && g->scores[i] > g->scores[chosen[at - 1]]; at--) chosen[at] = chosen[at - 1];
            chosen[at] = i;
        }
        if (__builtin_expf(g->scores[chosen[0]]) < g->confidence) break;
        for (int r = 0; r < some; r++) {
            origin[r] = (chosen[r] - begun) / width;
            memset(next + r * (most + 1), 0, most + 1);
            memcpy(next + r * (most + 1), path + origin[r] * (most + 1), (size_t)(drafted + rows));
            for (int i = 0; i <= g->legs; i++)
                memcpy(before + i * block + (int64_t)r * hidden, now + i * block + (int64_t)origin[r] * hidden, 2 * (size_t)hidden);
            tokens[r] = g->ids[chosen[r]], nodes[r] = chosen[r] + 1, score[r] = g->scores[chosen[r]];
        }
        drafted += rows, rows = some;
    }
    free(x), free(before), free(now), free(fm), free(best), free(paths), free(mask);
    return failed ? -1 : found;
}

/* out [rows, width] = map(x), all bf16, for x [rows, map->in] in `parts` pieces [rows, map->in / parts], one beside the
 * other; each piece goes through an RMS norm if eps > 0 (weight NULL: ones). `best` [rows], if not NULL, is made instead:
 * the first of each row's largest outputs. Returns 0, or -1 without memory. */
int specdec_linear(const Map *map, const float *weight, float eps, const bf16 *const *x, int parts, int rows, bf16 *out,
                   int64_t *best, int width, int threads) {
    int blocks = (rows + 15) / 16, features = map->in, piece = features / parts;
    float *fm = room(64 * (size_t)blocks * piece);
    uint32_t *vn = room(32 * (size_t)blocks * features);
    uint8_t *scratch = room(scratch_bytes(features, blocks));
    float *tops = room(128 * (size_t)blocks * threads); /* by thread and row: the largest output so far, and which */
    if (fm && vn && scratch && tops) {
        for (int lane = 0; lane < 16 * blocks * threads; lane++) tops[lane] = -__builtin_inff();
        int32_t *which = (int32_t *)(tops + 16 * blocks * threads);
        memset(which, 0, 64 * (size_t)blocks * threads);
        for (int part = 0; part < parts; part++) {
            to_blocks(x[part], rows, piece, fm);
            for (int b = 0; b < blocks; b++) {
                const float *from = fm + (int64_t)b * piece * 16;
                uint32_t *to = vn + ((int64_t)b * features + part * piece) * 8;
                if (eps > 0) norm(from, weight, piece, eps, to);
                else
                    for (int i = 0; i < piece; i += 2)
                        _mm512_store_si512(to + 8 * i, paired(_mm512_load_ps(from + 16 * i), _mm512_load_ps(from + 16 * i + 16)));
            }
        }
        const uint32_t *seen = input_of(map, vn, rows, scratch);
        int team = 1; /* there may be fewer threads than we ask for */
#pragma omp parallel num_threads(threads)
        {
            float sums[MOST_BLOCKS * 256] __attribute__((aligned(64)));
            const __m512i column = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
            int from, to, me = omp_get_thread_num(), n = omp_get_num_threads();
            if (!me) team = n;
            enter_tiles();
            share(map->out / 16, me, n, &from, &to);
            for (int b0 = 0; b0 < blocks; b0 += MOST_BLOCKS) {
                int some = blocks - b0 < MOST_BLOCKS ? blocks - b0 : MOST_BLOCKS, tokens = rows - 16 * b0;
                for (int t = from; t < to; t++) {
                    product(map, NULL, t, from_block(map, seen, b0), NULL, tokens < 16 * some ? tokens : 16 * some, sums);
                    int left = width - 16 * t;
                    for (int b = 0; best && b < some; b++) {
                        int lanes = 16 * (blocks * me + b0 + b);
                        F top = _mm512_load_ps(tops + lanes);
                        __m512i at = _mm512_load_si512(which + lanes);
                        for (int o = 0; o < 16 && o < left; o++) {
                            F v = rounded(_mm512_load_ps(sums + 256 * b + 16 * o));
                            __mmask16 more = _mm512_cmp_ps_mask(v, top, _CMP_GT_OQ);
                            top = _mm512_mask_mov_ps(top, more, v), at = _mm512_mask_mov_epi32(at, more, _mm512_set1_epi32(16 * t + o));
                        }
                        _mm512_store_ps(tops + lanes, top), _mm512_store_si512(which + lanes, at);
                    }
                    if (best) continue;
                    __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1 << (left > 0 ? left : 0)) - 1);
                    for (int r = 16 * b0; r < 16 * (b0 + some) && r < rows; r++) {
                        F v = _mm512_i32gather_ps(column, sums + 256 * (r / 16 - b0) + r % 16, 4);
                        _mm256_mask_storeu_epi16(out + (int64_t)r * width + 16 * t, mask, narrow16(v));
                    }
                }
            }
            leave_tiles();
        }
        for (int r = 0; best && r < rows; r++) {
            int of = r; /* threads have outputs in order, so the first one of equals stays */
            for (int lane = r; lane < 16 * blocks * team; lane += 16 * blocks) of = tops[lane] > tops[of] ? lane : of;
            best[r] = which[of];
        }
    }
    int failed = !(fm && vn && scratch && tops);
    free(fm), free(vn), free(scratch), free(tops);
    return failed ? -1 : 0;
}

/* The first of the largest values of each row of bf16 [rows, width]. */
void specdec_argmax(const bf16 *x, int rows, int width, int64_t *out, int threads) {
#pragma omp parallel for num_threads(rows < threads ? rows : threads)
    for (int r = 0; r < rows; r++) {
        const bf16 *row = x + (int64_t)r * width;
        F most = _mm512_set1_ps(-__builtin_inff());
        int i = 0;
        for (; i + 16 <= width; i += 16) most = _mm512_max_ps(most, load_bf16(row + i));
        float largest = _mm512_reduce_max_ps(most);
        for (; i < width; i++) largest = widen(row[i]) > largest ? widen(row[i]) : largest;
        for (i = 0; i + 16 <= width; i += 16) {
            __mmask16 equal_ = _mm512_cmp_ps_mask(load_bf16(row + i), _mm512_set1_ps(largest), _CMP_EQ_OQ);
            if (equal_) {
                i += __builtin_ctz(equal_);
                break;
            }
        }
        while (i < width && widen(row[i]) != largest) i++;
        out[r] = i < width ? i : 0;
    }
}

/* -- packing ------------------------------------------------------------------------------------------------------ */

static inline bf16 half_of(float v) { return (bf16)_cvtss_sh(v, 0); }
static inline float half(bf16 v) { return _cvtsh_ss(v); }

static int equal(const float *w, F a, F b) { /* do the values round to these bf16 ones? */
    __mmask16 first = _mm512_cmpneq_epi32_mask(_mm512_castps_si512(rounded(a)), _mm512_castps_si512(_mm512_load_ps(w)));
    return !(first | _mm512_cmpneq_epi32_mask(_mm512_castps_si512(rounded(b)), _mm512_castps_si512(_mm512_load_ps(w + 16))));
}

/* Find float16 scale d and low m with bf16(q d + m) = w for all 32 weights; q from the extremes. 1 if they exist. */
static int fit4(const float *w, float *q, bf16 *scale, bf16 *low) {
    F a = _mm512_load_ps(w), b = _mm512_load_ps(w + 16);
    float least = _mm512_reduce_min_ps(_mm512_min_ps(a, b)), most = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
    F steps = _mm512_set1_ps(most > least ? 15.0f / (most - least) : 0.0f), from = _mm512_set1_ps(least);
    F qa = _mm512_roundscale_ps(_mm512_mul_ps(_mm512_sub_ps(a, from), steps), 8);
    F qb = _mm512_roundscale_ps(_mm512_mul_ps(_mm512_sub_ps(b, from), steps), 8);
    _mm512_store_ps(q, qa), _mm512_store_ps(q + 16, qb);
    /* A weight holds between the midpoints to its bf16 neighbours: bounds on d, for each m that rounds to the least. */
    F bounds[2][2];
    for (int side = 0; side < 2; side++)
        for (int h = 0; h < 2; h++) {
            __m512i bits = _mm512_castps_si512(h ? b : a), step = _mm512_set1_epi32(0x8000);
            __mmask16 up = _mm512_cmplt_epi32_mask(bits, _mm512_setzero_si512()); /* negative: larger bits are lower */
            if (side) up = ~up;
            bits = _mm512_mask_add_epi32(_mm512_sub_epi32(bits, step), up, bits, step);
            __mmask16 zero = _mm512_cmp_ps_mask(h ? b : a, _mm512_setzero_ps(), _CMP_EQ_OQ);
            bounds[side][h] = _mm512_mask_mov_ps(_mm512_castsi512_ps(bits), zero, _mm512_set1_ps(side ? 1e-30f : -1e-30f));
        }
    F inverse[2] = {_mm512_div_ps(_mm512_set1_ps(1.0f), qa), _mm512_div_ps(_mm512_set1_ps(1.0f), qb)};
    __mmask16 set[2] = {_mm512_cmp_ps_mask(qa, _mm512_setzero_ps(), _CMP_GT_OQ), _mm512_cmp_ps_mask(qb, _mm512_setzero_ps(), _CMP_GT_OQ)};
    bf16 centre = half_of(least), least_bits = narrow(least);
    for (int away = 0; away < 24; away++) {
        bf16 m = (bf16)(centre + (away & 1 ? -(away + 1) / 2 : away / 2));
        float value = half(m);
        if (narrow(value) != least_bits) continue;
        float lo = -1e30f, hi = 1e30f;
        for (int h = 0; h < 2; h++) {
            if (!set[h]) continue;
            F x = _mm512_mul_ps(_mm512_sub_ps(bounds[0][h], _mm512_set1_ps(value)), inverse[h]);
            F y = _mm512_mul_ps(_mm512_sub_ps(bounds[1][h], _mm512_set1_ps(value)), inverse[h]);
            float l = _mm512_mask_reduce_max_ps(set[h], x), u = _mm512_mask_reduce_min_ps(set[h], y);
            lo = l > lo ? l : lo, hi = u < hi ? u : hi;
        }
        float middle = lo < -1e29f ? 0.0f : 0.5f * (lo + hi), slack = 1e-6f * (hi > 0 ? hi : -hi);
        if (lo > hi + slack) continue;
        bf16 near = half_of(middle);
        for (int other = 0; other < 7; other++) {
            bf16 d = (bf16)(near + (other & 1 ? -(other + 1) / 2 : other / 2));
            F s = _mm512_set1_ps(half(d)), z = _mm512_set1_ps(value);
            if (equal(w, _mm512_fmadd_ps(qa, s, z), _mm512_fmadd_ps(qb, s, z))) {
                *scale = d, *low = m;
                return 1;
            }
        }
    }
    return 0;
}

/* The same for bf16(q d), q whole and in -127 .. 127. */
static int fit8(const float *w, float *q, bf16 *scale) {
    F a = _mm512_load_ps(w), b = _mm512_load_ps(w + 16);
    float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    bf16 centre = half_of(most / 127);
    for (int away = 0; away < 24; away++) {
        bf16 d = (bf16)(centre + (away & 1 ? -(away + 1) / 2 : away / 2));
        float value = half(d);
        if (!(value > 0) && most > 0) continue;
        F s = _mm512_set1_ps(value), inverse = _mm512_set1_ps(value > 0 ? 1 / value : 0.0f);
        F qa = _mm512_roundscale_ps(_mm512_mul_ps(a, inverse), 8), qb = _mm512_roundscale_ps(_mm512_mul_ps(b, inverse), 8);
        if (_mm512_cmp_ps_mask(_mm512_abs_ps(qa), _mm512_set1_ps(127), _CMP_GT_OQ) | _mm512_cmp_ps_mask(_mm512_abs_ps(qb), _mm512_set1_ps(127), _CMP_GT_OQ))
            continue;
        if (equal(w, _mm512_mul_ps(qa, s), _mm512_mul_ps(qb, s))) {
            _mm512_store_ps(q, qa), _mm512_store_ps(q + 16, qb);
            *scale = d;
            return 1;
        }
    }
    return 0;
}

/* Rounding to 4 bits: codes between the extremes, then the scale and low that fit them best. */
static void round4(const float *w, float *q, bf16 *scale, bf16 *low) {
    float least = w[0], most = w[0], mq = 0, mw = 0, qq = 0, qw = 0;
    for (int i = 1; i < 32; i++) least = w[i] < least ? w[i] : least, most = w[i] > most ? w[i] : most;
    for (int i = 0; i < 32; i++) {
        q[i] = most > least ? __builtin_rintf((w[i] - least) * (15 / (most - least))) : 0;
        mq += q[i] / 32, mw += w[i] / 32;
    }
    for (int i = 0; i < 32; i++) qq += (q[i] - mq) * (q[i] - mq), qw += (q[i] - mq) * w[i];
    float d = qq > 0 ? qw / qq : 0;
    *scale = half_of(d), *low = half_of(mw - half(*scale) * mq);
}

static void round8(const float *w, float *q, bf16 *scale) {
    float most = 0;
    for (int i = 0; i < 32; i++) most = __builtin_fabsf(w[i]) > most ? __builtin_fabsf(w[i]) : most;
    *scale = half_of(most / 127);
    float d = half(*scale);
    for (int i = 0; i < 32; i++) {
        float v = d > 0 ? __builtin_rintf(w[i] / d) : 0;
        q[i] = v > 127 ? 127 : v < -127 ? -127 : v;
    }
}

/* Codes in -8 .. 7 for 32 weights; returns the scale that fits them best, of a few ranges the one with the least error. */
static float symmetric4(const float *w, float *q) {
    float most = 0, best = -1, found = 0;
    for (int i = 0; i < 32; i++) most = __builtin_fabsf(w[i]) > __builtin_fabsf(most) ? w[i] : most;
    memset(q, 0, 32 * sizeof *q);
    for (float range = 6.5f; most != 0 && range < 10; range += 0.5f) { /* the largest becomes -8 or so */
        float codes[32], qq = 0, qw = 0;
        for (int i = 0; i < 32; i++) {
            float v = __builtin_rintf(w[i] * (-range / most));
            codes[i] = v > 7 ? 7 : v < -8 ? -8 : v;
            qq += codes[i] * codes[i], qw += codes[i] * w[i];
        }
        if (qw * qw > best * qq) { /* the more, the smaller the error */
            best = qw * qw / qq, found = qw / qq;
            memcpy(q, codes, sizeof codes);
        }
    }
    return found;
}

/* Pack bf16 weights [out, in] into tiles of `kind`; rows up to the next multiple of 16 are zero. Weights that the kind
 * does not hold exactly: with `rounding` they are rounded, in place too, else packing ends. Returns 1 if all were packed. */
int specdec_pack(int kind, int rounding, bf16 *weights, int out, int in, uint8_t *tiles, int threads) {
    int good = 1;
#pragma omp parallel num_threads(threads)
    {
        int from, to, bytes = TILE_BYTES[kind], columns = in / 32;
        share((out + 15) / 16, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
        for (int t = from; t < to && __atomic_load_n(&good, __ATOMIC_RELAXED); t++)
            for (int k = 0; k < columns; k++) {
                uint8_t *tile = tiles + bytes * ((int64_t)t * columns + k);
                memset(tile, 0, (size_t)bytes);
                for (int row = 0; row < 16 && 16 * t + row < out; row++) {
                    bf16 *source = weights + (int64_t)(16 * t + row) * in + 32 * k;
                    if (kind == BF16) {
                        memcpy(tile + 64 * row, source, 64);
                        continue;
                    }
                    float w[32] __attribute__((aligned(64))), q[32] __attribute__((aligned(64)));
                    bf16 scale = 0, low = 0;
                    _mm512_store_ps(w, load_bf16(source)), _mm512_store_ps(w + 16, load_bf16(source + 16));
                    if (!(kind == Q4 ? fit4(w, q, &scale, &low) : fit8(w, q, &scale))) {
                        if (!rounding) {
                            __atomic_store_n(&good, 0, __ATOMIC_RELAXED);
                            break;
                        }
                        if (kind == Q4) round4(w, q, &scale, &low);
                        else round8(w, q, &scale);
                        for (int i = 0; i < 32; i++)
                            source[i] = narrow(kind == Q4 ? __builtin_fmaf(q[i], half(scale), half(low)) : q[i] * half(scale));
                    }
                    memcpy(tile + 2 * row, &scale, 2);
                    if (kind == Q4) {
                        memcpy(tile + 32 + 2 * row, &low, 2);
                        uint8_t *words = tile + 64 + 64 * (row / 4); /* nibble row % 4 of each 16-bit word */
                        for (int i = 0; i < 32; i++) words[2 * i + row % 4 / 2] |= (uint8_t)((int)q[i] << 4 * (row % 2));
                    } else
                        for (int i = 0; i < 32; i++) tile[32 + 32 * row + i] = (uint8_t)(int8_t)q[i];
                }
            }
    }
    return good;
}

/* Round bf16 weights [out, in] to I8 tiles (without AMX: 128 more) and a scale per row; rows up to the next multiple of
 * 16 are zero. */
void specdec_pack_i8(const bf16 *weights, int out, int in, uint8_t *tiles, float *scale, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int row = 0; row < (out + 15) / 16 * 16; row++) {
        float most = 0;
        const bf16 *source = weights + (int64_t)row * in;
        for (int i = 0; row < out && i < in; i++) most = __builtin_fmaxf(most, __builtin_fabsf(widen(source[i])));
        scale[row] = most / 127;
        for (int i = 0; i < in; i++) {
            float v = most > 0 ? __builtin_rintf(widen(source[i]) * (127 / most)) : 0;
            tiles[16 * (int64_t)in * (row / 16) + 1024 * (i / 64) + 64 * (row % 16) + i % 64] = (uint8_t)((int)v + (has_amx ? 0 : 128));
        }
    }
}

/* Round bf16 weights [out, in] to I4 tiles, and what a row's products with tokens that are 128 too large exceed them by;
 * rows up to the next multiple of 16 are zero. Each half of a row's 64 inputs has the scale that fits it best. */
void specdec_pack_i4(const bf16 *weights, int out, int in, uint8_t *tiles, float *excess, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int pair = 0; pair < (out + 15) / 16 * 8; pair++) /* two rows at a time: they share bytes */
        for (int row = 2 * pair; row < 2 * pair + 2; row++) {
            float sum = 0;
            for (int k = 0; k < in / 64; k++) {
                uint8_t *tile = tiles + TILE_BYTES[I4] * ((int64_t)(row / 16) * (in / 64) + k), *codes = tile + 64 + 64 * (row % 16 / 2);
                if (row % 2 == 0) memset(codes, 0, 64);
                for (int side = 0; side < 2; side++) {
                    float w[32], q[32];
                    for (int i = 0; i < 32; i++)
                        w[i] = row < out ? widen(weights[(int64_t)row * in + 64 * k + i / 4 * 8 + 4 * side + i % 4]) : 0;
                    bf16 scale = half_of(symmetric4(w, q) / 16);
                    memcpy(tile + 2 * (2 * (row % 16) + side), &scale, 2);
                    for (int i = 0; i < 32; i++) {
                        sum += 16 * q[i] * half(scale);
                        codes[i / 4 * 8 + 4 * side + i % 4] |= (uint8_t)(((int)q[i] & 15) << (row % 2 ? 0 : 4));
                    }
                }
            }
            excess[row] = 128 * sum;
        }
}

/* Bytes of a tile of `kind`, 0 for one that this CPU does not have, or does better without. */
int specdec_tile_bytes(int kind) {
    return kind < BF16 || kind > I4 || (kind == I8 && !has_vnni && !has_amx) || (kind == I4 && (!has_vnni || has_amx)) ? 0 : TILE_BYTES[kind];
}

/* Ask for large pages for memory that will be read in whole, again and again. */
void specdec_large_pages(void *memory, int64_t bytes) {
    uintptr_t from = ((uintptr_t)memory + 4095) & ~(uintptr_t)4095, to = ((uintptr_t)memory + (uintptr_t)bytes) & ~(uintptr_t)4095;
    if (to > from) madvise((void *)from, to - from, MADV_HUGEPAGE);
}

/* What this CPU can do: 0 nothing here, 1 AVX-512 BF16, 2 AMX too. `most` forbids more. Call first. */
int specdec_open(int most) {
    unsigned a, b, c, d;
    __builtin_cpu_init();
    if (most < 1 || !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16")))
        return 0;
    int tiles = most > 1 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1 && d >> 24 & 1 && d >> 25 & 1; /* AMX-BF16, AMX-TILE, AMX-INT8 */
    if (tiles) tiles = syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM: tile data */
    has_vnni = __builtin_cpu_supports("avx512vnni") > 0, has_amx = tiles; /* once: another thread may be using them */
    return tiles ? 2 : 1;
}
#else
int specdec_open(int most) { return 0; }
#endif
