/* Linear maps: one output tile for all tokens, and whole maps for callers of their own. */

/* The input of `map` for vnni_bf16 `x`: `x` itself, or rounded tokens or rows of bf16 in `out`. */
static const uint32_t *input_of(const Linear *map, const uint32_t *x, int tokens, uint8_t *out) {
    if (reads_vnni(map)) return x;
    for (int b = 0; 16 * b < tokens; b++, x += 8 * (int64_t)map->in) {
        int some = tokens - 16 * b < 16 ? tokens - 16 * b : 16;
        if (map->rounded) round_inputs(x, map->in, some, (Rounded *)(out + b * block_bytes(map)));
        else to_rows(x, map->in, some, out + b * block_bytes(map));
    }
    return (const uint32_t *)out;
}

/* The part of `map` that has tile `t`, and the tile's weights. */
static const LinearPart *part_of(const Linear *map, int t, const uint8_t **tiles) {
    int first = 0;
    const LinearPart *part = map->parts;
    for (; t >= part->end; part++) first = part->end;
    *tiles = part->tiles + tiles_bytes(part->kind, map->in / 32) * (t - first);
    return part;
}

static inline F finished(const Linear *map, F v) {
    if (map->scale != 1) v = mul16(v, set16(map->scale));
    return map->cap > 0 ? capped16(v, map->cap) : v;
}

/* to[tokens][16 outputs] of tile `t` of a rounded `map` for up to 16 tokens of a block `x`. */
static void rows_of_product(const Linear *map, int t, const Rounded *x, int tokens, float (*to)[16]) {
    const uint8_t *tiles;
    const int kind = part_of(map, t, &tiles)->kind;
    dot_few_tokens(kind, tokens, tiles, map->in / 32, x, to);
    if (!map->bias && map->scale == 1 && !(map->cap > 0)) return;
    const F bias = map->bias ? load16(map->bias + 16 * t) : zero16();
    for (int i = 0; i < tokens; i++) store16(to[i], finished(map, map->bias ? add16(load16(to[i]), bias) : load16(to[i])));
}

/* The outputs of tile `t` of `map` for `tokens` tokens from the beginning of `x`, which `input_of` made: sums[blocks][16 outputs][16
 * lanes]. Lanes without a token mean nothing; they are finite. */
static void product(const Linear *map, int t, const uint32_t *x, int tokens, float *sums) {
    const uint8_t *tiles, *inputs = (const uint8_t *)x;
    if (!map->rounded) {
        part_of(map, t, &tiles);
        Operand a = {tiles, inputs, INPUT_BYTES * (int64_t)map->in, block_bytes(map), map->in / 32};
        bf16_product(&a, tokens, sums);
        for (int i = 0; i < (tokens + 15) / 16 * 16; i++) {
            const F v = load16(sums + 16 * i);
            store16(sums + 16 * i, finished(map, map->bias ? add16(v, set16(map->bias[16 * t + i % 16])) : v));
        }
        return;
    }
    for (; tokens > 0; tokens -= 16, inputs += block_bytes(map), sums += 256) {
        const int some = tokens < 16 ? tokens : 16;
        float to[16][16] __attribute__((aligned(64)));
        rows_of_product(map, t, (const Rounded *)inputs, some, to);
        if (some == 1) {
            for (int o = 0; o < 16; o++) store16(sums + 16 * o, first16(to[0] + o));
            continue;
        }
        U a[16];
        for (int i = 0; i < 16; i++) a[i] = i < some ? load_u(to[i]) : set_u(0);
        transpose(a);
        for (int o = 0; o < 16; o++) store_u(sums + 16 * o, a[o]);
    }
}

enum { CHUNKS = 32 }; /* of up to 8 threads, each has so many parts of a whole map, which others may take, and one more */
enum { BOUNDED = WIDE == 16 ? 10 : 7 }; /* most tokens for which two readings of some weights cost less than one of all */

/* Put the 16 outputs `sums` from number `first` on, of which `left` are there, among the largest of each lane so far. */
static void keep_largest(const float *sums, int first, int left, float *tops, int32_t *which) {
    F top = load16(tops);
    U at = load_u(which);
    for (int o = 0; o < 16 && o < left; o++) {
        F v = rounded(load16(sums + 16 * o));
        M more = more16(v, top);
        top = pick16(more, v, top), at = pick_u(more, set_u((uint32_t)(first + o)), at);
    }
    store16(tops, top), store_u(which, at);
}

/* The largest of a thread's outputs for up to BOUNDED tokens, as keep_largest of all tiles. Outputs that the proxy rules out are
 * not computed: the likeliest ones say how large the largest one is at least. most: scratch [out / 16][tokens]; seeds: [threads][16]. */
static void argmax_by_bounds(const Linear *map, const uint32_t *x, int tokens, int width, float *most, float *seeds, Barrier *barrier,
    float *tops, int32_t *which, int me, int n) {
    float outputs[16][16] __attribute__((aligned(64))), sums[256] __attribute__((aligned(64))), floors[16] __attribute__((aligned(64)));
    float length[BOUNDED] = {0}, high[BOUNDED];
    int32_t likeliest[BOUNDED], unread[16] __attribute__((aligned(64))) = {0};
    const int count = map->in / 32;
    int from, to;
    Work work = {barrier, map->out / 16, 1, me, n};
    for (int k = 0; k < count; k++)
        for (int r = 0; r < tokens; r++) {
            const Rounded *own = (const Rounded *)x + k * tokens + r;
            int32_t sum = 0;
            for (int i = 0; i < 32; i++) sum += own->x[i] * own->x[i];
            length[r] += own->scale * own->scale * (float)sum;
        }
    for (int r = 0; r < tokens; r++) length[r] = __builtin_sqrtf(length[r]) * 1.001f, high[r] = -__builtin_inff(), likeliest[r] = 0;
    for (int t; (t = next_item(&work)) >= 0;) {
        dot_few_tokens(Q4, tokens, map->proxy + tiles_bytes(Q4, count) * t, count, (const Rounded *)x, outputs);
        for (int r = 0; r < tokens; r++) {
            const F v = load16(outputs[r]);
            const float best = largest16(v);
            most[tokens * t + r] = map->scale * largest16(fma16(load16(map->error_bounds + 16 * t), set16(length[r]), v));
            if (best > high[r]) high[r] = best, likeliest[r] = t;
        }
    }
    store16(seeds + 16 * me, set16(-__builtin_inff()));
    for (int r = 0; r < tokens; r++) {
        product(map, likeliest[r], x, tokens, sums);
        keep_largest(sums, 0, width - 16 * likeliest[r], seeds + 16 * me, unread);
    }
    wait_for_team(barrier, n);
    F floor = load16(seeds);
    for (int i = 1; i < n; i++) floor = max16(floor, load16(seeds + 16 * i));
    split(map->out / 16, me, n, &from, &to);
    /* What is smaller by more than a step of bf16 stays smaller when it is rounded. */
    store16(floors, sub16(sub16(floor, mul16(abs16(floor), set16(1 / 128.0f))), set16(1e-30f)));
    for (int t = from; t < to; t++) {
        int may = 0; /* NaN may, too */
        for (int r = 0; r < tokens; r++) may |= !(most[tokens * t + r] < floors[r]);
        if (!may) continue;
        product(map, t, x, tokens, sums);
        keep_largest(sums, 16 * t, width - 16 * t, tops, which);
    }
}

/* Whether all inputs of row `r` are finite. */
static int all_finite(const bf16 *const *x, int parts, int r, int piece) {
    unsigned odd = 0;
    for (int part = 0; part < parts; part++)
        for (int i = 0; i < piece; i++) odd |= (x[part][(int64_t)r * piece + i] & 0x7f80) == 0x7f80;
    return !odd;
}

/* out [rows, width] = map(x), all bf16, for x [rows, map->in] in `parts` pieces [rows, map->in / parts], one beside the
 * other; each piece goes through an RMS norm if eps > 0 (weight NULL: ones; after_weight: as in Model.round_after_weight). `best` [rows], if not NULL, is made
 * instead: the first of each row's largest outputs, -1 if an input is not finite. Returns 0, or -1 without memory. */
EXPORT int KERNEL(linear)(const Linear *map, const float *weight, float eps, int after_weight, const bf16 *const *x, int parts, int rows,
                   bf16 *out, int64_t *best, int width, int threads) {
    int blocks = (rows + 15) / 16, features = map->in, piece = features / parts;
    float *fm = allocate(64 * (size_t)blocks * piece);
    uint32_t *vnni = allocate(32 * (size_t)blocks * features);
    uint8_t *scratch = allocate((size_t)blocks * block_bytes(map));
    const int bounded = best && map->proxy && rows <= BOUNDED, chunks = threads + CHUNKS * (threads < 8 ? threads : 8);
    float *tops = allocate(best ? 128 * (size_t)blocks * chunks + 64 * (size_t)threads : 1); /* by chunk and row: the largest output, which */
    float *most = allocate(bounded ? 4 * (size_t)rows * (map->out / 16) : 1);
    Barrier barrier;
    memset(&barrier, 0, sizeof barrier);
    if (fm && vnni && scratch && tops && most) {
        const int lanes = best ? 16 * blocks * chunks : 0;
        int32_t *which = (int32_t *)(tops + lanes);
        float *seeds = (float *)(which + lanes); /* of argmax_by_bounds */
        for (int lane = 0; lane < lanes; lane++) tops[lane] = -__builtin_inff(), which[lane] = 0;
        for (int part = 0; part < parts; part++) {
            to_blocks(x[part], rows, piece, fm);
            for (int b = 0; b < blocks; b++) {
                const float *from = fm + (int64_t)b * piece * 16;
                uint32_t *to = vnni + ((int64_t)b * features + part * piece) * 8;
                if (eps > 0) norm(from, weight, piece, eps, after_weight, to);
                else to_pairs(from, piece, to);
            }
        }
        const uint32_t *input = input_of(map, vnni, rows, scratch);
#pragma omp parallel num_threads(threads)
        {
            float sums[MOST_BLOCKS * 256] __attribute__((aligned(64)));
            int from, to, me = omp_get_thread_num(), n = omp_get_num_threads();
            Work work = {&barrier, bounded ? 0 : chunks, 1, me, n};
            enter_tiles();
            if (bounded) argmax_by_bounds(map, input, rows, width, most, seeds, &barrier, tops + 16 * me, which + 16 * me, me, n);
            for (int chunk; (chunk = next_item(&work)) >= 0;) {
                split(map->out / 16, chunk, chunks, &from, &to);
                for (int b0 = 0; b0 < blocks; b0 += MOST_BLOCKS) {
                    int some = blocks - b0 < MOST_BLOCKS ? blocks - b0 : MOST_BLOCKS, tokens = rows - 16 * b0;
                    for (int t = from; t < to; t++) {
                        product(map, t, from_block(map, input, b0), tokens < 16 * some ? tokens : 16 * some, sums);
                        int left = width - 16 * t;
                        for (int b = 0; best && b < some; b++) {
                            int first = 16 * (blocks * chunk + b0 + b);
                            keep_largest(sums + 256 * b, 16 * t, left, tops + first, which + first);
                        }
                        for (int r = 16 * b0; !best && r < 16 * (b0 + some) && r < rows; r++) {
                            F v = column16(sums + 256 * (r / 16 - b0) + r % 16);
                            store_some_h(out + (int64_t)r * width + 16 * t, narrow16(v), left);
                        }
                    }
                }
            }
            leave_tiles();
        }
        for (int r = 0; best && r < rows; r++) {
            int of = r; /* chunks (of argmax_by_bounds: threads) have outputs in order, so the first one of equals stays */
            for (int lane = r; lane < lanes; lane += 16 * blocks) of = tops[lane] > tops[of] ? lane : of;
            best[r] = all_finite(x, parts, r, piece) ? which[of] : -1;
        }
    }
    int failed = !(fm && vnni && scratch && tops && most);
    free(fm), free(vnni), free(scratch), free(tops), free(most);
    return failed ? -1 : 0;
}
