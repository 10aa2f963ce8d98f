/* Numbers in vectors, and tiles unpacked into registers: what several products share. */
#ifndef SPECDEC_SIMD_H
#define SPECDEC_SIMD_H
#include "native.h"
#ifdef SPECDEC_NATIVE

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

/* The pairs (even, odd) of each lane as vnni_bf16's dwords. */
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

#endif
#endif
