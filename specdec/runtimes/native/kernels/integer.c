/* Products of weights in blocks with activations in 8 bits.
 *
 * A token's activations are rounded in blocks of 32: whole numbers -127 .. 127 times the block's scale. Weights keep their
 * codes, as bytes without sign. So the products of a block are whole numbers, whose sums have no order, and what follows is
 * done for each token and output in one order, each step rounded once:
 *     v = sum of codes times activations, times the weights' scale (plus that of the second half, where halves have their own)
 *     v = v + (weights' low) times (sum of activations);    result = result + v times (activations' scale)
 * A result depends neither on the tokens beside it nor on the instruction set. */

enum { PREFETCH = 8192, PREFETCH_NEAR = 2048 }; /* number of bytes ahead that are prefetched into the second cache, and then into the first */
enum { ONE_BY_ONE = 2 }; /* up to so many tokens are rounded one by one */

static const uint8_t E2M1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}; /* 12 + twice the number of 4 bits: -6 to 6 */

/* Pairs of a token's 32 inputs, rounded. */
INLINE void round_token(U pairs, Rounded *out) {
    const U sign = set_u(0x80000000), upper = set_u(0xffff0000), byte = set_u(255);
    uint32_t halves[2]; /* without sign: sums of inputs that are not finite wrap */
    const U even = shift_u(pairs, 16), odd = and_u(pairs, upper);
    union { uint32_t bits; float value;
        } most = {largest_u(max_u(to_u(set16(1e-30f)), max_u(without_u(even, sign), without_u(odd, sign))))};
    const F inverse = set16(127.0f / most.value);
    const U a = nearest_u(mul16(to_f(even), inverse)), b = nearest_u(mul16(to_f(odd), inverse));
    sums_u(add_u(a, b), halves);
    const int32_t less[] = {(int32_t)(0 - 32 * halves[0]), (int32_t)(0 - 32 * halves[1])};
    *out = (Rounded){most.value * (1 / 127.0f), (float)(int32_t)(halves[0] + halves[1]), {less[0], less[1]}, {0}};
    const H codes = words_h(or_u(and_u(a, byte), shift_u(and_u(b, byte), 8)));
    memcpy(out->x, &codes, 32);
}

/* vnni_bf16 of up to 16 tokens to rounded [features / 32][tokens]. A block with an input that is not finite gets such a
 * scale. */
static void round_inputs(const uint32_t *x, int features, int tokens, Rounded *out) {
    const U sign = set_u(0x80000000), upper = set_u(0xffff0000), byte = set_u(255);
    for (int k = 0; k < features / 32; k++, x += 256, out += tokens) {
        if (tokens <= ONE_BY_ONE) {
            for (int t = 0; t < tokens; t++) round_token(column_u(x + t), out + t);
            continue;
        }
        uint32_t quads[8][16] __attribute__((aligned(64))), sums[2][16] __attribute__((aligned(64)));
        float scale[16] __attribute__((aligned(64)));
        U most = to_u(set16(1e-30f)); /* without their signs, floats order as whole numbers do, NaN last */
        for (int i = 0; i < 16; i++) {
            U pair = load_u(x + 16 * i);
            most = max_u(most, max_u(without_u(shift_u(pair, 16), sign), without_u(and_u(pair, upper), sign)));
        }
        F inverse = div16(set16(127.0f), to_f(most));
        store16(scale, mul16(to_f(most), set16(1 / 127.0f)));
        for (int h = 0; h < 2; h++) {
            U sum = set_u(0);
            for (int g = 4 * h; g < 4 * h + 4; g++) {
                U quad = set_u(0);
                for (int j = 0; j < 2; j++) {
                    U pair = load_u(x + 32 * g + 16 * j);
                    U a = nearest_u(mul16(to_f(shift_u(pair, 16)), inverse)), b = nearest_u(mul16(to_f(and_u(pair, upper)), inverse));
                    sum = add_u(sum, add_u(a, b));
                    quad = or_u(quad, shift_u(or_u(and_u(a, byte), shift_u(and_u(b, byte), 8)), 16 * j));
                }
                store_u(quads[g], quad);
            }
            store_u(sums[h], sum);
        }
        for (int t = 0; t < tokens; t++) {
            const uint32_t first = sums[0][t], second = sums[1][t]; /* unsigned: sums of inputs that are not finite wrap */
            out[t] = (Rounded){scale[t], (float)(int32_t)(first + second), {(int32_t)(0 - 32 * first), (int32_t)(0 - 32 * second)}, {0}};
            for (int g = 0; g < 8; g++) memcpy(out[t].x + 4 * g, &quads[g][t], 4);
        }
    }
}

/* The codes of a tile's inputs 4 i .. in codes[i], for WIDE outputs from 16 * WIDE bytes `at` of each vector on. */
INLINE void codes_of_tile(int kind, const uint8_t *at, Codes *codes) {
    const Codes nibble = same_codes(15);
    const int extra = kind == Q5 || kind == K5 ? 1 : kind == K6 ? 2 : 0;
    for (int i = 0; i < 8 && kind == Q8; i++) codes[i] = load_codes(at + 64 * i);
    for (int i = 0; i < 4 && kind != Q8; i++) {
        Codes both = load_codes(at + 64 * i);
        codes[i] = and_codes(both, nibble), codes[i + 4] = and_codes(right_codes(both, 4), nibble);
    }
    for (int i = 0; i < 8 && kind == MX; i++) codes[i] = pick_codes(E2M1, codes[i]);
    for (int i = 0; i < 8 && extra; i++) {
        const int from = extra * i % 8;
        Codes bits = load_codes(at + 256 + 64 * (extra * i / 8));
        bits = from < 4 ? left_codes(bits, 4 - from) : right_codes(bits, from - 4);
        codes[i] = or_codes(codes[i], and_codes(bits, same_codes(extra == 1 ? 16 : 48)));
    }
}

typedef struct {
    W d, m;             /* of a group of tiles */
    W scale, second, low; /* of a tile; second: of the upper half of its inputs */
    W base;             /* BASE times `scale` */
} Scales;

INLINE void scales_of_group(int kind, const uint8_t *head, int first, Scales *s) {
    s->scale = s->second = s->d = kind == MX ? powers_w(head + first) : halves_w(head + 2 * first);
    s->low = s->m = kind == Q8 || kind == K6 || kind == MX ? set_w(0) : halves_w(head + 32 + 2 * first);
}

INLINE void scales_of_tile(int kind, const uint8_t *head, int tile, int first, Scales *s) {
    if (kind == K4 || kind == K5) {
        s->scale = mul_w(s->d, bytes_w(head + 64 + 16 * tile + first));
        s->low = mul_w(s->m, bytes_w(head + 192 + 16 * tile + first));
    } else if (kind == K6) {
        s->scale = mul_w(s->d, signed_bytes_w(head + 64 + 32 * tile + first));
        s->second = mul_w(s->d, signed_bytes_w(head + 80 + 32 * tile + first));
    }
    s->base = mul_w(s->scale, set_w(BASE));
}

/* sum + a tile's products with 32 inputs `x` of a token, of which a and (K6) b are the whole numbers, for WIDE outputs. */
INLINE W scaled(int kind, Codes a, Codes b, const Scales *s, const Rounded *x, W sum) {
    W v = kind == MX ? mul_w(whole_w(a), s->scale) : scaled_whole(a, s->scale, s->base); /* a power of two may be too large for BASE */
    if (kind == K6) v = fma_w(whole_w(b), s->second, v);
    if (kind == Q4 || kind == Q5) v = fma_w(s->low, set_w(x->sum), v);
    if (kind == K4 || kind == K5) v = fnma_w(s->low, set_w(x->sum), v);
    return fma_w(v, set_w(x->scale), sum);
}

/* Initial value of a tile's sums of whole numbers, which corrects for unsigned codes; of K6, of each half. */
INLINE int32_t start_of(int kind, const Rounded *x, int half_) {
    if (kind == MX) return (x->less[0] + x->less[1]) / 32 * 12;
    if (kind == K6) return x->less[half_] + (half_ ? 0 : BASE_BITS);
    return BASE_BITS + (kind == Q8 ? 4 * (x->less[0] + x->less[1]) : 0);
}

INLINE W add_tile_of(int kind, int chains, const Codes *codes, const Scales *s, const Rounded *x, W sum) {
    const int most = kind == Q8 ? 255 : kind == K6 ? 63 : kind == Q5 || kind == K5 ? 31 : kind == MX ? 24 : 15, n = kind == K6 ? 4 : 8;
    Codes a = sum_codes(most, kind == K6 ? 1 : chains, codes, n, x->x, start_of(kind, x, 0)), b = a;
    if (kind == K6) b = sum_codes(most, 1, codes + 4, 4, x->x + 16, start_of(kind, x, 1));
    return scaled(kind, a, b, s, x, sum);
}

#ifdef MANY_TOKENS
/* As add_tile_of, for `many` tokens at once, whose sums do not wait for one another. */
INLINE void add_tile_to_many(int kind, int many, const Codes *codes, const Scales *s, const Rounded *x, W *sum) {
    const int n = kind == K6 ? 4 : 8;
    Codes a[MANY_TOKENS], b[MANY_TOKENS];
    for (int t = 0; t < many; t++) a[t] = b[t] = whole_codes(start_of(kind, x + t, 0));
    sum_codes_of_many(many, codes, n, x->x, sizeof *x, a);
    for (int t = 0; kind == K6 && t < many; t++) b[t] = whole_codes(start_of(kind, x + t, 1));
    if (kind == K6) sum_codes_of_many(many, codes + 4, 4, x->x + 16, sizeof *x, b);
    for (int t = 0; t < many; t++) sum[t] = scaled(kind, a[t], b[t], s, x + t, sum[t]);
}
#endif

#ifdef TWO_TOKENS
/* As add_tile_of, for a token and the one `next` behind it (0: none), to sum[2]; codes: of pair_codes. */
INLINE void add_tile_to_two(int kind, const Codes *codes, const Scales *s, const Rounded *x, int next, W *sum) {
    const Rounded *y = x + next;
    Codes a[2], b[2] = {codes[0], codes[0]};
    sum_pairs(codes, kind == K6 ? 4 : 8, x->x, y->x, start_of(kind, x, 0), start_of(kind, y, 0), a);
    if (kind == K6) sum_pairs(codes + 4, 4, x->x + 16, y->x + 16, start_of(kind, x, 1), start_of(kind, y, 1), b);
    sum[0] = scaled(kind, a[0], b[0], s, x, sum[0]);
    if (next) sum[1] = scaled(kind, a[1], b[1], s, y, sum[1]);
}
#endif

/* Prefetch `bytes` of later tiles into the second cache, and as many of nearer ones from there into the first: a load that misses
 * the first cache would wait until one of the requests to memory ends. */
INLINE void prefetch_tiles(const uint8_t *at, int bytes) {
    for (int i = 0; i < bytes; i += 64) {
        _mm_prefetch((const char *)at + PREFETCH + i, _MM_HINT_T1);
        _mm_prefetch((const char *)at + PREFETCH_NEAR + i, _MM_HINT_T0);
    }
}

/* to [tokens][16 outputs] = a row of `count` tiles times `tokens` tokens, which lie beside each other in `x`. few: sums of so
 * few tokens stay in registers. */
INLINE void row_of_tiles(int kind, int few, int tokens, const uint8_t *at, int count, const Rounded *x, float (*to)[16]) {
    enum { PARTS = 16 / WIDE };
    const Group g = GROUPS[kind];
    W sum[PARTS][16];
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < PARTS; p++) sum[p][t] = set_w(0);
    for (int k = 0; k < count; k += g.tiles) {
        const uint8_t *head = at;
        Scales s[PARTS];
        for (int p = 0; p < PARTS; p++) scales_of_group(kind, head, WIDE * p, s + p);
        prefetch_tiles(at, g.head);
        at += g.head;
        for (int tile = 0; tile < g.tiles; tile++, at += g.codes, x += tokens) {
            prefetch_tiles(at, g.codes);
            for (int p = 0; p < PARTS; p++) {
                Codes codes[8];
                codes_of_tile(kind, at + 4 * WIDE * p, codes);
                scales_of_tile(kind, head, tile, WIDE * p, s + p);
#ifdef TWO_TOKENS
                if (few != 1) {
                    pair_codes(codes);
                    for (int t = 0; t < tokens; t += 2) add_tile_to_two(kind, codes, s + p, x + t, t + 1 < tokens, sum[p] + t);
                    continue;
                }
#endif
#ifdef MANY_TOKENS
                if (few > 2) {
                    add_tile_to_many(kind, few, codes, s + p, x, sum[p]);
                    continue;
                }
#endif
                if (few) {
#pragma GCC unroll 4
                    for (int t = 0; t < few; t++)
                        sum[p][t] = add_tile_of(kind, few == 3 || few == 4 ? 1 : 2, codes, s + p, x + t, sum[p][t]);
                } else {
                    int t = 0;
#ifdef MANY_TOKENS
#pragma GCC unroll 1
                    for (; t + MANY_TOKENS <= tokens; t += MANY_TOKENS)
                        add_tile_to_many(kind, MANY_TOKENS, codes, s + p, x + t, sum[p] + t);
                    if (t + MANY_TOKENS / 2 <= tokens) {
                        add_tile_to_many(kind, MANY_TOKENS / 2, codes, s + p, x + t, sum[p] + t);
                        t += MANY_TOKENS / 2;
                    }
#endif
#pragma GCC unroll 1
                    for (; t < tokens; t++) sum[p][t] = add_tile_of(kind, 2, codes, s + p, x + t, sum[p][t]);
                }
            }
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < PARTS; p++) store_w(to[t] + WIDE * p, sum[p][t]);
}

INLINE void rows_of_kind(int kind, int tokens, const uint8_t *tiles, int count, const Rounded *x, float (*to)[16]) {
    switch (tokens) {
    case 1: row_of_tiles(kind, 1, 1, tiles, count, x, to); break;
    case 2: row_of_tiles(kind, 2, 2, tiles, count, x, to); break;
    case 3: row_of_tiles(kind, 3, 3, tiles, count, x, to); break;
    case 4: row_of_tiles(kind, 4, 4, tiles, count, x, to); break;
#ifdef MANY_TOKENS
    case 5: row_of_tiles(kind, 5, 5, tiles, count, x, to); break;
    case 6: row_of_tiles(kind, 6, 6, tiles, count, x, to); break;
    case 7: row_of_tiles(kind, 7, 7, tiles, count, x, to); break;
    case 8: row_of_tiles(kind, 8, 8, tiles, count, x, to); break;
#endif
    default: row_of_tiles(kind, 0, tokens, tiles, count, x, to);
    }
}

/* Call a function whose first argument is `kind`, as a constant. */
#define BY_KIND(function, ...)                                                                                         \
    switch (kind) {                                                                                                    \
    case Q8: function(Q8, __VA_ARGS__); break;                                                                         \
    case Q4: function(Q4, __VA_ARGS__); break;                                                                         \
    case Q5: function(Q5, __VA_ARGS__); break;                                                                         \
    case K4: function(K4, __VA_ARGS__); break;                                                                         \
    case K5: function(K5, __VA_ARGS__); break;                                                                         \
    case MX: function(MX, __VA_ARGS__); break;                                                                         \
    default: function(K6, __VA_ARGS__);                                                                                \
    }

/* to [tokens][16 outputs] = a row of tiles in blocks times `tokens` rounded tokens, 16 at most. */
static void dot_few_tokens(int kind, int tokens, const uint8_t *tiles, int count, const Rounded *x, float (*to)[16]) {
    BY_KIND(rows_of_kind, tokens, tiles, count, x, to)
}
