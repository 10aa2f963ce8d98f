/* Products of bf16 tiles in AMX, 16 tokens at once. Whole numbers are left to AVX-512: for 8 to 64 tokens, AMX takes 1.2 to 1.4 times as
 * long, because codes must be unpacked to memory first. */

enum { NEAR = 4096 }; /* as PREFETCH */

typedef struct {
    uint8_t palette, start, zero[14];
    uint16_t width[16];
    uint8_t height[16];
} TileConfig;

/* Tiles of 16 rows of 64 bytes. */
static void enter_tiles(void) {
    TileConfig config __attribute__((aligned(64)));
    if (!has_amx) return;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.width[i] = 64, config.height[i] = 16;
    _tile_loadconfig(&config);
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

/* As score_rows16, in another order of sums; vectors of columns are `stride` numbers apart. Returns 0 without AMX. */
static int tiles_score(const bf16 *keys, int d, const uint32_t *queries, int columns, float *to, int stride) {
    if (!has_amx) return 0;
    for (int v = 0; 16 * v < columns; v++, queries += 8 * d, to += stride) {
        _tile_zero(0);
        for (int k = 0; k < d; k += 32) {
            _tile_loadd(4, keys + k, 2 * d);
            _tile_loadd(5, queries + 8 * k, 64);
            _tile_dpbf16ps(0, 4, 5);
        }
        _tile_stored(0, to, 64);
    }
    return 1;
}
