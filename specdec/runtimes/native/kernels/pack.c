/* Packing weights into tiles: bf16, and GGUF blocks, whose codes and scales do not change. */

static inline uint16_t word_at(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

/* --- GGUF blocks, by ggml's numbers of their types --- */

enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, MXFP4 = 39 };

/* The number of weights of a block of this type; its bytes and the kind of its tiles. */
static int shape_of(int type, int *bytes, int *kind) {
    switch (type) {
    case Q4_0: return *bytes = 18, *kind = Q4, 32;
    case Q4_1: return *bytes = 20, *kind = Q4, 32;
    case Q5_0: return *bytes = 22, *kind = Q5, 32;
    case Q5_1: return *bytes = 24, *kind = Q5, 32;
    case Q8_0: return *bytes = 34, *kind = Q8, 32;
    case Q4_K: return *bytes = 144, *kind = K4, 256;
    case Q5_K: return *bytes = 176, *kind = K5, 256;
    case Q6_K: return *bytes = 210, *kind = K6, 256;
    case MXFP4: return *bytes = 17, *kind = MX, 32;
    default: return 0;
    }
}

/* A block: weight i is scale[i / 32] code[i] + low[i / 32]; in Q6_K scale[i / 16] (code[i] - 32), in Q8_0 128 less, in MXFP4
 * scale[0] (E2M1[code] - 12). */
typedef struct {
    uint8_t code[256];
    float scale[16], low[8];
    uint16_t d, m;          /* float16 factors of the scales and lows */
    uint8_t sc[16], mn[8];  /* their whole-number factors */
} Block;

static void read_block(int type, const uint8_t *p, Block *b) {
    int k = type >= Q4_K && type <= Q6_K, five = type == Q5_0 || type == Q5_1 || type == Q5_K;
    b->d = word_at(type == Q6_K ? p + 208 : p), b->m = type == Q4_1 || type == Q5_1 || k ? word_at(p + 2) : 0;
    float d = half(b->d), m = half(b->m);
    if (type == MXFP4) {
        /* half of 2 to p[0] - 127 */
        union { uint32_t bits; float value; } power = {p[0] < 2 ? 0x200000u << p[0] : (uint32_t)(p[0] - 1) << 23};
        for (int i = 0; i < 16; i++) b->code[i] = p[1 + i] & 15, b->code[16 + i] = p[1 + i] >> 4;
        b->scale[0] = power.value, b->low[0] = 0, b->sc[0] = p[0] ? p[0] - 1 : 0;
    } else if (type == Q8_0) {
        for (int i = 0; i < 32; i++) b->code[i] = p[2 + i] ^ 128;
        b->scale[0] = d, b->low[0] = 0;
    } else if (!k) {
        const uint8_t *bits = p + (type == Q4_1 || type == Q5_1 ? 4 : 2), *nibbles = bits + (five ? 4 : 0);
        for (int i = 0; i < 16; i++) b->code[i] = nibbles[i] & 15, b->code[16 + i] = nibbles[i] >> 4;
        for (int i = 0; five && i < 32; i++) b->code[i] |= (uint8_t)((bits[i / 8] >> i % 8 & 1) << 4);
        b->scale[0] = d, b->low[0] = type == Q4_0 ? -8 * d : type == Q5_0 ? -16 * d : m;
    } else if (type == Q6_K) {
        for (int half_ = 0; half_ < 2; half_++) { /* of 128 weights: 64 bytes of nibbles, 32 of pairs */
            const uint8_t *nibbles = p + 64 * half_, *pairs = p + 128 + 32 * half_;
            uint8_t *code = b->code + 128 * half_;
            for (int i = 0; i < 64; i++) {
                code[i] = (uint8_t)((nibbles[i] & 15) | (pairs[i % 32] >> (i < 32 ? 0 : 2) & 3) << 4);
                code[64 + i] = (uint8_t)(nibbles[i] >> 4 | (pairs[i % 32] >> (i < 32 ? 4 : 6) & 3) << 4);
            }
        }
        memcpy(b->sc, p + 192, 16);
        for (int i = 0; i < 16; i++) b->scale[i] = d * (int8_t)b->sc[i];
    } else {
        const uint8_t *six = p + 4, *bits = p + 16, *nibbles = p + (five ? 48 : 16);
        for (int i = 0; i < 8; i++) {
            b->sc[i] = i < 4 ? six[i] & 63 : (uint8_t)((six[i + 4] & 15) | six[i - 4] >> 6 << 4);
            b->mn[i] = i < 4 ? six[i + 4] & 63 : (uint8_t)(six[i + 4] >> 4 | six[i] >> 6 << 4);
            b->scale[i] = d * b->sc[i], b->low[i] = -(m * b->mn[i]);
        }
        for (int j = 0; j < 4; j++) /* 64 weights in 32 bytes */
            for (int i = 0; i < 32; i++) {
                int low = nibbles[32 * j + i] & 15, high = nibbles[32 * j + i] >> 4;
                if (five) low |= (bits[i] >> 2 * j & 1) << 4, high |= (bits[i] >> (2 * j + 1) & 1) << 4;
                b->code[64 * j + i] = (uint8_t)low, b->code[64 * j + 32 + i] = (uint8_t)high;
            }
    }
}

/* Whether a tile holds the numbers of a block of 32 weights: their low in float16; in MXFP4 a scale as a power of two. */
static int representable(int kind, const Block *b) {
    int zero = 1;
    if (kind != MX) return half(half_of(b->low[0])) == b->low[0];
    for (int i = 0; i < 32; i++) zero &= !(b->code[i] & 7);
    return b->sc[0] ? 24 * b->scale[0] < __builtin_inff() : zero;
}

/* Write the codes of 16 rows, 256 apart, to a tile of zeros. */
static void put_codes(int kind, const uint8_t *code, uint8_t *codes) {
    uint32_t quad, *to = (uint32_t *)codes; /* [vector][row] */
    for (int row = 0; row < 16; row++)
        for (int i = 0; i < 8; i++) {
            memcpy(&quad, code + 256 * row + 4 * i, 4);
            if (kind == Q8) to[16 * i + row] = quad;
            else to[16 * (i % 4) + row] |= (quad & 0x0f0f0f0f) << (i < 4 ? 0 : 4);
            if (kind == Q5 || kind == K5) to[64 + row] |= (quad >> 4 & 0x01010101) << i;
            if (kind == K6) to[64 + 16 * (i / 4) + row] |= (quad >> 4 & 0x03030303) << 2 * (i % 4);
        }
}

/* The bytes of the tiles of `out` rows of `in` weights of a GGUF type, and their kind; 0 for an unsupported type. */
EXPORT int64_t KERNEL(block_tiles)(int type, int out, int in, int *kind) {
    int bytes, weights = shape_of(type, &bytes, kind);
    return !weights || in % weights ? 0 : (out + 15) / 16 * tiles_bytes(*kind, in / 32);
}

/* Pack `out` rows of GGUF blocks into tiles; rows up to the next multiple of 16 are zero. Returns 0 if a number is too large for
 * the tiles. */
EXPORT int KERNEL(pack_blocks)(const Table *table, int out, uint8_t *tiles, int threads) {
    int bytes = 0, kind = Q4, in = table->columns, weights = shape_of(table->type, &bytes, &kind), good = weights > 0;
    const int count = good ? (out + 15) / 16 : 0;
    const Group g = GROUPS[kind];
#pragma omp parallel for num_threads(threads)
    for (int t = 0; t < count; t++) {
        uint8_t *head = tiles + t * tiles_bytes(kind, in / 32);
        for (int at = 0; at < in / weights; at++, head += g.head + g.tiles * g.codes) {
            uint8_t codes[16 * 256] = {0};
            memset(head, 0, (size_t)tiles_bytes(kind, g.tiles));
            for (int row = 0; row < 16 && 16 * t + row < out; row++) {
                Block b;
                int64_t from = table->order ? table->order[16 * t + row] : 16 * t + row;
                read_block(table->type, table->data + from * table->stride + (int64_t)at * bytes, &b);
                uint16_t second = weights == 256 ? b.m : half_of(b.low[0]);
                if (weights == 32 && !representable(kind, &b)) __atomic_store_n(&good, 0, __ATOMIC_RELAXED);
                if (kind == MX) head[row] = b.sc[0];
                else memcpy(head + 2 * row, &b.d, 2);
                if (kind != Q8 && kind != K6 && kind != MX) memcpy(head + 32 + 2 * row, &second, 2);
                for (int i = 0; i < 8 && (kind == K4 || kind == K5); i++)
                    head[64 + 16 * i + row] = b.sc[i], head[192 + 16 * i + row] = b.mn[i];
                for (int i = 0; i < 16 && kind == K6; i++) head[64 + 16 * i + row] = b.sc[i];
                memcpy(codes + 256 * row, b.code, (size_t)weights);
            }
            for (int k = 0; k < g.tiles; k++) put_codes(kind, codes + 32 * k, head + g.head + g.codes * k);
        }
    }
    return good;
}

/* A row of a table in bf16, each number rounded once. */
static void read_row(const Table *table, int64_t index, bf16 *to) {
    int bytes, kind, weights = shape_of(table->type, &bytes, &kind);
    const uint8_t *row = table->data + (table->order ? table->order[index] : index) * table->stride;
    if (!weights) memcpy(to, row, 2 * (size_t)table->columns);
    for (int at = 0; weights && at < table->columns; at += weights, row += bytes) {
        Block b;
        read_block(table->type, row, &b);
        for (int i = 0; kind == MX && i < 32; i++) b.code[i] = E2M1[b.code[i]];
        for (int part = 0; part < weights / 16; part++) {
            float scale = b.scale[kind == K6 ? part : part / 2], low = kind == K6 ? 0 : b.low[part / 2];
            int less = kind == K6 ? 32 : kind == Q8 ? 128 : kind == MX ? 12 : 0;
            const uint8_t *code = b.code + 16 * part;
            bf16 all[16]; /* of their own, so that compilers make vectors of them */
#pragma omp simd
            for (int i = 0; i < 16; i++) all[i] = narrow((code[i] - less) * scale + low);
            memcpy(to + at + 16 * part, all, sizeof all);
        }
    }
    for (int i = 0; table->scale != 1 && i < table->columns; i++) to[i] = narrow(widen(to[i]) * table->scale);
}

/* Rows `index` [count] of a table (NULL: the first ones) in bf16 [count, columns]. */
EXPORT void KERNEL(read_rows)(const Table *table, const int64_t *index, int64_t count, bf16 *to, int threads) {
#pragma omp parallel for num_threads(count < threads ? (int)count : threads) if (count > 64) /* others wake slower than they read */
    for (int64_t i = 0; i < count; i++) read_row(table, index ? index[i] : i, to + i * table->columns);
}

/* Pack bf16 weights [out, in]; rows up to the next multiple of 16 are zero. */
EXPORT void KERNEL(pack)(const bf16 *weights, int out, int in, uint8_t *tiles, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int t = 0; t < (out + 15) / 16; t++)
        for (int k = 0; k < in / 32; k++) {
            uint8_t *tile = tiles + 1024 * ((int64_t)t * (in / 32) + k);
            memset(tile, 0, 1024);
            for (int row = 0; row < 16 && 16 * t + row < out; row++)
                memcpy(tile + 64 * row, weights + (int64_t)(16 * t + row) * in + 32 * k, 64);
        }
}

/* --- kept tiles --- */

enum { LANES = 8, PART = 4096 }; /* numbers of 8 bytes that are summed side by side; bytes of a part */

/* A checksum of bytes that finds accidents (another bit or order), not forgeries: sums of numbers, and sums of these sums, of each
 * part, mixed with its place; `first_part` is that of the first one, and zeros fill up the last. So checksums of pieces add up. */
EXPORT uint64_t KERNEL(checksum)(const uint8_t *data, int64_t bytes, int64_t first_part, int threads) {
    uint64_t found = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 256) reduction(+ : found)
    for (int64_t at = 0; at < bytes; at += PART) {
        uint64_t first[LANES] = {0}, second[LANES] = {0}, words[LANES], mixed = (uint64_t)(first_part + at / PART) + 1;
        uint8_t last[PART];
        const uint8_t *from = data + at;
        if (bytes - at < PART) memset(last, 0, PART), from = memcpy(last, from, (size_t)(bytes - at));
        for (int i = 0; i < PART; i += (int)sizeof words) {
            memcpy(words, from + i, sizeof words);
            for (int lane = 0; lane < LANES; lane++) first[lane] += words[lane], second[lane] += first[lane];
        }
        for (int lane = 0; lane < LANES; lane++) {
            mixed = (mixed ^ first[lane]) * 0x9e3779b97f4a7c15u, mixed ^= mixed >> 29;
            mixed = (mixed ^ second[lane]) * 0xbf58476d1ce4e5b9u, mixed ^= mixed >> 32;
        }
        found += mixed;
    }
    return found;
}

/* --- for drafts --- */

static inline float total(float *v) { /* of 16 numbers, which change */
    for (int half_ = 8; half_; half_ /= 2)
        for (int i = 0; i < half_; i++) v[i] += v[i + half_];
    return v[0];
}

/* 32 numbers to the codes of Q8 or Q4, and their scale and low in float16. For Q4, the best of several step sizes: smaller ones
 * clip the ends. Returns the sum of squares of what is lost. */
static float fit(int kind, const bf16 *weights, uint8_t *codes, uint16_t *scale, uint16_t *low) {
    const F v[2] = {load_bf16(weights), load_bf16(weights + 16)}, most = set16(kind == Q8 ? 255 : 15), less = set16(kind == Q8 ? 128 : 0);
    float first = -largest16(max16(sub16(zero16(), v[0]), sub16(zero16(), v[1]))), last = largest16(max16(v[0], v[1])), best = 0;
    if (kind == Q8) last = __builtin_fmaxf(last, -first), first = -last;
    for (int turn = 0; turn < (kind == Q8 ? 1 : 4); turn++) {
        float cut = 0.03f * turn * (last - first), errors[16] __attribute__((aligned(64)));
        uint16_t step = half_of((last - first - 2 * cut) / (kind == Q8 ? 254 : 15)), least = kind == Q8 ? 0 : half_of(first + cut);
        const F d = set16(half(step)), m = set16(half(least)), inverse = set16(half(step) > 0 ? 1 / half(step) : 0);
        int32_t found[32] __attribute__((aligned(64)));
        F sum = zero16();
        for (int i = 0; i < 2; i++) {
            F q = max16(add16(round16(mul16(sub16(v[i], m), inverse)), less), zero16());
            q = sub16(most, max16(sub16(most, q), zero16()));
            F gap = sub16(fnma16(sub16(q, less), d, v[i]), m);
            sum = fma16(gap, gap, sum);
            store_u(found + 16 * i, nearest_u(q));
        }
        store16(errors, sum);
        const float error = total(errors);
        if (turn && error >= best) continue;
        best = error, *scale = step, *low = least;
        for (int i = 0; i < 32; i++) codes[i] = (uint8_t)found[i];
    }
    return best;
}

/* Round the rows [out, columns] of a table to tiles of `kind`, Q8 or Q4; rows up to the next multiple of 16 are zero. bounds, if not
 * NULL: as in Linear. Returns 0, or -1 without memory. */
EXPORT int KERNEL(pack_rounded)(const Table *table, int out, int kind, uint8_t *tiles, float *bounds, int threads) {
    const Group g = GROUPS[kind];
    const int in = table->columns;
    int failed = 0;
#pragma omp parallel for num_threads(threads)
    for (int t = 0; t < (out + 15) / 16; t++) {
        float lost[16] = {0}, squares[16][16] __attribute__((aligned(64))) = {{0}};
        bf16 *rows = calloc(16 * (size_t)in, sizeof *rows);
        for (int row = 0; rows && row < 16 && 16 * t + row < out; row++) read_row(table, 16 * t + row, rows + (int64_t)row * in);
        for (int k = 0; rows && k < in / 32; k++) {
            uint8_t *head = tiles + tiles_bytes(kind, (int64_t)t * (in / 32) + k), codes[16 * 256] = {0};
            memset(head, 0, (size_t)tiles_bytes(kind, 1));
            for (int row = 0; row < 16; row++) {
                const bf16 *v = rows + (int64_t)row * in + 32 * k;
                uint16_t scale, low;
                lost[row] += fit(kind, v, codes + 256 * row, &scale, &low);
                const F one = load_bf16(v), other = load_bf16(v + 16);
                store16(squares[row], fma16(one, one, fma16(other, other, load16(squares[row]))));
                memcpy(head + 2 * row, &scale, 2);
                if (kind == Q4) memcpy(head + 32 + 2 * row, &low, 2);
            }
            put_codes(kind, codes, head + g.head);
        }
        /* A row was rounded to bf16 (at most 1 / 512 of each weight), and sums in float are, too. */
        for (int row = 0; bounds && row < 16; row++) bounds[16 * t + row] = __builtin_sqrtf(lost[row])
            * 1.001f + __builtin_sqrtf(total(squares[row])) * 0.0022f;
        if (!rows) __atomic_store_n(&failed, -1, __ATOMIC_RELAXED);
        free(rows);
    }
    return failed;
}
