/* Products of tiles in AMX, 16 tokens at once. */

enum { RING = 8, AHEAD = 2, PREFETCH = 4096, FAR = 16384 };

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

INLINE void sum_tiles(int kind, const Side *a, const Side *b, int blocks, float *sums) {
    const Group g = GROUPS[kind];
    uint8_t ring[RING][1024] __attribute__((aligned(64)));
    float scales[32 * 8] __attribute__((aligned(64))), odd[MOST_BLOCKS * 256] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    if (blocks > 1) { _tile_zero(2); _tile_zero(3); }
    if (blocks > 2) { _tile_zero(4); _tile_zero(5); }
/* Even and odd tiles are added apart: a product waits for the one before it in its sum. */
#define ADD_TO(one, two, three, rows, at, step)                                                                      \
    do {                                                                                                             \
        const uint8_t *lanes_ = (at);                                                                                \
        _tile_loadd(6, rows, 64);                                                                                    \
        _tile_loadd(7, lanes_, 64);                                                                                  \
        _tile_dpbf16ps(one, 6, 7);                                                                                   \
        if (blocks > 1) { _tile_loadd(7, lanes_ + (step), 64); _tile_dpbf16ps(two, 6, 7); }                          \
        if (blocks > 2) { _tile_loadd(7, lanes_ + 2 * (step), 64); _tile_dpbf16ps(three, 6, 7); }                    \
    } while (0)
#define MULTIPLY(k, rows, at, step)                                                                                  \
    do {                                                                                                             \
        if ((k) & 1) ADD_TO(1, 3, 5, rows, at, step);                                                                \
        else ADD_TO(0, 2, 4, rows, at, step);                                                                        \
    } while (0)
    for (int k = 0; k < a->count + (kind == BF16 ? 0 : AHEAD); k++) { /* unpack ahead: a tile load waits for stores to reach the cache */
        const uint8_t *codes = codes_of(kind, a->tiles, k);
        for (int i = 0; i < g.codes; i += 64) _mm_prefetch((const char *)codes + PREFETCH + i, _MM_HINT_T0);
        if (kind == BF16) {
            MULTIPLY(k, codes, a->x + 1024 * (int64_t)k, a->block);
            continue;
        }
        if (k < a->count) {
            if (k % g.tiles == 0) {
                read_head(kind, codes - g.head, scales);
                for (int i = 0; g.tiles > 1 && i < g.head; i += 64) _mm_prefetch((const char *)codes - g.head + PREFETCH + i, _MM_HINT_T0);
            }
            for (int quad = 0; quad < 4; quad++) {
                __m512i row[4];
                four_rows(kind, codes, quad, scales + 32 * (k % g.tiles), row);
                for (int o = 0; o < 4; o++) _mm512_store_si512(ring[k % RING] + 256 * quad + 64 * o, row[o]);
            }
        }
        if (k >= AHEAD) MULTIPLY(k - AHEAD, ring[(k - AHEAD) % RING], a->x + 1024 * (int64_t)(k - AHEAD), a->block);
    }
    for (int k = 0; k < b->count; k++) MULTIPLY(k, b->tiles + 1024 * (int64_t)k, b->x + 1024 * (int64_t)k, b->block);
    _tile_stored(0, sums, 64);
    _tile_stored(1, odd, 64);
    if (blocks > 1) { _tile_stored(2, sums + 256, 64); _tile_stored(3, odd + 256, 64); }
    if (blocks > 2) { _tile_stored(4, sums + 512, 64); _tile_stored(5, odd + 512, 64); }
    for (int i = 0; i < 256 * blocks; i += 16) _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(odd + i)));
#undef MULTIPLY
#undef ADD_TO
}

/* sums[block][16 outputs][16 lanes] of one output tile: tiles of `kind` on vnni_bf16, and then side b's, which are bf16. */
static void amx_product(int kind, const Side *a, const Side *b, int blocks, float *sums) {
    switch (kind) {
    case Q8: sum_tiles(Q8, a, b, blocks, sums); break;
    case Q4: sum_tiles(Q4, a, b, blocks, sums); break;
    case Q5: sum_tiles(Q5, a, b, blocks, sums); break;
    case K4: sum_tiles(K4, a, b, blocks, sums); break;
    case K5: sum_tiles(K5, a, b, blocks, sums); break;
    case K6: sum_tiles(K6, a, b, blocks, sums); break;
    default: sum_tiles(BF16, a, b, blocks, sums);
    }
}

/* The same for I8 tiles and vnni_int8, times the scales of both. */
static void amx_int8_product(const Side *a, int tokens, const float *scale, float *sums) {
    int32_t *whole = (int32_t *)sums;
    int blocks = (tokens + 15) / 16, count = a->count;
    int64_t stride = a->block;
    _tile_zero(0);
    if (blocks > 1) _tile_zero(1);
    if (blocks > 2) _tile_zero(2);
    for (int k = 0; k < count; k++) {
        const uint8_t *tile = a->tiles + 1024 * (int64_t)k, *lanes = a->x + 1024 * (int64_t)k;
        for (int i = 0; i < 1024; i += 64) _mm_prefetch((const char *)tile + PREFETCH + i, _MM_HINT_T0);
        _tile_loadd(4, tile, 64);
        _tile_loadd(5, lanes, 64);
        _tile_dpbssd(0, 4, 5);
        if (blocks > 1) { _tile_loadd(6, lanes + stride, 64); _tile_dpbssd(1, 4, 6); }
        if (blocks > 2) { _tile_loadd(5, lanes + 2 * stride, 64); _tile_dpbssd(2, 4, 5); }
    }
    _tile_stored(0, whole, 64);
    if (blocks > 1) _tile_stored(1, whole + 256, 64);
    if (blocks > 2) _tile_stored(2, whole + 512, 64);
    for (int b = 0; b < blocks; b++) {
        F lane = _mm512_loadu_ps((const float *)(a->x + b * stride + 1024 * (int64_t)count));
        for (int o = 0; o < 16; o++) {
            F v = _mm512_cvtepi32_ps(_mm512_load_si512(whole + 256 * b + 16 * o));
            _mm512_store_ps(sums + 256 * b + 16 * o, _mm512_mul_ps(v, _mm512_mul_ps(lane, _mm512_set1_ps(scale[o]))));
        }
    }
}

/* The same for I4 tiles and rows_int8. */
static void amx_int4_product(const Side *a, int tokens, const float *scale, float *sums) {
    uint8_t ring[RING][1024] __attribute__((aligned(64)));
    int32_t whole_[256] __attribute__((aligned(64)));
    int blocks = (tokens + 15) / 16;
    _tile_zero(0);
    if (blocks > 1) _tile_zero(1);
    if (blocks > 2) _tile_zero(2);
    for (int k = 0; k < a->count + AHEAD; k++) { /* unpack ahead, as above */
        const uint8_t *tile = a->tiles + tiles_bytes(I4, k), *rows = ring[(k - AHEAD) % RING], *x = a->x + 64 * (int64_t)(k - AHEAD);
        for (int i = 0; i < tiles_bytes(I4, 1); i += 64) _mm_prefetch((const char *)tile + FAR + i, _MM_HINT_T1);
        for (int half_ = 0; half_ < 2 && k < a->count; half_++) {
            __m512i row[8];
            eight_rows4(tile, half_, row);
            for (int i = 0; i < 8; i++) _mm512_store_si512(ring[k % RING] + 512 * half_ + 64 * i, row[i]);
        }
        if (k < AHEAD) continue;
        _tile_loadd(4, rows, 64);
        _tile_loadd(5, x, a->stride);
        _tile_dpbssd(0, 5, 4);
        if (blocks > 1) { _tile_loadd(6, x + a->block, a->stride); _tile_dpbssd(1, 6, 4); }
        if (blocks > 2) { _tile_loadd(5, x + 2 * a->block, a->stride); _tile_dpbssd(2, 5, 4); }
    }
    for (int b = 0; b < blocks; b++) {
        if (b == 0) _tile_stored(0, whole_, 64);
        if (b == 1) _tile_stored(1, whole_, 64);
        if (b == 2) _tile_stored(2, whole_, 64);
        scale4(whole_, (const float *)(a->x + b * a->block + 1024 * (int64_t)a->count), NULL, scale, sums + 256 * b);
    }
}

/* vnni_bf16 to vnni_int8: each lane by its largest value. */
static void to_vnni_int8(const uint32_t *vnni, int features, int blocks, uint8_t *int8) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000), byte = _mm512_set1_epi32(255);
    for (int b = 0; b < blocks; b++, vnni += 8 * features, int8 += int8_block_bytes(features)) {
        __m512i most = _mm512_setzero_si512(); /* without their signs, floats order as integers do */
        for (int i = 0; i < features / 2; i++) {
            __m512i pair = _mm512_load_si512(vnni + 16 * i);
            most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_slli_epi32(pair, 16), _mm512_set1_epi32(0x7fffffff)));
            most = _mm512_max_epi32(most, _mm512_and_si512(pair, _mm512_set1_epi32(0x7fff0000)));
        }
        F largest = _mm512_max_ps(_mm512_castsi512_ps(most), _mm512_set1_ps(1e-20f));
        F inverse = _mm512_div_ps(_mm512_set1_ps(127.0f), largest);
#define WHOLE(bits) _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(bits), inverse))
        for (int i = 0; i < features / 4; i++) {
            __m512i p = _mm512_load_si512(vnni + 32 * i), q = _mm512_load_si512(vnni + 32 * i + 16);
            __m512i low = _mm512_or_si512(_mm512_and_si512(WHOLE(_mm512_slli_epi32(p, 16)), byte),
                                          _mm512_slli_epi32(_mm512_and_si512(WHOLE(_mm512_and_si512(p, upper)), byte), 8));
            __m512i high = _mm512_or_si512(_mm512_and_si512(WHOLE(_mm512_slli_epi32(q, 16)), byte),
                                           _mm512_slli_epi32(_mm512_and_si512(WHOLE(_mm512_and_si512(q, upper)), byte), 8));
            _mm512_store_si512(int8 + 64 * (int64_t)i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
#undef WHOLE
        _mm512_store_ps((float *)(int8 + 16 * (int64_t)features), _mm512_mul_ps(largest, _mm512_set1_ps(1 / 127.0f)));
    }
}

/* --- what the algorithms call: AMX where it is, or else rows --- */

/* sums[block][16 outputs][16 lanes] of one output tile of `kind`, and then side b's, which are bf16. scale: of I8 and I4. */
static void tile_product(int kind, const Side *a, const Side *b, int tokens, const float *scale, float *sums) {
    if (kind == I8 && has_amx) amx_int8_product(a, tokens, scale, sums);
    else if (kind == I4 && has_amx) amx_int4_product(a, tokens, scale, sums);
    else if (kind == I4) row_int4_product(a, tokens, scale, sums);
    else if (kind == I8) row_int8_product(a, tokens, scale, sums);
    else if (has_amx) amx_product(kind, a, b, (tokens + 15) / 16, sums);
    else row_product(kind, a, b, tokens, sums);
}

static inline int reads_vnni(const Map *map) { return has_amx && map->kind < I8; }

/* What `map` reads of vnni_bf16 `x`: itself with AMX, or else rows_bf16 in `out`; for I8 maps vnni_int8 or
 * rows_int8, and for I4 rows_int8. spare: room for a block. */
static const uint32_t *input_of(const Map *map, const uint32_t *x, int tokens, uint8_t *out, uint8_t *spare) {
    if (reads_vnni(map)) return x;
    if (has_amx && map->kind == I8) to_vnni_int8(x, map->in, (tokens + 15) / 16, out);
    else to_rows(map, x, tokens, out, spare);
    return (const uint32_t *)out;
}

/* Bytes between 32 inputs and the next, in a block of what bf16 tiles are multiplied with. */
static int tile_inputs(void) { return has_amx ? 1024 : 64; }

/* Put a pair of features where bf16 tiles' products read them: `pair` of a block of `features`. */
static void put_pairs(uint32_t *block, int features, int pair, U pairs) {
    const U lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (has_amx) store_u(block + 16 * pair, pairs);
    else _mm512_i32scatter_epi32(block + pair, _mm512_mullo_epi32(lanes, _mm512_set1_epi32(features / 2)), pairs, 4);
}

/* What I8's and I4's numbers are larger by. */
static int surplus(void) { return has_amx ? 0 : 128; }

/* to[column][16 keys] = keys [16][d] times queries, vnni_bf16 [d / 2][16 columns]. */
static void score_keys(const bf16 *keys, int d, const uint32_t *queries, int columns, float *to) {
    U a[16];
    if (has_amx) {
        float tile[256] __attribute__((aligned(64)));
        _tile_zero(0);
        for (int k = 0; k < d; k += 32) {
            _tile_loadd(4, keys + k, 2 * d);
            _tile_loadd(5, queries + 8 * k, 64);
            _tile_dpbf16ps(0, 4, 5);
        }
        _tile_stored(0, tile, 64);
        for (int i = 0; i < 16; i++) a[i] = load_u(tile + 16 * i);
        transpose(a);
        for (int c = 0; c < columns; c++) store_u(to + 16 * c, a[c]);
    } else
        for (int k = 0; k < d; k += 32) {
            for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(keys + (int64_t)i * d + k);
            transpose(a);
            for (int c = 0; c < columns; c++) {
                F acc = k ? load16(to + 16 * c) : zero16();
                for (int j = 0; j < 16; j++)
                    acc = _mm512_dpbf16_ps(acc, (__m512bh)a[j], (__m512bh)_mm512_set1_epi32((int)queries[16 * (k / 2 + j) + c]));
                store16(to + 16 * c, acc);
            }
        }
}
