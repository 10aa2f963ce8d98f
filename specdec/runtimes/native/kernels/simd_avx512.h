/* Vectors of 16 numbers in AVX-512: what the algorithms are written in. */

enum { INPUT_BYTES = 2 }; /* of a number that bf16 tiles are multiplied with */

typedef __m512 F;     /* 16 floats */
typedef __m512i U;    /* 16 dwords */
typedef __m256i H;    /* 16 words: bf16 */
typedef __mmask16 M;  /* 16 booleans */

static inline F load16(const float *p) { return _mm512_load_ps(p); }
static inline void store16(float *p, F v) { _mm512_store_ps(p, v); }
static inline F set16(float v) { return _mm512_set1_ps(v); }
static inline F first16(const float *p) { return _mm512_zextps128_ps512(_mm_load_ss(p)); } /* a number, and zeros behind it */
static inline F zero16(void) { return _mm512_setzero_ps(); }
static inline F add16(F a, F b) { return _mm512_add_ps(a, b); }
static inline F sub16(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F mul16(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F div16(F a, F b) { return _mm512_div_ps(a, b); }
static inline F fma16(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }   /* a b + c */
static inline F fms16(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }   /* a b - c */
static inline F fnma16(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a b */
static inline F sqrt16(F v) { return _mm512_sqrt_ps(v); }
static inline F max16(F a, F b) { return _mm512_max_ps(a, b); }
static inline F abs16(F v) { return _mm512_abs_ps(v); }
static inline F round16(F v) { return _mm512_roundscale_ps(v, 8); }
static inline F scale16(F v, F n) { return _mm512_scalef_ps(v, n); } /* v times 2 to the whole number n */
static inline float largest16(F v) { return _mm512_reduce_max_ps(v); }
static inline F column16(const float *p) { /* every 16th number */
    return _mm512_i32gather_ps(_mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240), p, 4);
}

static inline U load_u(const void *p) { return _mm512_load_si512(p); }
static inline U column_u(const uint32_t *p) { /* every 16th dword */
    return _mm512_setr_epi32((int)p[0], (int)p[16], (int)p[32], (int)p[48], (int)p[64], (int)p[80], (int)p[96], (int)p[112],
                             (int)p[128], (int)p[144], (int)p[160], (int)p[176], (int)p[192], (int)p[208], (int)p[224], (int)p[240]);
}
static inline void store_u(void *p, U v) { _mm512_store_si512(p, v); }
static inline U set_u(uint32_t v) { return _mm512_set1_epi32((int)v); }
static inline U add_u(U a, U b) { return _mm512_add_epi32(a, b); }
static inline U max_u(U a, U b) { return _mm512_max_epi32(a, b); }
static inline U and_u(U a, U b) { return _mm512_and_si512(a, b); }
static inline U or_u(U a, U b) { return _mm512_or_si512(a, b); }
static inline U xor_u(U a, U b) { return _mm512_xor_si512(a, b); }
static inline U without_u(U a, U b) { return _mm512_andnot_si512(b, a); } /* a without the bits of b */
static inline U shift_u(U v, int n) { return _mm512_slli_epi32(v, (unsigned)n); }
static inline U nearest_u(F v) { return _mm512_cvtps_epi32(v); }
static inline uint32_t largest_u(U v) { return (uint32_t)_mm512_reduce_max_epi32(v); }
static inline uint32_t sum8_u(__m256i v) {
    __m128i h = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_add_epi32(h, _mm_shuffle_epi32(h, 0xb1)));
}
static inline void sums_u(U v, uint32_t *halves) { /* the sum of each half */
    halves[0] = sum8_u(_mm512_castsi512_si256(v)), halves[1] = sum8_u(_mm512_extracti64x4_epi64(v, 1));
}
static inline H words_h(U v) { return _mm512_cvtepi32_epi16(v); } /* the lower ones */
static inline U to_u(F v) { return _mm512_castps_si512(v); } /* the same bits */
static inline F to_f(U v) { return _mm512_castsi512_ps(v); }

static inline M mask16(uint32_t bits) { return (M)bits; }
static inline uint32_t bits16(M m) { return m; }
static inline M both16(M a, M b) { return a & b; }
static inline M more16(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static inline F pick16(M m, F a, F b) { return _mm512_mask_mov_ps(b, m, a); } /* a where m, else b */
static inline U pick_u(M m, U a, U b) { return _mm512_mask_mov_epi32(b, m, a); }
static inline F keep16(M m, F v) { return _mm512_maskz_mov_ps(m, v); }

static inline F load_bf16(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline F load_int8(const void *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p))); }
static inline F load_bytes(const void *p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p))); }
static inline H narrow16(F v) { return (H)_mm512_cvtneps_pbh(v); } /* to nearest even, as torch does */
static inline F rounded(F v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow16(v)), 16)); }
static inline void store_h(void *p, H v) { _mm256_store_si256((__m256i *)p, v); }
static inline void store_some_h(void *p, H v, int count) { /* the first ones, at any address */
    _mm256_mask_storeu_epi16(p, count >= 16 ? 0xffff : (__mmask16)((1 << (count > 0 ? count : 0)) - 1), v);
}

/* The pairs (even, odd) of each lane as vnni_bf16's dwords. */
static inline U paired(F even, F odd) {
    U low = _mm512_cvtepu16_epi32(narrow16(even)), high = _mm512_cvtepu16_epi32(narrow16(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* The first 4 numbers of 4 rows of 16, and the first 8 of 2; and one of these parts, with zeros behind it. */
static inline F four_rows16(const float *p) {
    F v = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_load_ps(p)), _mm_load_ps(p + 16), 1);
    return _mm512_insertf32x4(_mm512_insertf32x4(v, _mm_load_ps(p + 32), 2), _mm_load_ps(p + 48), 3);
}
static inline F two_rows16(const float *p) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_load_ps(p)), _mm256_load_ps(p + 16), 1);
}
static inline void split_four16(F v, F *part) {
    part[0] = _mm512_maskz_mov_ps(15, v), part[1] = _mm512_maskz_shuffle_f32x4(15, v, v, 1);
    part[2] = _mm512_maskz_shuffle_f32x4(15, v, v, 2), part[3] = _mm512_maskz_shuffle_f32x4(15, v, v, 3);
}
static inline void split_two16(F v, F *part) {
    part[0] = _mm512_maskz_mov_ps(255, v), part[1] = _mm512_maskz_shuffle_f32x4(255, v, v, 14);
}

/* 16 rows of 16 dwords to their columns. */
static inline void transpose(U *a) {
    U b[16];
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
        U even = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        U even2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88), odd2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        a[c] = _mm512_shuffle_i32x4(even, even2, 0x88), a[8 + c] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        a[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88), a[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
}

static inline uint16_t half_of(float v) { return (uint16_t)_cvtss_sh(v, 0); } /* float16 */
static inline float half(uint16_t v) { return _cvtsh_ss(v); }

/* Vectors of WIDE outputs: their weights' codes, four inputs each, as bytes; their sums. */
enum { WIDE = 16 };
typedef __m512i Codes;
typedef __m512 W;

static inline Codes load_codes(const void *p) { return _mm512_loadu_si512(p); }
static inline Codes same_codes(int v) { return _mm512_set1_epi8((char)v); }
static inline Codes and_codes(Codes a, Codes b) { return _mm512_and_si512(a, b); }
static inline Codes or_codes(Codes a, Codes b) { return _mm512_or_si512(a, b); }
static inline Codes left_codes(Codes v, int n) { return _mm512_slli_epi16(v, (unsigned)n); } /* in words: bits of a neighbour come in */
static inline Codes right_codes(Codes v, int n) { return _mm512_srli_epi16(v, (unsigned)n); }
/* of 16 bytes */
static inline Codes pick_codes(const uint8_t *table,
    Codes at) { return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), at); }
static inline W load_w(const float *p) { return _mm512_loadu_ps(p); }
static inline void store_w(float *p, W v) { _mm512_storeu_ps(p, v); }
static inline W set_w(float v) { return _mm512_set1_ps(v); }
static inline W mul_w(W a, W b) { return _mm512_mul_ps(a, b); }
static inline W add_w(W a, W b) { return _mm512_add_ps(a, b); }
static inline W fma_w(W a, W b, W c) { return _mm512_fmadd_ps(a, b, c); }
static inline W fnma_w(W a, W b, W c) { return _mm512_fnmadd_ps(a, b, c); }
static inline W whole_w(Codes v) { return _mm512_cvtepi32_ps(v); }

/* Whole numbers times `scale`, rounded once. A number comes as the bits of the float 3 * 2^22 plus the number, which is below 2^22: a
 * sum begins with BASE_BITS, and one FMA both converts and scales it. base: BASE times `scale`, exact, as a scale has at most 19 bits. */
enum { BASE_BITS = 0x4b400000, BASE = -12582912 };
static inline W scaled_whole(Codes v, W scale, W base) { return fma_w(_mm512_castsi512_ps(v), scale, base); }
static inline W halves_w(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
/* 2 to e - 127; 0: 0 */
static inline W powers_w(const void *p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(p)), 23)); }
static inline W bytes_w(const void *p) { return load_bytes(p); }
static inline W signed_bytes_w(const void *p) { return load_int8(p); }

/* Pairs of bf16: a lane's sum grows by the product of the second numbers, then by that of the first ones. */
typedef Codes Pairs;
enum { TILE_VECTORS = 3, TILE_KEYS = 8, TILE_COLUMNS = 6, TILE_PARTS = 4 }; /* of attention: so many sums stay in registers */
static inline Pairs pairs_of(Codes v) { return v; }
static inline W add_pairs(Pairs a, Pairs b, W sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
static inline Codes same_dword(const void *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}
/* 32 numbers of two rows to pairs, the first row's above. */
static inline void join_rows(const bf16 *first, const bf16 *second, uint32_t *to) {
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second), lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
        11, 12, 13, 14, 15), at = _mm512_add_epi32(_mm512_slli_epi32(lane, 16), _mm512_add_epi32(lane, _mm512_set1_epi32(32)));
    _mm512_store_si512(to, _mm512_permutex2var_epi16(a, at, b));
    _mm512_store_si512(to + 16, _mm512_permutex2var_epi16(a, _mm512_add_epi32(at, _mm512_set1_epi32(0x100010)), b));
}

/* sum + the products of codes and four inputs, which the instruction itself repeats: compilers load them into a register. */
static inline __attribute__((always_inline)) Codes add_four(Codes sum, Codes codes, const int8_t *x) {
    typedef int32_t __attribute__((may_alias)) Four;
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*(const Four *)x));
    return sum;
}

/* start + the products of codes [n] and the inputs `x` [4 n], by output. most: the largest code. `chains` sums side by side:
 * a product waits for the one before it in its sum. */
static inline __attribute__((always_inline)) Codes sum_codes(int most, int chains, const Codes *codes, int n, const int8_t *x,
    int32_t start) {
    Codes a = _mm512_set1_epi32(start), b = _mm512_setzero_si512();
    for (int i = 0; i < n; i++)
        if (chains > 1 && i & 1) b = add_four(b, codes[i], x + 4 * i);
        else a = add_four(a, codes[i], x + 4 * i);
    return chains > 1 ? _mm512_add_epi32(a, b) : a;
}

/* sums [many] + the products of codes [n] and the inputs of as many tokens, `step` bytes apart. */
#define MANY_TOKENS 8
static inline Codes whole_codes(int32_t v) { return _mm512_set1_epi32(v); }
static inline __attribute__((always_inline)) void sum_codes_of_many(int many, const Codes *codes, int n, const int8_t *x, int step,
    Codes *sums) {
    for (int i = 0; i < n; i++)
        for (int t = 0; t < many; t++) sums[t] = add_four(sums[t], codes[i], x + step * t + 4 * i);
}
