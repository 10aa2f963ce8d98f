/* Vectors of 16 numbers in AVX2, FMA and F16C. simd_avx512.h documents each function. */

enum { INPUT_BYTES = 4 }; /* of a number that bf16 tiles are multiplied with */

typedef struct { __m256 a, b; } F;
typedef struct { __m256i a, b; } U;
typedef __m256i H;
typedef struct { __m256 a, b; } M; /* all bits of a lane, or none */

#define TWICE(type, operation) return (type){operation(v.a), operation(v.b)}
#define PAIRWISE(type, operation) return (type){operation(a.a, b.a), operation(a.b, b.b)}

static inline F load16(const float *p) { return (F){_mm256_load_ps(p), _mm256_load_ps(p + 8)}; }
static inline void store16(float *p, F v) { _mm256_store_ps(p, v.a), _mm256_store_ps(p + 8, v.b); }
static inline F set16(float v) { return (F){_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
static inline F first16(const float *p) { return (F){_mm256_zextps128_ps256(_mm_load_ss(p)), _mm256_setzero_ps()}; }
static inline F zero16(void) { return (F){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F add16(F a, F b) { PAIRWISE(F, _mm256_add_ps); }
static inline F sub16(F a, F b) { PAIRWISE(F, _mm256_sub_ps); }
static inline F mul16(F a, F b) { PAIRWISE(F, _mm256_mul_ps); }
static inline F div16(F a, F b) { PAIRWISE(F, _mm256_div_ps); }
static inline F fma16(F a, F b, F c) { return (F){_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
static inline F fms16(F a, F b, F c) { return (F){_mm256_fmsub_ps(a.a, b.a, c.a), _mm256_fmsub_ps(a.b, b.b, c.b)}; }
static inline F fnma16(F a, F b, F c) { return (F){_mm256_fnmadd_ps(a.a, b.a, c.a), _mm256_fnmadd_ps(a.b, b.b, c.b)}; }
static inline F sqrt16(F v) { TWICE(F, _mm256_sqrt_ps); }
static inline F max16(F a, F b) { PAIRWISE(F, _mm256_max_ps); }
static inline __m256 abs8(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
static inline F abs16(F v) { TWICE(F, abs8); }
static inline __m256 to_whole8(__m256 v) { return _mm256_round_ps(v, 8); }
static inline F round16(F v) { TWICE(F, to_whole8); }
static inline __m256 power8(__m256 n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n),
    _mm256_set1_epi32(127)), 23)); }
static inline F scale16(F v, F n) { return (F){_mm256_mul_ps(v.a, power8(n.a)), _mm256_mul_ps(v.b, power8(n.b))}; } /* -127 < n < 128 */
static inline float largest16(F v) {
    __m256 m = _mm256_max_ps(v.a, v.b);
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
static inline F column16(const float *p) {
    const __m256i at = _mm256_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112);
    return (F){_mm256_i32gather_ps(p, at, 4), _mm256_i32gather_ps(p + 128, at, 4)};
}

static inline U load_u(const void *p) { return (U){_mm256_load_si256(p), _mm256_load_si256((const __m256i *)p + 1)}; }
static inline __m256i column8(const uint32_t *p) {
    return _mm256_setr_epi32((int)p[0], (int)p[16], (int)p[32], (int)p[48], (int)p[64], (int)p[80], (int)p[96], (int)p[112]);
}
static inline U column_u(const uint32_t *p) { return (U){column8(p), column8(p + 128)}; }
static inline void store_u(void *p, U v) { _mm256_store_si256(p, v.a), _mm256_store_si256((__m256i *)p + 1, v.b); }
static inline U set_u(uint32_t v) { return (U){_mm256_set1_epi32((int)v), _mm256_set1_epi32((int)v)}; }
static inline U add_u(U a, U b) { PAIRWISE(U, _mm256_add_epi32); }
static inline U max_u(U a, U b) { PAIRWISE(U, _mm256_max_epi32); }
static inline U and_u(U a, U b) { PAIRWISE(U, _mm256_and_si256); }
static inline U or_u(U a, U b) { PAIRWISE(U, _mm256_or_si256); }
static inline U xor_u(U a, U b) { PAIRWISE(U, _mm256_xor_si256); }
static inline U without_u(U b, U a) { PAIRWISE(U, _mm256_andnot_si256); }
static inline U shift_u(U v, int n) { return (U){_mm256_slli_epi32(v.a, n), _mm256_slli_epi32(v.b, n)}; }
static inline U nearest_u(F v) { TWICE(U, _mm256_cvtps_epi32); }
static inline uint32_t largest_u(U v) {
    __m256i m = _mm256_max_epi32(v.a, v.b);
    __m128i h = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epi32(h, _mm_shuffle_epi32(h, 0xb1)));
}
static inline uint32_t sum8_u(__m256i v) {
    __m128i h = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_add_epi32(h, _mm_shuffle_epi32(h, 0xb1)));
}
static inline void sums_u(U v, uint32_t *halves) { halves[0] = sum8_u(v.a), halves[1] = sum8_u(v.b); } /* the sum of each half */
static inline H words_h(U v) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(v.a, low), _mm256_and_si256(v.b, low)), 0xd8);
}
static inline U to_u(F v) { TWICE(U, _mm256_castps_si256); }
static inline F to_f(U v) { TWICE(F, _mm256_castsi256_ps); }

static inline __m256 mask8(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), lane), lane));
}
static inline M mask16(uint32_t bits) { return (M){mask8(bits), mask8(bits >> 8)}; }
static inline uint32_t bits16(M m) { return (uint32_t)(_mm256_movemask_ps(m.a) | _mm256_movemask_ps(m.b) << 8); }
static inline M both16(M a, M b) { PAIRWISE(M, _mm256_and_ps); }
static inline M more16(F a, F b) { return (M){_mm256_cmp_ps(a.a, b.a, _CMP_GT_OQ), _mm256_cmp_ps(a.b, b.b, _CMP_GT_OQ)}; }
static inline F pick16(M m, F a, F b) { return (F){_mm256_blendv_ps(b.a, a.a, m.a), _mm256_blendv_ps(b.b, a.b, m.b)}; }
static inline U pick_u(M m, U a, U b) { return to_u(pick16(m, to_f(a), to_f(b))); }
static inline F keep16(M m, F v) { return (F){_mm256_and_ps(m.a, v.a), _mm256_and_ps(m.b, v.b)}; }

static inline __m256 load_bf16_8(const bf16 *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline F load_bf16(const bf16 *p) { return (F){load_bf16_8(p), load_bf16_8(p + 8)}; }
static inline __m256 load_int8_8(const void *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p))); }
static inline F load_int8(const void *p) { return (F){load_int8_8(p), load_int8_8((const char *)p + 8)}; }
static inline __m256 load_bytes8(const void *p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p))); }
static inline __m256i half_up8(__m256 v) { /* the upper 16 bits are v's bf16 */
    __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x800000), _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    bits = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    bits = _mm256_andnot_si256(_mm256_and_si256(tiny, _mm256_set1_epi32(0x7fffffff)), bits); /* as AVX-512 does: no denormals */
    const __m256i nan = _mm256_set1_epi32(0x7fc00000);
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(bits), _mm256_castsi256_ps(nan), _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
static inline H narrow16(F v) {
    __m256i a = _mm256_srli_epi32(half_up8(v.a), 16), b = _mm256_srli_epi32(half_up8(v.b), 16);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
}
static inline __m256 rounded8(__m256 v) { return _mm256_castsi256_ps(_mm256_and_si256(half_up8(v), _mm256_set1_epi32((int)0xffff0000))); }
static inline F rounded(F v) { TWICE(F, rounded8); }
static inline void store_h(void *p, H v) { _mm256_store_si256((__m256i *)p, v); }
static inline void store_some_h(void *p, H v, int count) {
    uint16_t all[16] __attribute__((aligned(32)));
    _mm256_store_si256((__m256i *)all, v);
    memcpy(p, all, 2 * (size_t)(count >= 16 ? 16 : count > 0 ? count : 0));
}

static inline __m256i paired8(__m256 even, __m256 odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(half_up8(even), 16), half_up8(odd), 0xaa);
}
static inline U paired(F a, F b) { PAIRWISE(U, paired8); }

static inline F four_rows16(const float *p) {
    return (F){_mm256_set_m128(_mm_load_ps(p + 16), _mm_load_ps(p)), _mm256_set_m128(_mm_load_ps(p + 48), _mm_load_ps(p + 32))};
}
static inline F two_rows16(const float *p) { return (F){_mm256_load_ps(p), _mm256_load_ps(p + 16)}; }
static inline void split_four16(F v, F *part) {
    const __m256 zero = _mm256_setzero_ps();
    part[0] = (F){_mm256_permute2f128_ps(v.a, v.a, 0x80), zero}, part[1] = (F){_mm256_permute2f128_ps(v.a, v.a, 0x81), zero};
    part[2] = (F){_mm256_permute2f128_ps(v.b, v.b, 0x80), zero}, part[3] = (F){_mm256_permute2f128_ps(v.b, v.b, 0x81), zero};
}
static inline void split_two16(F v, F *part) {
    part[0] = (F){v.a, _mm256_setzero_ps()}, part[1] = (F){v.b, _mm256_setzero_ps()};
}

/* 8 rows of 8 dwords to their columns. */
static inline void transpose8(__m256i *a) {
    __m256i b[8];
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) /* a[i + c]: of rows i .., columns c and 4 + c */
        for (int h = 0; h < 2; h++) {
            a[i + 2 * h] = _mm256_unpacklo_epi64(b[i + h], b[i + 2 + h]);
            a[i + 2 * h + 1] = _mm256_unpackhi_epi64(b[i + h], b[i + 2 + h]);
        }
    for (int c = 0; c < 4; c++) {
        __m256i low = _mm256_permute2x128_si256(a[c], a[4 + c], 0x20), high = _mm256_permute2x128_si256(a[c], a[4 + c], 0x31);
        a[c] = low, a[4 + c] = high;
    }
}

static inline void transpose(U *a) {
    __m256i part[8];
    U b[16];
    for (int i = 0; i < 16; i += 8) /* rows i .. */
        for (int h = 0; h < 2; h++) {
            for (int j = 0; j < 8; j++) part[j] = h ? a[i + j].b : a[i + j].a;
            transpose8(part);
            for (int j = 0; j < 8; j++)
                if (i) b[8 * h + j].b = part[j];
                else b[8 * h + j].a = part[j];
        }
    memcpy(a, b, sizeof b);
}

static inline uint16_t half_of(float v) { return (uint16_t)_cvtss_sh(v, 0); } /* float16 */
static inline float half(uint16_t v) { return _cvtsh_ss(v); }

enum { WIDE = 8 };
typedef __m256i Codes;
typedef __m256 W;

static inline Codes load_codes(const void *p) { return _mm256_loadu_si256(p); }
static inline Codes same_codes(int v) { return _mm256_set1_epi8((char)v); }
static inline Codes and_codes(Codes a, Codes b) { return _mm256_and_si256(a, b); }
static inline Codes or_codes(Codes a, Codes b) { return _mm256_or_si256(a, b); }
static inline Codes left_codes(Codes v, int n) { return _mm256_slli_epi16(v, n); }
static inline Codes right_codes(Codes v, int n) { return _mm256_srli_epi16(v, n); }
static inline Codes pick_codes(const uint8_t *table,
    Codes at) { return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), at); }
static inline W even_w(Codes pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
static inline W odd_w(Codes pairs) { return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000))); }
static inline W load_w(const float *p) { return _mm256_loadu_ps(p); }
static inline void store_w(float *p, W v) { _mm256_storeu_ps(p, v); }
static inline W set_w(float v) { return _mm256_set1_ps(v); }
static inline W mul_w(W a, W b) { return _mm256_mul_ps(a, b); }
static inline W add_w(W a, W b) { return _mm256_add_ps(a, b); }
static inline W fma_w(W a, W b, W c) { return _mm256_fmadd_ps(a, b, c); }
static inline W fnma_w(W a, W b, W c) { return _mm256_fnmadd_ps(a, b, c); }
static inline W whole_w(Codes v) { return _mm256_cvtepi32_ps(v); }

/* Whole numbers times `scale`. Here they come as they are: fewer registers hold less. */
enum { BASE_BITS = 0, BASE = 0 };
static inline W scaled_whole(Codes v, W scale, W base) { return (void)base, mul_w(whole_w(v), scale); }
static inline W halves_w(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
static inline W powers_w(const void *p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p)), 23)); }
static inline W bytes_w(const void *p) { return load_bytes8(p); }
static inline W signed_bytes_w(const void *p) { return load_int8_8(p); }

static inline Codes same_dword(const void *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}
static inline Codes four_inputs(const int8_t *x) { return same_dword(x); }

/* Pairs of bf16, as AVX-512's instruction multiplies them. */
typedef struct { W first, second; } Pairs;
enum { TILE_VECTORS = 2, TILE_KEYS = 4, TILE_COLUMNS = 4, TILE_PARTS = 2 };
static inline Pairs pairs_of(Codes v) { return (Pairs){even_w(v), odd_w(v)}; }
static inline W add_pairs(Pairs a, Pairs b, W sum) { return fma_w(a.first, b.first, fma_w(a.second, b.second, sum)); }
static inline void join_rows(const bf16 *first, const bf16 *second, uint32_t *to) {
    for (int i = 0; i < 32; i += 8) {
        const __m256i above = _mm256_castps_si256(load_bf16_8(first + i)), below = _mm256_castps_si256(load_bf16_8(second + i));
        _mm256_store_si256((__m256i *)(to + i), _mm256_or_si256(above, _mm256_srli_epi32(below, 16)));
    }
}

#ifdef __AVXVNNI__
static inline __attribute__((always_inline)) Codes sum_codes(int most, int chains, const Codes *codes, int n, const int8_t *x,
    int32_t start) {
    Codes a = _mm256_set1_epi32(start), b = _mm256_setzero_si256();
    for (int i = 0; i < n; i++)
        if (chains > 1 && i & 1) b = _mm256_dpbusd_avx_epi32(b, codes[i], four_inputs(x + 4 * i));
        else a = _mm256_dpbusd_avx_epi32(a, codes[i], four_inputs(x + 4 * i));
    return chains > 1 ? _mm256_add_epi32(a, b) : a;
}
#elif defined(__aarch64__)
/* Codes of 8 bits are multiplied without their 128, and what `start` takes off is left out. */
static inline __attribute__((always_inline)) Codes sum_codes(int most, int chains, const Codes *codes, int n, const int8_t *x,
    int32_t start) {
    Codes sum = _mm256_set1_epi32(most > 63 ? 0 : start);
    for (int i = 0; i < n; i++) {
        Codes own = most > 63 ? _mm256_xor_si256(codes[i], _mm256_set1_epi8(-128)) : codes[i], token = four_inputs(x + 4 * i);
        sum.a = vdotq_s32(sum.a, (int8x16_t)own.a, (int8x16_t)token.a), sum.b = vdotq_s32(sum.b, (int8x16_t)own.b, (int8x16_t)token.b);
    }
    return sum;
}
#else
/* Products are added two by two in 16 bits, which hold 2 x 4 most 127; then in 32. Two of codes of 8 bits exceed them:
 * those are multiplied without their 128, the sign on the inputs, and what `start` takes off is left out. */
static inline __attribute__((always_inline)) Codes sum_codes(int most, int chains, const Codes *codes, int n, const int8_t *x,
    int32_t start) {
    const __m256i ones = _mm256_set1_epi16(1);
    const int together = most > 63 ? 1 : 32767 / (2 * 127 * most) < n ? 32767 / (2 * 127 * most) : n;
    Codes sum = _mm256_set1_epi32(most > 63 ? 0 : start);
    for (int i = 0; i < n; i += together) {
        __m256i words = _mm256_setzero_si256();
        for (int j = i; j < i + together && j < n; j++) {
            Codes own = codes[j], token = four_inputs(x + 4 * j);
            if (most > 63) {
                own = _mm256_xor_si256(own, _mm256_set1_epi8(-128));
                token = _mm256_sign_epi8(token, own), own = _mm256_abs_epi8(own);
            }
            __m256i two = _mm256_maddubs_epi16(own, token);
            words = j == i ? two : _mm256_add_epi16(words, two);
        }
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(words, ones));
    }
    return sum;
}
#endif
