/* Norms, rotary embeddings, and token rows to blocks and back. */

/* 1 / RMS of each lane of feature_major `x`. */
static F inverse_rms(const float *x, int features, float eps) {
    F s[4] = {zero16(), zero16(), zero16(), zero16()};
    for (int i = 0; i < features; i++) {
        F v = load16(x + 16 * i);
        s[i & 3] = fma16(v, v, s[i & 3]);
    }
    F sum = add16(add16(s[0], s[1]), add16(s[2], s[3]));
    F mean = div16(sum, set16((float)features));
    return div16(set16(1.0f), sqrt16(add16(mean, set16(eps))));
}

/* A feature times 1 / RMS and its weight (NULL: 1), still to be rounded. Rounds in between as transformers does, unless `after_weight`. */
INLINE F normed16(F v, F factor, const float *weight, int after_weight) {
    v = mul16(v, factor);
    if (!after_weight) v = rounded(v);
    return weight ? mul16(v, set16(*weight)) : v;
}

/* RMS norm over the features of feature_major `x`, to vnni_bf16. weight NULL: ones. */
static void norm(const float *x, const float *weight, int features, float eps, int after_weight, uint32_t *out) {
    const F factor = inverse_rms(x, features, eps);
    for (int i = 0; i < features; i += 2) {
        const float *w = weight ? weight + i : NULL;
        store_u(out + 8 * i, paired(normed16(load16(x + 16 * i), factor, w, after_weight),
            normed16(load16(x + 16 * i + 16), factor, w ? w + 1 : w, after_weight)));
    }
}

/* feature_major `x` to vnni_bf16. */
static void to_pairs(const float *x, int features, uint32_t *out) {
    for (int i = 0; i < features; i += 2) store_u(out + 8 * i, paired(load16(x + 16 * i), load16(x + 16 * i + 16)));
}

/* Token rows [count, features] to feature_major blocks (lanes without a token are 0), and back. */
static void to_blocks(const bf16 *rows, int count, int features, float *fm) {
    memset(fm, 0, 64 * (size_t)features * ((count + 15) / 16));
    for (int r = 0; r < count; r++) {
        float *lane = fm + (int64_t)(r / 16) * features * 16 + r % 16;
        for (int i = 0; i < features; i++) lane[16 * i] = widen(rows[(int64_t)r * features + i]);
    }
}

static void from_blocks(const float *fm, int first, int end, int features, bf16 *rows) {
    for (int r = first; r < end; r++) {
        const float *lane = fm + (int64_t)(r / 16) * features * 16 + r % 16;
        for (int i = 0; i < features; i++) rows[(int64_t)r * features + i] = narrow(lane[16 * i]);
    }
}

/* Rotate one head's feature_major rows, which are rounded, in place. */
static void rotate(float *head, int half, const float *cos, const float *sin) {
    for (int i = 0; i < half; i++) {
        F a = load16(head + 16 * i), b = load16(head + 16 * (i + half));
        F c = load16(cos + 16 * i), s = load16(sin + 16 * i);
        store16(head + 16 * i, fms16(a, c, mul16(b, s)));
        store16(head + 16 * (i + half), fma16(b, c, mul16(a, s)));
    }
}
