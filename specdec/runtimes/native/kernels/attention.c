/* Attention of a few queries to one key head's cached keys. */

enum { SOON = 64 }; /* keys ahead that are sent for */

/* Keys in blocks of 16, without the blocks that nobody sees: holes of ragged rows, what lies before a window. (Memory
 * behind the last key's entry may be read.) */
#define EACH_BLOCK(s)                   \
    for (int s = 0; s < count; s += 16) \
        if (!visible || any_h(visible + s))

#define EACH_KEY(s)   \
    EACH_BLOCK(block) \
    for (int s = block; s < block + 16 && s < count; s++)

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
                for (int i = 0; i < PARTS; i++) v[i] = load_bf16(values + (int64_t)s * d + at + 16 * i);             \
                for (int c = 0; c < COLUMNS; c++) {                                                                  \
                    F weight = set16(p[(columns - 1) * block + s + 16 * c]);                                           \
                    for (int i = 0; i < PARTS; i++) acc[i][c] = fma16(weight, v[i], acc[i][c]);            \
                }                                                                                                    \
            }                                                                                                        \
            for (int i = 0; i < PARTS; i++)                                                                          \
                for (int c = 0; c < COLUMNS; c++) store16(out + c * d + at + 16 * i, acc[i][c]);             \
        }                                                                                                            \
    } while (0)

/* Attention of up to 16 columns (a token and a head each) to `count` keys of one key head.
 * queries: vnni_bf16 [d / 2][16 columns]; visible: for each key the columns that see it, as bits from `bit` on, or NULL (all see
 * all). p: scratch, [blocks of 16 keys][column][key]; out: [16][d]. once: no other columns read these keys: they are sent
 * for ahead. Memory of whole blocks of keys is read. */
static void attend(const bf16 *keys, const bf16 *values, int count, int d, const uint32_t *queries, int columns,
                   const uint16_t *visible, int bit, float scale, int once, float *p, float *out) {
    F most[16], sum[16], scales = set16(scale);
    for (int c = 0; c < 16; c++) most[c] = set16(-1e30f);
    EACH_BLOCK(s) {
        float *to = p + columns * s;
        for (int i = 0; once && i < 16 * d; i += 32) {
            __builtin_prefetch((keys + (int64_t)(s + SOON) * d + i), 0, 3);
            __builtin_prefetch((values + (int64_t)s * d + i), 0, 2);
        }
        M there = mask16(count - s < 16 ? (1u << (count - s)) - 1 : 0xffff);
        score_keys(keys + (int64_t)s * d, d, queries, columns, to);
        for (int c = 0; c < columns; c++) {
            M mine = visible ? both16(there, bit_h(visible + s, bit + c)) : there;
            F v = pick16(mine, mul16(load16(to + 16 * c), scales), set16(-1e30f));
            store16(to + 16 * c, v);
            most[c] = max16(most[c], v);
        }
    }
    for (int c = 0; c < columns; c++) most[c] = set16(largest16(most[c]));
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
    for (int c = 0; c < columns; c++) {
        F share_ = div16(set16(1.0f), max16(sum[c], set16(1e-30f)));
        for (int at = 0; at < d; at += 16) store16(out + c * d + at, mul16(load16(out + c * d + at), share_));
    }
}
