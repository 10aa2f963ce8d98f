/* Numbers, one by one and in vectors, for every instruction set. */

static inline float to_float(uint32_t bits) {
    union { uint32_t u; float f; } w = {bits};
    return w.f;
}

static inline float widen(bf16 v) { return to_float((uint32_t)v << 16); }

static inline bf16 narrow(float v) { /* round to nearest even, as torch does */
    union { float f; uint32_t u; } w = {v};
    if (v != v) return 0x7fc0; /* rounding would make some NaN zeros */
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

/* The same of one number: a library's differs from system to system. */
static inline float exp1(float x) {
    float all[16] __attribute__((aligned(64)));
    store16(all, exp16(set16(x)));
    return all[0];
}

/* 1 / (1 + exp(-v)) */
static inline F sigmoid16(F v) {
    F e = exp16(sub16(zero16(), max16(v, set16(-80.0f))));
    return div16(set16(1.0f), add16(set16(1.0f), e));
}

/* log(1 + exp(x)), in one way on every system */
static inline float softplus1(float x) {
    if (x > 20) return x;
    float e = exp1(x), more = 1 + e, m = more;
    union { float f; uint32_t u; } bits = {more};
    int n = (int)(bits.u >> 23) - 127;
    bits.u = (bits.u & 0x7fffff) | 0x3f800000, m = bits.f;
    if (m > 1.41421356f) m *= 0.5f, n++;
    float s = (m - 1) / (m + 1), z = s * s;
    float log = (float)n * 0.693147181f + 2 * s * (1 + z * (0.333333333f + z * (0.2f + z * (0.142857143f + z * 0.111111111f))));
    return more == 1 ? e : log * (e / (more - 1)); /* what is lost in 1 + e */
}

/* The sum of 16 numbers. */
static inline float sum1(F v) {
    float all[16] __attribute__((aligned(64)));
    store16(all, v);
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) all[i] += all[i + n];
    return all[0];
}

/* cap tanh(v / cap); NaN where v is not finite. */
static inline F capped16(F v, float cap) {
    F e = exp16(mul16(abs16(v), set16(-2.0f / cap)));
    F t = mul16(div16(sub16(set16(1.0f), e), add16(set16(1.0f), e)), set16(cap));
    return fma16(v, zero16(), pick16(more16(zero16(), v), sub16(zero16(), t), t));
}

#define INLINE static inline __attribute__((always_inline)) /* `kind` and, mostly, `tokens` are constants where these are called */

typedef struct { /* factors of a product: `count` bf16 tiles; tokens are `stride` bytes apart, blocks of tokens `block` */
    const uint8_t *tiles, *x;
    int64_t stride, block;
    int count;
} Operand;

/* Bytes of a block of tokens, as bf16 tiles are multiplied with it. */
static inline int64_t input_bytes(int features) { return 16 * INPUT_BYTES * (int64_t)features; }

typedef struct {      /* 32 inputs of a token, in 8 bits */
    float scale, sum;   /* scale; the sum of x */
    int32_t less[2];    /* -32 times the sum of each half of x: corrects codes that are 32 too large */
    int8_t x[32];
} Rounded;

/* Bytes of a block of tokens, as `input_of` makes it for `map`. */
static inline int64_t block_bytes(const Linear *map) {
    return map->rounded ? map->in / 2 * (int64_t)sizeof(Rounded) : input_bytes(map->in);
}

static inline const uint32_t *from_block(const Linear *map, const uint32_t *x, int b) { return x + b * block_bytes(map) / 4; }
