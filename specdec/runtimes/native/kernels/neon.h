/* AVX2's operations in NEON, as far as simd_avx2.h and avx2.c use them: a vector is a pair. What x86 defines apart from IEEE 754
 * (numbers that are not finite as whole ones, the larger of NaN and a number) is the same here. */

typedef struct { float32x4_t a, b; } __m256;
typedef struct { int32x4_t a, b; } __m256i;
typedef float32x4_t __m128;
typedef int32x4_t __m128i;

enum { _CMP_GT_OQ, _CMP_UNORD_Q };
#define _MM_HINT_T0 3
#define _MM_HINT_T1 2
#define _mm_prefetch(address, hint) __builtin_prefetch(address, 0, hint)

#define NEON_1(name, R, T, operation) static inline R name(T v) { return (R){operation(v.a), operation(v.b)}; }
#define NEON_2(name, T, operation) static inline T name(T a, T b) { return (T){operation(a.a, b.a), operation(a.b, b.b)}; }
#define NEON_3(name, operation) static inline __m256 name(__m256 a, __m256 b, \
    __m256 c) { return (__m256){operation(a.a, b.a, c.a), operation(a.b, b.b, c.b)}; }
#define NEON_SHIFT(name, lanes, operator) static inline __m256i name(__m256i v, \
    int n) { return (__m256i){(int32x4_t)((lanes)v.a operator n), (int32x4_t)((lanes)v.b operator n)}; }

static inline __m128 _mm_max_ps(__m128 a, __m128 b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline int32x4_t neon_whole(float32x4_t v) { return vbslq_s32(vcaltq_f32(v, vdupq_n_f32(0x1p31f)), vcvtnq_s32_f32(v),
    vdupq_n_s32(INT32_MIN)); }
#define NEON_FMA(a, b, c) vfmaq_f32(c, a, b)
#define NEON_FMS(a, b, c) vfmaq_f32(vnegq_f32(c), a, b)
#define NEON_FNMA(a, b, c) vfmsq_f32(c, a, b)
#define NEON_ANDNOT(a, b) vbicq_s32(b, a)
#define NEON_EQUAL(a, b) (int32x4_t)vceqq_s32(a, b)
#define NEON_MORE(a, b) (int32x4_t)vcgtq_s32(a, b)
#define NEON_LOW64(a, b) (int32x4_t)vzip1q_s64((int64x2_t)a, (int64x2_t)b)
#define NEON_HIGH64(a, b) (int32x4_t)vzip2q_s64((int64x2_t)a, (int64x2_t)b)
#define NEON_LOOKUP(a, b) (int32x4_t)vqtbl1q_u8((uint8x16_t)a, (uint8x16_t)b)
#define NEON_PACK(a, b) (int32x4_t)vqmovun_high_s32(vqmovun_s32(a), b)

NEON_2(_mm256_add_ps, __m256, vaddq_f32)
NEON_2(_mm256_sub_ps, __m256, vsubq_f32)
NEON_2(_mm256_mul_ps, __m256, vmulq_f32)
NEON_2(_mm256_div_ps, __m256, vdivq_f32)
NEON_2(_mm256_max_ps, __m256, _mm_max_ps)
NEON_2(_mm256_hadd_ps, __m256, vpaddq_f32)
NEON_3(_mm256_fmadd_ps, NEON_FMA)
NEON_3(_mm256_fmsub_ps, NEON_FMS)
NEON_3(_mm256_fnmadd_ps, NEON_FNMA)
NEON_1(_mm256_sqrt_ps, __m256, __m256, vsqrtq_f32)
NEON_1(_mm256_castps_si256, __m256i, __m256, (int32x4_t))
NEON_1(_mm256_castsi256_ps, __m256, __m256i, (float32x4_t))
NEON_1(_mm256_cvtps_epi32, __m256i, __m256, neon_whole)
NEON_1(_mm256_cvtepi32_ps, __m256, __m256i, vcvtq_f32_s32)
NEON_2(_mm256_add_epi32, __m256i, vaddq_s32)
NEON_2(_mm256_max_epi32, __m256i, vmaxq_s32)
NEON_2(_mm256_and_si256, __m256i, vandq_s32)
NEON_2(_mm256_or_si256, __m256i, vorrq_s32)
NEON_2(_mm256_xor_si256, __m256i, veorq_s32)
NEON_2(_mm256_andnot_si256, __m256i, NEON_ANDNOT)
NEON_2(_mm256_cmpeq_epi32, __m256i, NEON_EQUAL)
NEON_2(_mm256_cmpgt_epi32, __m256i, NEON_MORE)
NEON_2(_mm256_unpacklo_epi32, __m256i, vzip1q_s32)
NEON_2(_mm256_unpackhi_epi32, __m256i, vzip2q_s32)
NEON_2(_mm256_unpacklo_epi64, __m256i, NEON_LOW64)
NEON_2(_mm256_unpackhi_epi64, __m256i, NEON_HIGH64)
NEON_2(_mm256_packus_epi32, __m256i, NEON_PACK)
NEON_2(_mm256_shuffle_epi8, __m256i, NEON_LOOKUP)
NEON_SHIFT(_mm256_slli_epi32, uint32x4_t, <<)
NEON_SHIFT(_mm256_srli_epi32, uint32x4_t, >>)
NEON_SHIFT(_mm256_slli_epi16, uint16x8_t, <<)
NEON_SHIFT(_mm256_srli_epi16, uint16x8_t, >>)

static inline __m256 _mm256_and_ps(__m256 a,
    __m256 b) { return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(a), _mm256_castps_si256(b))); }
static inline __m256 _mm256_andnot_ps(__m256 a,
    __m256 b) { return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_castps_si256(a), _mm256_castps_si256(b))); }
static inline __m256 _mm256_round_ps(__m256 v, int nearest) { return (__m256){vrndnq_f32(v.a), vrndnq_f32(v.b)}; }
static inline __m256 _mm256_blendv_ps(__m256 a, __m256 b,
    __m256 m) { return (__m256){vbslq_f32((uint32x4_t)m.a, b.a, a.a), vbslq_f32((uint32x4_t)m.b, b.b, a.b)}; }
static inline int32x4_t neon_compare(float32x4_t a, float32x4_t b, int how) {
    return (int32x4_t)(how == _CMP_GT_OQ ? vcgtq_f32(a, b) : vmvnq_u32(vandq_u32(vceqq_f32(a, a), vceqq_f32(b, b))));
}
static inline __m256 _mm256_cmp_ps(__m256 a, __m256 b,
    int how) { return (__m256){(float32x4_t)neon_compare(a.a, b.a, how), (float32x4_t)neon_compare(a.b, b.b, how)}; }

static inline __m256 _mm256_loadu_ps(const float *p) { return (__m256){vld1q_f32(p), vld1q_f32(p + 4)}; }
static inline void _mm256_storeu_ps(float *p, __m256 v) { vst1q_f32(p, v.a), vst1q_f32(p + 4, v.b); }
static inline __m256i _mm256_loadu_si256(const void *p) { return (__m256i){(int32x4_t)vld1q_u8(p),
    (int32x4_t)vld1q_u8((const uint8_t *)p + 16)}; }
static inline void _mm256_storeu_si256(void *p, __m256i v) { vst1q_u8(p, (uint8x16_t)v.a), vst1q_u8((uint8_t *)p + 16, (uint8x16_t)v.b); }
#define _mm256_load_ps _mm256_loadu_ps
#define _mm256_store_ps _mm256_storeu_ps
#define _mm256_load_si256 _mm256_loadu_si256
#define _mm256_store_si256 _mm256_storeu_si256
static inline __m256 _mm256_set1_ps(float v) { return (__m256){vdupq_n_f32(v), vdupq_n_f32(v)}; }
static inline __m256 _mm256_setzero_ps(void) { return _mm256_set1_ps(0); }
static inline __m256i _mm256_set1_epi32(int v) { return (__m256i){vdupq_n_s32(v), vdupq_n_s32(v)}; }
static inline __m256i _mm256_set1_epi8(char v) { return _mm256_set1_epi32((int)(0x01010101u * (uint8_t)v)); }
static inline __m256i _mm256_setr_epi32(int a, int b, int c, int d, int e, int f, int g,
    int h) { return (__m256i){{a, b, c, d}, {e, f, g, h}}; }
static inline __m256 _mm256_set_m128(__m128 high, __m128 low) { return (__m256){low, high}; }
static inline __m256 _mm256_i32gather_ps(const float *p, __m256i at, int bytes) {
    return (__m256){{p[at.a[0]], p[at.a[1]], p[at.a[2]], p[at.a[3]]}, {p[at.b[0]], p[at.b[1]], p[at.b[2]], p[at.b[3]]}};
}

static inline __m256i _mm256_broadcastsi128_si256(__m128i v) { return (__m256i){v, v}; }
static inline __m128 _mm256_castps256_ps128(__m256 v) { return v.a; }
static inline __m128i _mm256_castsi256_si128(__m256i v) { return v.a; }
static inline __m256 _mm256_zextps128_ps256(__m128 v) { return (__m256){v, vdupq_n_f32(0)}; }
static inline __m128 _mm256_extractf128_ps(__m256 v, int half) { return half ? v.b : v.a; }
static inline __m128i _mm256_extracti128_si256(__m256i v, int half) { return half ? v.b : v.a; }
static inline int32x4_t neon_half(__m256i a, __m256i b,
    int which) { return which & 8 ? vdupq_n_s32(0) : which & 2 ? which & 1 ? b.b : b.a : which & 1 ? a.b : a.a; }
static inline __m256i _mm256_permute2x128_si256(__m256i a, __m256i b,
    int halves) { return (__m256i){neon_half(a, b, halves & 15), neon_half(a, b, halves >> 4)}; }
static inline __m256 _mm256_permute2f128_ps(__m256 a, __m256 b,
    int halves) { return _mm256_castsi256_ps(_mm256_permute2x128_si256(_mm256_castps_si256(a), _mm256_castps_si256(b), halves)); }
static inline __m256i _mm256_permute4x64_epi64(__m256i v,
    int swap_middle) { return (__m256i){NEON_LOW64(v.a, v.b), NEON_HIGH64(v.a, v.b)}; }
static inline __m256i _mm256_blend_epi16(__m256i a, __m256i b, int odd) {
    return (__m256i){(int32x4_t)vtrn1q_s16((int16x8_t)a.a, (int16x8_t)vshrq_n_u32((uint32x4_t)b.a, 16)),
        (int32x4_t)vtrn1q_s16((int16x8_t)a.b, (int16x8_t)vshrq_n_u32((uint32x4_t)b.b, 16))};
}
static inline int _mm256_movemask_ps(__m256 v) {
    const int32x4_t at = {0, 1, 2, 3};
    return (int)(vaddvq_u32(vshlq_u32(vshrq_n_u32((uint32x4_t)v.a, 31), at)) | vaddvq_u32(vshlq_u32(vshrq_n_u32((uint32x4_t)v.b, 31),
        at)) << 4);
}

static inline __m128 _mm_load_ps(const float *p) { return vld1q_f32(p); }
static inline __m128 _mm_load_ss(const float *p) { return (__m128){*p, 0, 0, 0}; }
static inline void _mm_storeu_ps(float *p, __m128 v) { vst1q_f32(p, v); }
static inline float _mm_cvtss_f32(__m128 v) { return v[0]; }
static inline __m128 _mm_add_ps(__m128 a, __m128 b) { return vaddq_f32(a, b); }
static inline __m128 _mm_max_ss(__m128 a, __m128 b) { return _mm_max_ps(a, b); } /* the first number alone is used */
static inline __m128 _mm_movehl_ps(__m128 a, __m128 b) { return (__m128)vzip2q_s64((int64x2_t)b, (int64x2_t)a); }
static inline __m128 _mm_movehdup_ps(__m128 v) { return vtrn2q_f32(v, v); }
static inline __m128i _mm_loadu_si128(const void *p) { return (int32x4_t)vld1q_u8(p); }
static inline __m128i _mm_loadl_epi64(const void *p) { return (int32x4_t)vcombine_u8(vld1_u8(p), vdup_n_u8(0)); }
static inline int _mm_cvtsi128_si32(__m128i v) { return v[0]; }
static inline __m128i _mm_max_epi32(__m128i a, __m128i b) { return vmaxq_s32(a, b); }
static inline __m128i _mm_add_epi32(__m128i a, __m128i b) { return vaddq_s32(a, b); }
static inline __m128i _mm_shuffle_epi32(__m128i v,
    int order) { return (__m128i){v[order & 3], v[order >> 2 & 3], v[order >> 4 & 3], v[order >> 6]}; }

static inline __m256i _mm256_cvtepi16_epi32(__m128i v) { return (__m256i){vmovl_s16(vget_low_s16((int16x8_t)v)),
    vmovl_high_s16((int16x8_t)v)}; }
static inline __m256i _mm256_cvtepu16_epi32(__m128i v) { return (__m256i){(int32x4_t)vmovl_u16(vget_low_u16((uint16x8_t)v)),
    (int32x4_t)vmovl_high_u16((uint16x8_t)v)}; }
static inline __m256i _mm256_cvtepi8_epi32(__m128i v) { return _mm256_cvtepi16_epi32((int32x4_t)vmovl_s8(vget_low_s8((int8x16_t)v))); }
static inline __m256i _mm256_cvtepu8_epi32(__m128i v) { return _mm256_cvtepu16_epi32((int32x4_t)vmovl_u8(vget_low_u8((uint8x16_t)v))); }
static inline __m256 _mm256_cvtph_ps(__m128i v) { return (__m256){vcvt_f32_f16(vget_low_f16((float16x8_t)v)),
    vcvt_high_f32_f16((float16x8_t)v)}; }
static inline float _cvtsh_ss(uint16_t v) {
    union { uint16_t bits; __fp16 number; } half_ = {v};
    return half_.number;
}
static inline uint16_t _cvtss_sh(float v, int nearest) {
    union { __fp16 number; uint16_t bits; } half_ = {(__fp16)v};
    return half_.bits;
}
