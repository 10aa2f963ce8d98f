/* Products of bf16 tiles in AVX2: as floats, multiplied with one token after another. */

/* tokens multiplied at once: 12 sums, 3 tokens and a row fit the registers; tiles that are unpacked at once */
enum { ROWS = 3, CHUNK = 32 };

static inline void enter_tiles(void) {}
static inline void leave_tiles(void) {}

/* sum[4 outputs][tokens] += rows 4 quad .. of a tile times `tokens` tokens, `stride` floats apart. wide: the rows, in floats
 * [vector of 8 inputs][4 rows][8], instead of `tile`. */
INLINE void add_tile(int tokens, const uint8_t *tile, const float *wide, int quad, const float *x, int64_t stride, __m256 sum[4][ROWS]) {
    for (int i = 0; i < 4; i++)
        for (int o = 0; o < 4; o++) {
            __m256 row = wide ? _mm256_load_ps(wide + 32 * i + 8 * o) : load_bf16_8((const bf16 *)tile + 32 * (4 * quad + o) + 8 * i);
            for (int r = 0; r < tokens; r++) sum[o][r] = _mm256_fmadd_ps(row, _mm256_load_ps(x + stride * r + 8 * i), sum[o][r]);
        }
}

/* The sums of four vectors' elements, side by side. */
static inline __m128 sums_of(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

static inline void put_sums(__m256 a, __m256 b, __m256 c, __m256 d, float *sums) {
    float four[4];
    _mm_storeu_ps(four, sums_of(a, b, c, d));
    for (int o = 0; o < 4; o++) sums[16 * o] = four[o];
}

/* sums[4 outputs][16 lanes] of `tokens` <= ROWS tokens: all products are added one after the other in 8 places, and those
 * in the end, so a token's result is the same whatever is computed beside it. */
INLINE void four_outputs(int tokens, const Operand *a, int quad, float *sums) {
    const int64_t bytes = 1024 * (int64_t)a->count; /* to what will be read next */
    __m256 sum[4][ROWS];
    for (int o = 0; o < 4; o++)
        for (int r = 0; r < tokens; r++) sum[o][r] = _mm256_setzero_ps();
    for (int k = 0; k < a->count; k++) {
        const uint8_t *tile = a->tiles + 1024 * (int64_t)k;
        for (int i = 64 * quad; i < 1024; i += 256) _mm_prefetch((const char *)tile + bytes + i, _MM_HINT_T1);
        add_tile(tokens, tile, NULL, quad, (const float *)a->x + 32 * k, a->stride / 4, sum);
    }
    for (int r = 0; r < tokens; r++) put_sums(sum[0][r], sum[1][r], sum[2][r], sum[3][r], sums + r);
}

/* The same products of `count` unpacked tiles, added to sums [4][8] of each token. */
INLINE void add_unpacked(int tokens, const float *tiles, int count, const float *x, int64_t stride, float *sums) {
    __m256 sum[4][ROWS];
    for (int o = 0; o < 4; o++)
        for (int r = 0; r < tokens; r++) sum[o][r] = _mm256_load_ps(sums + 32 * r + 8 * o);
    for (int k = 0; k < count; k++) add_tile(tokens, NULL, tiles + 128 * k, 0, x + 32 * k, stride, sum);
    for (int o = 0; o < 4; o++)
        for (int r = 0; r < tokens; r++) _mm256_store_ps(sums + 32 * r + 8 * o, sum[o][r]);
}

/* The products with more tokens, added to sums [token][4][8]: tiles are unpacked once for all of them. */
static void add_products(const Operand *a, int quad, int tokens, float *sums) {
    float wide[CHUNK * 128] __attribute__((aligned(64)));
    for (int from = 0; from < a->count; from += CHUNK) {
        int some = a->count - from < CHUNK ? a->count - from : CHUNK;
        for (int k = 0; k < some; k++) {
            const uint8_t *tile = a->tiles + 1024 * (int64_t)(from + k);
            for (int i = 64 * quad; i < 1024; i += 256) _mm_prefetch((const char *)tile + 1024 * (int64_t)a->count + i, _MM_HINT_T1);
            for (int o = 0; o < 4; o++)
                for (int i = 0; i < 4; i++)
                    _mm256_store_ps(wide + 128 * k + 32 * i + 8 * o, load_bf16_8((const bf16 *)tile + 32 * (4 * quad + o) + 8 * i));
        }
        for (int r = 0; r < tokens; r += r % 16 == 15 ? 1 : ROWS) { /* not across blocks */
            const float *x = (const float *)(a->x + a->block * (r / 16) + a->stride * (r % 16)) + 32 * from;
            int left = tokens - r < 16 - r % 16 ? tokens - r : 16 - r % 16;
            if (left >= 3) add_unpacked(3, wide, some, x, a->stride / 4, sums + 32 * r);
            else if (left == 2) add_unpacked(2, wide, some, x, a->stride / 4, sums + 32 * r);
            else add_unpacked(1, wide, some, x, a->stride / 4, sums + 32 * r);
        }
    }
}

/* sums[block][16 outputs][16 lanes] of one output tile in bf16. Lanes without a token are 0. */
static void bf16_product(const Operand *a, int tokens, float *sums) {
    memset(sums, 0, 1024 * (size_t)((tokens + 15) / 16));
    for (int quad = 0; quad < 4; quad++) {
        float *to = sums + 64 * quad, all[16 * MOST_BLOCKS * 32] __attribute__((aligned(64)));
        if (tokens == 1) four_outputs(1, a, quad, to);
        else if (tokens == 2) four_outputs(2, a, quad, to);
        else if (tokens == 3) four_outputs(3, a, quad, to);
        else {
            memset(all, 0, 128 * (size_t)tokens);
            add_products(a, quad, tokens, all);
            for (int r = 0; r < tokens; r++) {
                const float *from = all + 32 * r;
                put_sums(_mm256_load_ps(from), _mm256_load_ps(from + 8), _mm256_load_ps(from + 16), _mm256_load_ps(from + 24),
                    to + 256 * (r / 16) + r % 16);
            }
        }
    }
}

/* vnni_bf16 of a block to rows_f32. */
static void to_rows(const uint32_t *vnni, int features, int tokens, uint8_t *out) {
    float *rows = (float *)out;
    for (int i = 0; i < features / 2; i += 8)
        for (int half = 0; half < 16 && half < tokens; half += 8) {
            __m256i a[8];
            for (int j = 0; j < 8; j++) a[j] = _mm256_load_si256((const __m256i *)(vnni + 16 * (i + j) + half));
            transpose8(a);
            for (int r = 0; r < 8 && half + r < tokens; r++) {
                __m256i even = _mm256_slli_epi32(a[r], 16), odd = _mm256_and_si256(a[r], _mm256_set1_epi32((int)0xffff0000));
                __m256i low = _mm256_unpacklo_epi32(even, odd), high = _mm256_unpackhi_epi32(even, odd);
                __m256i *to = (__m256i *)(rows + (int64_t)(half + r) * features + 2 * i);
                _mm256_store_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
                _mm256_store_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
            }
        }
}

static inline int reads_vnni(const Linear *map) { return 0; }

static inline int attends_in_tiles(void) { return 0; }
static inline void arrange_rows(const bf16 *from, int numbers, bf16 *to) {}
static inline void arrange_columns(int d, uint32_t *pairs) {}
static inline void tiles_score(const bf16 *rows, int count, int d, const uint32_t *queries, int columns, float *to, int stride) {}
static inline void tiles_values(const uint32_t *weights, const uint32_t *values, int d, float *out) {}

static inline int score_few(const bf16 *rows, int left, int d, const uint32_t *queries, int columns, float *to, const uint8_t *one,
    const uint8_t *other) { return 0; }
