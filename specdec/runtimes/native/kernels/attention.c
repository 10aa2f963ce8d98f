/* Attention of a few queries to one key head's cached keys. */

enum { KEYS_AHEAD = 64 }; /* number of keys ahead that are prefetched */

/* Keys in blocks of 16, without the blocks that no column sees (holes of ragged rows, keys before a window). Memory behind
 * the last key may be read. */
#define EACH_BLOCK(s)                   \
    for (int s = 0; s < count; s += 16) \
        if (!visible || any_h(visible + s))

#define EACH_KEY(s)   \
    EACH_BLOCK(block) \
    for (int s = block; s < block + 16 && s < count; s++)

/* Numbers `at` to `at` + 15 of a row of the cache. */
INLINE F cached16(int kind, const uint8_t *row, int d, int at) {
    if (kind == CACHE16) return load_bf16((const bf16 *)row + at);
    uint32_t scale; /* in the upper half */
    memcpy(&scale, row + d + 2 * (at / TOGETHER) - 2, 4);
    return mul16(load_int8(row + at), to_f(and_u(set_u(scale), set_u(0xffff0000))));
}

/* sums to[column][keys] of WIDE keys and `columns` queries, of WIDE pairs of dims, transposed; queries as score_rows16 has them. */
INLINE void score_pairs(int columns, const Codes *pairs, const float *queries, int first, float *to) {
    W sum[6];
    for (int c = 0; c < columns; c++) sum[c] = first ? set_w(0) : load_w(to + 16 * c);
    for (int i = 0; i < WIDE; i++)
        for (int c = 0; c < columns; c++) {
            sum[c] = fma_w(even_w(pairs[i]), set_w(queries[32 * i + c]), sum[c]);
            sum[c] = fma_w(odd_w(pairs[i]), set_w(queries[32 * i + 16 + c]), sum[c]);
        }
    for (int c = 0; c < columns; c++) store_w(to + 16 * c, sum[c]);
}

/* to[column][16 keys] = keys [16][d] times queries [d][16 columns], dims one after another. */
static void score_rows16(const bf16 *keys, int d, const float *queries, int columns, float *to) {
    Codes a[WIDE];
    for (int part = 0; part < 16; part += WIDE)
        for (int k = 0; k < d; k += 2 * WIDE) {
            const float *from = queries + 16 * k;
            int c = 0;
            for (int i = 0; i < WIDE; i++) a[i] = load_codes(keys + (int64_t)(part + i) * d + k);
            transpose_codes(a);
            for (; c + 6 <= columns; c += 6) score_pairs(6, a, from + c, !k, to + 16 * c + part);
            for (; c + 3 <= columns; c += 3) score_pairs(3, a, from + c, !k, to + 16 * c + part);
            for (; c < columns; c++) score_pairs(1, a, from + c, !k, to + 16 * c + part);
        }
}

/* As score_rows16, for rows of 8 bits and rounded queries [d / 32][columns]: sums of a block are whole numbers. */
INLINE void score_rows8(const uint8_t *keys, int d, const Rounded *queries, int columns, float *to) {
    const int64_t row = cache_row(CACHE8, d);
    uint8_t quads[16][16][4] __attribute__((aligned(64)));
    float scales[16];
    U a[16];
    for (int b = 0; b < d / TOGETHER; b++, queries += columns) {
        if (b % 2 == 0) { /* two blocks at once; the numbers behind the last block are not used */
            for (int i = 0; i < 16; i++) a[i] = load_bytes_u(keys + i * row + TOGETHER * b);
            transpose(a);
            for (int i = 0; i < 16; i++) store_u(quads[i], xor_u(a[i], set_u(0x80808080)));
        }
        for (int i = 0; i < 16; i++) scales[i] = widen(((const bf16 *)(keys + i * row + d))[b]);
        for (int p = 0; p < 16; p += WIDE) {
            Codes codes[8];
            for (int i = 0; i < 8; i++) codes[i] = load_codes(quads[8 * (b % 2) + i][p]);
            for (int c = 0; c < columns; c++) {
                const Rounded *x = queries + c;
                W v = whole_w(sum_codes(255, 2, codes, 8, x->x, start_of(Q8, x, 0)));
                v = mul_w(v, load_w(scales + p));
                store_w(to + 16 * c + p, fma_w(v, set_w(x->scale), b ? load_w(to + 16 * c + p) : set_w(0)));
            }
        }
    }
}

/* sum[column] = the sum of p[key][column], out[column][dims] that of p[key][column] v[key][dims]; COLUMNS and PARTS times
 * 16 dims at once. Keys are added in order: on where they lie nothing depends. */
#define WEIGHTED_SUM(COLUMNS, PARTS)                                                                                 \
    do {                                                                                                             \
        F acc[PARTS][COLUMNS], v[PARTS];                                                                             \
        for (int c = 0; c < COLUMNS; c++) acc[0][c] = zero16();                                           \
        EACH_KEY(s)                                                                                                  \
        for (int c = 0; c < COLUMNS; c++)                                                                            \
            acc[0][c] = add16(set16(p[(columns - 1) * block + s + 16 * c]), acc[0][c]);                        \
        for (int c = 0; c < COLUMNS; c++) sum[c] = acc[0][c];                                                        \
        for (int at = 0; at < d; at += 16 * PARTS) {                                                                 \
            for (int i = 0; i < PARTS; i++)                                                                          \
                for (int c = 0; c < COLUMNS; c++) acc[i][c] = zero16();                                   \
            EACH_KEY(s) {                                                                                            \
                for (int i = 0; i < PARTS; i++) v[i] = cached16(kind, values + s * row, d, at + 16 * i);             \
                for (int c = 0; c < COLUMNS; c++) {                                                                  \
                    F weight = set16(p[(columns - 1) * block + s + 16 * c]);                                           \
                    for (int i = 0; i < PARTS; i++) acc[i][c] = fma16(weight, v[i], acc[i][c]);            \
                }                                                                                                    \
            }                                                                                                        \
            for (int i = 0; i < PARTS; i++)                                                                          \
                for (int c = 0; c < COLUMNS; c++) store16(out + c * d + at + 16 * i, acc[i][c]);             \
        }                                                                                                            \
    } while (0)

static int all_numbers_finite(const float *numbers, int count) {
    F sum = zero16();
    float each[16];
    for (int i = 0; i < count; i += 16) sum = fma16(load16(numbers + i), zero16(), sum);
    store16(each, sum);
    for (int i = 0; i < 16; i++)
        if (each[i] != each[i]) return 0;
    return 1;
}

/* As WEIGHTED_SUM, from the keys alone that a column sees: others have the weight 0, which infinite values turn into NaN. */
static void sum_seen(int kind, const uint8_t *values, int count, int d, int columns, const uint16_t *visible, const float *p, float *out) {
    const int64_t row = cache_row(kind, d);
    for (int c = 0; c < columns; c++)
        for (int at = 0; at < d; at += 16) {
            F acc = zero16();
            EACH_KEY(s) {
                const float weight = p[(columns - 1) * block + s + 16 * c];
                if (weight != 0) acc = fma16(set16(weight), cached16(kind, values + s * row, d, at), acc);
            }
            store16(out + c * d + at, acc);
        }
}

/* Attention of up to 16 columns (a token and a head each) to `count` keys of one key head.
 * queries: vnni_bf16 [d / 2][16 columns]; visible: for each key the columns that see it, as bits from `bit` on, or NULL (all see
 * all); cap: of scores, as in Linear; sinks: of each column, or NULL. p: scratch, [blocks of 16 keys][column][key]; out: [16][d].
 * once: no other columns read these keys: they are sent
 * for ahead. equal: to the last bit, in every instruction set. Memory of whole blocks of keys is read. */
INLINE void attend_rows(int kind, const uint8_t *keys, const uint8_t *values, int count, int d, const uint32_t *queries, int columns,
                        const uint16_t *visible, int bit, float scale, float cap, const float *sinks, int once, int equal, float *p,
                            float *out) {
    const int64_t row = cache_row(kind, d);
    Rounded rounded_queries[16 * 256 / TOGETHER];
    float wide[16 * 256] __attribute__((aligned(64)));
    F most[16], sum[16], scales = set16(scale);
    if (kind == CACHE8) round_inputs(queries, d, columns, rounded_queries);
    for (int i = 0; i < d / 2 && kind == CACHE16; i++) {
        U pairs = load_u(queries + 16 * i);
        store16(wide + 32 * i, to_f(shift_u(pairs, 16))), store16(wide + 32 * i + 16, to_f(and_u(pairs, set_u(0xffff0000))));
    }
    for (int c = 0; c < 16; c++) most[c] = set16(-1e30f);
    EACH_BLOCK(s) {
        float *to = p + columns * s;
        for (int i = 0; once && i < 16 * row; i += 64) {
            __builtin_prefetch((keys + (s + KEYS_AHEAD) * row + i), 0, 3);
            __builtin_prefetch((values + s * row + i), 0, 2);
        }
        M there = mask16(count - s < 16 ? (1u << (count - s)) - 1 : 0xffff);
        if (kind == CACHE8) score_rows8(keys + s * row, d, rounded_queries, columns, to);
        else if (equal || !tiles_score((const bf16 *)(keys + s * row), d, queries, columns, to))
            score_rows16((const bf16 *)(keys + s * row), d, wide, columns, to);
        for (int c = 0; c < columns; c++) {
            M mine = visible ? both16(there, bit_h(visible + s, bit + c)) : there;
            F v = mul16(load16(to + 16 * c), scales);
            v = pick16(mine, cap > 0 ? capped16(v, cap) : v, set16(-1e30f));
            store16(to + 16 * c, v);
            most[c] = max16(most[c], v);
        }
    }
    for (int c = 0; c < columns; c++) {
        most[c] = set16(largest16(most[c]));
        if (sinks) most[c] = max16(most[c], set16(sinks[c]));
    }
    EACH_BLOCK(s)
    for (int c = 0; c < columns; c++) {
        F v = load16(p + columns * s + 16 * c);
        M mine = not_less16(v, set16(-1e30f));
        store16(p + columns * s + 16 * c, keep16(mine, exp16(sub16(v, most[c]))));
    }
    if (columns <= 3 && d % 64 == 0) WEIGHTED_SUM(3, 4);
    else if (columns <= 6 && d % 64 == 0) WEIGHTED_SUM(6, 4);
    else if (columns <= 6) WEIGHTED_SUM(6, 2);
    else if (columns <= 9) WEIGHTED_SUM(9, 2);
    else if (columns <= 12) WEIGHTED_SUM(12, 2);
    else WEIGHTED_SUM(16, 1);
    if (visible && !all_numbers_finite(out, columns * d)) sum_seen(kind, values, count, d, columns, visible, p, out);
    for (int c = 0; c < columns; c++) {
        if (sinks) sum[c] = add16(sum[c], exp16(sub16(set16(sinks[c]), most[c])));
        F share_ = div16(set16(1.0f), max16(sum[c], set16(1e-30f)));
        for (int at = 0; at < d; at += 16) store16(out + c * d + at, mul16(load16(out + c * d + at), share_));
    }
}

static void attend(int kind, const uint8_t *keys, const uint8_t *values, int count, int d, const uint32_t *queries, int columns,
                   const uint16_t *visible, int bit, float scale, float cap, const float *sinks, int once, int equal, float *p,
                       float *out) {
    if (kind == CACHE8) attend_rows(CACHE8, keys, values, count, d, queries, columns, visible, bit, scale, cap, sinks, once, equal, p, out);
    else attend_rows(CACHE16, keys, values, count, d, queries, columns, visible, bit, scale, cap, sinks, once, equal, p, out);
}
