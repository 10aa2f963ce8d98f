/* Products of tiles without AMX: a tile's rows are multiplied with one token after another, so a pass of few tokens costs
 * few products. int8 products take one side without sign: I8's and I4's weights are 128 too large. */

enum { ROWS = 6 }; /* tokens multiplied at once: 24 sums, 4 rows and a token fit the registers */

/* vnni_bf16 to rows_bf16. */
static void to_rows_bf16(const uint32_t *vnni, int features, int tokens, uint32_t *rows) {
    int width = features / 2;
    for (int i = 0; i < width; i += 16) {
        __m512i a[16];
        for (int j = 0; j < 16; j++) a[j] = _mm512_load_si512(vnni + 16 * (i + j));
        transpose(a);
        for (int r = 0; r < tokens; r++) _mm512_store_si512(rows + (int64_t)r * width + i, a[r]);
    }
}

/* rows_bf16 to rows_int8: each token by its largest value. */
static void to_rows_int8(const uint32_t *rows, int features, int tokens, uint8_t *int8) {
    F *scales = (F *)(int8 + 16 * (int64_t)features);
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    float lane[16] __attribute__((aligned(64))) = {0}, sums[16] __attribute__((aligned(64))) = {0};
    for (int r = 0; r < tokens; r++) {
        const uint32_t *row = rows + (int64_t)r * features / 2;
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
            _mm_store_si128((__m128i *)(int8 + (int64_t)r * features + i), _mm512_cvtsepi32_epi8(whole));
        }
        lane[r] = largest / 127.0f, sums[r] = 128.0f * (float)_mm512_reduce_add_epi32(sum);
    }
    scales[0] = _mm512_load_ps(lane), scales[1] = _mm512_load_ps(sums);
}

/* vnni_bf16 to what `map` reads: rows_bf16, or rows_int8. */
static void to_rows(const Map *map, const uint32_t *x, int tokens, uint8_t *out, uint8_t *spare) {
    int features = map->in, blocks = (tokens + 15) / 16;
    for (int b = 0; b < blocks; b++) {
        int some = tokens - 16 * b < 16 ? tokens - 16 * b : 16;
        uint8_t *to = out + b * block_bytes(map), *rows = map->kind >= I8 ? spare : to;
        to_rows_bf16(x + 8 * (int64_t)features * b, features, some, (uint32_t *)rows);
        if (map->kind >= I8) to_rows_int8((const uint32_t *)rows, features, some, to);
    }
}

/* The heads of a row of tiles, as `read_head` reads them. */
INLINE void read_scales(int kind, const uint8_t *tiles, int count, float *scales) {
    const Group g = GROUPS[kind];
    for (int k = 0; k < count; k += g.tiles, tiles += g.head + g.tiles * g.codes) read_head(kind, tiles, scales + 32 * k);
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
INLINE void four_outputs(int kind, int tokens, const Side *a, const Side *b, int quad, const float *scales,
                                                               int64_t ahead, __mmask16 lanes, float *sums) {
    __m512i row[4], next[4], whole[4][ROWS]; /* a kind has sums of one type: casts would keep the compiler from using registers */
    F sum[4][ROWS];
    for (int o = 0; o < 4; o++)
        for (int r = 0; r < tokens; r++)
            if (kind == I8) whole[o][r] = _mm512_setzero_si512();
            else sum[o][r] = _mm512_setzero_ps();
    const int nibbles = kind == Q4 || kind == K4, whole_rows = kind == Q8 || kind == K6;
    if (nibbles) make_tables(scales + 4 * quad, scales + 16 + 4 * quad, next);
    if (whole_rows) four_rows(kind, codes_of(kind, a->tiles, 0), quad, scales, next);
    for (int k = 0; k < a->count; k++) {
        const uint8_t *codes = kind == BF16 ? a->tiles + a->step * k : codes_of(kind, a->tiles, k), *x = a->x + 64 * k;
        if (ahead)
            for (int i = 64 * quad; i < GROUPS[kind].codes; i += 256) _mm_prefetch((const char *)codes + ahead + i, _MM_HINT_T1);
        /* What the next products need is begun before these: they would wait for it behind them. */
        int after = k + 1 < a->count ? 1 : 0;
        const float *soon = scales + 32 * (k + after) + 4 * quad;
        if (nibbles) {
            __m512i table[2] = {next[0], next[1]};
            make_tables(soon, soon + 16, next);
            look_up(codes + 64 * quad, table, row);
        } else if (whole_rows) {
            memcpy(row, next, sizeof row);
            four_rows(kind, codes_of(kind, a->tiles, k + after), quad, scales + 32 * (k + after), next);
        } else four_rows(kind, codes, quad, scales + 32 * k, row);
        for (int r = 0; r < tokens; r++) {
            __m512i token = _mm512_load_si512(x + a->stride * r);
            for (int o = 0; o < 4; o++)
                if (kind == I8) whole[o][r] = _mm512_dpbusd_epi32(whole[o][r], row[o], token);
                else sum[o][r] = _mm512_dpbf16_ps(sum[o][r], (__m512bh)row[o], (__m512bh)token);
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

INLINE void few_tokens(int kind, int tokens, const Side *a, const Side *b, int quad, const float *scales, int64_t ahead, __mmask16 lanes, float *sums) {
    switch (tokens) {
    case 1: four_outputs(kind, 1, a, b, quad, scales, ahead, lanes, sums); break;
    case 2: four_outputs(kind, 2, a, b, quad, scales, ahead, lanes, sums); break;
    case 3: four_outputs(kind, 3, a, b, quad, scales, ahead, lanes, sums); break;
    case 4: four_outputs(kind, 4, a, b, quad, scales, ahead, lanes, sums); break;
    case 5: four_outputs(kind, 5, a, b, quad, scales, ahead, lanes, sums); break;
    default: four_outputs(kind, 6, a, b, quad, scales, ahead, lanes, sums);
    }
}

INLINE void rows_of_kind(int kind, const Side *a, const Side *b, int tokens, float *sums) {
    const int packed = kind != BF16 && kind < I8;
    const int64_t bytes = tiles_bytes(kind, a->count);
    float scales[packed ? 32 * a->count : 16] __attribute__((aligned(64)));
    if (packed) read_scales(kind, a->tiles, a->count, scales);
    if (tokens <= ROWS) {
        for (int quad = 0; quad < 4; quad++) few_tokens(kind, tokens, a, b, quad, scales, bytes, 0xffff, sums + 64 * quad);
        return;
    }
    memset(sums, 0, 1024 * (size_t)((tokens + 15) / 16));
    uint8_t unpacked[packed ? 256 * (size_t)a->count : 64] __attribute__((aligned(64)));
    for (int quad = 0; quad < 4; quad++) {
        Side from = *a, beside = *b;
        if (packed) { /* once for all tokens */
            for (int k = 0; k < a->count; k++) {
                __m512i row[4];
                const uint8_t *codes = codes_of(kind, a->tiles, k);
                for (int i = 64 * quad; i < GROUPS[kind].codes; i += 256) _mm_prefetch((const char *)codes + bytes + i, _MM_HINT_T1);
                four_rows(kind, codes, quad, scales + 32 * k, row);
                for (int o = 0; o < 4; o++) _mm512_store_si512(unpacked + 256 * (size_t)k + 64 * o, row[o]);
            }
            from.tiles = unpacked, from.step = 256, beside.tiles += 256 * quad;
        }
        for (int r = 0; r < tokens; r += r % 16 == 12 ? 4 : ROWS) {
            int left = tokens - r < 16 - r % 16 ? tokens - r : 16 - r % 16;
            from.x = a->x + a->block * (r / 16) + a->stride * (r % 16), beside.x = b->x + b->block * (r / 16) + b->stride * (r % 16);
            few_tokens(packed ? BF16 : kind, left, &from, &beside, packed ? 0 : quad, scales, packed || r ? 0 : bytes,
                       (__mmask16)((1 << (left < ROWS ? left : ROWS)) - 1), sums + 256 * (r / 16) + 64 * quad + r % 16);
        }
    }
}

/* sums[block][16 outputs][16 lanes], as amx_product, from rows. Lanes without a token are 0. */
static void row_product(int kind, const Side *a, const Side *b, int tokens, float *sums) {
    switch (kind) {
    case Q8: rows_of_kind(Q8, a, b, tokens, sums); break;
    case Q4: rows_of_kind(Q4, a, b, tokens, sums); break;
    case Q5: rows_of_kind(Q5, a, b, tokens, sums); break;
    case K4: rows_of_kind(K4, a, b, tokens, sums); break;
    case K5: rows_of_kind(K5, a, b, tokens, sums); break;
    case K6: rows_of_kind(K6, a, b, tokens, sums); break;
    case I8: rows_of_kind(I8, a, b, tokens, sums); break;
    default: rows_of_kind(BF16, a, b, tokens, sums);
    }
}

/* As amx_int8_product, from rows_int8. */
static void row_int8_product(const Side *a, int tokens, const float *scale, float *sums) {
    const Side none = {NULL, NULL, 1024, 0, 0, 0};
    row_product(I8, a, &none, tokens, sums);
    for (int b = 0; b < (tokens + 15) / 16; b++) {
        const F *lanes = (const F *)(a->x + b * a->block + 1024 * (int64_t)a->count); /* their scales, and sums */
        for (int o = 0; o < 16; o++) {
            F v = _mm512_load_ps(sums + 256 * b + 16 * o), own = _mm512_set1_ps(scale[o]);
            _mm512_store_ps(sums + 256 * b + 16 * o, _mm512_mul_ps(_mm512_sub_ps(v, lanes[1]), _mm512_mul_ps(lanes[0], own)));
        }
    }
}

/* whole [tokens][16 outputs] of I4 tiles. */
INLINE void sum_int4(const Side *a, int tokens, const uint8_t *x, int64_t ahead, int32_t *whole_) {
    const int chains = tokens > 2 ? 2 : 4; /* a product waits for the one before it in its sum */
    __m512i sum[ROWS][4], row[8];
    for (int r = 0; r < tokens; r++)
        for (int c = 0; c < chains; c++) sum[r][c] = _mm512_setzero_si512();
    for (int k = 0; k < a->count; k++)
        for (int half_ = 0; half_ < 2; half_++) {
            const uint8_t *tile = a->tiles + tiles_bytes(I4, k);
            for (int i = 64 * half_; i < tiles_bytes(I4, 1); i += 128) _mm_prefetch((const char *)tile + ahead + i, _MM_HINT_T1);
            eight_rows4(tile, half_, row);
            for (int i = 0; i < 8; i++)
                for (int r = 0; r < tokens; r++) {
                    int32_t quad;
                    memcpy(&quad, x + a->stride * r + 64 * k + 32 * half_ + 4 * i, 4);
                    sum[r][i % chains] = _mm512_dpbusd_epi32(sum[r][i % chains], row[i], _mm512_set1_epi32(quad));
                }
        }
    for (int r = 0; r < tokens; r++) {
        for (int c = 1; c < chains; c++) sum[r][0] = _mm512_add_epi32(sum[r][0], sum[r][c]);
        _mm512_store_si512(whole_ + 16 * r, sum[r][0]);
    }
}

/* As amx_int4_product. */
static void row_int4_product(const Side *a, int tokens, const float *scale, float *sums) {
    int32_t whole_[256] __attribute__((aligned(64))) = {0};
    int64_t bytes = tiles_bytes(I4, a->count);
    for (int b = 0; b < (tokens + 15) / 16; b++) {
        const uint8_t *x = a->x + b * a->block;
        const float *lanes = (const float *)(x + 1024 * (int64_t)a->count); /* their scales, and sums */
        int some = tokens - 16 * b < 16 ? tokens - 16 * b : 16;
        for (int r = 0; r < some; r += ROWS, x += ROWS * a->stride)
            switch (some - r) {
            case 1: sum_int4(a, 1, x, bytes, whole_ + 16 * r); break;
            case 2: sum_int4(a, 2, x, bytes, whole_ + 16 * r); break;
            case 3: sum_int4(a, 3, x, bytes, whole_ + 16 * r); break;
            case 4: sum_int4(a, 4, x, bytes, whole_ + 16 * r); break;
            case 5: sum_int4(a, 5, x, bytes, whole_ + 16 * r); break;
            default: sum_int4(a, 6, x, bytes, whole_ + 16 * r);
            }
        scale4(whole_, lanes, lanes + 16, scale, sums + 256 * b);
    }
}
