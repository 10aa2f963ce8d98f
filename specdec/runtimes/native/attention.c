/* Attention of a few queries to one key head's cached keys. */
#include "simd.h"
#ifdef SPECDEC_NATIVE

enum { SOON = 64 }; /* keys ahead that are sent for */

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
 * queries: vnni_bf16 [d / 2][16 columns]; visible: for each key the columns that see it, as bits from `bit` on, or NULL (all see
 * all). p: scratch, [blocks of 16 keys][column][key]; out: [16][d]. once: no other columns read these keys: they are sent
 * for ahead. Memory of whole blocks of keys is read. */
void attend(const bf16 *keys, const bf16 *values, int count, int d, const uint32_t *queries, int columns,
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
#endif
