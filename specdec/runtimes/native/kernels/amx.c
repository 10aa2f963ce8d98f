/* Products of bf16 tiles in AMX, 16 tokens at once. Whole numbers are left to AVX-512: for 8 to 64 tokens, AMX takes 1.2 to 1.4 times as
 * long, because codes must be unpacked to memory first. */

enum { NEAR = 4096 }; /* as PREFETCH */

typedef struct {
    uint8_t palette, start, zero[14];
    uint16_t width[16];
    uint8_t height[16];
} TileConfig;

/* Tiles of 16 rows of 64 bytes. */
static void load_tile_config(void) {
    TileConfig config __attribute__((aligned(64)));
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.width[i] = 64, config.height[i] = 16;
    _tile_loadconfig(&config);
}

static void enter_tiles(void) {
    if (has_amx) load_tile_config();
}

static void leave_tiles(void) {
    if (has_amx) _tile_release();
}

/* sums[block][16 outputs][16 lanes] of one output tile: bf16 tiles on vnni_bf16. */
static void amx_product(const Operand *a, int blocks, float *sums) {
    float odd[MOST_BLOCKS * 256] __attribute__((aligned(64)));
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
    for (int k = 0; k < a->count; k++) {
        const uint8_t *tile = a->tiles + 1024 * (int64_t)k, *x = a->x + 1024 * (int64_t)k;
        for (int i = 0; i < 1024; i += 64) _mm_prefetch((const char *)tile + NEAR + i, _MM_HINT_T0);
        if (k & 1) ADD_TO(1, 3, 5, tile, x, a->block);
        else ADD_TO(0, 2, 4, tile, x, a->block);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, odd, 64);
    if (blocks > 1) { _tile_stored(2, sums + 256, 64); _tile_stored(3, odd + 256, 64); }
    if (blocks > 2) { _tile_stored(4, sums + 512, 64); _tile_stored(5, odd + 512, 64); }
    for (int i = 0; i < 256 * blocks; i += 16) _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(odd + i)));
#undef ADD_TO
}

/* --- what the algorithms call: AMX where it is, or else rows --- */

/* sums[block][16 outputs][16 lanes] of one output tile in bf16. Lanes without a token are 0. */
static void bf16_product(const Operand *a, int tokens, float *sums) {
    if (has_amx) amx_product(a, (tokens + 15) / 16, sums);
    else row_product(a, tokens, sums);
}

static inline int reads_vnni(const Linear *map) { return has_amx && !map->rounded; }

/* Whether a product of tiles is the sums of both halves of 16 pairs, added up and then to what is there. */
EXPORT int KERNEL(tiles_agree)(void) {
    uint32_t a[256] __attribute__((aligned(64))), b[256] __attribute__((aligned(64))), state = 1;
    float sum[256] __attribute__((aligned(64))), got[256] __attribute__((aligned(64)));
    int agree = 1;
    load_tile_config();
    for (int turn = 0; turn < 16; turn++) {
        for (int i = 0; i < 256; i++) { /* numbers as in pairs_agree */
            uint32_t bits[3];
            for (int j = 0; j < 3; j++) state = state * 1664525 + 1013904223, bits[j] = state >> 4;
            a[i] = (bits[0] & 0x87ff87ff) + 0x3c003c00, b[i] = (bits[1] & 0x87ff87ff) + 0x3c003c00;
            sum[i] = to_float((bits[2] & 0x87ffffff) + 0x3c000000);
        }
        _tile_loadd(0, sum, 64);
        _tile_loadd(1, a, 64);
        _tile_loadd(2, b, 64);
        _tile_dpbf16ps(0, 1, 2);
        _tile_stored(0, got, 64);
        for (int i = 0; i < 256; i++) {
            float upper = 0, lower = 0;
            for (int k = 0; k < 16; k++) {
                const uint32_t x = a[i / 16 * 16 + k], y = b[16 * k + i % 16];
                upper = __builtin_fmaf(to_float(x & 0xffff0000), to_float(y & 0xffff0000), upper);
                lower = __builtin_fmaf(to_float(x << 16), to_float(y << 16), lower);
            }
            agree &= got[i] == sum[i] + (lower + upper);
        }
    }
    _tile_release();
    return agree;
}

/* --- attention: the products of score_tile and of value_tile in chains, in the same order of sums --- */

static inline int attends_in_tiles(void) { return has_amx; }

/* 32 numbers in the order in which a product of tiles adds them as add_pairs adds 16 pairs in chains: number j above number 16 + j, in pairs
 * whose second number is first. */
INLINE U arranged(U v) {
    const U other = _mm512_setr_epi32(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    const U at = _mm512_add_epi32(_mm512_or_si512(_mm512_slli_epi32(other, 16), other), set_u(16));
    return _mm512_permutexvar_epi16(at, v);
}

static void arrange_rows(const bf16 *from, int numbers, bf16 *to) {
    for (int i = 0; i < numbers; i += 32) store_u(to + i, arranged(load_u(from + i)));
}

/* As arrange_rows, of pairs[d / 2][16 columns]. */
static void arrange_columns(int d, uint32_t *pairs) {
    for (int i = 0; i < d / 2; i += 16, pairs += 256) {
        U lines[16];
        for (int j = 0; j < 16; j++) lines[j] = load_u(pairs + 16 * j);
        for (int j = 0; j < 8; j++) {
            store_u(pairs + 32 * j, or_u(and_u(lines[j], set_u(0xffff0000)), _mm512_srli_epi32(lines[8 + j], 16)));
            store_u(pairs + 32 * j + 16, or_u(shift_u(lines[j], 16), and_u(lines[8 + j], set_u(0xffff))));
        }
    }
}

/* As score_rows16, of up to 64 keys; rows and queries are arranged, vectors of columns are `stride` numbers apart. */
static void tiles_score(const bf16 *rows, int count, int d, const uint32_t *queries, int columns, float *to, int stride) {
    for (int v = 0; 16 * v < columns; v++, queries += 8 * d, to += stride) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int i = 0; i < d; i += 32) { /* 16 keys are a tile */
            _tile_loadd(4, queries + 8 * i, 64);
            _tile_loadd(5, rows + i, 2 * d);
            _tile_dpbf16ps(0, 5, 4);
            if (count > 16) { _tile_loadd(6, rows + 16 * d + i, 2 * d); _tile_dpbf16ps(1, 6, 4); }
            if (count > 32) { _tile_loadd(7, rows + 32 * d + i, 2 * d); _tile_dpbf16ps(2, 7, 4); }
            if (count > 48) { _tile_loadd(5, rows + 48 * d + i, 2 * d); _tile_dpbf16ps(3, 5, 4); }
        }
        _tile_stored(0, to, 64);
        if (count > 16) _tile_stored(1, to + 256, 64);
        if (count > 32) _tile_stored(2, to + 512, 64);
        if (count > 48) _tile_stored(3, to + 768, 64);
    }
}

/* As chain_values, to out[16 columns][d] of 64 keys whose values are pairs of key k and key 16 + k of each 32. */
static void tiles_values(const uint32_t *weights, const uint32_t *values, int d, float *out) {
    uint32_t of_columns[512] __attribute__((aligned(64))); /* [32 keys][column][16 pairs] */
    for (int half = 0; half < 512; half += 256) {
        U rows[16];
        for (int i = 0; i < 16; i++) rows[i] = load_u(weights + half + 16 * i);
        transpose(rows);
        for (int i = 0; i < 16; i++) store_u(of_columns + half + 16 * i, arranged(rows[i]));
    }
    _tile_loadd(4, of_columns, 64);
    _tile_loadd(5, of_columns + 256, 64);
    for (int i = 0; i < d; i += 32) {
        _tile_loadd(0, out + i, 4 * d);
        _tile_loadd(1, out + i + 16, 4 * d);
        _tile_loadd(6, values + i, 4 * d);
        _tile_loadd(7, values + i + 16, 4 * d);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, values + 16 * d + i, 4 * d);
        _tile_loadd(7, values + 16 * d + i + 16, 4 * d);
        _tile_dpbf16ps(0, 5, 6);
        _tile_dpbf16ps(1, 5, 7);
        _tile_stored(0, out + i, 4 * d);
        _tile_stored(1, out + i + 16, 4 * d);
    }
}
