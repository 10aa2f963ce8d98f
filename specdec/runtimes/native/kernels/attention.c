/* Attention of the queries of a key head, a column for each token and head, to the head's cached keys.
 *
 * All columns read a block of keys while it is in the nearest cache. Products are added in pairs of bf16, the second number first,
 * as AVX-512's instruction does. "In chains": 16 numbers are added up, the next 16 likewise, and both sums together to what is there,
 * as a product of AMX's tiles does. Scores are added in chains. A key's weight is 2 to its score over 2 to the column's base, rounded to bf16. The base is the
 * rounded score of the first key that the column sees, and a later one that is FAR beyond it becomes the base: so sums change by
 * powers of two alone. Values are added in chains in blocks that end at least LATE positions before the column's token and of which it
 * sees all keys, else key by key. No draft is LATE deep, so the slots of such blocks are positions: a result depends on the visible keys
 * and their order, not on the blocks and slots in which the late ones lie. */

enum { KEYS = 64, MOST_COLUMNS = 128, VECTORS = MOST_COLUMNS / 16, FAR = 60, LATE = 256 }; /* KEYS: of a block */

typedef struct { /* scratch of a thread; vectors have 16 columns */
    uint32_t queries[VECTORS * WIDEST_HEAD / 2 * 16] __attribute__((aligned(64))); /* [vector][d / 2][16], pairs */
    float scores[VECTORS][KEYS][16];
    uint32_t weights[VECTORS][KEYS / 2][16], values[KEYS / 2 * WIDEST_HEAD]; /* pairs of keys, the first one above; values: [pair][d] */
    float parts[TILE_COLUMNS * TILE_PARTS][WIDE];                    /* sums of the first 16 of 32 numbers */
    float out[MOST_COLUMNS * WIDEST_HEAD];                                   /* [column][d] */
    float base[VECTORS][16], sum[VECTORS][16];
    float first[VECTORS][16], end[VECTORS][16]; /* each column sees the slots [first, end), `begin` ones and those of the tree */
    float chained[VECTORS][16];                 /* values of blocks that end here or before may be added in chains */
    bf16 keys[KEYS * WIDEST_HEAD] __attribute__((aligned(64))); /* of rows of 8 bits, or arranged for tiles */
    uint16_t tree[][VECTORS];                   /* of each slot behind the committed ones: the columns that see it, as bits */
} Attention;

typedef struct { /* what the columns of `a` read */
    Attention *a;
    const uint8_t *keys, *values;
    /* No column sees a slot outside [0, begin) and [first, end), and all see the former; committed: where `tree` begins. */
    int kind, d, columns, begin, first, end, committed;
    float scale, cap;
} Reading;

/* sum[key][vector]: products of 8 pairs, from number `from` on, of `keys` rows and `vectors` times WIDE columns. Lines from `one` and from
 * `other` on are prefetched meanwhile, into the second cache; NULL: none. */
INLINE void score_chain(int vectors, int keys, const bf16 *rows, int d, int from, const uint32_t *queries, const uint8_t *one,
    const uint8_t *other, W (*sum)[TILE_VECTORS]) {
    for (int i = 0; i < keys; i++)
        for (int v = 0; v < vectors; v++) sum[i][v] = set_w(0);
    for (int k = from; k < from + 8; k++) {
        Pairs query[TILE_VECTORS];
        if (one) _mm_prefetch((const char *)one + 64 * k, _MM_HINT_T1);
        if (other) _mm_prefetch((const char *)other + 64 * k, _MM_HINT_T1);
        for (int v = 0; v < vectors; v++) query[v] = pairs_of(load_codes(queries + v * WIDE / 16 * 8 * d + 16 * k + v * WIDE % 16));
        for (int i = 0; i < keys; i++) {
            const Pairs key = pairs_of(same_dword(rows + i * d + 2 * k));
            for (int v = 0; v < vectors; v++) sum[i][v] = add_pairs(key, query[v], sum[i][v]);
        }
    }
}

/* to[key][16] of `keys` rows and `vectors` times WIDE columns. one, other: d / 2 lines to prefetch, as in score_chain. */
INLINE void score_tile(int vectors, int keys, const bf16 *rows, int d, const uint32_t *queries, float *to, const uint8_t *one,
    const uint8_t *other) {
    float first[2 * TILE_KEYS * TILE_VECTORS][WIDE] __attribute__((aligned(64)));
    W sum[2 * TILE_KEYS][TILE_VECTORS];
    for (int from = 0; from < d / 2; from += 16) {
        score_chain(vectors, keys, rows, d, from, queries, one, other, sum);
        for (int i = 0; i < keys; i++)
            for (int v = 0; v < vectors; v++) store_w(first[i * vectors + v], sum[i][v]);
        score_chain(vectors, keys, rows, d, from + 8, queries, one, other, sum);
        for (int i = 0; i < keys; i++)
            for (int v = 0; v < vectors; v++) {
                float *at = to + v * WIDE / 16 * 16 * KEYS + 16 * i + v * WIDE % 16;
                const W both = add_w(load_w(first[i * vectors + v]), sum[i][v]);
                store_w(at, from ? add_w(load_w(at), both) : both);
            }
    }
}

/* Scores of 16 keys. keys, values: what is prefetched, or NULL. */
static void score_rows16(const bf16 *rows, int d, const uint32_t *queries, int columns, float *to, const uint8_t *keys,
    const uint8_t *values) {
    for (int v = 0, left = (columns + WIDE - 1) / WIDE, some; left; v += some, left -= some) {
        const uint32_t *from = queries + v * WIDE / 16 * 8 * d + v * WIDE % 16;
        float *at = to + v * WIDE / 16 * 16 * KEYS + v * WIDE % 16;
        some = left >= 3 && left != 4 && TILE_VECTORS == 3 ? 3 : left >= 2 ? 2 : 1;
#define TILES(VECTORS, TILE)                                                                                           \
    for (int k = 0; some == VECTORS && k < 16; k += TILE)                                                              \
    score_tile(VECTORS, TILE, rows + k * d, d, from, at + 16 * k, v || k ? NULL : keys, v || k + TILE != 2 * TILE_KEYS ? NULL : values)
        TILES(TILE_VECTORS, TILE_KEYS);
        if (TILE_VECTORS > 2) TILES(2, TILE_KEYS);
        TILES(1, 2 * TILE_KEYS);
#undef TILES
    }
}

/* Numbers `at` to `at` + 15 of a row of 8 bits. */
INLINE F cached16(const Reading *r, const uint8_t *row, int at) {
    uint32_t scale; /* in the upper half */
    memcpy(&scale, row + r->d + 2 * (at / TOGETHER) - 2, 4);
    return mul16(load_int8(row + at), to_f(and_u(set_u(scale), set_u(0xffff0000))));
}

static void score_block(const Reading *r, int s, int count, int once) {
    const int64_t row = cache_row(r->kind, r->d);
    Attention *a = r->a;
    for (int k = 0; r->kind == CACHE8 && k < count; k++)
        for (int i = 0; i < r->d; i += 16) store_h(a->keys + k * r->d + i, narrow16(cached16(r, r->keys + (s + k) * row, i)));
    const bf16 *all = r->kind == CACHE16 ? (const bf16 *)(r->keys + s * row) : a->keys;
    if (attends_in_tiles()) {
        arrange_rows(all, count * r->d, a->keys);
        tiles_score(a->keys, count, r->d, a->queries, r->columns, a->scores[0][0], 16 * KEYS);
        for (int64_t i = 0; once && i < KEYS * row; i += 64) {
            _mm_prefetch((const char *)r->keys + (s + KEYS) * row + i, _MM_HINT_T1);
            _mm_prefetch((const char *)r->values + (s + KEYS) * row + i, _MM_HINT_T1);
        }
        return;
    }
    for (int k = 0, some; k < count; k += some) {
        const bf16 *rows = all + k * r->d;
        float *to = a->scores[0][k];
        const uint8_t *keys = once ? r->keys + (s + k + KEYS) * row : NULL, *values = once ? r->values + (s + k + KEYS) * row : NULL;
        some = score_few(rows, count - k, r->d, a->queries, r->columns, to, keys, values);
        if (some) continue;
        score_rows16(rows, r->d, a->queries, r->columns, to, keys, values);
        some = 16;
    }
}

/* Which columns of vector `v` see slot `s`. */
INLINE M seen(const Reading *r, int v, int s) {
    const F at = set16((float)s + 0.5f);
    const M committed = both16(more16(at, load16(r->a->first[v])), more16(load16(r->a->end[v]), at));
    if (s < r->begin) return mask16(0xffff);
    return s < r->committed || s >= r->end ? committed : mask16(r->a->tree[s - r->committed][v]);
}

/* Scores as powers of two; -2e30 where a column does not see the key. */
INLINE F score_of(const Reading *r, int v, int s, int k, int all) {
    F x = load16(r->a->scores[v][k]);
    if (r->cap > 0) x = mul16(capped16(mul16(x, set16(r->scale)), r->cap), set16(1.44269504f));
    else x = mul16(x, set16(r->scale * 1.44269504f));
    return all ? x : pick16(seen(r, v, s + k), x, set16(-2e30f));
}

/* 2 to x - base, which is whole; 0 if it is small. Small results are never computed: each would cost an Intel core an assist. */
INLINE F power16(F x, F n, F base) {
    const F r = sub16(x, n);
    F p = set16(9.582851082e-3f);
    p = fma16(p, r, set16(5.590642989e-2f));
    p = fma16(p, r, set16(0.2402409911f));
    p = fma16(p, r, set16(0.6931241751f));
    p = fma16(p, r, set16(1.0f));
    const F by = sub16(n, base);
    return keep16(more16(by, set16(-125.5f)), scale16(p, max16(by, set16(-125.0f))));
}

/* Raise bases to scores that are FAR beyond them. */
static void raise_bases(const Reading *r, int v, int s, int count, int all) {
    Attention *a = r->a;
    float factors[16] __attribute__((aligned(64)));
    const F before = load16(a->base[v]);
    F base = before;
    for (int k = 0; k < count; k++) {
        const F n = round16(score_of(r, v, s, k, all));
        base = pick16(more16(n, add16(base, set16(FAR))), n, base);
    }
    const F by = sub16(before, base);
    store16(factors, keep16(more16(by, set16(-126.5f)), scale16(set16(1.0f), max16(by, set16(-126.0f)))));
    store16(a->base[v], base), store16(a->sum[v], mul16(load16(a->sum[v]), load16(factors)));
    for (int c = 0; c < 16 && 16 * v + c < r->columns; c++)
        for (int i = 0; factors[c] != 1 && i < r->d; i++) a->out[(16 * v + c) * r->d + i] *= factors[c];
}

/* Weights of a block's keys, and their sums. Returns whether a score is FAR beyond its base: then there are none yet. */
INLINE int weigh(const Reading *r, int v, int s, int count, int all) {
    Attention *a = r->a;
    const F base = load16(a->base[v]);
    F most = set16(-2e30f), sum = load16(a->sum[v]);
    for (int k = 0; k < count; k += 2) {
        const F x = score_of(r, v, s, k, all), y = score_of(r, v, s, k + 1, all), n = round16(x), m = round16(y);
        const U pair = paired(power16(y, m, base), power16(x, n, base));
        store_u(a->weights[v][k / 2], pair);
        sum = add16(to_f(and_u(pair, set_u(0xffff0000))), sum), sum = add16(to_f(shift_u(pair, 16)), sum);
        most = max16(n, max16(m, most));
    }
    if (bits16(more16(most, add16(base, set16(FAR))))) return 1;
    store16(a->sum[v], sum);
    return 0;
}

/* The values of a block, in pairs of neighbouring keys, or of key k and key 16 + k of each 32 if they are far. */
static void pair_values(const Reading *r, int s, int count, int far) {
    static const bf16 nothing[WIDEST_HEAD];
    const int64_t row = cache_row(r->kind, r->d);
    for (int p = 0; 2 * p < count; p++) {
        const int k = far ? 32 * (p / 16) + p % 16 : 2 * p, other = far ? k + 16 : k + 1;
        const uint8_t *first = r->values + (s + k) * row, *second = r->values + (s + other) * row;
        uint32_t *to = r->a->values + p * r->d;
        for (int i = 0; r->kind == CACHE8 && i < r->d; i += 16)
            store_u(to + i, paired(other < count ? cached16(r, second, i) : zero16(), cached16(r, first, i)));
        if (other >= count) second = (const uint8_t *)nothing;
        for (int i = 0; r->kind == CACHE16 && i < r->d; i += 32) join_rows((const bf16 *)first + i, (const bf16 *)second + i, to + i);
    }
}

/* out[column][parts times WIDE numbers] += weights times values of `pairs` pairs of keys; halves: NULL, or room for sums in chains. */
INLINE void value_tile(int columns, int parts, const uint32_t *weights, const uint32_t *values, int pairs, int d, float *out,
    float (*halves)[WIDE]) {
    for (int from = 0, end; from < pairs; from = end) {
        W sum[TILE_COLUMNS][TILE_PARTS];
        end = halves ? from + 8 : pairs;
        for (int c = 0; c < columns; c++)
            for (int i = 0; i < parts; i++) sum[c][i] = halves ? set_w(0) : load_w(out + c * d + WIDE * i);
        for (int p = from; p < end; p++) {
            Pairs value[TILE_PARTS];
            for (int i = 0; i < parts; i++) value[i] = pairs_of(load_codes(values + p * d + WIDE * i));
            for (int c = 0; c < columns; c++) {
                const Pairs weight = pairs_of(same_dword(weights + 16 * p + c));
                for (int i = 0; i < parts; i++) sum[c][i] = add_pairs(weight, value[i], sum[c][i]);
            }
        }
        for (int c = 0; c < columns; c++)
            for (int i = 0; i < parts; i++) {
                float *at = out + c * d + WIDE * i, *half = halves ? halves[c * parts + i] : at;
                if (halves && from % 16 == 0) store_w(half, sum[c][i]);
                else store_w(at, halves ? add_w(load_w(at), add_w(load_w(half), sum[c][i])) : sum[c][i]);
            }
    }
}

/* out[columns][d] += weights times values. halves: as of value_tile. */
INLINE void all_values(int columns, const uint32_t *weights, const uint32_t *values, int pairs, int d, float *out, float (*halves)[WIDE]) {
    for (int i = 0, parts; i < d; i += parts * WIDE) {
        parts = (d - i) % (TILE_PARTS * WIDE) ? 2 : TILE_PARTS;
#define MOST(COLUMNS) (COLUMNS < TILE_COLUMNS ? COLUMNS : TILE_COLUMNS) /* larger ones are not called */
#define TILE(COLUMNS)                                                                                                  \
    if (parts == 2) value_tile(MOST(COLUMNS), 2, weights + c, values + i, pairs, d, out + c * d + i, halves);                \
    else value_tile(MOST(COLUMNS), TILE_PARTS, weights + c, values + i, pairs, d, out + c * d + i, halves)
        for (int c = 0, left = columns, some; left; c += some, left -= some) {
            const int turns = (left + TILE_COLUMNS - 1) / TILE_COLUMNS;
            some = (left + turns - 1) / turns;
            switch (some) {
            case 1: TILE(1); break;
            case 2: TILE(2); break;
            case 3: TILE(3); break;
            case 4: TILE(4); break;
            case 5: TILE(5); break;
            default: TILE(6);
            }
        }
#undef TILE
#undef MOST
    }
}

static void add_values(int columns, const uint32_t *weights, const uint32_t *values, int pairs, int d, float *out) {
    all_values(columns, weights, values, pairs, d, out, NULL);
}

/* As add_values of a whole block, in chains. */
static void chain_values(Attention *a, int columns, const uint32_t *weights, int d, float *out) {
    all_values(columns, weights, a->values, KEYS / 2, d, out, a->parts);
}

/* add_values to the columns [from, from + columns) of vector `v`, of which some do not see all keys of the block: what these hold,
 * if it is not finite, must not reach them. */
static void add_seen_values(const Reading *r, int v, int s, int count, int from, int columns) {
    Attention *a = r->a;
    const U exponent = set_u(0x7f800000);
    U most = set_u(0);
    for (int i = 0; i < (count + 1) / 2 * r->d; i += 16) {
        const U pair = load_u(a->values + i);
        most = max_u(most, max_u(and_u(pair, exponent), and_u(shift_u(pair, 16), exponent)));
    }
    float *out = a->out + 16 * v * r->d;
    if (largest_u(most) != 0x7f800000) {
        add_values(columns, a->weights[v][0] + from, a->values, (count + 1) / 2, r->d, out + from * r->d);
        return;
    }
    uint32_t pair[WIDEST_HEAD] __attribute__((aligned(64)));
    for (int c = from; c < from + columns; c++)
        for (int k = 0; k < count; k += 2) {
            const uint32_t first = bits16(seen(r, v, s + k)) >> c & 1, second = k + 1 < count && bits16(seen(r, v, s + k + 1)) >> c & 1;
            const U mask = set_u(0xffff0000 * first | 0xffff * second);
            for (int i = 0; i < r->d; i += 16) store_u(pair + i, and_u(load_u(a->values + k / 2 * r->d + i), mask));
            add_values(1, a->weights[v][k / 2] + c, pair, 1, r->d, out + c * r->d);
        }
}

/* To which columns of vector `v` the values of the block at `s` are added in chains, as bits. */
INLINE uint32_t chained(const Reading *r, int v, int s) {
    const M before = more16(load16(r->a->chained[v]), set16((float)(s + KEYS) - 0.5f));
    return bits16(s + KEYS <= r->begin ? before : both16(before, more16(set16((float)s + 0.5f), load16(r->a->first[v]))));
}

/* Add the values of a block to the columns of vector `v`. all: each sees all of its keys. */
static void add_block(const Reading *r, int v, int s, int count, int all) {
    Attention *a = r->a;
    const int d = r->d, columns = r->columns - 16 * v < 16 ? r->columns - 16 * v : 16;
    const uint32_t chains = chained(r, v, s), every = (1u << columns) - 1;
    float *out = a->out + 16 * v * d;
    if (chains == every) chain_values(a, columns, a->weights[v][0], d, out);
    else if (!chains && all) add_values(columns, a->weights[v][0], a->values, (count + 1) / 2, d, out);
    else if (!chains) add_seen_values(r, v, s, count, 0, columns);
    else
        for (int c = 0; c < columns; c++)
            if (chains >> c & 1) chain_values(a, 1, a->weights[v][0] + c, d, out + c * d);
            else add_seen_values(r, v, s, count, c, 1);
}

/* Let the columns, whose queries and visible slots are in r->a, read the keys; r->a->out [column][d] is the result.
 * sinks: scores of nothing, of each column, or NULL. once: no other columns read these keys: they are prefetched. Memory of 16
 * whole keys is read. */
static void attend(const Reading *r, const float *sinks, int once) {
    Attention *a = r->a;
    const int vectors = (r->columns + 15) / 16, d = r->d;
    for (int v = 0; attends_in_tiles() && v < vectors; v++) arrange_columns(d, a->queries + 8 * d * v);
    float firsts[VECTORS], ends[VECTORS]; /* [from the last first slot, to the first end) all columns see all */
    float last = 0, least = 1e30f;        /* whole blocks from `last` to `least` are added in chains to all columns */
    memset(a->out, 0, 4 * (size_t)r->columns * d);
    for (int v = 0; v < vectors; v++) {
        float *base = a->base[v], *sum = a->sum[v];
        firsts[v] = 0, ends[v] = 1e30f;
        for (int c = 0; c < 16; c++) {
            base[c] = -1e30f, sum[c] = 0;
            if (16 * v + c >= r->columns) base[c] = 1e30f, a->first[v][c] = 1e30f, a->end[v][c] = a->chained[v][c] = 0;
            else firsts[v] = a->first[v][c] > firsts[v] ? a->first[v][c] : firsts[v], ends[v] = a->end[v][c] < ends[v] ? a->end[v][c] : ends[v];
            if (16 * v + c < r->columns && a->chained[v][c] < least) least = a->chained[v][c];
            if (sinks && 16 * v + c < r->columns) base[c] = 1.44269504f * sinks[16 * v + c];
        }
        last = firsts[v] > last ? firsts[v] : last;
        if (!sinks) continue;
        const F x = load16(base), n = round16(x);
        store16(sum, power16(x, n, n)), store16(base, n);
    }
    for (int s = r->begin ? 0 : r->first / KEYS * KEYS, next; s < r->end; s = next) {
        next = s + KEYS > r->first ? s + KEYS : r->first / KEYS * KEYS; /* begin is at most KEYS */
        const int count = r->end - s < KEYS ? r->end - s : KEYS;
        const int tiles = attends_in_tiles() && (float)(s + KEYS) <= least && (s + KEYS <= r->begin || (float)s >= last);
        score_block(r, s, count, once);
        pair_values(r, s, count, tiles);
        for (int v = 0; v < vectors; v++) {
            const int all = s + KEYS <= r->begin || ((float)s >= firsts[v] && (float)(s + KEYS) <= ends[v]);
            while (all ? weigh(r, v, s, count, 1) : weigh(r, v, s, count, 0)) raise_bases(r, v, s, count, all);
            if (tiles) tiles_values(a->weights[v][0], a->values, d, a->out + 16 * v * d);
            else add_block(r, v, s, count, all);
        }
    }
    for (int c = 0; c < r->columns; c++) {
        const F share_ = div16(set16(1.0f), max16(set16(a->sum[c / 16][c % 16]), set16(1e-30f)));
        for (int i = 0; i < d; i += 16) store16(a->out + c * d + i, mul16(load16(a->out + c * d + i), share_));
    }
}
