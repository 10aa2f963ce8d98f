/* Products of tiles in AMX, 16 tokens at once. */

enum { RING = 8, AHEAD = 2, MANY = 8, NEAR = 4096 }; /* MANY: fewest tokens for which AMX multiplies whole numbers; NEAR: as PREFETCH */

typedef struct {
    uint8_t palette, start, zero[14];
    uint16_t width[16];
    uint8_t height[16];
} TileConfig;

/* Tiles 0 to 5 of `rows` rows, 6 of `rows` rows of `width` bytes, and 7 of width / 4 rows. */
static void configure_tiles(int rows, int width) {
    TileConfig config __attribute__((aligned(64)));
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.width[i] = 64, config.height[i] = (uint8_t)rows;
    config.width[6] = (uint16_t)width, config.height[7] = (uint8_t)(width / 4);
    _tile_loadconfig(&config);
}

static void enter_tiles(void) {
    if (has_amx) configure_tiles(16, 64);
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

/* As row_of_tiles, for many tokens. Loading a tile from memory that was just written is slow, and so is the reverse: codes
 * are unpacked AHEAD tiles before they are multiplied, and sums are scaled AHEAD tiles later. */
INLINE void amx_row_of_tiles(int kind, int tokens, const uint8_t *at, int count, const Rounded *x, float (*to)[16]) {
    const Group g = GROUPS[kind];
    Codes codes[RING][8], whole[RING][2][16];
    Scales scales[RING], s;
    W sum[16];
    const uint8_t *head = at;
    configure_tiles(tokens, kind == K6 ? 16 : 32);
    for (int t = 0; t < tokens; t++) sum[t] = set_w(0);
    for (int k = 0; k < count + 2 * AHEAD; k++) {
        if (k < count) {
            for (int i = 0; i < g.codes; i += 64) _mm_prefetch((const char *)at + NEAR + i, _MM_HINT_T0);
            if (k % g.tiles == 0) scales_of_group(kind, head = at, 0, &s), at += g.head;
            codes_of_tile(kind, at, codes[k % RING]);
            scales_of_tile(kind, head, k % g.tiles, 0, &s);
            scales[k % RING] = s, at += g.codes;
        }
        const int now = k - AHEAD, then = k - 2 * AHEAD;
        __asm__ volatile("" ::: "memory"); /* compilers do not know that tiles are loaded from memory */
        if (now >= 0 && now < count)
            for (int h = 0; h < (kind == K6 ? 2 : 1); h++) {
                _tile_zero(0);
                _tile_loadd(6, x[now * tokens].x + 16 * h, sizeof(Rounded));
                _tile_loadd(7, codes[now % RING] + 4 * h, 64);
                _tile_dpbsud(0, 6, 7);
                _tile_stored(0, whole[now % RING][h], 64);
            }
        for (int t = 0; then >= 0 && t < tokens; t++) {
            const Rounded *own = x + then * tokens + t;
            Codes sums[2];
            for (int h = 0; h < 2; h++)
                sums[h] = _mm512_add_epi32(whole[then % RING][kind == K6 ? h : 0][t], _mm512_set1_epi32(start_of(kind, own, h)));
            sum[t] = scaled(kind, sums[0], sums[1], scales + then % RING, own, sum[t]);
        }
    }
    for (int t = 0; t < tokens; t++) store_w(to[t], sum[t]);
    enter_tiles();
}

/* As dot_few_tokens. */
static void amx_row_of_kind(int kind, int tokens, const uint8_t *tiles, int count, const Rounded *x, float (*to)[16]) {
    BY_KIND(amx_row_of_tiles, tokens, tiles, count, x, to)
}

/* Whether products of whole numbers in AMX equal those of rows, bit by bit: checked once, before AMX is used for them. */
EXPORT int KERNEL(amx_agrees)(void) {
    enum { TILES = 8, TOKENS = 9 };
    uint8_t tiles[TILES * 512 + 512] __attribute__((aligned(64)));
    Rounded x[TILES * TOKENS] __attribute__((aligned(64)));
    float rows[16][16], amx[16][16];
    for (size_t i = 0; i < sizeof tiles; i++) tiles[i] = (i * 37 + i / 64 * 11) & 63; /* numbers are finite */
    for (int i = 0; i < TILES * TOKENS; i++) {
        int32_t half_[2] = {0, 0};
        for (int j = 0; j < 32; j++) half_[j / 16] += x[i].x[j] = (int8_t)((i * 29 + j * 53) % 255 - 127);
        x[i].scale = 0.01f * (float)(i + 1), x[i].sum = (float)(half_[0] + half_[1]);
        x[i].less[0] = -32 * half_[0], x[i].less[1] = -32 * half_[1];
    }
    for (int kind = Q8; kind < KINDS; kind++) {
        dot_few_tokens(kind, TOKENS, tiles, TILES, x, rows);
        enter_tiles();
        amx_row_of_kind(kind, TOKENS, tiles, TILES, x, amx);
        leave_tiles();
        if (memcmp(rows, amx, sizeof(float) * 16 * TOKENS)) return 0;
    }
    return 1;
}

/* --- what the algorithms call: AMX where it is, or else rows --- */

/* As dot_few_tokens. */
static void dot_tokens(int kind, int tokens, const uint8_t *tiles, int count, const Rounded *x, float (*to)[16]) {
    if (amx_blocks && tokens >= MANY) amx_row_of_kind(kind, tokens, tiles, count, x, to);
    else dot_few_tokens(kind, tokens, tiles, count, x, to);
}

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
