/* Products of bf16 tiles without AMX: a tile's rows are multiplied with one token after another, so a pass of few tokens costs
 * few products. */

enum { ROWS = 6 }; /* tokens multiplied at once: 24 sums, 4 rows and a token fit the registers */

/* vnni_bf16 of a block to rows_bf16. */
static void to_rows(const uint32_t *vnni, int features, int tokens, uint8_t *out) {
    uint32_t *rows = (uint32_t *)out;
    int width = features / 2;
    for (int i = 0; i < width; i += 16) {
        __m512i a[16];
        for (int j = 0; j < 16; j++) a[j] = _mm512_load_si512(vnni + 16 * (i + j));
        transpose(a);
        for (int r = 0; r < tokens; r++) _mm512_store_si512(rows + (int64_t)r * width + i, a[r]);
    }
}

/* The sums of four vectors' elements, side by side. */
static inline __m128 sums_of(F a, F b, F c, F d) {
    F ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    F cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    F all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* sums[4 outputs][16 lanes], in `lanes`, of `tokens` <= ROWS tokens: products are added one after the other in 16 places, and
 * those in the end, so a token's result is the same whatever is computed beside it. */
INLINE void four_outputs(int tokens, const Operand *a, int quad, int64_t ahead, __mmask16 lanes, float *sums) {
    F sum[4][ROWS];
    for (int o = 0; o < 4; o++)
        for (int r = 0; r < tokens; r++) sum[o][r] = _mm512_setzero_ps();
    for (int k = 0; k < a->count; k++) {
        const uint8_t *rows = a->tiles + 1024 * (int64_t)k + 256 * quad, *x = a->x + 64 * k;
        if (ahead)
            for (int i = 0; i < 256; i += 64) _mm_prefetch((const char *)rows + ahead + i, _MM_HINT_T1);
        for (int r = 0; r < tokens; r++) {
            __m512bh token = (__m512bh)_mm512_load_si512(x + a->stride * r);
            for (int o = 0; o < 4; o++) sum[o][r] = _mm512_dpbf16_ps(sum[o][r], (__m512bh)_mm512_load_si512(rows + 64 * o), token);
        }
    }
    __m128 four[8]; /* of a token four outputs, and then of an output four tokens */
    for (int r = 0; r < 8; r++) four[r] = r < tokens ? sums_of(sum[0][r], sum[1][r], sum[2][r], sum[3][r]) : _mm_setzero_ps();
    _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
    _MM_TRANSPOSE4_PS(four[4], four[5], four[6], four[7]);
    for (int o = 0; o < 4; o++)
        _mm512_mask_storeu_ps(sums + 16 * o, lanes, _mm512_zextps256_ps512(_mm256_set_m128(four[4 + o], four[o])));
}

INLINE void few_tokens(int tokens, const Operand *a, int quad, int64_t ahead, __mmask16 lanes, float *sums) {
    switch (tokens) {
    case 1: four_outputs(1, a, quad, ahead, lanes, sums); break;
    case 2: four_outputs(2, a, quad, ahead, lanes, sums); break;
    case 3: four_outputs(3, a, quad, ahead, lanes, sums); break;
    case 4: four_outputs(4, a, quad, ahead, lanes, sums); break;
    case 5: four_outputs(5, a, quad, ahead, lanes, sums); break;
    default: four_outputs(6, a, quad, ahead, lanes, sums);
    }
}

/* sums[block][16 outputs][16 lanes], as amx_product, from rows. Lanes without a token are 0. */
static void row_product(const Operand *a, int tokens, float *sums) {
    if (tokens > ROWS) memset(sums, 0, 1024 * (size_t)((tokens + 15) / 16));
    for (int quad = 0; quad < 4; quad++)
        for (int r = 0; r < tokens; r += r % 16 == 12 ? 4 : ROWS) {
            int left = tokens - r < 16 - r % 16 ? tokens - r : 16 - r % 16;
            Operand from = *a;
            from.x += a->block * (r / 16) + a->stride * (r % 16);
            few_tokens(left, &from, quad, r ? 0 : 1024 * (int64_t)a->count,
                       tokens <= ROWS ? 0xffff : (__mmask16)((1 << (left < ROWS ? left : ROWS)) - 1),
                           sums + 256 * (r / 16) + 64 * quad + r % 16);
        }
}

/* Whether AVX-512's products of pairs are those that the other instruction sets compute in two steps. */
EXPORT int KERNEL(pairs_agree)(void) {
    uint32_t a[16] __attribute__((aligned(64))), b[16] __attribute__((aligned(64))), state = 1;
    float sum[16] __attribute__((aligned(64))), got[16] __attribute__((aligned(64)));
    for (int turn = 0; turn < 1000; turn++) {
        for (int i = 0; i < 16; i++) { /* numbers of 2 to -8 to 2 to 7 */
            uint32_t bits[3];
            for (int j = 0; j < 3; j++) state = state * 1664525 + 1013904223, bits[j] = state >> 4;
            a[i] = (bits[0] & 0x87ff87ff) + 0x3c003c00, b[i] = (bits[1] & 0x87ff87ff) + 0x3c003c00;
            sum[i] = to_float((bits[2] & 0x87ffffff) + 0x3c000000);
        }
        store_w(got, add_pairs(load_codes(a), load_codes(b), load_w(sum)));
        for (int i = 0; i < 16; i++) {
            const float first = __builtin_fmaf(to_float(a[i] << 16), to_float(b[i] << 16),
                __builtin_fmaf(to_float(a[i] & 0xffff0000), to_float(b[i] & 0xffff0000), sum[i]));
            if (first != got[i]) return 0;
        }
    }
    return 1;
}

/* Scores of `keys` rows and up to `lanes` columns, 16 / lanes keys in a vector; else as score_rows16, whose order of sums it has. */
INLINE void score_few_rows(int lanes, int keys, const bf16 *rows, int d, const uint32_t *queries, float *to, const uint8_t *one,
    const uint8_t *other) {
    const int together = 16 / lanes, vectors = keys / together;
    __m512i four[16]; /* pairs of each key, in its lanes */
    W sum[16], first[16], total[16]; /* of a chain, of the one before it, of all */
    for (int i = 0; i < vectors; i++) sum[i] = first[i] = total[i] = set_w(0);
    for (int k = 0; k < d; k += 8) {
        for (int i = 0; one && i < keys * 16; i += 64) {
            _mm_prefetch((const char *)one + keys * 2 * k + i, _MM_HINT_T1);
            _mm_prefetch((const char *)other + keys * 2 * k + i, _MM_HINT_T1);
        }
        for (int i = 0; i < vectors; i++) {
            four[i] = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(rows + together * i * d + k)));
            for (int j = 1; j < together; j++)
                four[i] = _mm512_mask_broadcast_i32x4(four[i], (__mmask16)(0xffff << lanes * j),
                    _mm_loadu_si128((const __m128i *)(rows + (together * i + j) * d + k)));
        }
#define ADD(PAIR)                                                                                                      \
    do {                                                                                                               \
        const uint32_t *from = queries + 8 * k + 16 * PAIR;                                                            \
        const __m512i query = lanes == 8 ? _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i *)from))            \
                                         : _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)from));              \
        for (int i = 0; i < vectors; i++) sum[i] = add_pairs(_mm512_shuffle_epi32(four[i], 0x55 * PAIR), query, sum[i]); \
    } while (0)
        ADD(0);
        ADD(1);
        ADD(2);
        ADD(3);
#undef ADD
        for (int i = 0; k % 16 == 8 && i < vectors; i++) {
            if (k % 32 == 8) first[i] = sum[i];
            else total[i] = add_w(total[i], add_w(first[i], sum[i]));
            sum[i] = set_w(0);
        }
    }
    for (int i = 0; i < vectors; i++) {
        float *at = to + 16 * together * i;
        if (lanes == 8) {
            _mm256_store_ps(at, _mm512_castps512_ps256(total[i])), _mm256_store_ps(at + 16, _mm512_extractf32x8_ps(total[i], 1));
        } else {
            _mm_store_ps(at, _mm512_castps512_ps128(total[i])), _mm_store_ps(at + 16, _mm512_extractf32x4_ps(total[i], 1));
            _mm_store_ps(at + 32, _mm512_extractf32x4_ps(total[i], 2)), _mm_store_ps(at + 48, _mm512_extractf32x4_ps(total[i], 3));
        }
    }
}

/* Scores of up to `left` keys of few columns. Returns of how many keys, 0 if there are more columns. */
static int score_few(const bf16 *rows, int left, int d, const uint32_t *queries, int columns, float *to, const uint8_t *one,
    const uint8_t *other) {
    if (columns > 8) return 0;
    if (columns <= 4 && left > 16) score_few_rows(4, 32, rows, d, queries, to, one, other);
    else if (columns <= 4) score_few_rows(4, 16, rows, d, queries, to, one, other);
    else if (left > 16) score_few_rows(8, 32, rows, d, queries, to, one, other);
    else score_few_rows(8, 16, rows, d, queries, to, one, other);
    return left > 16 ? 32 : 16;
}
