/* Products of tiles in AVX2: a tile's rows are unpacked to floats and multiplied with one token after another. */

enum { ROWS = 3, CHUNK = 32 }; /* tokens multiplied at once: 12 sums, 3 tokens and a row fit the registers; tiles that are unpacked at once */
enum { FLOATS = KINDS };       /* a kind beside the others: a quad's unpacked tiles, float [vector of 8 inputs][4 rows][8] */

static inline void enter_tiles(void) {}
static inline void leave_tiles(void) {}
static inline int tile_inputs(void) { return 128; } /* bytes of 32 inputs */
static inline int surplus(void) { return 0; }       /* of I8's codes: none */

static inline __m128i load128(const void *p) { return _mm_loadu_si128(p); }
static inline __m256 whole8(__m256i v) { return _mm256_cvtepi32_ps(v); }
static inline __m256i words8(const void *p) { return _mm256_cvtepu16_epi32(load128(p)); }

/* The heads of a row of tiles: float [tile][2][16 outputs], scale and low (K6: a scale for each half of the inputs). Scales
 * of nibbles are for codes where they lie: of row 4 i + j, 16^j times as large. */
INLINE void read_scales(int kind, const uint8_t *tiles, int count, float *scales) {
    const Group g = GROUPS[kind];
    const __m256 place = _mm256_setr_ps(1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 1, 0x1p-4f, 0x1p-8f, 0x1p-12f);
    for (int k = 0; k < count; k++) {
        const uint8_t *head = codes_of(kind, tiles, k / g.tiles * g.tiles) - g.head;
        for (int h = 0; h < 2; h++) { /* 8 outputs */
            int at = k % g.tiles;
            __m256 d = _mm256_cvtph_ps(load128(head + 16 * h)), low = kind == Q8 ? d : _mm256_cvtph_ps(load128(head + 32 + 16 * h));
            if (kind == K4 || kind == K5) {
                d = _mm256_mul_ps(d, whole8(_mm256_cvtepu8_epi32(load128(head + 64 + 16 * at + 8 * h))));
                low = _mm256_sub_ps(_mm256_setzero_ps(), _mm256_mul_ps(low, whole8(_mm256_cvtepu8_epi32(load128(head + 192 + 16 * at + 8 * h)))));
            } else if (kind == K6) {
                low = _mm256_mul_ps(d, whole8(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(head + 80 + 32 * at + 8 * h)))));
                d = _mm256_mul_ps(d, whole8(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(head + 64 + 32 * at + 8 * h)))));
            }
            if (kind != Q8 && kind != K6) d = _mm256_mul_ps(d, place);
            _mm256_store_ps(scales + 32 * k + 8 * h, d), _mm256_store_ps(scales + 32 * k + 16 + 8 * h, low);
        }
    }
}

/* The nibbles of inputs 8 i .. of rows 4 quad .., if the kind has such. */
INLINE __m256i nibbles_of(int kind, const uint8_t *codes, int quad, int i) {
    return kind == Q4 || kind == Q5 || kind == K4 || kind == K5 ? words8(codes + 64 * quad + 16 * i) : _mm256_setzero_si256();
}

/* Inputs 8 i .. of row 4 quad + o of a tile. */
INLINE __m256 row_of(int kind, __m256i nibbles, const uint8_t *codes, int quad, int i, int o, const float *scales) {
    const int row = 4 * quad + o, at = 4 * o; /* at: where a nibble lies in its word */
    if (kind == FLOATS) return _mm256_load_ps((const float *)codes + 32 * i + 8 * o);
    if (kind == BF16) return _mm256_castsi256_ps(_mm256_slli_epi32(words8(codes + 64 * row + 16 * i), 16));
    __m256 d = _mm256_broadcast_ss(scales + row), second = _mm256_broadcast_ss(scales + 16 + row);
    if (kind == Q8 || kind == K6) {
        __m256i code = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(codes + 32 * row + 8 * i)));
        return _mm256_mul_ps(whole8(code), kind == K6 && i > 1 ? second : d);
    }
    __m256i code = _mm256_and_si256(nibbles, _mm256_set1_epi32(15 << at));
    if (kind == Q5 || kind == K5) { /* bit 8 i + lane becomes the uppermost, and then the one above the nibble */
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), up = _mm256_sub_epi32(_mm256_set1_epi32(31 - 8 * i), lane);
        __m256i bits = _mm256_castps_si256(_mm256_broadcast_ss((const float *)(codes + 256 + 4 * row)));
        bits = _mm256_srli_epi32(_mm256_sllv_epi32(bits, up), 27 - at);
        code = _mm256_or_si256(code, _mm256_and_si256(bits, _mm256_set1_epi32(16 << at)));
    }
    return _mm256_fmadd_ps(whole8(code), d, second);
}

/* sum[4 outputs][tokens] += a tile of `kind` times `tokens` tokens, `stride` floats apart. */
INLINE void add_tile(int kind, int tokens, const uint8_t *codes, int quad, const float *scales, const float *x, int64_t stride, __m256 sum[4][ROWS]) {
    for (int i = 0; i < 4; i++) {
        __m256i nibbles = nibbles_of(kind, codes, quad, i);
        for (int o = 0; o < 4; o++) {
            __m256 row = row_of(kind, nibbles, codes, quad, i, o, scales);
            for (int r = 0; r < tokens; r++) sum[o][r] = _mm256_fmadd_ps(row, _mm256_load_ps(x + stride * r + 8 * i), sum[o][r]);
        }
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
 * in the end, so a token's result is the same whatever is computed beside it. ahead: bytes to what will be read next. */
INLINE void four_outputs(int kind, int tokens, const Side *a, const Side *b, int quad, const float *scales, int64_t ahead, float *sums) {
    __m256 sum[4][ROWS];
    for (int o = 0; o < 4; o++)
        for (int r = 0; r < tokens; r++) sum[o][r] = _mm256_setzero_ps();
    for (int k = 0; k < a->count; k++) {
        const uint8_t *codes = codes_of(kind, a->tiles, k);
        for (int i = 64 * quad; i < GROUPS[kind].codes; i += 256) _mm_prefetch((const char *)codes + ahead + i, _MM_HINT_T1);
        add_tile(kind, tokens, codes, quad, scales + 32 * k, (const float *)a->x + 32 * k, a->stride / 4, sum);
    }
    for (int k = 0; k < b->count; k++)
        add_tile(BF16, tokens, b->tiles + 1024 * (int64_t)k, quad, NULL, (const float *)b->x + 32 * k, b->stride / 4, sum);
    for (int r = 0; r < tokens; r++) put_sums(sum[0][r], sum[1][r], sum[2][r], sum[3][r], sums + r);
}

/* The same products of `count` unpacked tiles, added to sums [4][8] of each token. */
INLINE void add_unpacked(int tokens, const float *tiles, int count, const float *x, int64_t stride, float *sums) {
    __m256 sum[4][ROWS];
    for (int o = 0; o < 4; o++)
        for (int r = 0; r < tokens; r++) sum[o][r] = _mm256_load_ps(sums + 32 * r + 8 * o);
    for (int k = 0; k < count; k++) add_tile(FLOATS, tokens, (const uint8_t *)(tiles + 128 * k), 0, NULL, x + 32 * k, stride, sum);
    for (int o = 0; o < 4; o++)
        for (int r = 0; r < tokens; r++) _mm256_store_ps(sums + 32 * r + 8 * o, sum[o][r]);
}

/* One side's products with more tokens, added to sums [token][4][8]: tiles are unpacked once for all of them. */
INLINE void add_side(int kind, const Side *side, int quad, const float *scales, int tokens, int64_t ahead, float *sums) {
    float unpacked[CHUNK * 128] __attribute__((aligned(64)));
    for (int from = 0; from < side->count; from += CHUNK) {
        int some = side->count - from < CHUNK ? side->count - from : CHUNK;
        for (int k = 0; k < some; k++) {
            const uint8_t *codes = codes_of(kind, side->tiles, from + k);
            for (int i = 64 * quad; i < GROUPS[kind].codes; i += 256) _mm_prefetch((const char *)codes + ahead + i, _MM_HINT_T1);
            for (int i = 0; i < 4; i++) {
                __m256i nibbles = nibbles_of(kind, codes, quad, i);
                for (int o = 0; o < 4; o++)
                    _mm256_store_ps(unpacked + 128 * k + 32 * i + 8 * o, row_of(kind, nibbles, codes, quad, i, o, scales + 32 * (from + k)));
            }
        }
        for (int r = 0; r < tokens; r += r % 16 == 15 ? 1 : ROWS) { /* not across blocks */
            const float *x = (const float *)(side->x + side->block * (r / 16) + side->stride * (r % 16)) + 32 * from;
            int left = tokens - r < 16 - r % 16 ? tokens - r : 16 - r % 16;
            if (left >= 3) add_unpacked(3, unpacked, some, x, side->stride / 4, sums + 32 * r);
            else if (left == 2) add_unpacked(2, unpacked, some, x, side->stride / 4, sums + 32 * r);
            else add_unpacked(1, unpacked, some, x, side->stride / 4, sums + 32 * r);
        }
    }
}

INLINE void product_of_kind(int kind, const Side *a, const Side *b, int tokens, float *sums) {
    const int64_t bytes = tiles_bytes(kind, a->count);
    float scales[kind == BF16 ? 32 : 32 * a->count] __attribute__((aligned(64)));
    if (kind != BF16) read_scales(kind, a->tiles, a->count, scales);
    for (int quad = 0; quad < 4; quad++) {
        float *to = sums + 64 * quad, all[16 * MOST_BLOCKS * 32] __attribute__((aligned(64)));
        if (tokens == 1) four_outputs(kind, 1, a, b, quad, scales, bytes, to);
        else if (tokens == 2) four_outputs(kind, 2, a, b, quad, scales, bytes, to);
        else if (tokens == 3) four_outputs(kind, 3, a, b, quad, scales, bytes, to);
        else {
            memset(all, 0, 128 * (size_t)tokens);
            add_side(kind, a, quad, scales, tokens, bytes, all);
            add_side(BF16, b, quad, scales, tokens, 0, all);
            for (int r = 0; r < tokens; r++) {
                const float *from = all + 32 * r;
                put_sums(_mm256_load_ps(from), _mm256_load_ps(from + 8), _mm256_load_ps(from + 16), _mm256_load_ps(from + 24), to + 256 * (r / 16) + r % 16);
            }
        }
    }
}

/* Products of I8 tiles and rows_int8, times the scales of both: whole numbers, so their order is free. */
static void int8_product(const Side *a, int tokens, const float *scale, float *sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int r = 0; r < tokens; r++) {
        const int8_t *x = (const int8_t *)(a->x + a->block * (r / 16) + a->stride * (r % 16));
        const float own = ((const float *)(a->x + a->block * (r / 16) + 1024 * (int64_t)a->count))[r % 16];
        for (int row = 0; row < 16; row++) {
            __m256i sum = _mm256_setzero_si256();
            for (int k = 0; k < a->count; k++)
                for (int h = 0; h < 2; h++) {
                    __m256i w = _mm256_load_si256((const __m256i *)(a->tiles + 1024 * (int64_t)k + 64 * row + 32 * h));
                    __m256i token = _mm256_load_si256((const __m256i *)(x + 64 * k + 32 * h));
                    __m256i two = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(token, w));
                    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(two, ones));
                }
            __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
            four = _mm_hadd_epi32(four, four);
            sums[256 * (r / 16) + 16 * row + r % 16] = (float)_mm_cvtsi128_si32(_mm_hadd_epi32(four, four)) * (own * scale[row]);
        }
    }
}

/* sums[block][16 outputs][16 lanes] of one output tile of `kind`, and then side b's, which are bf16. scale: of I8. Lanes
 * without a token are 0. */
static void tile_product(int kind, const Side *a, const Side *b, int tokens, const float *scale, float *sums) {
    memset(sums, 0, 1024 * (size_t)((tokens + 15) / 16));
    switch (kind) {
    case Q8: product_of_kind(Q8, a, b, tokens, sums); break;
    case Q4: product_of_kind(Q4, a, b, tokens, sums); break;
    case Q5: product_of_kind(Q5, a, b, tokens, sums); break;
    case K4: product_of_kind(K4, a, b, tokens, sums); break;
    case K5: product_of_kind(K5, a, b, tokens, sums); break;
    case K6: product_of_kind(K6, a, b, tokens, sums); break;
    case I8: int8_product(a, tokens, scale, sums); break;
    default: product_of_kind(BF16, a, b, tokens, sums);
    }
}

/* vnni_bf16 to rows_f32. */
static void to_rows_f32(const uint32_t *vnni, int features, int tokens, float *rows) {
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

/* rows_f32 to rows_int8: each token by its largest value. */
static void to_rows_int8(const float *rows, int features, int tokens, uint8_t *int8) {
    float *scales = (float *)(int8 + 16 * (int64_t)features);
    memset(scales, 0, 128);
    for (int r = 0; r < tokens; r++, rows += features) {
        F most = set16(1e-20f);
        for (int i = 0; i < features; i += 16) most = max16(most, abs16(load16(rows + i)));
        float largest = largest16(most);
        __m256 inverse = _mm256_set1_ps(127.0f / largest);
        for (int i = 0; i < features; i += 16) {
            __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(rows + i), inverse));
            __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(rows + i + 8), inverse));
            a = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
            _mm_store_si128((__m128i *)(int8 + (int64_t)r * features + i), _mm_packs_epi16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
        }
        scales[r] = largest / 127.0f;
    }
}

static inline int reads_vnni(const Map *map) { return 0; }

/* What `map` reads of vnni_bf16 `x`: rows_f32, or rows_int8 for I8 maps. spare: room for a block. */
static const uint32_t *input_of(const Map *map, const uint32_t *x, int tokens, uint8_t *out, uint8_t *spare) {
    int features = map->in, blocks = (tokens + 15) / 16;
    for (int b = 0; b < blocks; b++) {
        int some = tokens - 16 * b < 16 ? tokens - 16 * b : 16;
        uint8_t *to = out + b * block_bytes(map), *rows = map->kind >= I8 ? spare : to;
        to_rows_f32(x + 8 * (int64_t)features * b, features, some, (float *)rows);
        if (map->kind >= I8) to_rows_int8((const float *)rows, features, some, to);
    }
    return (const uint32_t *)out;
}

/* Put a pair of features where bf16 tiles' products read them: `pair` of a block of `features`. */
static void put_pairs(uint32_t *block, int features, int pair, U pairs) {
    uint32_t lanes[16] __attribute__((aligned(64)));
    store_u(lanes, pairs);
    for (int r = 0; r < 16; r++) block[r * features + 2 * pair] = lanes[r] << 16, block[r * features + 2 * pair + 1] = lanes[r] & 0xffff0000;
}

/* to[column][16 keys] = keys [16][d] times queries, vnni_bf16 [d / 2][16 columns]. */
static void score_keys(const bf16 *keys, int d, const uint32_t *queries, int columns, float *to) {
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    for (int half = 0; half < 16; half += 8)
        for (int k = 0; k < d; k += 16) {
            __m256i a[8];
            __m256 even[8], odd[8];
            for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_si256((const __m256i *)(keys + (int64_t)(half + i) * d + k));
            transpose8(a);
            for (int j = 0; j < 8; j++)
                even[j] = _mm256_castsi256_ps(_mm256_slli_epi32(a[j], 16)), odd[j] = _mm256_castsi256_ps(_mm256_and_si256(a[j], upper));
            for (int c = 0; c < columns; c++) {
                __m256 sum = k ? _mm256_load_ps(to + 16 * c + half) : _mm256_setzero_ps();
                for (int j = 0; j < 8; j++) {
                    __m256i pair = _mm256_set1_epi32((int)queries[16 * (k / 2 + j) + c]);
                    sum = _mm256_fmadd_ps(even[j], _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)), sum);
                    sum = _mm256_fmadd_ps(odd[j], _mm256_castsi256_ps(_mm256_and_si256(pair, upper)), sum);
                }
                _mm256_store_ps(to + 16 * c + half, sum);
            }
        }
}
