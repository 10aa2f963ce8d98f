/* Packing weights into tiles: bf16 as it is, and GGUF blocks, whose codes and scales stay what they are. */

static inline uint16_t word_at(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

/* --- GGUF blocks, by ggml's numbers of their types --- */

enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

/* Of a type: the weights and bytes of a block, and the tiles that hold it. */
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
    default: return 0;
    }
}

typedef struct { /* a block: weight i is scale[i / 32] code[i] + low[i / 32]; in Q6_K scale[i / 16] code[i] */
    int8_t code[256];
    float scale[16], low[8];
    uint16_t d, m;          /* halves that the scales and lows are multiples of */
    uint8_t sc[16], mn[8];  /* ... by these */
} Block;

static void read_block(int type, const uint8_t *p, Block *b) {
    int k = type >= Q4_K, five = type == Q5_0 || type == Q5_1 || type == Q5_K;
    b->d = word_at(type == Q6_K ? p + 208 : p), b->m = type == Q4_1 || type == Q5_1 || k ? word_at(p + 2) : 0;
    float d = half(b->d), m = half(b->m);
    if (type == Q8_0) {
        memcpy(b->code, p + 2, 32);
        b->scale[0] = d, b->low[0] = 0;
    } else if (!k) {
        const uint8_t *bits = p + (type == Q4_1 || type == Q5_1 ? 4 : 2), *nibbles = bits + (five ? 4 : 0);
        for (int i = 0; i < 16; i++) b->code[i] = (int8_t)(nibbles[i] & 15), b->code[16 + i] = (int8_t)(nibbles[i] >> 4);
        for (int i = 0; five && i < 32; i++) b->code[i] |= (int8_t)((bits[i / 8] >> i % 8 & 1) << 4);
        b->scale[0] = d, b->low[0] = type == Q4_0 ? -8 * d : type == Q5_0 ? -16 * d : m;
    } else if (type == Q6_K) {
        for (int half_ = 0; half_ < 2; half_++) { /* of 128 weights: 64 bytes of nibbles, 32 of pairs */
            const uint8_t *nibbles = p + 64 * half_, *pairs = p + 128 + 32 * half_;
            int8_t *code = b->code + 128 * half_;
            for (int i = 0; i < 64; i++) {
                code[i] = (int8_t)(((nibbles[i] & 15) | (pairs[i % 32] >> (i < 32 ? 0 : 2) & 3) << 4) - 32);
                code[64 + i] = (int8_t)((nibbles[i] >> 4 | (pairs[i % 32] >> (i < 32 ? 4 : 6) & 3) << 4) - 32);
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
                b->code[64 * j + i] = (int8_t)low, b->code[64 * j + 32 + i] = (int8_t)high;
            }
    }
}

/* Codes of 16 rows, 256 apart, to a tile's. */
static void put_codes(int kind, const int8_t *code, uint8_t *codes) {
    for (int row = 0; row < 16 && (kind == Q8 || kind == K6); row++) memcpy(codes + 32 * row, code + 256 * row, 32);
    for (int row = 0; row < 16 && (kind == Q5 || kind == K5); row++) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; i++) bits |= (uint32_t)(code[256 * row + i] >> 4 & 1) << i;
        memcpy(codes + 256 + 4 * row, &bits, 4);
    }
    for (int quad = 0; quad < 4 && kind != Q8 && kind != K6; quad++) {
        const int8_t *a = code + 1024 * quad, *b = a + 256, *c = b + 256, *d = c + 256;
        uint16_t words[32];
        for (int i = 0; i < 32; i++)
            words[i] = (uint16_t)((a[i] & 15) | (b[i] & 15) << 4 | (c[i] & 15) << 8 | (d[i] & 15) << 12);
        memcpy(codes + 64 * quad, words, 64);
    }
}

/* Bytes of the tiles that hold `out` rows of `in` weights of GGUF's `type`, and their kind; 0 for a type that none hold. */
EXPORT int64_t KERNEL(block_tiles)(int type, int out, int in, int *kind) {
    int bytes, weights = shape_of(type, &bytes, kind);
    return !weights || in % weights ? 0 : (out + 15) / 16 * tiles_bytes(*kind, in / 32);
}

/* Pack `out` rows of GGUF blocks into tiles; rows up to the next multiple of 16 are zero. Returns 0 if a number of theirs is
 * too large for the tiles. */
EXPORT int KERNEL(pack_blocks)(const Table *table, int out, uint8_t *tiles, int threads) {
    int bytes = 0, kind = Q4, in = table->columns, weights = shape_of(table->type, &bytes, &kind), good = weights > 0;
    const Group g = GROUPS[kind];
#pragma omp parallel for num_threads(threads)
    for (int t = 0; t < (good ? (out + 15) / 16 : 0); t++) {
        uint8_t *head = tiles + t * tiles_bytes(kind, in / 32);
        for (int at = 0; at < in / weights; at++, head += g.head + g.tiles * g.codes) {
            int8_t codes[16 * 256] = {0};
            memset(head, 0, (size_t)g.head);
            for (int row = 0; row < 16 && 16 * t + row < out; row++) {
                Block b;
                int64_t from = table->order ? table->order[16 * t + row] : 16 * t + row;
                read_block(table->type, table->data + from * table->stride + (int64_t)at * bytes, &b);
                uint16_t second = weights == 256 ? b.m : half_of(b.low[0]);
                if (weights == 32 && half(second) != b.low[0]) __atomic_store_n(&good, 0, __ATOMIC_RELAXED);
                memcpy(head + 2 * row, &b.d, 2);
                if (kind != Q8 && kind != K6) memcpy(head + 32 + 2 * row, &second, 2);
                for (int i = 0; i < 8 && (kind == K4 || kind == K5); i++) head[64 + 16 * i + row] = b.sc[i], head[192 + 16 * i + row] = b.mn[i];
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
        for (int part = 0; part < weights / 16; part++) {
            float scale = b.scale[kind == K6 ? part : part / 2], low = kind == K6 ? 0 : b.low[part / 2];
            for (int i = 16 * part; i < 16 * part + 16; i++) to[at + i] = narrow(b.code[i] * scale + low);
        }
    }
}

/* Rows `index` [count] of a table (NULL: the first ones) in bf16 [count, columns]. */
EXPORT void KERNEL(read_rows)(const Table *table, const int64_t *index, int64_t count, bf16 *to, int threads) {
#pragma omp parallel for num_threads(count < threads ? (int)count : threads)
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

/* --- for drafts --- */

/* Round bf16 weights [out, in] to I8 tiles (or more, as `surplus` says) and a scale per row; rows up to the next multiple of
 * 16 are zero. */
EXPORT void KERNEL(pack_i8)(const bf16 *weights, int out, int in, uint8_t *tiles, float *scale, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int row = 0; row < (out + 15) / 16 * 16; row++) {
        float most = 0;
        const bf16 *source = weights + (int64_t)row * in;
        for (int i = 0; row < out && i < in; i++) most = __builtin_fmaxf(most, __builtin_fabsf(widen(source[i])));
        scale[row] = most / 127;
        for (int i = 0; i < in; i++) {
            float v = most > 0 ? __builtin_rintf(widen(source[i]) * (127 / most)) : 0;
            tiles[16 * (int64_t)in * (row / 16) + 1024 * (i / 64) + 64 * (row % 16) + i % 64] = (uint8_t)((int)v + surplus());
        }
    }
}

/* Codes in 0 .. 15 for 32 numbers, and the step (1 .. 15) and the least (-128 .. 127) with which they fit these best. */
static void fit4(const float *u, uint8_t *codes, int *step, int *least) {
    float low = u[0], high = u[0], best = __builtin_inff();
    for (int i = 1; i < 32; i++) low = u[i] < low ? u[i] : low, high = u[i] > high ? u[i] : high;
    int widest = (int)((high - low) / 15) + 1;
    for (int m = widest > 4 ? widest - 3 : 1; m <= widest; m++) { /* smaller ones cut the ends off */
        float code[32], error = 0, z = __builtin_rintf((low + high - 15 * m) / 2);
        for (int turn = 0; turn < 2; turn++) {
            float rest = 0;
            error = 0;
            for (int i = 0; i < 32; i++) {
                float v = __builtin_rintf((u[i] - z) * (1.0f / m));
                code[i] = v < 0 ? 0 : v > 15 ? 15 : v;
                float gap = u[i] - m * code[i] - z;
                rest += gap, error += gap * gap;
            }
            if (turn || m > 15 || z < -128 || z + 15 * m > 127) break;
            z = __builtin_rintf(z + rest / 32);
        }
        if (error >= best || m > 15 || z < -128 || z + 15 * m > 127) continue;
        best = error, *step = m, *least = (int)z;
        for (int i = 0; i < 32; i++) codes[i] = (uint8_t)code[i];
    }
}

/* Round bf16 weights [out, in] to I4 tiles (or more, as `surplus` says) and a scale per row; rows up to the next multiple of
 * 16 are zero. */
EXPORT void KERNEL(pack_i4)(const bf16 *weights, int out, int in, uint8_t *tiles, float *scale, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int row = 0; row < (out + 15) / 16 * 16; row++) {
        const bf16 *source = weights + (int64_t)row * in;
        uint8_t *tile = tiles + tiles_bytes(I4, in / 64) * (row / 16);
        float most = 0;
        for (int i = 0; row < out && i < in; i++) most = __builtin_fmaxf(most, __builtin_fabsf(widen(source[i])));
        scale[row] = most / 112; /* all steps up to 15 fit then */
        for (int g = 0; g < in / 32; g++) { /* halves of tiles */
            float u[32];
            uint8_t codes[32] = {0}, *half_ = tile + tiles_bytes(I4, g / 2) + 32 * (g % 2), *to = tile + tiles_bytes(I4, g / 2) + GROUPS[I4].head + 256 * (g % 2);
            int step = 1, least = 0;
            for (int i = 0; most > 0 && i < 32; i++) u[i] = widen(source[32 * g + i]) * (112 / most);
            if (most > 0) fit4(u, codes, &step, &least);
            half_[row % 16] = (uint8_t)step, half_[16 + row % 16] = (uint8_t)(least + surplus());
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++)
                    to[64 * i + 4 * (row % 16) + j] = (uint8_t)(codes[8 * i + j] | codes[8 * i + 4 + j] << 4);
        }
    }
}
