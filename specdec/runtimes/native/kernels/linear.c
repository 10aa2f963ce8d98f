/* Linear maps: one output tile for all tokens, and whole maps for callers of their own. */

/* The sums of output tile `t` of `map` (and `low`, on `down_x`, its rank's activations) for `tokens` tokens, from the
 * block on that `x` begins with, in the layout that `input_of` makes; bias added. */
static void product(const Map *map, const LowRank *low, int t, const uint32_t *x, const uint32_t *down_x, int tokens, float *sums) {
    int blocks = (tokens + 15) / 16, first = 0;
    const Part *part = map->parts;
    for (; t >= part->end; part++) first = part->end;
    Side a = {NULL, (const uint8_t *)x, GROUPS[part->kind].codes, map->kind >= I8 ? map->in : INPUT_BYTES * (int64_t)map->in, block_bytes(map),
              map->in / (map->kind >= I8 ? 64 : 32)};
    Side b = {NULL, NULL, 1024, 0, 0, 0};
    a.tiles = part->tiles + tiles_bytes(part->kind, a.count) * (t - first);
    if (low && low->first[t] >= 0) {
        b.count = low->ks, b.stride = INPUT_BYTES * (int64_t)low->down.out, b.block = 16 * b.stride;
        b.tiles = low->up + 1024 * (int64_t)low->ks * t;
        b.x = (const uint8_t *)down_x + tile_inputs() * (int64_t)low->first[t];
    }
    tile_product(part->kind, &a, &b, tokens, map->kind >= I8 ? map->scale + 16 * t : NULL, sums);
    if (map->bias)
        for (int b = 0; b < blocks; b++)
            for (int o = 0; o < 16; o++) {
                float *row = sums + 256 * b + 16 * o;
                store16(row, add16(load16(row), set16(map->bias[16 * t + o])));
            }
}

/* out [rows, width] = map(x), all bf16, for x [rows, map->in] in `parts` pieces [rows, map->in / parts], one beside the
 * other; each piece goes through an RMS norm if eps > 0 (weight NULL: ones). `best` [rows], if not NULL, is made instead:
 * the first of each row's largest outputs. Returns 0, or -1 without memory. */
EXPORT int KERNEL(linear)(const Map *map, const float *weight, float eps, const bf16 *const *x, int parts, int rows, bf16 *out,
                   int64_t *best, int width, int threads) {
    int blocks = (rows + 15) / 16, features = map->in, piece = features / parts;
    float *fm = allocate(64 * (size_t)blocks * piece);
    uint32_t *vnni = allocate(32 * (size_t)blocks * features);
    uint8_t *scratch = allocate((size_t)(blocks + 1) * most_block_bytes(features));
    float *tops = allocate(128 * (size_t)blocks * threads); /* by thread and row: the largest output so far, and which */
    if (fm && vnni && scratch && tops) {
        for (int lane = 0; lane < 16 * blocks * threads; lane++) tops[lane] = -__builtin_inff();
        int32_t *which = (int32_t *)(tops + 16 * blocks * threads);
        memset(which, 0, 64 * (size_t)blocks * threads);
        for (int part = 0; part < parts; part++) {
            to_blocks(x[part], rows, piece, fm);
            for (int b = 0; b < blocks; b++) {
                const float *from = fm + (int64_t)b * piece * 16;
                uint32_t *to = vnni + ((int64_t)b * features + part * piece) * 8;
                if (eps > 0) norm(from, weight, piece, eps, to);
                else
                    for (int i = 0; i < piece; i += 2)
                        store_u(to + 8 * i, paired(load16(from + 16 * i), load16(from + 16 * i + 16)));
            }
        }
        const uint32_t *input = input_of(map, vnni, rows, scratch, scratch + blocks * block_bytes(map));
        int team = 1; /* there may be fewer threads than we ask for */
#pragma omp parallel num_threads(threads)
        {
            float sums[MOST_BLOCKS * 256] __attribute__((aligned(64)));
            int from, to, me = omp_get_thread_num(), n = omp_get_num_threads();
            if (!me) team = n;
            enter_tiles();
            split(map->out / 16, me, n, &from, &to);
            for (int b0 = 0; b0 < blocks; b0 += MOST_BLOCKS) {
                int some = blocks - b0 < MOST_BLOCKS ? blocks - b0 : MOST_BLOCKS, tokens = rows - 16 * b0;
                for (int t = from; t < to; t++) {
                    product(map, NULL, t, from_block(map, input, b0), NULL, tokens < 16 * some ? tokens : 16 * some, sums);
                    int left = width - 16 * t;
                    for (int b = 0; best && b < some; b++) {
                        int lanes = 16 * (blocks * me + b0 + b);
                        F top = load16(tops + lanes);
                        U at = load_u(which + lanes);
                        for (int o = 0; o < 16 && o < left; o++) {
                            F v = rounded(load16(sums + 256 * b + 16 * o));
                            M more = more16(v, top);
                            top = pick16(more, v, top), at = pick_u(more, set_u((uint32_t)(16 * t + o)), at);
                        }
                        store16(tops + lanes, top), store_u(which + lanes, at);
                    }
                    if (best) continue;
                    for (int r = 16 * b0; r < 16 * (b0 + some) && r < rows; r++) {
                        F v = column16(sums + 256 * (r / 16 - b0) + r % 16);
                        store_some_h(out + (int64_t)r * width + 16 * t, narrow16(v), left);
                    }
                }
            }
            leave_tiles();
        }
        for (int r = 0; best && r < rows; r++) {
            int of = r; /* threads have outputs in order, so the first one of equals stays */
            for (int lane = r; lane < 16 * blocks * team; lane += 16 * blocks) of = tops[lane] > tops[of] ? lane : of;
            best[r] = which[of];
        }
    }
    int failed = !(fm && vnni && scratch && tops);
    free(fm), free(vnni), free(scratch), free(tops);
    return failed ? -1 : 0;
}

/* The first of the largest values of each row of bf16 [rows, width]. */
EXPORT void KERNEL(argmax)(const bf16 *x, int rows, int width, int64_t *out, int threads) {
#pragma omp parallel for num_threads(rows < threads ? rows : threads)
    for (int r = 0; r < rows; r++) {
        const bf16 *row = x + (int64_t)r * width;
        F most = set16(-__builtin_inff());
        int i = 0;
        for (; i + 16 <= width; i += 16) most = max16(most, load_bf16(row + i));
        float largest = largest16(most);
        for (; i < width; i++) largest = widen(row[i]) > largest ? widen(row[i]) : largest;
        for (i = 0; i + 16 <= width; i += 16) {
            uint32_t equal_ = bits16(equal16(load_bf16(row + i), set16(largest)));
            if (equal_) {
                i += __builtin_ctz(equal_);
                break;
            }
        }
        while (i < width && widen(row[i]) != largest) i++;
        out[r] = i < width ? i : 0;
    }
}
