/* Numbers, one by one and in vectors, for every instruction set. */

static inline float widen(bf16 v) {
    union { uint32_t u; float f; } w = {(uint32_t)v << 16};
    return w.f;
}

static inline bf16 narrow(float v) { /* round to nearest even, as torch does */
    union { float f; uint32_t u; } w = {v};
    return (bf16)((w.u + 0x7fff + ((w.u >> 16) & 1)) >> 16);
}

/* exp(x) for x <= ~88; relative error below 2e-7. */
static inline F exp16(F x) {
    x = max16(x, set16(-87.0f));
    F n = round16(mul16(x, set16(1.44269504f)));
    F r = fnma16(n, set16(0.693145752f), x);
    r = fnma16(n, set16(1.42860677e-6f), r);
    F p = set16(1.9875691500e-4f);
    p = fma16(p, r, set16(1.3981999507e-3f));
    p = fma16(p, r, set16(8.3334519073e-3f));
    p = fma16(p, r, set16(4.1665795894e-2f));
    p = fma16(p, r, set16(1.6666665459e-1f));
    p = fma16(p, r, set16(5.0000001201e-1f));
    p = fma16(p, mul16(r, r), add16(r, set16(1.0f)));
    return scale16(p, n);
}

#define INLINE static inline __attribute__((always_inline)) /* `kind` is a constant wherever these are called */

/* The codes of tile `k` of a row of tiles. */
INLINE const uint8_t *codes_of(int kind, const uint8_t *tiles, int k) {
    const Group g = GROUPS[kind];
    return tiles + g.head * (int64_t)(k / g.tiles + 1) + g.codes * (int64_t)k;
}

typedef struct { /* what is multiplied: `count` tiles, bf16 ones `step` bytes apart; tokens `stride` bytes apart, blocks of them `block` */
    const uint8_t *tiles, *x;
    int64_t step, stride, block;
    int count;
} Side;

/* Bytes of a block of what bf16 tiles are multiplied with. */
static inline int64_t input_bytes(int features) { return 16 * INPUT_BYTES * (int64_t)features; }

/* Bytes of a block of vnni_int8, or of rows_int8. */
static inline int64_t int8_block_bytes(int features) { return 16 * (int64_t)features + 128; }

/* Bytes of a block of what `map` reads, for the layout that `input_of` makes. */
static inline int64_t block_bytes(const Map *map) { return map->kind >= I8 ? int8_block_bytes(map->in) : input_bytes(map->in); }

/* Bytes of a block of what any map reads. */
static inline int64_t most_block_bytes(int features) { return input_bytes(features) + 128; }

static inline const uint32_t *from_block(const Map *map, const uint32_t *x, int b) { return x + b * block_bytes(map) / 4; }
